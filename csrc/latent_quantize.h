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

}  // namespace qlae
