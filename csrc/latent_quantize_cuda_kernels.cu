// The kernels of one value type: compiled once per ValueType, which QLAE_VALUE_TYPE names, into the table QLAE_KERNELS.
// docs/latent_quantize.md derives what they do. z is a latent, as there.
#include "latent_quantize_cuda_kernels.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

__device__ __forceinline__ unsigned char* qlae_dynamic_shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

// Addresses of shared memory take one register where pointers take two.
__device__ __forceinline__ unsigned qlae_shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}
__device__ __forceinline__ void qlae_load_shared(unsigned address, float& value) {
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
}
__device__ __forceinline__ void qlae_load_shared(unsigned address, double& value) {
  asm volatile("ld.shared.f64 %0, [%1];" : "=d"(value) : "r"(address) : "memory");
}
__device__ __forceinline__ void qlae_store_shared(unsigned address, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}
__device__ __forceinline__ void qlae_store_shared(unsigned address, double value) {
  asm volatile("st.shared.f64 [%0], %1;" ::"r"(address), "d"(value) : "memory");
}
#else
#include "cuda_emulation.h"

inline unsigned qlae_shared_address(const void* pointer) {
  return static_cast<unsigned>(static_cast<const unsigned char*>(pointer) - qlae_dynamic_shared_memory());
}
template <class T>
void qlae_load_shared(unsigned address, T& value) {
  value = *reinterpret_cast<const T*>(qlae_dynamic_shared_memory() + address);
}
template <class T>
void qlae_store_shared(unsigned address, T value) {
  *reinterpret_cast<T*>(qlae_dynamic_shared_memory() + address) = value;
}
using std::fabs;
using std::max;
using std::min;
#endif

#include <type_traits>

namespace qlae::cuda {
namespace {

template <ValueType>
struct StoredAs;
template <>
struct StoredAs<ValueType::kFloat32> {
  using Type = float;
};
template <>
struct StoredAs<ValueType::kFloat64> {
  using Type = double;
};
template <>
struct StoredAs<ValueType::kFloat16> {
  using Type = __half;
};
template <>
struct StoredAs<ValueType::kBFloat16> {
  using Type = __nv_bfloat16;
};

using Stored = StoredAs<ValueType::QLAE_VALUE_TYPE>::Type;
using Value = std::conditional_t<std::is_same_v<Stored, double>, double, float>;

constexpr int kVector = vector_length_of(sizeof(Stored));
// A thread's vector as it is loaded.
using Raw = std::conditional_t<kVector * sizeof(Stored) == 16, uint4, uint2>;
constexpr int kRowsAtOnce = 2;
constexpr int kLanes = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

[[maybe_unused]] QLAE_DEVICE Value to_value(float stored) { return stored; }
[[maybe_unused]] QLAE_DEVICE double to_value(double stored) { return stored; }
[[maybe_unused]] QLAE_DEVICE Value to_value(__half stored) { return __half2float(stored); }
[[maybe_unused]] QLAE_DEVICE Value to_value(__nv_bfloat16 stored) { return __bfloat162float(stored); }

template <class T = Stored>
QLAE_DEVICE T to_stored(Value value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else {
    return value;
  }
}

QLAE_DEVICE bool is_finite(Value value) { return value - value == Value(0); }
QLAE_DEVICE Value absolute(Value value) { return fabs(value); }
QLAE_DEVICE Value infinity() { return Value(INFINITY); }
QLAE_DEVICE Value not_a_number() { return Value(NAN); }

// Where a thread's vector of one row lies, and how many of its elements exist.
struct Place {
  int64_t address;
  int count;
};

// The columns of a thread.
struct Columns {
  int column;
  int row;  // within the stack of rows of a block
  int local_latent[kVector];
  bool active;
};

// The window that a block works on, and its share of the window's rows.
struct Block {
  int window;
  int chunk;
  int first_latent;
  int num_latents;
  int64_t limit;

