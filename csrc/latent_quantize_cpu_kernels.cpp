// The CPU kernels, compiled once per instruction set (see CMakeLists.txt): QLAE_KERNELS names the exported table and
// QLAE_VECTOR_BYTES is the register width. All else has internal linkage, so that no function of one instruction set
// can be linked into another.
#include "latent_quantize_cpu_kernels.h"

#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace qlae::cpu {
namespace {

constexpr int kVectorBytes = QLAE_VECTOR_BYTES;
// Vectors searched together: each table row is loaded once for all of them.
constexpr int kUnroll = 4;

template <class E, int kBytes>
struct VectorOf {
  typedef E type __attribute__((vector_size(kBytes)));
};

template <class T>
struct Simd {
  using Index = typename VectorIndex<T>::type;
  static constexpr int kLanes = kVectorBytes / sizeof(T);
  using V = typename VectorOf<T, kVectorBytes>::type;
  using I = typename VectorOf<Index, kVectorBytes>::type;

  static V load(const T* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
  }
  static I load(const Index* from) {
    I i;
    std::memcpy(&i, from, sizeof i);
    return i;
  }
  static void store(T* to, V v) { std::memcpy(to, &v, sizeof v); }
  static V splat(T value) { return value - V{}; }
  static I splat(Index value) { return value - I{}; }
  static V absolute(V v) {
    constexpr Index kSign = std::numeric_limits<Index>::max();
    return (V)((I)v & kSign);
  }
  static I lane_numbers() {
    I lanes;
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lane;
    return lanes;
  }
};

// Element types of z and what is computed with. Half types are widened on load and rounded to nearest even on store.
struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

using F = Simd<float>;
using UI32 = VectorOf<uint32_t, kVectorBytes>::type;
using UI16 = VectorOf<uint16_t, kVectorBytes / 2>::type;

inline UI16 load_bits(const void* from) {
  UI16 bits;
  std::memcpy(&bits, from, sizeof bits);
  return bits;
}

template <class V>
inline void stream_or_store(void* to, V v, [[maybe_unused]] bool stream) {
#if defined(__AVX512F__)
  if constexpr (sizeof v == 64) {
    if (stream) return _mm512_stream_si512(static_cast<__m512i*>(to), (__m512i)v);
  }
#endif
#if defined(__AVX__)
  if constexpr (sizeof v == 32) {
    if (stream) return _mm256_stream_si256(static_cast<__m256i*>(to), (__m256i)v);
  }
#endif
#if defined(__SSE2__)
  if constexpr (sizeof v == 16) {
    if (stream) return _mm_stream_si128(static_cast<__m128i*>(to), (__m128i)v);
  }
#endif
  std::memcpy(to, &v, sizeof v);
}

inline F::V widen(UI16 half, Float16) {
  const UI32 bits = __builtin_convertvector(half, UI32);
  const UI32 magnitude = (bits & 0x7fffu) << 13;
  const UI32 exponent = magnitude & (0x7c00u << 13);
  const UI32 normal = magnitude + ((127u - 15u) << 23);
  const UI32 infinite = magnitude + ((255u - 31u) << 23);
  // A subnormal half is its mantissa times 2^-24: add the mantissa to 2^-14 as bits, then subtract 2^-14.
  const F::V subnormal = (F::V)(magnitude + (113u << 23)) - F::splat(0x1p-14f);
  UI32 result = (UI32)(exponent == (0x7c00u << 13)) & infinite;
  result |= (UI32)(exponent == 0u) & (UI32)subnormal;
  result |= (UI32)((exponent != (0x7c00u << 13)) & (exponent != 0u)) & normal;
  return (F::V)(result | ((bits & 0x8000u) << 16));
}

inline UI16 narrow(F::V value, Float16) {
  const UI32 bits = (UI32)value;
  const UI32 sign = bits & 0x80000000u;
  const UI32 magnitude = bits ^ sign;
  const UI32 odd = (magnitude >> 13) & 1u;
  const UI32 normal = (magnitude - ((127u - 15u) << 23) + 0xfffu + odd) >> 13;
  // Adding 0.5 makes the hardware round to a multiple of 2^-24, the subnormal step.
  const UI32 subnormal = (UI32)((F::V)magnitude + F::splat(0.5f)) - (126u << 23);
  const UI32 special = 0x7c00u | ((UI32)(magnitude > 0x7f800000u) & 0x200u);
  const UI32 is_special = (UI32)(magnitude >= (143u << 23));
  const UI32 is_subnormal = (UI32)(magnitude < (113u << 23));
  const UI32 result = (is_special & special) | (is_subnormal & subnormal) | (~(is_special | is_subnormal) & normal);
  return __builtin_convertvector(result | (sign >> 16), UI16);
}

inline F::V widen(UI16 half, BFloat16) { return (F::V)(__builtin_convertvector(half, UI32) << 16); }

inline UI16 narrow(F::V value, BFloat16) {
  const UI32 bits = (UI32)value;
  const UI32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const UI32 is_nan = (UI32)((bits & 0x7fffffffu) > 0x7f800000u);
  return __builtin_convertvector((is_nan & 0x7fc0u) | (~is_nan & rounded), UI16);
}

template <class E>
struct Element {
  using Compute = float;
  static F::V load(const E* from) { return widen(load_bits(from), E{}); }
  static void store(E* to, F::V value, bool stream) { stream_or_store(to, narrow(value, E{}), stream); }
};
template <class T>
  requires std::is_floating_point_v<T>
struct Element<T> {
  using Compute = T;
  static typename Simd<T>::V load(const T* from) { return Simd<T>::load(from); }
  static void store(T* to, typename Simd<T>::V value, bool stream) { stream_or_store(to, value, stream); }
};

// The first `lanes` elements; the rest reads as zero and is not written.
template <class E>
inline auto load_part(const E* from, int64_t lanes) {
  constexpr int kLanes = Simd<typename Element<E>::Compute>::kLanes;
  if (lanes == kLanes) return Element<E>::load(from);
  E part[kLanes] = {};
  std::memcpy(part, from, lanes * sizeof(E));
  return Element<E>::load(part);
}

template <class E, class V>
inline void store_part(E* to, V value, int64_t lanes, bool stream) {
  constexpr int kLanes = Simd<typename Element<E>::Compute>::kLanes;
  if (lanes == kLanes) return Element<E>::store(to, value, stream);
  E part[kLanes];
  Element<E>::store(part, value, false);
  std::memcpy(to, part, lanes * sizeof(E));
}

template <class T, class Out>
inline void store_indices_as(void* indices, int64_t offset, typename Simd<T>::I index, int64_t lanes, bool stream) {
  constexpr int kLanes = Simd<T>::kLanes;
  typedef typename VectorOf<Out, kLanes * sizeof(Out)>::type OutVector;
  const OutVector narrowed = __builtin_convertvector(index, OutVector);
  Out* to = static_cast<Out*>(indices) + offset;
  if (lanes == kLanes) return stream_or_store(to, narrowed, stream);
  std::memcpy(to, &narrowed, lanes * sizeof(Out));
}

template <class T>
inline void store_indices(void* indices, IndexType type, int64_t offset, typename Simd<T>::I index, int64_t lanes,
                          bool stream) {
  switch (type) {
    case IndexType::kUInt8: return store_indices_as<T, uint8_t>(indices, offset, index, lanes, stream);
    case IndexType::kInt16: return store_indices_as<T, int16_t>(indices, offset, index, lanes, stream);
    case IndexType::kInt32: return store_indices_as<T, int32_t>(indices, offset, index, lanes, stream);
    case IndexType::kInt64: return store_indices_as<T, int64_t>(indices, offset, index, lanes, stream);
  }
}

// table[index] per lane. Scalar loads: on the processors measured, gather instructions are no faster.
template <class T, class E>
inline auto gather(const E* table, typename Simd<T>::I index) {
  constexpr int kLanes = Simd<T>::kLanes;
  typename Simd<T>::Index positions[kLanes];
  E values[kLanes];
  std::memcpy(positions, &index, sizeof index);
  for (int lane = 0; lane < kLanes; ++lane) values[lane] = table[positions[lane]];
  typename VectorOf<E, kVectorBytes>::type result;
  std::memcpy(&result, values, sizeof result);
  return result;
}

template <class M>
inline bool any(M mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  uint64_t words[sizeof(M) / 8];
  std::memcpy(words, &mask, sizeof mask);
  uint64_t all = 0;
  for (uint64_t word : words) all |= word;
  return all != 0;
#endif
}

// Makes non-temporal stores visible to the threads that read the outputs next.
inline void finish_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

template <class T>
Order order_of(const T* codes, int64_t count) {
  using S = Simd<T>;
  constexpr T kEpsilon = FloatLimits<T>::kEpsilon;
  typename S::I unordered{}, uneven{};
  const auto compare = [&](typename S::V a, typename S::V b, typename S::V c) {
    const auto below = b - a, above = c - b;
    unordered |= ~((a < b) & (b < c));
    uneven |= (below < above * kEpsilon) | (above < below * kEpsilon);
  };
  int64_t k = 0;
  for (; k + S::kLanes + 2 <= count; k += S::kLanes)
    compare(S::load(codes + k), S::load(codes + k + 1), S::load(codes + k + 2));
  for (; k + 2 < count; ++k) compare(S::splat(codes[k]), S::splat(codes[k + 1]), S::splat(codes[k + 2]));
  if (count == 2 && !(codes[0] < codes[1])) return Order::kNone;
  return any(unordered) ? Order::kNone : any(uneven) ? Order::kUneven : Order::kEven;
}

// Vectors of one column at `offset`, `offset + stride`, ..., each with the same number of valid lanes.
struct Span {
  int64_t column;
  int64_t offset;
  int64_t stride;
  int64_t count;
  int64_t lanes;
};

// Calls visit(span) over the units of `work`, and after each unit finish(columns_begin, columns_end, vectors), where
// no column has received more than `vectors` vectors in this unit.
template <class T, class Visit, class Finish>
inline void for_each_span(const Work<T>& work, Visit visit, Finish finish) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  const Traversal& t = work.traversal;
  if (!t.periodic) {
    const int64_t units_per_run = (t.segment + t.unit_length - 1) / t.unit_length;
    for (int64_t unit = work.unit_begin; unit < work.unit_end; ++unit) {
      const int64_t place = unit / units_per_run, column = place % t.group_columns;
      const int64_t run = place / t.group_columns * t.columns + work.first_column + column;
      const int64_t begin = (unit % units_per_run) * t.unit_length;
      const int64_t length = t.segment - begin < t.unit_length ? t.segment - begin : t.unit_length;
      const int64_t offset = run * t.segment + begin;
      const int64_t full = length / kLanes, rest = length % kLanes;
      if (full) visit(Span{column, offset, kLanes, full, kLanes});
      if (rest) visit(Span{column, offset + full * kLanes, kLanes, 1, rest});
      finish(column, column + 1, full + 1);
    }
    return;
  }
  const int64_t segments = t.size / t.segment;
  for (int64_t unit = work.unit_begin; unit < work.unit_end; ++unit) {
    const int64_t first = unit * t.unit_length;
    const int64_t count = segments - first < t.unit_length ? segments - first : t.unit_length;
    // Segments far apart are searched together, so that each of the kUnroll streams runs through memory in order.
    const int64_t together = t.columns == 1 ? count : kUnroll;
    const int64_t apart = t.columns == 1 ? 1 : count / together;
    const auto visit_segments = [&](int64_t segment, int64_t stride, int64_t vectors) {
      for (int64_t column = 0; column < work.num_columns; ++column) {
        const int64_t begin = (work.first_column + column) * kLanes;
        const int64_t lanes = t.segment - begin < kLanes ? t.segment - begin : kLanes;
        visit(Span{column, segment * t.segment + begin, stride * t.segment, vectors, lanes});
      }
    };
    for (int64_t segment = 0; count && segment < apart; ++segment) visit_segments(first + segment, apart, together);
    for (int64_t segment = apart * together; segment < count; ++segment) visit_segments(first + segment, 1, 1);
    // Several groups have whole segments only.
    if (unit == t.units - 1) {
      const int64_t rest = t.size - segments * t.segment;
      for (int64_t begin = 0; begin < rest; begin += kLanes) {
        const int64_t lanes = rest - begin < kLanes ? rest - begin : kLanes;
        visit(Span{begin / kLanes, segments * t.segment + begin, t.segment, 1, lanes});
      }
    }
    finish(0, work.num_columns, count + 1);
  }
}

