// The latent quantizer's semantics and data layout, shared by every native backend (host and device).
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define QLAE_HOST_DEVICE __host__ __device__
#else
#define QLAE_HOST_DEVICE
#endif

namespace qlae {

enum class ValueType : int32_t { kFloat32, kFloat64, kFloat16, kBFloat16 };
enum class IndexType : int32_t { kUInt8, kInt16, kInt32, kInt64 };

// A dense tensor of latents, seen as [outer, num_latents, inner] in memory order.
struct LatentLayout {
  int64_t outer;
  int64_t num_latents;
  int64_t inner;

  [[gnu::always_inline]] QLAE_HOST_DEVICE int64_t size() const { return outer * num_latents * inner; }
};

// Scalar codes in the compute type, [rows, stride] row-major; rows == 1 means that all latents share one row.
// `levels` holds the number of codes of each latent; null means `stride` codes everywhere.
struct CodebookView {
  const void* values;
  int64_t rows;
  int64_t stride;
  const int64_t* levels;

  [[gnu::always_inline]] QLAE_HOST_DEVICE int64_t row(int64_t latent) const { return rows == 1 ? 0 : latent; }
  [[gnu::always_inline]] QLAE_HOST_DEVICE int64_t num_codes(int64_t latent) const {
    return levels ? levels[latent] : stride;
  }
};

// The smallest k that attains the minimum of |z - codes[k]| in T's arithmetic, as argmin finds it: a NaN distance
// counts as smaller than any number. A z that is not finite belongs to no code and yields 0.
// Internal linkage: each instruction set has its own copy.
template <class T>
QLAE_HOST_DEVICE static inline int64_t nearest_code(T z, const T* codes, int64_t num_codes) {
  if (!(z - z == T(0))) return 0;
  auto distance = [&](int64_t k) {
    const T difference = z - codes[k];
    return difference < T(0) ? -difference : difference;
  };
  int64_t nearest = 0;
  T smallest = distance(0);
  for (int64_t k = 1; k < num_codes && smallest == smallest; ++k) {
    const T candidate = distance(k);
    if (!(candidate >= smallest)) {
      smallest = candidate;
      nearest = k;
    }
  }
  return nearest;
}

// Whether z, between lower < upper, belongs to `upper`: it is nearer, or as near and wins the tie.
template <class T>
QLAE_HOST_DEVICE static inline bool is_nearer(T z, T lower, T upper, bool upper_wins_tie) {
  return upper_wins_tie ? upper - z <= z - lower : upper - z < z - lower;
}

template <class T>
struct FloatBits;
template <>
struct FloatBits<float> {
  using Integer = int32_t;
  using Unsigned = uint32_t;
  static constexpr Integer kSmallest = INT32_MIN;
};
template <>
struct FloatBits<double> {
  using Integer = int64_t;
  using Unsigned = uint64_t;
  static constexpr Integer kSmallest = INT64_MIN;
};

// Floats in their numeric order as consecutive integers.
template <class T>
QLAE_HOST_DEVICE static inline typename FloatBits<T>::Integer to_ordered(T value) {
  typename FloatBits<T>::Integer bits;
  __builtin_memcpy(&bits, &value, sizeof(T));
  return bits < 0 ? FloatBits<T>::kSmallest - bits : bits;
}

template <class T>
QLAE_HOST_DEVICE static inline T from_ordered(typename FloatBits<T>::Integer order) {
  const typename FloatBits<T>::Integer bits = order < 0 ? FloatBits<T>::kSmallest - order : order;
  T value;
  __builtin_memcpy(&value, &bits, sizeof(T));
  return value;
}

// The smallest z in (lower, upper] that is assigned to `upper`. The predicate is monotone there: both distances are,
// in rounded arithmetic too. It mostly flips within a few units in the last place of the midpoint.
template <class T>
QLAE_HOST_DEVICE static inline T threshold_between(T lower, T upper, bool upper_wins_tie) {
  using Integer = typename FloatBits<T>::Integer;
  using Unsigned = typename FloatBits<T>::Unsigned;
  Integer low = to_ordered(lower), high = to_ordered(upper);
  const Integer middle = to_ordered(lower + (upper - lower) / 2);
  for (int offset = -2; offset <= 2; offset += 4) {
    const Integer near = middle + offset;
    if (near <= low || near >= high) continue;
    (is_nearer(from_ordered<T>(near), lower, upper, upper_wins_tie) ? high : low) = near;
  }
  while (high - 1 != low) {
    const Integer half = low + static_cast<Integer>((static_cast<Unsigned>(high) - static_cast<Unsigned>(low)) / 2);
    (is_nearer(from_ordered<T>(half), lower, upper, upper_wins_tie) ? high : low) = half;
  }
  return from_ordered<T>(high);
}

template <class T>
struct FloatLimits;
template <>
struct FloatLimits<float> {
  static constexpr float kMax = 3.402823466e+38f, kEpsilon = 1.1920928955078125e-07f;
};
template <>
struct FloatLimits<double> {
  static constexpr double kMax = 1.7976931348623157e+308, kEpsilon = 2.220446049250313e-16;
};

// Up to this |z| two codes on the same side of z differ in distance by more than the spacing of such distances, so
// only the two neighbours of z compete. Negative if nowhere. `magnitude` is the largest |code|, `gap` the smallest
// difference of two codes.
template <class T>
QLAE_HOST_DEVICE static inline T exact_bound(T magnitude, T gap) {
  const T limit = FloatLimits<T>::kMax / 4;
  if (!(magnitude <= limit)) return T(-1);
  const T by_gap = gap * (T(0.5) / FloatLimits<T>::kEpsilon);
  const T reach = by_gap < limit ? by_gap : limit;
  return reach > magnitude ? reach - magnitude : T(-1);
}

}  // namespace qlae