  QLAE_DEVICE explicit Block(const Geometry& geometry) {
    window = static_cast<int>(geometry.chunks_divisor.quotient(blockIdx.x));
    chunk = static_cast<int>(blockIdx.x) - window * geometry.chunks;
    first_latent = window * geometry.window_latents;
    num_latents = min(geometry.window_latents, geometry.num_latents - first_latent);
    limit = window + 1 == geometry.windows ? geometry.last_limit : geometry.limit;
  }
};

QLAE_DEVICE Columns columns_of_thread(const Geometry& geometry, const Block& block) {
  const uint32_t stack_row = geometry.row_threads.quotient(threadIdx.x);
  const uint32_t column = (threadIdx.x - stack_row * geometry.row_threads.divisor) * kVector;
  Columns columns;
  columns.row = static_cast<int>(stack_row);
  columns.column = static_cast<int>(column);
  columns.active = columns.row < geometry.stack;
  uint32_t place = column - geometry.column_period.quotient(column) * geometry.column_period.divisor;
  uint32_t latent = geometry.column_inner.quotient(place);
  uint32_t inner = place - latent * geometry.column_inner.divisor;
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    columns.local_latent[j] = min(static_cast<int>(latent), block.num_latents - 1);
    if (++inner == geometry.column_inner.divisor) inner = 0, ++latent;
    if (++place == geometry.column_period.divisor) place = latent = inner = 0;
  }
  return columns;
}

QLAE_DEVICE Place place_of(const Geometry& geometry, const Block& block, const Columns& columns, uint32_t row) {
  if (row >= geometry.rows || !columns.active) return {0, 0};
  const uint32_t group = geometry.rows_per_group.quotient(row);
  const uint32_t row_of_group = row - group * geometry.rows_per_group.divisor;
  const int64_t position = row_of_group * geometry.row_pitch + columns.column;
  const int64_t left = block.limit - position;
  const int count = left >= kVector ? kVector : left > 0 ? static_cast<int>(left) : 0;
  return {block.window * geometry.window_pitch + group * geometry.group_pitch + position, count};
}

template <class T>
QLAE_DEVICE void store_packed(T* target, const T (&values)[kVector]) {
  constexpr int kBytes = kVector * sizeof(T);
  using Chunk =
      std::conditional_t<kBytes == 2, uint16_t,
                         std::conditional_t<kBytes == 4, uint32_t, std::conditional_t<kBytes == 8, uint2, uint4>>>;
  Chunk chunks[kBytes / sizeof(Chunk)];
  __builtin_memcpy(chunks, values, kBytes);
#pragma unroll
  for (int i = 0; i < kBytes / static_cast<int>(sizeof(Chunk)); ++i) {
    reinterpret_cast<Chunk*>(target)[i] = chunks[i];
  }
}

template <class T>
QLAE_DEVICE void store_vector(T* target, const T (&values)[kVector], int count, bool aligned) {
  if (aligned && count == kVector) return store_packed(target, values);
#pragma unroll
  for (int j = 0; j < kVector; ++j)
    if (j < count) target[j] = values[j];
}

// All at once where rows and addresses allow; elements that do not exist are 0.
QLAE_DEVICE Raw load_vector(const void* base, Place place, bool aligned) {
  const Stored* source = static_cast<const Stored*>(base) + place.address;
  if (aligned && place.count == kVector) return *reinterpret_cast<const Raw*>(source);
  Stored values[kVector];
#pragma unroll
  for (int j = 0; j < kVector; ++j) values[j] = j < place.count ? source[j] : to_stored(Value(0));
  Raw raw;
  __builtin_memcpy(&raw, values, sizeof(raw));
  return raw;
}

QLAE_DEVICE void unpack(const Raw& raw, Value (&values)[kVector]) {
  Stored stored[kVector];
  __builtin_memcpy(stored, &raw, sizeof(raw));
#pragma unroll
  for (int j = 0; j < kVector; ++j) values[j] = to_value(stored[j]);
}

QLAE_DEVICE void store_values(void* base, Place place, const Value (&values)[kVector], bool aligned) {
  Stored stored[kVector];
#pragma unroll
  for (int j = 0; j < kVector; ++j) stored[j] = to_stored(values[j]);
  store_vector(static_cast<Stored*>(base) + place.address, stored, place.count, aligned);
}

template <class Index>
QLAE_DEVICE void store_indices_as(void* base, Place place, const int (&indices)[kVector], bool aligned) {
  Index stored[kVector];
#pragma unroll
  for (int j = 0; j < kVector; ++j) stored[j] = static_cast<Index>(indices[j]);
  store_vector(static_cast<Index*>(base) + place.address, stored, place.count, aligned);
}

QLAE_DEVICE void store_indices(void* base, IndexType type, Place place, const int (&indices)[kVector], bool aligned) {
  switch (type) {
    case IndexType::kUInt8: return store_indices_as<uint8_t>(base, place, indices, aligned);
    case IndexType::kInt16: return store_indices_as<int16_t>(base, place, indices, aligned);
    case IndexType::kInt32: return store_indices_as<int32_t>(base, place, indices, aligned);
    case IndexType::kInt64: return store_indices_as<int64_t>(base, place, indices, aligned);
  }
}

// The codes of a block's latents as the definition takes them.
struct WindowCodebook {
  const Value* values;
  int64_t stride;
  const int64_t* levels;
  int num_codes_of_all;

  template <class Parameters>
  QLAE_DEVICE WindowCodebook(const Parameters& parameters, const Block& block)
      : values(static_cast<const Value*>(parameters.pointers.codebook) +
               block.first_latent * parameters.codebook_stride),
        stride(parameters.codebook_stride),
        levels(parameters.levels ? parameters.levels + block.first_latent : nullptr),
        num_codes_of_all(parameters.plan.num_codes) {}
  QLAE_DEVICE const Value* row(int latent) const { return values + latent * stride; }
  QLAE_DEVICE int num_codes(int latent) const { return levels ? static_cast<int>(levels[latent]) : num_codes_of_all; }
  QLAE_DEVICE int nearest(Value z, int latent) const {
    return static_cast<int>(nearest_code(z, row(latent), num_codes(latent)));
  }
  QLAE_DEVICE void find_by_definition(const Value (&z)[kVector], const int (&latent)[kVector], int (&index)[kVector],
                                      Value (&code)[kVector]) const {
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      index[j] = nearest(z[j], latent[j]);
      code[j] = is_finite(z[j]) ? row(latent[j])[index[j]] : not_a_number();
    }
  }
};

// Each search finds, for the latents of a thread's columns, a position in its table and the code there; for a z that is
// not finite the position of index 0, and NaN.

// Codes in shared memory, [latent][code]; padding is NaN, which is never nearer. A position is an index.
struct DirectSearch {
  static constexpr Search kKind = Search::kDirect;
  WindowCodebook codebook;
  const Value* codes;
  int pitch;
  bool has_nan;
  int offset[kVector];

  template <class Parameters>
  QLAE_DEVICE DirectSearch(const Parameters& parameters, const Block& block, const Columns& columns,
                           unsigned char* memory)
      : codebook(parameters, block), codes(reinterpret_cast<Value*>(memory)), pitch(parameters.plan.table_pitch) {
    Value* table = reinterpret_cast<Value*>(memory);
    const FastDivisor divisor = parameters.plan.positions_divisor;
    const uint32_t entries = divisor.divisor * static_cast<uint32_t>(block.num_latents);
    int nan_here = 0;
    for (uint32_t i = threadIdx.x; i < entries; i += blockDim.x) {
      const int latent = static_cast<int>(divisor.quotient(i));
      const int code = static_cast<int>(i - static_cast<uint32_t>(latent) * divisor.divisor);
      const bool exists = code < codebook.num_codes(latent);
      const Value value = exists ? codebook.row(latent)[code] : not_a_number();
      nan_here |= exists && value != value;
      table[latent * pitch + code] = value;
    }
    has_nan = __syncthreads_or(nan_here) != 0;
#pragma unroll
    for (int j = 0; j < kVector; ++j) offset[j] = columns.local_latent[j] * pitch;
  }