// z, its code and the code's index for kCount vectors of one column.
template <class T, int kCount>
struct Group {
  typename Simd<T>::V z[kCount];
  typename Simd<T>::V quantized[kCount];
  typename Simd<T>::I index[kCount];
};

// In runs all lanes of a column share one latent, whose codes are read from the codebook itself.
template <class T, int kCount, bool kRuns>
[[gnu::always_inline]] inline void search_direct(const Work<T>& work, int64_t column, Group<T, kCount>& group) {
  using S = Simd<T>;
  const T* codes = static_cast<const T*>(work.codebook.values) + column * work.codebook.stride;
  const T* table = work.columns.values + column * work.columns.rows * S::kLanes;
  const int64_t rows = kRuns ? work.codebook.num_codes(column) : work.columns.rows;
  const auto value_of = [&](int64_t row) {
    if constexpr (kRuns) return S::splat(codes[row]);
    return S::load(table + row * S::kLanes);
  };
  typename S::V smallest[kCount];
#pragma GCC unroll 4
  for (int n = 0; n < kCount; ++n) {
    group.quantized[n] = value_of(0);
    group.index[n] = typename S::I{};
    smallest[n] = S::absolute(group.z[n] - group.quantized[n]);
  }
  for (int64_t row = 1; row < rows; ++row) {
    const auto value = value_of(row);
    const auto index = S::splat(static_cast<typename S::Index>(row));
#pragma GCC unroll 4
    for (int n = 0; n < kCount; ++n) {
      const auto distance = S::absolute(group.z[n] - value);
      const auto closer = distance < smallest[n];
      smallest[n] = closer ? distance : smallest[n];
      group.quantized[n] = closer ? value : group.quantized[n];
      group.index[n] = closer ? index : group.index[n];
    }
  }
#pragma GCC unroll 4
  for (int n = 0; n < kCount; ++n) {
    const auto finite = S::absolute(group.z[n]) <= S::splat(std::numeric_limits<T>::max());
    group.quantized[n] = finite ? group.quantized[n] : S::splat(std::numeric_limits<T>::quiet_NaN());
    group.index[n] = group.index[n] & finite;
  }
}