  QLAE_DEVICE void find(const Value (&z)[kVector], int (&position)[kVector], Value (&code)[kVector]) const {
    if (has_nan) return find_by_definition(z, position, code);
    Value smallest[kVector];
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      smallest[j] = absolute(z[j] - codes[offset[j]]);
      position[j] = 0;
    }
#pragma unroll 3
    for (int k = 1; k < codebook.num_codes_of_all; ++k) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        const Value distance = absolute(z[j] - codes[offset[j] + k]);
        const bool nearer = distance < smallest[j];
        smallest[j] = nearer ? distance : smallest[j];
        position[j] = nearer ? k : position[j];
      }
    }
#pragma unroll
    for (int j = 0; j < kVector; ++j) code[j] = is_finite(z[j]) ? codes[offset[j] + position[j]] : not_a_number();
  }

  QLAE_DEVICE int index_at(int latent, int position) const {
    return position < codebook.num_codes(latent) ? position : -1;
  }

 private:
  QLAE_DEVICE void find_by_definition(const Value (&z)[kVector], int (&position)[kVector],
                                      Value (&code)[kVector]) const {
    int latent[kVector];
#pragma unroll
    for (int j = 0; j < kVector; ++j) latent[j] = offset[j] / pitch;
    codebook.find_by_definition(z, latent, position, code);
  }
};

// The codebook as it is, in device memory. A position is an index.
struct GlobalSearch {
  static constexpr Search kKind = Search::kGlobal;
  WindowCodebook codebook;
  int local_latent[kVector];
  int num_positions;

  template <class Parameters>
  QLAE_DEVICE GlobalSearch(const Parameters& parameters, const Block& block, const Columns& columns, unsigned char*)
      : codebook(parameters, block), num_positions(parameters.plan.num_positions) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) local_latent[j] = columns.local_latent[j];
  }

  // From the first bin to those of the latent of a thread's column j.
  QLAE_DEVICE int offset(int j) const { return local_latent[j] * num_positions; }

  QLAE_DEVICE void find(const Value (&z)[kVector], int (&position)[kVector], Value (&code)[kVector]) const {
    codebook.find_by_definition(z, local_latent, position, code);
  }

  QLAE_DEVICE int index_at(int latent, int position) const {
    return position < codebook.num_codes(latent) ? position : -1;
  }
};

// Sorted codes and the boundaries between them in shared memory, [latent][position]; a position is the skewed place of
// a sorted code. Of equal codes, the one with the smallest index comes last and is the only one that is found.
struct SortedSearch {
  static constexpr Search kKind = Search::kSorted;
  WindowCodebook codebook;
  Value* codes;
  Value* boundaries;
  Value* bounds;  // per latent: the boundaries decide exactly where |z| <= bound
  uint16_t* order;
  int latents;
  int pitch;
  int levels;
  unsigned code_distance;   // from a code to the boundary behind it, in bytes
  unsigned start[kVector];  // where the boundaries of the thread's latents begin in shared memory
  Value smallest_bound;     // of the thread's latents