template <class T, int kCount>
[[gnu::always_inline]] inline void search_thresholds(const ColumnTables<T>& tables, int64_t column,
                                                     Group<T, kCount>& group) {
  using S = Simd<T>;
  const int64_t begin = column * tables.rows * S::kLanes;
#pragma GCC unroll 4
  for (int n = 0; n < kCount; ++n) {
    group.quantized[n] = S::load(tables.values + begin);
    group.index[n] = S::load(tables.indices + begin);
  }
  for (int64_t row = 1; row < tables.rows; ++row) {
    const auto threshold = S::load(tables.thresholds + begin + row * S::kLanes);
    const auto value = S::load(tables.values + begin + row * S::kLanes);
    const auto index = S::load(tables.indices + begin + row * S::kLanes);
#pragma GCC unroll 4
    for (int n = 0; n < kCount; ++n) {
      const auto reached = group.z[n] >= threshold;
      group.quantized[n] = reached ? value : group.quantized[n];
      group.index[n] = reached ? index : group.index[n];
    }
  }
}

// The code below z is found in z's cell, for all vectors at once, so that their loads wait side by side; then z is
// compared to it and to the next one above as the definition does.
template <class T, int kCount>
[[gnu::always_inline]] inline void search_cells(const Work<T>& work, int64_t column, Group<T, kCount>& group) {
  using S = Simd<T>;
  using Index = typename S::Index;
  const CellTables<T>& cells = work.cells;
  const auto codebook_row = S::load(work.columns.codebook_rows + column * S::kLanes);
  const auto origin = gather<T>(cells.origins, codebook_row);
  const auto scale = gather<T>(cells.scales, codebook_row);
  const auto first_cell = codebook_row * static_cast<Index>(cells.cells);
  const auto first_code = codebook_row * static_cast<Index>(cells.stride);
  const auto last_code = first_code + gather<T>(cells.lasts, codebook_row);
  const auto last_cell = S::splat(static_cast<T>(cells.cells - 1));
  typename S::I below[kCount];
#pragma GCC unroll 4
  for (int n = 0; n < kCount; ++n) {
    auto place = (group.z[n] - origin) * scale;
    place = place > typename S::V{} ? place : typename S::V{};
    place = place < last_cell ? place : last_cell;
    below[n] = first_code + gather<T>(cells.starts, first_cell + __builtin_convertvector(place, typename S::I));
  }
  for (int64_t step = cells.first_step; step > 0; step >>= 1) {
#pragma GCC unroll 4
    for (int n = 0; n < kCount; ++n) {
      auto candidate = below[n] + S::splat(static_cast<Index>(step));
      candidate = candidate < last_code ? candidate : last_code;
      below[n] = group.z[n] >= gather<T>(cells.values, candidate) ? candidate : below[n];
    }
  }
#pragma GCC unroll 4
  for (int n = 0; n < kCount; ++n) {
    const auto above = below[n] < last_code ? below[n] + S::splat(Index{1}) : last_code;
    const auto lower = gather<T>(cells.values, below[n]), upper = gather<T>(cells.values, above);
    const auto to_lower = group.z[n] - lower, to_upper = upper - group.z[n];
    auto is_upper = to_upper < to_lower;
    if (cells.indices) {
      const auto lower_index = gather<T>(cells.indices, below[n]), upper_index = gather<T>(cells.indices, above);
      is_upper |= (to_upper == to_lower) & (upper_index < lower_index);
      group.index[n] = is_upper ? upper_index : lower_index;
    } else {
      group.index[n] = (is_upper ? above : below[n]) - first_code;
    }
    group.quantized[n] = is_upper ? upper : lower;
  }
}

template <class T>
struct Match {
  typename Simd<T>::V quantized;
  typename Simd<T>::I index;
};

// One element beyond the range in which the two codes around it suffice. NaN and infinity belong to no code.
template <class T, Search kSearch>
inline int64_t nearest_exactly(const Work<T>& work, int64_t codebook_row, T z) {
  if constexpr (kSearch == Search::kCells) {
    const CellTables<T>& cells = work.cells;
    const T* values = cells.values + codebook_row * cells.stride;
    const auto* indices = cells.indices ? cells.indices + codebook_row * cells.stride : nullptr;
    const bool ordered = values[0] == values[0];
    if (ordered && z - z == T(0)) return nearest_of_sorted(z, values, indices, int64_t{cells.lasts[codebook_row]} + 1);
  }
  const T* codes = static_cast<const T*>(work.codebook.values) + codebook_row * work.codebook.stride;
  return nearest_code(z, codes, work.codebook.num_codes(codebook_row));
}

// Lanes outside the range, where rounding may tie distant codes, and z that is not finite. Rare, and by value, so that
// the caller's vectors stay in registers.
template <class T, Search kSearch>
[[gnu::noinline]] Match<T> search_exactly(const Work<T>& work, int64_t column, int64_t lanes, typename Simd<T>::V z,
                                          Match<T> match) {
  using S = Simd<T>;
  const T* codes = static_cast<const T*>(work.codebook.values);
  const T* lows = work.columns.lows + column * S::kLanes;
  const T* highs = work.columns.highs + column * S::kLanes;
  for (int64_t lane = 0; lane < lanes; ++lane) {
    const T value = z[lane];
    if (value >= lows[lane] && value <= highs[lane]) continue;
    const int64_t codebook_row = work.columns.codebook_rows[column * S::kLanes + lane];
    const int64_t nearest = nearest_exactly<T, kSearch>(work, codebook_row, value);
    const bool finite = value - value == T(0);
    match.index[lane] = static_cast<typename S::Index>(nearest);
    match.quantized[lane] =
        finite ? codes[codebook_row * work.codebook.stride + nearest] : std::numeric_limits<T>::quiet_NaN();
  }
  return match;
}