  template <class Parameters>
  QLAE_DEVICE SortedSearch(const Parameters& parameters, const Block& block, const Columns& columns,
                           unsigned char* memory)
      : codebook(parameters, block),
        codes(reinterpret_cast<Value*>(memory)),
        latents(block.num_latents),
        pitch(parameters.plan.table_pitch),
        levels(parameters.plan.table_levels) {
    code_distance = static_cast<unsigned>(latents * pitch * static_cast<int>(sizeof(Value)));
    boundaries = codes + latents * pitch;
    bounds = boundaries + latents * pitch;
    order = reinterpret_cast<uint16_t*>(bounds + latents);
    load_codes();
    __syncthreads();
    if (__syncthreads_or(is_unsorted())) sort();
    find_boundaries();
    __syncthreads();
    smallest_bound = infinity();
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      start[j] = qlae_shared_address(boundaries + columns.local_latent[j] * pitch);
      smallest_bound = min(smallest_bound, bounds[columns.local_latent[j]]);
    }
  }

  QLAE_DEVICE void find(const Value (&z)[kVector], int (&position)[kVector], Value (&code)[kVector]) const {
    unsigned at[kVector];
#pragma unroll
    for (int j = 0; j < kVector; ++j) at[j] = start[j];
    for (int step = levels / 2; step > 16; step /= 2) advance(z, at, step + step / 32, step + step / 32 - 2);
    // Steps within 32 positions know no skew.
    if (levels >= 32) advance(z, at, 16, 15);
    if (levels >= 16) advance(z, at, 8, 7);
    if (levels >= 8) advance(z, at, 4, 3);
    if (levels >= 4) advance(z, at, 2, 1);
    if (levels >= 2) advance(z, at, 1, 0);
    bool exception = false;
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      qlae_load_shared(at[j] - code_distance, code[j]);
      position[j] = static_cast<int>((at[j] - start[j]) / sizeof(Value));
      exception |= !(absolute(z[j]) <= smallest_bound);
    }
    if (exception) find_exceptions(z, position, code);
  }

  // From the table's begin to that of the latent of a thread's column j.
  QLAE_DEVICE int offset(int j) const {
    return static_cast<int>((start[j] - qlae_shared_address(boundaries)) / sizeof(Value));
  }

  // -1 where the table has no code.
  QLAE_DEVICE int index_at(int latent, int position) const {
    const int sorted = position - position / 33;
    return position % 33 != 32 && sorted < codebook.num_codes(latent) ? order[latent * pitch + position] : -1;
  }

 private:
  QLAE_DEVICE void advance(const Value (&z)[kVector], unsigned (&at)[kVector], int step, int boundary) const {
    Value value[kVector];
#pragma unroll
    for (int j = 0; j < kVector; ++j) qlae_load_shared(at[j] + boundary * static_cast<int>(sizeof(Value)), value[j]);
#pragma unroll
    for (int j = 0; j < kVector; ++j)
      if (z[j] >= value[j]) at[j] += step * static_cast<int>(sizeof(Value));
  }

  QLAE_DEVICE void find_exceptions(const Value (&z)[kVector], int (&position)[kVector], Value (&code)[kVector]) const {
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const int latent = offset(j) / pitch;
      if (absolute(z[j]) <= bounds[latent]) continue;
      const int index = codebook.nearest(z[j], latent);
      int sorted = 0;
      while (order[offset(j) + skewed(sorted)] != index) ++sorted;
      position[j] = skewed(sorted);
      code[j] = is_finite(z[j]) ? codebook.row(latent)[index] : not_a_number();
    }
  }

  QLAE_DEVICE int place(int latent, int sorted) const { return latent * pitch + skewed(sorted); }

  // Calls body(latent, lane) with a warp for each latent.
  template <class Body>
  QLAE_DEVICE void for_each_latent(Body body) const {
    for (int latent = static_cast<int>(threadIdx.x) / kLanes; latent < latents;
         latent += static_cast<int>(blockDim.x) / kLanes)
      body(latent, static_cast<int>(threadIdx.x) % kLanes);
  }

  // Padding sorts behind all codes. Codes that are not finite are not sorted: every z is an exception.
  QLAE_DEVICE void load_codes() {
    for_each_latent([&](int latent, int lane) {
      const int count = codebook.num_codes(latent);
      bool finite = true;
      for (int k = lane; k < levels; k += kLanes) {
        const Value value = k < count ? codebook.row(latent)[k] : infinity();
        finite &= k >= count || is_finite(value);
        codes[place(latent, k)] = value;
        order[place(latent, k)] = static_cast<uint16_t>(k < count ? k : levels - 1 - (k - count));
      }
      finite = __all_sync(kAllLanes, finite);
      if (lane == 0) bounds[latent] = finite ? Value(0) : Value(-1);
      if (finite) return;
      for (int k = lane; k < levels; k += kLanes) {
        codes[place(latent, k)] = static_cast<Value>(k);
        order[place(latent, k)] = static_cast<uint16_t>(k);
      }
    });
  }

  QLAE_DEVICE bool comes_before(int a, int b) const {
    return codes[a] < codes[b] || (codes[a] == codes[b] && order[a] > order[b]);
  }

  QLAE_DEVICE int is_unsorted() const {
    int unsorted = 0;
    for_each_latent([&](int latent, int lane) {
      for (int k = lane; k + 1 < levels; k += kLanes) unsorted |= comes_before(place(latent, k + 1), place(latent, k));
    });
    return unsorted;
  }

  // Bitonic sort of every latent's codes at once.
  QLAE_DEVICE void sort() {
    const int pairs = levels / 2;
    const int shift = __ffs(pairs) - 1;
    for (int size = 2; size <= levels; size *= 2) {
      for (int distance = size / 2; distance > 0; distance /= 2) {
        for (int i = static_cast<int>(threadIdx.x); i < latents * pairs; i += static_cast<int>(blockDim.x)) {
          const int latent = i >> shift, pair = i & (pairs - 1);
          const int low = 2 * pair - (pair & (distance - 1));
          const int a = place(latent, low), b = place(latent, low + distance);
          const bool ascending = (low & size) == 0;
          if (comes_before(b, a) != ascending) continue;
          const Value code = codes[a];
          codes[a] = codes[b];
          codes[b] = code;
          const uint16_t index = order[a];
          order[a] = order[b];
          order[b] = index;
        }
        __syncthreads();
      }
    }
  }

  // The boundary at a position is the smallest z that belongs behind it.
  QLAE_DEVICE void find_boundaries() {
    for_each_latent([&](int latent, int lane) {
      const int count = codebook.num_codes(latent);
      const bool finite = bounds[latent] == Value(0);
      Value gap = FloatLimits<Value>::kMax;
      for (int m = lane; m + 1 < levels; m += kLanes) {
        const bool between_codes = finite && m + 1 < count;
        boundaries[place(latent, m)] = between_codes ? boundary_behind(latent, m, count) : infinity();
        const Value difference = codes[place(latent, m + 1)] - codes[place(latent, m)];
        if (between_codes && difference > Value(0)) gap = min(gap, difference);
      }
      for (int distance = kLanes / 2; distance > 0; distance /= 2)
        gap = min(gap, __shfl_xor_sync(kAllLanes, gap, distance));
      const Value first = absolute(codes[place(latent, 0)]), last = absolute(codes[place(latent, count - 1)]);
      if (lane == 0 && finite) bounds[latent] = exact_bound(max(first, last), gap);
      __syncwarp();
    });
  }

  // Within equal codes the boundary is that before all of them, so that the search ends at the last.
  QLAE_DEVICE Value boundary_behind(int latent, int m, int count) const {
    const Value upper = codes[place(latent, m + 1)];
    int first = m + 1, last = m + 1;
    while (first > 0 && codes[place(latent, first - 1)] == upper) --first;
    while (last + 1 < count && codes[place(latent, last + 1)] == upper) ++last;
    if (first == 0) return -infinity();
    return threshold_between(codes[place(latent, first - 1)], upper,
                             order[place(latent, last)] < order[place(latent, first - 1)]);
  }
};

// The sum over the block's threads in a fixed order, in thread 0; `scratch` holds a number per warp.
QLAE_DEVICE double sum_of_block(double value, double* scratch) {
  for (int distance = kLanes / 2; distance > 0; distance /= 2) value += __shfl_down_sync(kAllLanes, value, distance);
  const int warps = static_cast<int>(blockDim.x) / kLanes;
  if (warps == 1) return value;
  if (threadIdx.x % kLanes == 0) scratch[threadIdx.x / kLanes] = value;
  __syncthreads();
  double sum = 0;
  if (threadIdx.x == 0)
    for (int warp = 0; warp < warps; ++warp) sum += scratch[warp];
  return sum;
}