// nearest_code in vectors of codes. A NaN distance ends the search, so the definition itself takes such rows.
template <class T>
inline int64_t scan(T z, const T* codes, int64_t num_codes) {
  using S = Simd<T>;
  using Index = typename S::Index;
  if (num_codes < S::kLanes || !(z - z == T(0))) return nearest_code(z, codes, num_codes);
  const auto wanted = S::splat(z);
  auto index = S::lane_numbers();
  auto nearest = index;
  auto smallest = S::absolute(wanted - S::load(codes));
  auto ordered = smallest == smallest;
  const auto compare = [&](int64_t first) {
    const auto distance = S::absolute(wanted - S::load(codes + first));
    const auto closer = distance < smallest;
    smallest = closer ? distance : smallest;
    nearest = closer ? index : nearest;
    ordered &= distance == distance;
  };
  int64_t first = S::kLanes;
  for (; first + S::kLanes <= num_codes; first += S::kLanes) {
    index += S::splat(Index{S::kLanes});
    compare(first);
  }
  // The last vector begins early: codes seen before come with the same index.
  if (first < num_codes) {
    index = S::lane_numbers() + S::splat(static_cast<Index>(num_codes - S::kLanes));
    compare(num_codes - S::kLanes);
  }
  if (any(~ordered)) return nearest_code(z, codes, num_codes);
  T least = smallest[0];
  for (int lane = 1; lane < S::kLanes; ++lane) least = smallest[lane] < least ? smallest[lane] : least;
  // Without branches: which lane has it cannot be foretold.
  const auto candidates = smallest == S::splat(least) ? nearest : S::splat(std::numeric_limits<Index>::max());
  Index best = candidates[0];
  for (int lane = 1; lane < S::kLanes; ++lane) best = candidates[lane] < best ? candidates[lane] : best;
  return best;
}

template <class T>
[[gnu::noinline]] Match<T> search_scan(const Work<T>& work, int64_t column, int64_t lanes, typename Simd<T>::V z) {
  using S = Simd<T>;
  const T* codes = static_cast<const T*>(work.codebook.values);
  Match<T> match{};
  for (int64_t lane = 0; lane < lanes; ++lane) {
    const int64_t codebook_row = work.columns.codebook_rows[column * S::kLanes + lane];
    const T* row = codes + codebook_row * work.codebook.stride;
    const int64_t nearest = scan<T>(z[lane], row, work.codebook.num_codes(codebook_row));
    const bool finite = z[lane] - z[lane] == T(0);
    match.index[lane] = static_cast<typename S::Index>(nearest);
    match.quantized[lane] = finite ? row[nearest] : std::numeric_limits<T>::quiet_NaN();
  }
  return match;
}

// Returns true when some lane lay outside the exact range, so that its index may stand in no table row.
template <class T, Search kSearch, int kCount>
[[gnu::always_inline]] inline bool search(const Work<T>& work, int64_t column, int64_t lanes, Group<T, kCount>& group) {
  using S = Simd<T>;
  if constexpr (kSearch == Search::kDirect) {
    if (work.traversal.periodic) {
      search_direct<T, kCount, false>(work, column, group);
    } else {
      search_direct<T, kCount, true>(work, column, group);
    }
    return false;
  } else if constexpr (kSearch == Search::kScan) {
#pragma GCC unroll 4
    for (int n = 0; n < kCount; ++n) {
      const Match<T> match = search_scan<T>(work, column, lanes, group.z[n]);
      group.quantized[n] = match.quantized;
      group.index[n] = match.index;
    }
    return false;
  } else {
    const auto low = S::load(work.columns.lows + column * S::kLanes);
    const auto high = S::load(work.columns.highs + column * S::kLanes);
    typename S::I outside = {};
#pragma GCC unroll 4
    for (int n = 0; n < kCount; ++n) outside |= ~((group.z[n] >= low) & (group.z[n] <= high));
    if constexpr (kSearch == Search::kThresholds) search_thresholds<T, kCount>(work.columns, column, group);
    if constexpr (kSearch == Search::kCells) search_cells<T, kCount>(work, column, group);
    if (!any(outside)) [[likely]]
      return false;
#pragma GCC unroll 4
    for (int n = 0; n < kCount; ++n) {
      const Match<T> match =
          search_exactly<T, kSearch>(work, column, lanes, group.z[n], {group.quantized[n], group.index[n]});
      group.quantized[n] = match.quantized;
      group.index[n] = match.index;
    }
    return true;
  }
}