// Whether this block is the last of `blocks` that arrive at the counter, with all that the others wrote before visible.
// Leaves the counter at 0.
QLAE_DEVICE bool is_last_to_arrive(uint32_t* counter, int blocks, int* scratch) {
  const uint32_t last = static_cast<uint32_t>(blocks - 1);
  // The barriers extend one thread's fences to what the whole block wrote before and reads after.
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    *scratch = atomicInc(counter, last) == last;
    __threadfence();
  }
  __syncthreads();
  return *scratch != 0;
}

// The rows that a thread reads at once: z, and the gradient of the quantized values where it is wanted.
template <bool kGradient>
struct Rows {
  Place place[kRowsAtOnce];
  Raw z[kRowsAtOnce];
  Raw gradient[kGradient ? kRowsAtOnce : 1];

  QLAE_DEVICE void load(const Geometry& geometry, const Block& block, const Columns& columns, uint32_t row,
                        uint32_t rows_of_step, const void* latents, const void* gradients, bool aligned) {
#pragma unroll
    for (int u = 0; u < kRowsAtOnce; ++u) {
      place[u] = place_of(geometry, block, columns, row + columns.row + u * rows_of_step);
      z[u] = load_vector(latents, place[u], aligned);
      if constexpr (kGradient) gradient[u] = gradients ? load_vector(gradients, place[u], aligned) : Raw{};
    }
  }
};

// Elements that do not exist have no residual.
QLAE_DEVICE void clear_behind(int count, Value (&residual)[kVector]) {
  if (count == kVector) return;
#pragma unroll
  for (int j = 0; j < kVector; ++j)
    if (j >= count) residual[j] = 0;
}

template <class SearchKind>
__global__ void __launch_bounds__(kMaxForwardThreads)
    forward_kernel(const __grid_constant__ ForwardParameters parameters) {
  unsigned char* memory = qlae_dynamic_shared_memory();
  const Geometry& geometry = parameters.plan.geometry;
  const ForwardPointers& pointers = parameters.pointers;
  const bool aligned = parameters.aligned;
  const Block block(geometry);
  const Columns columns = columns_of_thread(geometry, block);
  const uint32_t rows_of_step = static_cast<uint32_t>(geometry.chunks) * geometry.stack;
  uint32_t row = block.chunk * geometry.stack;
  Rows<false> rows;
  rows.load(geometry, block, columns, row, rows_of_step, pointers.z, nullptr, aligned);
  const SearchKind search(parameters, block, columns, memory + kScratchBytes);

  double squared_error = 0;
  while (row < geometry.rows) {
    const Rows<false>& now = rows;
    Value sum = 0;
#pragma unroll
    for (int u = 0; u < kRowsAtOnce; ++u) {
      if (u > 0 && row + u * rows_of_step >= geometry.rows) break;
      Value z[kVector], code[kVector];
      int position[kVector];
      unpack(now.z[u], z);
      search.find(z, position, code);
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        if constexpr (SearchKind::kKind == Search::kSorted) position[j] = search.order[search.offset(j) + position[j]];
        z[j] -= code[j];
      }
      store_values(pointers.quantized, now.place[u], code, aligned);
      if (pointers.indices) store_indices(pointers.indices, parameters.index_type, now.place[u], position, aligned);
      clear_behind(now.place[u].count, z);
#pragma unroll
      for (int j = 0; j < kVector; ++j) sum += z[j] * z[j];
    }
    squared_error += static_cast<double>(sum);
    row += kRowsAtOnce * rows_of_step;
    if (row < geometry.rows) rows.load(geometry, block, columns, row, rows_of_step, pointers.z, nullptr, aligned);
  }

  double* scratch = reinterpret_cast<double*>(memory);
  double total = sum_of_block(squared_error, scratch);
  if (parameters.plan.counters > 0) {
    double* partial = static_cast<double*>(pointers.workspace);
    if (threadIdx.x == 0) partial[blockIdx.x] = total;
    if (!is_last_to_arrive(pointers.counters, static_cast<int>(gridDim.x), reinterpret_cast<int*>(scratch + kLanes)))
      return;
    total = 0;
    for (unsigned i = threadIdx.x; i < gridDim.x; i += blockDim.x) total += __ldcg(partial + i);
    total = sum_of_block(total, scratch);
  }
  if (threadIdx.x == 0) *static_cast<Value*>(pointers.loss) = static_cast<Value>(total * parameters.loss_scale);
}

// values[j] = values[(j + places) % kVector] for places in 0 .. kVector - 1.
template <class T>
QLAE_DEVICE void rotate(T (&values)[kVector], int places) {
#pragma unroll
  for (int distance = 1; distance < kVector; distance *= 2) {
    T rotated[kVector];
#pragma unroll
    for (int j = 0; j < kVector; ++j) rotated[j] = places & distance ? values[(j + distance) % kVector] : values[j];
#pragma unroll
    for (int j = 0; j < kVector; ++j) values[j] = rotated[j];
  }
}

// Adds each lane's residuals to the warp's bins; lanes that share a bin take turns in the order of lanes. Where a
// lane's columns belong to different latents, lanes with the same latents begin at different columns and so seldom
// meet.
QLAE_DEVICE void add_in_turns(Value* bins, const Plan& plan, int (&bin)[kVector], Value (&residual)[kVector],
                              int count) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
#pragma unroll
  for (int j = 0; j < kVector; ++j)
    if (j >= count) bin[j] = -1;
  if (plan.columns_apart) {
    const int places = static_cast<int>(plan.peer_divisor.quotient(static_cast<uint32_t>(lane))) % kVector;
    rotate(bin, places);
    rotate(residual, places);
  }
  const int first_distance = static_cast<int>(plan.peer_divisor.divisor) * (plan.columns_apart ? kVector : 1);
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    int turn = bin[j] < 0 ? -1 : 0;
    for (int distance = first_distance; distance < kLanes; distance += first_distance) {
      const int other = __shfl_up_sync(kAllLanes, bin[j], static_cast<unsigned>(distance));
      turn += lane >= distance && other == bin[j] && bin[j] >= 0;
    }
    int now = 0;
    do {
      if (turn == now) bins[bin[j]] += residual[j];
      __syncwarp();
      ++now;
    } while (first_distance < kLanes && __any_sync(kAllLanes, turn >= now));
  }
}

// Adds a thread's residuals to its own bins, of which the first lies at the address `own` of shared memory.
QLAE_DEVICE void add_to_own(unsigned own, const Plan& plan, const int (&position)[kVector],
                            const Value (&residual)[kVector]) {
  const unsigned pitch = static_cast<unsigned>(plan.bins_pitch) * static_cast<unsigned>(sizeof(Value));
  const unsigned slot_pitch = plan.slots == 1 ? 0 : static_cast<unsigned>(plan.num_positions) * pitch;
  unsigned bin[kVector];
  Value sum[kVector];
#pragma unroll
  for (int j = 0; j < kVector; ++j) bin[j] = own + j * slot_pitch + static_cast<unsigned>(position[j]) * pitch;
  if (plan.slots == 1) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      qlae_load_shared(bin[j], sum[0]);
      qlae_store_shared(bin[j], sum[0] + residual[j]);
    }
    return;
  }
  // Each column has bins of its own, so that the additions need not wait for one another.
#pragma unroll
  for (int j = 0; j < kVector; ++j) qlae_load_shared(bin[j], sum[j]);
#pragma unroll
  for (int j = 0; j < kVector; ++j) qlae_store_shared(bin[j], sum[j] + residual[j]);
}

// Positions and residuals of a small problem, by element.
struct Stage {
  Value* residuals;
  int* positions;

  QLAE_DEVICE Stage(unsigned char* memory, int64_t size) {
    residuals = reinterpret_cast<Value*>(memory);
    positions = reinterpret_cast<int*>(residuals + skewed(static_cast<int>(size)) + 1);
  }
  QLAE_DEVICE void put(Place place, const int (&position)[kVector], const Value (&residual)[kVector]) const {
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      if (j >= place.count) break;
      const int at = skewed(static_cast<int>(place.address) + j);
      residuals[at] = residual[j];
      positions[at] = position[j];
    }
  }
};

constexpr uint32_t kColumnsAtMost = 1u << 20;
// Lanes that add up one bin's copies: fewer need fewer exchanges, more read side by side.
constexpr int kLanesOfSum = 8;

// The residuals' sums of one latent and position over the threads that own columns of the latent. `lanes` lanes, a
// power of two, work together and all return it.
QLAE_DEVICE Value sum_of_thread_bins(const Plan& plan, const Value* bins, int latent, int position, int lanes,
                                     bool exists) {
  const Geometry& geometry = plan.geometry;
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  Value sum = 0;
  if (exists && plan.slots == 1) {
    const Value* bin = bins + position * plan.bins_pitch;
#pragma unroll 8
    for (int member = lane; member < plan.members; member += lanes) sum += bin[member];
  } else if (exists) {
    const int columns = plan.classes * kVector;
    const int period = static_cast<int>(min(geometry.column_period.divisor, kColumnsAtMost));
    const int inner = static_cast<int>(geometry.column_inner.divisor);
    for (int first = latent * inner; first < columns; first += period) {
      for (int column = first; column < first + inner && column < columns; ++column) {
        const Value* bin = bins + (column % kVector * plan.num_positions + position) * plan.bins_pitch +
                           column / kVector * plan.member_pitch;
#pragma unroll 8
        for (int member = lane; member < plan.members; member += lanes) sum += bin[member];
      }
    }
  }
  for (int distance = lanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
  return sum;
}

// Adds up the staged residuals of a warp's latents, eight positions at a time.
template <class Result>
QLAE_DEVICE void for_each_staged_sum(const Plan& plan, const Block& block, const Stage& stage, Result result) {
  constexpr int kAtOnce = 8;
  const Geometry& geometry = plan.geometry;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int inner = static_cast<int>(geometry.column_inner.divisor);
  const int period = static_cast<int>(geometry.column_period.divisor);
  const int elements = static_cast<int>(block.limit) / block.num_latents;
  for (int latent = static_cast<int>(threadIdx.x) / kLanes; latent < block.num_latents;
       latent += static_cast<int>(blockDim.x) / kLanes) {
    for (int first = 0; first < plan.num_positions; first += kAtOnce) {
      Value sum[kAtOnce] = {};
      for (int i = lane; i < elements; i += kLanes) {
        const int outer = static_cast<int>(geometry.column_inner.quotient(static_cast<uint32_t>(i)));
        const int at = skewed(outer * period + latent * inner + i - outer * inner);
        const Value residual = stage.residuals[at];
        const int position = stage.positions[at] - first;
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) sum[u] += position == u ? residual : Value(0);
      }
      // Halves the lanes and the sums that each lane keeps, until a sum is spread over four lanes.
#pragma unroll
      for (int half = kAtOnce / 2, distance = kLanes / 2; half > 0; half /= 2, distance /= 2) {
        const bool upper = (lane & distance) != 0;
#pragma unroll
        for (int u = 0; u < half; ++u) {
          const Value sent = upper ? sum[u] : sum[u + half];
          const Value kept = upper ? sum[u + half] : sum[u];
          sum[u] = kept + __shfl_xor_sync(kAllLanes, sent, distance);
        }
      }
      sum[0] += __shfl_xor_sync(kAllLanes, sum[0], 2);
      sum[0] += __shfl_xor_sync(kAllLanes, sum[0], 1);
      const int position = first + lane / 4;
      if (lane % 4 == 0 && position < plan.num_positions) result(latent * plan.num_positions + position, sum[0]);
    }
  }
}