template <class T>
inline typename Simd<T>::V only_valid(typename Simd<T>::V value, int64_t lanes) {
  using S = Simd<T>;
  if (lanes == S::kLanes) return value;
  return S::lane_numbers() < static_cast<typename S::Index>(lanes) ? value : typename S::V{};
}

// Hands a span's vectors to the kernel: whole ones kUnroll at a time, what is left one by one.
template <class Kernel>
inline void groups(Kernel& kernel, const Span& span) {
  int64_t position = 0;
  if (span.lanes == Kernel::S::kLanes) {
    for (; position + kUnroll <= span.count; position += kUnroll) kernel.template group<kUnroll, true>(span, position);
  }
  for (; position < span.count; ++position) kernel.template group<1, false>(span, position);
}

template <class E, Search kSearch>
struct Forward {
  using T = typename Element<E>::Compute;
  using S = Simd<T>;

  const ForwardWork<T>& work;
  typename S::V squares = {};

  template <int kCount, bool kWhole>
  void group(const Span& span, int64_t position) {
    const int64_t lanes = kWhole ? S::kLanes : span.lanes;
    const ForwardArguments& a = *work.arguments;
    Group<T, kCount> group;
    int64_t offsets[kCount];
#pragma GCC unroll 4
    for (int n = 0; n < kCount; ++n) {
      offsets[n] = span.offset + (position + n) * span.stride;
      group.z[n] = load_part(static_cast<const E*>(a.z) + offsets[n], lanes);
    }
    search<T, kSearch, kCount>(work, span.column, lanes, group);
#pragma GCC unroll 4
    for (int n = 0; n < kCount; ++n) {
      if (a.quantized) store_part(static_cast<E*>(a.quantized) + offsets[n], group.quantized[n], lanes, work.stream);
      if (a.indices) store_indices<T>(a.indices, a.index_type, offsets[n], group.index[n], lanes, work.stream);
      const auto residual = only_valid<T>(group.z[n] - group.quantized[n], lanes);
      squares += residual * residual;
    }
  }

  void run() {
    double total = 0;
    int64_t accumulated = 0;
    auto flush = [&] {
      for (int lane = 0; lane < S::kLanes; ++lane) total += squares[lane];
      squares = typename S::V{};
      accumulated = 0;
    };
    for_each_span<T>(
        work,
        [&](const Span& span) {
          groups(*this, span);
          accumulated += span.count;
          if (accumulated >= kMaxAccumulations) flush();
        },
        [](int64_t, int64_t, int64_t) {});
    flush();
    finish_streaming();
    *work.squared_error = total;
  }
};

template <class E, Search kSearch>
struct Backward {
  using T = typename Element<E>::Compute;
  using S = Simd<T>;

  const BackwardWork<T>& work;