// Calls result(latent * num_positions + position, sum) for every sum of the block.
template <Bins kBins, class Result>
QLAE_DEVICE void for_each_sum(const Plan& plan, const Block& block, const Value* bins, Result result) {
  const int outputs = block.num_latents * plan.num_positions;
  if constexpr (kBins == Bins::kThread) {
    int lanes = 1;
    while (2 * lanes <= min(plan.members, kLanesOfSum)) lanes *= 2;
    const int teams = static_cast<int>(blockDim.x) / lanes;
    // All lanes of a warp take part in every round.
    for (int first = 0; first < outputs; first += teams) {
      const int output = first + static_cast<int>(threadIdx.x) / lanes;
      const int latent = static_cast<int>(plan.positions_divisor.quotient(static_cast<uint32_t>(output)));
      const int position = output - latent * plan.num_positions;
      const Value sum = sum_of_thread_bins(plan, bins, latent, position, lanes, output < outputs);
      if (output < outputs && threadIdx.x % lanes == 0) result(output, sum);
    }
  } else {
    const int warps = static_cast<int>(blockDim.x) / kLanes;
    for (int output = static_cast<int>(threadIdx.x); output < outputs; output += static_cast<int>(blockDim.x)) {
      Value sum = 0;
      for (int warp = 0; warp < warps; ++warp) sum += bins[static_cast<int64_t>(warp) * plan.bins_pitch + output];
      result(output, sum);
    }
  }
}

// Sums over `parts` arrays of `pitch` numbers that other blocks wrote, in order.
template <class Result>
QLAE_DEVICE void for_each_sum_of_parts(const Value* parts, int count, int64_t pitch, int outputs, Result result) {
  for (int output = static_cast<int>(threadIdx.x); output < outputs; output += static_cast<int>(blockDim.x)) {
    // Reads many before it adds the first: they come from far away.
    constexpr int kAtOnce = 16;
    double sum = 0;
    for (int first = 0; first < count; first += kAtOnce) {
      Value part[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u)
        part[u] = first + u < count ? __ldcg(parts + (first + u) * pitch + output) : Value(0);
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) sum += static_cast<double>(part[u]);
    }
    result(output, sum);
  }
}

// Writes the gradient of a window's codes from the sums of residuals.
template <class SearchKind>
struct GradientWriter {
  const Plan& plan;
  const Block& block;
  const SearchKind& search;
  Value* gradient;
  int64_t stride;
  double scale;

  QLAE_DEVICE void operator()(int output, double sum) const {
    const int latent = static_cast<int>(plan.positions_divisor.quotient(static_cast<uint32_t>(output)));
    const int index = search.index_at(latent, output - latent * plan.num_positions);
    if (index >= 0) gradient[latent * stride + index] = static_cast<Value>(0.0 - scale * sum);
  }

  // Where latents have fewer codes than the codebook has columns.
  QLAE_DEVICE void write_padding() const {
    if (!search.codebook.levels) return;
    for (int64_t i = threadIdx.x; i < block.num_latents * stride; i += blockDim.x) {
      const int latent = static_cast<int>(i / stride);
      if (i - latent * stride >= search.codebook.num_codes(latent)) gradient[i] = 0;
    }
  }
};

// Adds up the sums of all blocks of a window, in two steps where they are many, each by the block that arrives last.
template <Bins kBins, class Writer>
QLAE_DEVICE void reduce_over_blocks(const BackwardParameters& parameters, const Block& block, const Value* bins,
                                    const Writer& write, int* scratch) {
  const Plan& plan = parameters.plan;
  const Geometry& geometry = plan.geometry;
  const int outputs = block.num_latents * plan.num_positions;
  const int64_t pitch = int64_t{geometry.window_latents} * plan.num_positions;
  Value* parts = static_cast<Value*>(parameters.pointers.workspace) + block.window * geometry.chunks * pitch;
  Value* group_parts = static_cast<Value*>(parameters.pointers.workspace) +
                       (int64_t{geometry.windows} * geometry.chunks + block.window * plan.groups) * pitch;
  uint32_t* counters = parameters.pointers.counters + block.window * (plan.groups + 1);
  for_each_sum<kBins>(plan, block, bins, [&](int output, Value sum) { parts[block.chunk * pitch + output] = sum; });
  const int group = block.chunk / plan.fan;
  const int members = min(plan.fan, geometry.chunks - group * plan.fan);
  const Value* group_begin = parts + group * plan.fan * pitch;
  if (!is_last_to_arrive(counters + group, members, scratch)) return;
  if (plan.groups > 1) {
    for_each_sum_of_parts(group_begin, members, pitch, outputs, [&](int output, double sum) {
      group_parts[group * pitch + output] = static_cast<Value>(sum);
    });
    if (!is_last_to_arrive(counters + plan.groups, plan.groups, scratch)) return;
  }
  write.write_padding();
  if (plan.groups > 1) return for_each_sum_of_parts(group_parts, plan.groups, pitch, outputs, write);
  for_each_sum_of_parts(group_begin, members, pitch, outputs, write);
}