  void add_by_index(int64_t column, int64_t lanes, typename S::V residual, typename S::I index) {
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const int64_t codebook_row = work.columns.codebook_rows[column * S::kLanes + lane];
      add_to_code(codebook_row * work.codebook.stride + index[lane], residual[lane]);
    }
  }

  void add_to_code(int64_t code, T sum) {
    if (work.short_sums) {
      work.short_sums[code] += sum;
    } else {
      work.residual_sums[code] += sum;
    }
  }

  template <int kCount>
  void add_by_row(int64_t column, const Group<T, kCount>& group, const typename S::V* residual) {
    const int64_t begin = column * work.columns.rows * S::kLanes;
    for (int64_t row = 0; row < work.columns.rows; ++row) {
      const auto index = kSearch == Search::kDirect ? S::splat(static_cast<typename S::Index>(row))
                                                    : S::load(work.columns.indices + begin + row * S::kLanes);
      T* sums = work.scratch + begin + row * S::kLanes;
      auto sum = S::load(sums);
#pragma GCC unroll 4
      for (int n = 0; n < kCount; ++n) sum += group.index[n] == index ? residual[n] : typename S::V{};
      S::store(sums, sum);
    }
  }

  template <int kCount, bool kWhole>
  void group(const Span& span, int64_t position) {
    const int64_t lanes = kWhole ? S::kLanes : span.lanes;
    const BackwardArguments& a = *work.arguments;
    Group<T, kCount> group;
    int64_t offsets[kCount];
#pragma GCC unroll 4
    for (int n = 0; n < kCount; ++n) {
      offsets[n] = span.offset + (position + n) * span.stride;
      group.z[n] = load_part(static_cast<const E*>(a.z) + offsets[n], lanes);
    }
    const bool exact = search<T, kSearch, kCount>(work, span.column, lanes, group);
    typename S::V residual[kCount];
#pragma GCC unroll 4
    for (int n = 0; n < kCount; ++n) {
      residual[n] = only_valid<T>(group.z[n] - group.quantized[n], lanes);
      if (!a.grad_z) continue;
      auto gradient = residual[n] * S::splat(work.residual_scale);
      if (a.grad_quantized)
        gradient = load_part(static_cast<const E*>(a.grad_quantized) + offsets[n], lanes) + gradient;
      store_part(static_cast<E*>(a.grad_z) + offsets[n], gradient, lanes, work.stream);
    }
    if (!work.residual_sums && !work.short_sums) return;
    if (!work.scratch || exact) {
#pragma GCC unroll 4
      for (int n = 0; n < kCount; ++n) add_by_index(span.column, lanes, residual[n], group.index[n]);
    } else {
      add_by_row<kCount>(span.column, group, residual);
    }
  }

  void flush(int64_t begin_column, int64_t end_column) {
    const ColumnTables<T>& tables = work.columns;
    for (int64_t column = begin_column; column < end_column; ++column) {
      // Lanes beyond a period belong to no latent.
      const int64_t begin = (work.first_column + column) * S::kLanes;
      const int64_t left = work.traversal.periodic ? work.traversal.segment - begin : S::kLanes;
      const int64_t lanes = left < S::kLanes ? left : S::kLanes;
      for (int64_t row = 0; row < tables.rows; ++row) {
        const int64_t at = (column * tables.rows + row) * S::kLanes;
        for (int64_t lane = 0; lane < lanes; ++lane) {
          const int64_t codebook_row = tables.codebook_rows[column * S::kLanes + lane];
          const int64_t index = kSearch == Search::kDirect ? row : tables.indices[at + lane];
          if (index < 0) continue;
          add_to_code(codebook_row * work.codebook.stride + index, work.scratch[at + lane]);
          work.scratch[at + lane] = 0;
        }
      }
    }
  }

  void run() {
    const bool by_row = work.scratch != nullptr;
    int64_t begin = 0, end = 0, accumulated = 0;
    const auto flush_pending = [&] {
      flush(begin, end);
      accumulated = 0;
    };
    for_each_span<T>(
        work, [&](const Span& span) { groups(*this, span); },
        [&](int64_t unit_begin, int64_t unit_end, int64_t vectors) {
          if (!by_row) return;
          if (unit_begin != begin) flush_pending();
          begin = unit_begin;
          end = unit_end;
          accumulated += vectors;
          if (accumulated >= kMaxAccumulations) flush_pending();
        });
    if (by_row) flush_pending();
    finish_streaming();
  }
};

template <template <class, Search> class Kernel, class E, class W>
inline void run_search(const W& work) {
  switch (work.search) {
    case Search::kDirect: return Kernel<E, Search::kDirect>{work}.run();
    case Search::kThresholds: return Kernel<E, Search::kThresholds>{work}.run();
    case Search::kScan: return Kernel<E, Search::kScan>{work}.run();
    case Search::kCells: return Kernel<E, Search::kCells>{work}.run();
  }
}

template <template <class, Search> class Kernel, class W>
void run_float(const W& work) {
  switch (work.arguments->value_type) {
    case ValueType::kFloat16: return run_search<Kernel, Float16>(work);
    case ValueType::kBFloat16: return run_search<Kernel, BFloat16>(work);
    default: return run_search<Kernel, float>(work);
  }
}

template <template <class, Search> class Kernel, class W>
void run_double(const W& work) {
  run_search<Kernel, double>(work);
}

}  // namespace

const Kernels QLAE_KERNELS = {
    QLAE_KERNELS_NAME,
    {Simd<float>::kLanes, order_of<float>, run_float<Forward, ForwardWork<float>>,
     run_float<Backward, BackwardWork<float>>},
    {Simd<double>::kLanes, order_of<double>, run_double<Forward, ForwardWork<double>>,
     run_double<Backward, BackwardWork<double>>},
};

}  // namespace qlae::cpu