template <class SearchKind, Bins kBins>
__global__ void __launch_bounds__(kMaxBackwardThreads)
    backward_kernel(const __grid_constant__ BackwardParameters parameters) {
  unsigned char* memory = qlae_dynamic_shared_memory();
  const Plan& plan = parameters.plan;
  const Geometry& geometry = plan.geometry;
  const BackwardPointers& pointers = parameters.pointers;
  const bool aligned = parameters.aligned;
  const Block block(geometry);
  const Columns columns = columns_of_thread(geometry, block);
  const int thread = static_cast<int>(threadIdx.x);
  const void* incoming = pointers.grad_z ? pointers.grad_quantized : nullptr;
  const uint32_t rows_of_step = static_cast<uint32_t>(geometry.chunks) * geometry.stack;
  uint32_t row = block.chunk * geometry.stack;
  Rows<true> rows;
  rows.load(geometry, block, columns, row, rows_of_step, pointers.z, incoming, aligned);
  const Value grad_loss = *static_cast<const Value*>(pointers.grad_loss);

  // All bins of the block, and the part of them that this thread adds to.
  Value* bins = reinterpret_cast<Value*>(memory + kScratchBytes + plan.table_bytes);
  Value* own_bins = bins;
  if constexpr (kBins == Bins::kThread) {
    own_bins += (thread % plan.classes) * plan.member_pitch + thread / plan.classes;
    if (columns.active)
      for (int bin = 0; bin < plan.slots * plan.num_positions; ++bin) own_bins[bin * plan.bins_pitch] = 0;
  } else if constexpr (kBins != Bins::kStaged) {
    const int warps = static_cast<int>(blockDim.x) / kLanes;
    if constexpr (kBins == Bins::kGlobal) {
      const int64_t results = int64_t{geometry.windows} * (plan.counters > 0 ? geometry.chunks + plan.groups : 0) *
                              geometry.window_latents * plan.num_positions;
      bins = static_cast<Value*>(pointers.workspace) + results +
             static_cast<int64_t>(blockIdx.x) * warps * plan.bins_pitch;
    }
    own_bins = bins + static_cast<int64_t>(thread / kLanes) * plan.bins_pitch;
    for (int bin = thread % kLanes; bin < plan.bins_pitch; bin += kLanes) own_bins[bin] = 0;
  }
  const SearchKind search(parameters, block, columns, memory + kScratchBytes);
  __syncwarp();

  const Stage stage(reinterpret_cast<unsigned char*>(bins), block.limit);
  const unsigned own_address = kBins == Bins::kThread ? qlae_shared_address(own_bins) : 0;
  const Value scale = grad_loss * static_cast<Value>(parameters.commitment_scale);
  while (row < geometry.rows) {
    const Rows<true>& now = rows;
#pragma unroll
    for (int u = 0; u < kRowsAtOnce; ++u) {
      if (u > 0 && row + u * rows_of_step >= geometry.rows) break;
      Value z[kVector], code[kVector], gradient[kVector];
      int position[kVector];
      unpack(now.z[u], z);
      unpack(now.gradient[u], gradient);
      search.find(z, position, code);
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        // From here on z holds the residual.
        z[j] -= code[j];
        gradient[j] += scale * z[j];
      }
      if (pointers.grad_z) store_values(pointers.grad_z, now.place[u], gradient, aligned);
      if (!pointers.grad_codebook) continue;
      clear_behind(now.place[u].count, z);
      if constexpr (kBins == Bins::kStaged) {
        stage.put(now.place[u], position, z);
      } else if constexpr (kBins == Bins::kThread) {
        if (now.place[u].count > 0) add_to_own(own_address, plan, position, z);
      } else {
#pragma unroll
        for (int j = 0; j < kVector; ++j) position[j] += search.offset(j);
        add_in_turns(own_bins, plan, position, z, now.place[u].count);
      }
    }
    row += kRowsAtOnce * rows_of_step;
    if (row < geometry.rows) rows.load(geometry, block, columns, row, rows_of_step, pointers.z, incoming, aligned);
  }
  if (!pointers.grad_codebook) return;
  __syncthreads();
  const GradientWriter<SearchKind> write{
      plan,
      block,
      search,
      static_cast<Value*>(pointers.grad_codebook) + block.first_latent * parameters.codebook_stride,
      parameters.codebook_stride,
      static_cast<double>(grad_loss) * parameters.quantization_scale};
  if constexpr (kBins == Bins::kStaged) {
    write.write_padding();
    for_each_staged_sum(plan, block, stage, write);
  } else if (geometry.chunks == 1) {
    write.write_padding();
    for_each_sum<kBins>(plan, block, bins, write);
  } else {
    reduce_over_blocks<kBins>(parameters, block, bins, write, reinterpret_cast<int*>(memory));
  }
}

template <class Parameters>
void launch(void (*kernel)(Parameters), const Parameters& parameters, void* stream) {
  const Geometry& geometry = parameters.plan.geometry;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(geometry.windows) * static_cast<unsigned>(geometry.chunks));
  config.blockDim = dim3(static_cast<unsigned>(geometry.threads));
  config.dynamicSmemBytes = static_cast<size_t>(parameters.plan.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, kernel, parameters), "launching latent_quantize");
}

using ForwardKernel = void (*)(ForwardParameters);
using BackwardKernel = void (*)(BackwardParameters);

ForwardKernel forward_kernel_for(const Plan& plan) {
  switch (plan.search) {
    case Search::kDirect: return forward_kernel<DirectSearch>;
    case Search::kSorted: return forward_kernel<SortedSearch>;
    case Search::kGlobal: break;
  }
  return forward_kernel<GlobalSearch>;
}

BackwardKernel backward_kernel_for(const Plan& plan) {
  if (plan.bins == Bins::kGlobal) return backward_kernel<GlobalSearch, Bins::kGlobal>;
  if (plan.bins == Bins::kWarp) return backward_kernel<SortedSearch, Bins::kWarp>;
  if (plan.bins == Bins::kStaged)
    return plan.search == Search::kDirect ? backward_kernel<DirectSearch, Bins::kStaged>
                                          : backward_kernel<SortedSearch, Bins::kStaged>;
  if (plan.search == Search::kDirect) return backward_kernel<DirectSearch, Bins::kThread>;
  return backward_kernel<SortedSearch, Bins::kThread>;
}

void forward(const ForwardParameters& parameters, void* stream) {
  launch(forward_kernel_for(parameters.plan), parameters, stream);
}

void backward(const BackwardParameters& parameters, void* stream) {
  launch(backward_kernel_for(parameters.plan), parameters, stream);
}

int resident_blocks(const Plan& plan, bool backward, int64_t most_shared) {
  const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
  const auto ask = [&](auto kernel) {
    int blocks = 0;
    check(cudaFuncSetAttribute(kernel, attribute, static_cast<int>(most_shared)), "asking for shared memory");
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, plan.geometry.threads,
                                                        static_cast<size_t>(plan.shared_bytes)),
          "asking how many blocks fit");
    return blocks;
  };
  return backward ? ask(backward_kernel_for(plan)) : ask(forward_kernel_for(plan));
}

}  // namespace

const Kernels QLAE_KERNELS{forward, backward, resident_blocks};

}  // namespace qlae::cuda
