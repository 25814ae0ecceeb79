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
#else
#include "cuda_emulation.h"
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

constexpr int kVector = 16 / sizeof(Stored);
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
QLAE_DEVICE Value absolute(Value value) { return value < Value(0) ? -value : value; }
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
    window = static_cast<int>(blockIdx.x) / geometry.chunks;
    chunk = static_cast<int>(blockIdx.x) - window * geometry.chunks;
    first_latent = window * geometry.window_latents;
    num_latents = min(geometry.window_latents, geometry.num_latents - first_latent);
    limit = window + 1 == geometry.windows ? geometry.last_limit : geometry.limit;
  }
};

QLAE_DEVICE Columns columns_of_thread(const Geometry& geometry, const Block& block) {
  const int thread = static_cast<int>(threadIdx.x);
  Columns columns;
  columns.row = thread / geometry.row_threads;
  columns.column = (thread - columns.row * geometry.row_threads) * kVector;
  columns.active = columns.row < geometry.stack;
  int place = columns.column % geometry.column_period;
  int latent = place / geometry.column_inner;
  int inner = place - latent * geometry.column_inner;
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    columns.local_latent[j] = min(latent, block.num_latents - 1);
    if (++inner == geometry.column_inner) inner = 0, ++latent;
    if (++place == geometry.column_period) place = latent = inner = 0;
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
  using Chunk = std::conditional_t<
      kBytes == 2, uint16_t,
      std::conditional_t<kBytes == 4, uint32_t, std::conditional_t<kBytes == 8, uint2, uint4>>>;
  Chunk chunks[kBytes / sizeof(Chunk)];
  __builtin_memcpy(chunks, values, kBytes);
#pragma unroll
  for (int i = 0; i < kBytes / static_cast<int>(sizeof(Chunk)); ++i) reinterpret_cast<Chunk*>(target)[i] = chunks[i];
}

template <class T>
QLAE_DEVICE void store_vector(T* target, const T (&values)[kVector], int count, bool aligned) {
  if (aligned && count == kVector) return store_packed(target, values);
#pragma unroll
  for (int j = 0; j < kVector; ++j)
    if (j < count) target[j] = values[j];
}

// 16 bytes at once where rows and addresses allow; elements that do not exist are 0.
QLAE_DEVICE uint4 load_vector(const void* base, Place place, bool aligned) {
  const Stored* source = static_cast<const Stored*>(base) + place.address;
  if (aligned && place.count == kVector) return *reinterpret_cast<const uint4*>(source);
  Stored values[kVector];
#pragma unroll
  for (int j = 0; j < kVector; ++j) values[j] = j < place.count ? source[j] : to_stored(Value(0));
  uint4 raw;
  __builtin_memcpy(&raw, values, sizeof(raw));
  return raw;
}

QLAE_DEVICE void unpack(const uint4& raw, Value (&values)[kVector]) {
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
  QLAE_DEVICE int num_codes(int latent) const {
    return levels ? static_cast<int>(levels[latent]) : num_codes_of_all;
  }
  QLAE_DEVICE int nearest(Value z, int latent) const {
    return static_cast<int>(nearest_code(z, row(latent), num_codes(latent)));
  }
};

// Each search finds, for the latents of a thread's columns, a position in its table and the code there.

// Codes in shared memory, [code][latent]; padding is NaN, which is never nearer. A position is an index.
struct DirectSearch {
  static constexpr Search kKind = Search::kDirect;
  WindowCodebook codebook;
  const Value* codes;
  int latents;
  bool has_nan;
  int local_latent[kVector];

  template <class Parameters>
  QLAE_DEVICE DirectSearch(const Parameters& parameters, const Block& block, const Columns& columns,
                           unsigned char* memory)
      : codebook(parameters, block), codes(reinterpret_cast<Value*>(memory)), latents(block.num_latents) {
    Value* table = reinterpret_cast<Value*>(memory);
    const int entries = codebook.num_codes_of_all * latents;
    int nan_here = 0;
    for (int i = static_cast<int>(threadIdx.x); i < entries; i += static_cast<int>(blockDim.x)) {
      const int code = i / latents, latent = i - code * latents;
      const bool exists = code < codebook.num_codes(latent);
      const Value value = exists ? codebook.row(latent)[code] : not_a_number();
      nan_here |= exists && value != value;
      table[i] = value;
    }
    has_nan = __syncthreads_or(nan_here) != 0;
#pragma unroll
    for (int j = 0; j < kVector; ++j) local_latent[j] = columns.local_latent[j];
  }

  QLAE_DEVICE void find(const Value (&z)[kVector], int (&position)[kVector], Value (&code)[kVector]) const {
    if (has_nan) return find_by_definition(z, position, code);
    Value smallest[kVector];
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      code[j] = codes[local_latent[j]];
      smallest[j] = absolute(z[j] - code[j]);
      position[j] = 0;
    }
#pragma unroll 3
    for (int k = 1; k < codebook.num_codes_of_all; ++k) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        const Value candidate = codes[k * latents + local_latent[j]];
        const Value distance = absolute(z[j] - candidate);
        const bool nearer = distance < smallest[j];
        smallest[j] = nearer ? distance : smallest[j];
        code[j] = nearer ? candidate : code[j];
        position[j] = nearer ? k : position[j];
      }
    }
  }

  QLAE_DEVICE int index_at(int, int position) const { return position; }

 private:
  QLAE_DEVICE void find_by_definition(const Value (&z)[kVector], int (&position)[kVector],
                                      Value (&code)[kVector]) const {
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      position[j] = codebook.nearest(z[j], local_latent[j]);
      code[j] = codebook.row(local_latent[j])[position[j]];
    }
  }
};

// The codebook as it is, in device memory. A position is an index.
struct GlobalSearch {
  static constexpr Search kKind = Search::kGlobal;
  WindowCodebook codebook;
  int local_latent[kVector];

  template <class Parameters>
  QLAE_DEVICE GlobalSearch(const Parameters& parameters, const Block& block, const Columns& columns, unsigned char*)
      : codebook(parameters, block) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) local_latent[j] = columns.local_latent[j];
  }

  QLAE_DEVICE void find(const Value (&z)[kVector], int (&position)[kVector], Value (&code)[kVector]) const {
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      position[j] = codebook.nearest(z[j], local_latent[j]);
      code[j] = codebook.row(local_latent[j])[position[j]];
    }
  }

  QLAE_DEVICE int index_at(int, int position) const { return position; }
};

// Sorted codes and the boundaries between them in shared memory, [latent][position]; a position is that of a sorted
// code. Of equal codes, the one with the smallest index comes last and is the only one that is found.
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
  int offset[kVector];
  Value bound[kVector];

  template <class Parameters>
  QLAE_DEVICE SortedSearch(const Parameters& parameters, const Block& block, const Columns& columns,
                           unsigned char* memory)
      : codebook(parameters, block),
        codes(reinterpret_cast<Value*>(memory)),
        latents(block.num_latents),
        pitch(parameters.plan.table_pitch),
        levels(parameters.plan.table_levels) {
    boundaries = codes + latents * pitch;
    bounds = boundaries + latents * pitch;
    order = reinterpret_cast<uint16_t*>(bounds + latents);
    load_codes();
    __syncthreads();
    if (__syncthreads_or(is_unsorted())) sort();
    find_boundaries();
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      offset[j] = columns.local_latent[j] * pitch;
      bound[j] = bounds[columns.local_latent[j]];
    }
  }

  QLAE_DEVICE void find(const Value (&z)[kVector], int (&position)[kVector], Value (&code)[kVector]) const {
#pragma unroll
    for (int j = 0; j < kVector; ++j) position[j] = offset[j];
    for (int step = levels / 2; step > 0; step /= 2) {
#pragma unroll
      for (int j = 0; j < kVector; ++j)
        if (z[j] >= boundaries[position[j] + step - 1]) position[j] += step;
    }
    bool exception = false;
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      code[j] = codes[position[j]];
      position[j] -= offset[j];
      exception |= !(absolute(z[j]) <= bound[j]);
    }
    if (exception) find_exceptions(z, position, code);
  }

  QLAE_DEVICE int index_at(int latent, int position) const { return order[latent * pitch + position]; }

 private:
  QLAE_DEVICE void find_exceptions(const Value (&z)[kVector], int (&position)[kVector], Value (&code)[kVector]) const {
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      if (absolute(z[j]) <= bound[j]) continue;
      const int latent = offset[j] / pitch;
      const int index = codebook.nearest(z[j], latent);
      int at = 0;
      while (order[offset[j] + at] != index) ++at;
      position[j] = at;
      code[j] = codebook.row(latent)[index];
    }
  }

  // A warp per latent. Padding sorts behind all codes. Codes that are not finite are not sorted: all is an exception.
  QLAE_DEVICE void load_codes() {
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
    for (int latent = static_cast<int>(threadIdx.x) / kLanes; latent < latents;
         latent += static_cast<int>(blockDim.x) / kLanes) {
      const int count = codebook.num_codes(latent);
      bool finite = true;
      for (int k = lane; k < levels; k += kLanes) {
        const Value value = k < count ? codebook.row(latent)[k] : infinity();
        finite &= k >= count || is_finite(value);
        codes[latent * pitch + k] = value;
        order[latent * pitch + k] = static_cast<uint16_t>(k < count ? k : levels - 1 - (k - count));
      }
      finite = __all_sync(kAllLanes, finite);
      if (lane == 0) bounds[latent] = finite ? Value(0) : Value(-1);
      if (finite) continue;
      for (int k = lane; k < levels; k += kLanes) {
        codes[latent * pitch + k] = static_cast<Value>(k);
        order[latent * pitch + k] = static_cast<uint16_t>(k);
      }
    }
  }

  QLAE_DEVICE bool comes_before(int a, int b) const {
    return codes[a] < codes[b] || (codes[a] == codes[b] && order[a] > order[b]);
  }

  QLAE_DEVICE int is_unsorted() const {
    int unsorted = 0;
    for (int i = static_cast<int>(threadIdx.x); i < latents * levels; i += static_cast<int>(blockDim.x)) {
      const int latent = i / levels, k = i - latent * levels;
      const int at = latent * pitch + k;
      if (k + 1 < levels) unsorted |= comes_before(at + 1, at);
    }
    return unsorted;
  }

  // Bitonic sort of every latent's codes at once.
  QLAE_DEVICE void sort() {
    const int pairs = levels / 2;
    for (int size = 2; size <= levels; size *= 2) {
      for (int distance = size / 2; distance > 0; distance /= 2) {
        for (int i = static_cast<int>(threadIdx.x); i < latents * pairs; i += static_cast<int>(blockDim.x)) {
          const int latent = i / pairs, pair = i - latent * pairs;
          const int low = 2 * pair - (pair & (distance - 1));
          const int a = latent * pitch + low, b = a + distance;
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

  // boundaries[m]: the smallest z that belongs behind position m. A warp per latent.
  QLAE_DEVICE void find_boundaries() {
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
    for (int latent = static_cast<int>(threadIdx.x) / kLanes; latent < latents;
         latent += static_cast<int>(blockDim.x) / kLanes) {
      const int count = codebook.num_codes(latent);
      const Value* own = codes + latent * pitch;
      const bool finite = bounds[latent] == Value(0);
      Value gap = FloatLimits<Value>::kMax;
      for (int m = lane; m + 1 < levels; m += kLanes) {
        const bool between_codes = finite && m + 1 < count;
        boundaries[latent * pitch + m] = between_codes ? boundary_behind(latent, m, count) : infinity();
        if (between_codes && own[m + 1] != own[m]) gap = min(gap, own[m + 1] - own[m]);
      }
      for (int distance = kLanes / 2; distance > 0; distance /= 2)
        gap = min(gap, __shfl_xor_sync(kAllLanes, gap, distance));
      if (lane == 0 && finite) bounds[latent] = exact_bound(max(absolute(own[0]), absolute(own[count - 1])), gap);
      __syncwarp();
    }
  }

  // Within equal codes the boundary is that before all of them, so that the search ends at the last.
  QLAE_DEVICE Value boundary_behind(int latent, int m, int count) const {
    const Value* own = codes + latent * pitch;
    const uint16_t* own_order = order + latent * pitch;
    const Value upper = own[m + 1];
    int first = m + 1, last = m + 1;
    while (first > 0 && own[first - 1] == upper) --first;
    while (last + 1 < count && own[last + 1] == upper) ++last;
    if (first == 0) return -infinity();
    return threshold_between(own[first - 1], upper, own_order[last] < own_order[first - 1]);
  }
};

// The sum over the block's threads in a fixed order, in thread 0; `scratch` holds a number per warp.
QLAE_DEVICE double sum_of_block(double value, double* scratch) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  for (int distance = kLanes / 2; distance > 0; distance /= 2) value += __shfl_down_sync(kAllLanes, value, distance);
  if (lane == 0) scratch[threadIdx.x / kLanes] = value;
  __syncthreads();
  if (threadIdx.x >= kLanes) return 0;
  value = lane < static_cast<int>(blockDim.x) / kLanes ? scratch[lane] : 0.0;
  for (int distance = kLanes / 2; distance > 0; distance /= 2) value += __shfl_down_sync(kAllLanes, value, distance);
  return value;
}

// Whether this block is the last of `blocks` that arrive at the counter, with all that the others wrote before visible.
// Leaves the counter at 0.
QLAE_DEVICE bool is_last_to_arrive(uint32_t* counter, int blocks, int* scratch) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0)
    *scratch = atomicInc(counter, static_cast<uint32_t>(blocks - 1)) == static_cast<uint32_t>(blocks - 1);
  __syncthreads();
  const bool last = *scratch != 0;
  __threadfence();
  return last;
}

template <class SearchKind>
__global__ void __launch_bounds__(kMaxForwardThreads) forward_kernel(const __grid_constant__ ForwardParameters parameters) {
  unsigned char* memory = qlae_dynamic_shared_memory();
  const Geometry& geometry = parameters.plan.geometry;
  const ForwardPointers& pointers = parameters.pointers;
  const bool aligned = parameters.aligned;
  const Block block(geometry);
  const Columns columns = columns_of_thread(geometry, block);
  const SearchKind search(parameters, block, columns, memory + kScratchBytes);

  double squared_error = 0;
  const uint32_t rows_of_step = static_cast<uint32_t>(geometry.chunks) * geometry.stack;
  for (uint32_t row = block.chunk * geometry.stack; row < geometry.rows; row += kRowsAtOnce * rows_of_step) {
    uint4 raw[kRowsAtOnce];
    Place place[kRowsAtOnce];
#pragma unroll
    for (int u = 0; u < kRowsAtOnce; ++u) {
      place[u] = place_of(geometry, block, columns, row + columns.row + u * rows_of_step);
      raw[u] = load_vector(pointers.z, place[u], aligned);
    }
    Value sum = 0;
#pragma unroll
    for (int u = 0; u < kRowsAtOnce; ++u) {
      Value z[kVector], code[kVector];
      int position[kVector];
      unpack(raw[u], z);
      search.find(z, position, code);
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        if (!is_finite(z[j])) code[j] = not_a_number();
        const Value residual = j < place[u].count ? z[j] - code[j] : Value(0);
        sum += residual * residual;
        if constexpr (SearchKind::kKind == Search::kSorted)
          position[j] = search.order[search.offset[j] + position[j]];
      }
      store_values(pointers.quantized, place[u], code, aligned);
      if (pointers.indices) store_indices(pointers.indices, parameters.index_type, place[u], position, aligned);
    }
    squared_error += static_cast<double>(sum);
  }

  double* scratch = reinterpret_cast<double*>(memory);
  double total = sum_of_block(squared_error, scratch);
  if (parameters.plan.counts) {
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

// Adds each lane's residual to its bin; lanes that share a bin take turns in the order of lanes.
QLAE_DEVICE void add_in_turns(Value* bins, int bin, Value residual, bool exists) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  // Lanes without a residual share nothing.
  const unsigned key = exists ? static_cast<unsigned>(bin) : 0x80000000u + static_cast<unsigned>(lane);
  const unsigned peers = __match_any_sync(kAllLanes, key);
  const unsigned turn = static_cast<unsigned>(__popc(peers & ((1u << lane) - 1)));
  const unsigned turns = __reduce_max_sync(kAllLanes, turn) + 1;
  for (unsigned now = 0; now < turns; ++now) {
    if (exists && turn == now) bins[bin] += residual;
    __syncwarp();
  }
}

// The residuals' sums of one latent and position over the threads that own columns of the latent. `lanes` lanes, a
// power of two, work together and all return it.
QLAE_DEVICE Value sum_of_thread_bins(const Plan& plan, const Value* bins, int latent, int position, int lanes,
                                     bool exists) {
  const Geometry& geometry = plan.geometry;
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  Value sum = 0;
  if (exists && plan.slots == 1) {
    const Value* bin = bins + position * plan.bins_pitch;
    for (int member = lane; member < plan.members; member += lanes) sum += bin[member];
  } else if (exists) {
    const int columns = plan.classes * kVector;
    for (int first = latent * geometry.column_inner; first < columns; first += geometry.column_period) {
      for (int column = first; column < first + geometry.column_inner && column < columns; ++column) {
        const int owner = column / kVector, slot = column % kVector;
        const Value* bin =
            bins + (slot * plan.num_codes + position) * plan.bins_pitch + owner * plan.member_pitch;
        for (int member = lane; member < plan.members; member += lanes) sum += bin[member];
      }
      if (geometry.column_period > columns - first) break;
    }
  }
  for (int distance = lanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
  return sum;
}

// Calls result(latent * num_codes + position, sum) for every sum of the block.
template <Bins kBins, class Result>
QLAE_DEVICE void for_each_sum(const Plan& plan, const Block& block, const Value* bins, Result result) {
  const int outputs = block.num_latents * plan.num_codes;
  if constexpr (kBins == Bins::kThread) {
    int lanes = 1;
    while (2 * lanes <= min(plan.members, kLanes)) lanes *= 2;
    const int teams = static_cast<int>(blockDim.x) / lanes;
    // All lanes of a warp take part in every round.
    for (int first = 0; first < outputs; first += teams) {
      const int output = first + static_cast<int>(threadIdx.x) / lanes;
      const int latent = output / plan.num_codes, position = output - latent * plan.num_codes;
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
    double sum = 0;
#pragma unroll 8
    for (int part = 0; part < count; ++part) sum += static_cast<double>(__ldcg(parts + part * pitch + output));
    result(output, sum);
  }
}

// Adds up the sums of all blocks of a window in two steps, each by the block that arrives last, and writes the
// gradient of the window's codes.
template <Bins kBins, class SearchKind>
QLAE_DEVICE void reduce_codebook_gradient(const BackwardParameters& parameters, const Block& block,
                                          const SearchKind& search, const Value* bins, double scale, int* scratch) {
  const Plan& plan = parameters.plan;
  const Geometry& geometry = plan.geometry;
  const int outputs = block.num_latents * plan.num_codes;
  const int64_t pitch = int64_t{geometry.window_latents} * plan.num_codes;
  Value* gradient = static_cast<Value*>(parameters.pointers.grad_codebook) +
                    block.first_latent * parameters.codebook_stride;
  const auto write = [&](int output, double sum) {
    const int latent = output / plan.num_codes, position = output - latent * plan.num_codes;
    if (position >= search.codebook.num_codes(latent)) return;
    gradient[latent * parameters.codebook_stride + search.index_at(latent, position)] =
        static_cast<Value>(0.0 - scale * sum);
  };
  const auto write_padding = [&] {
    for (int64_t i = threadIdx.x; i < block.num_latents * parameters.codebook_stride; i += blockDim.x) {
      const int latent = static_cast<int>(i / parameters.codebook_stride);
      if (i - latent * parameters.codebook_stride >= search.codebook.num_codes(latent)) gradient[i] = 0;
    }
  };
  if (geometry.chunks == 1) {
    write_padding();
    return for_each_sum<kBins>(plan, block, bins, write);
  }

  Value* parts = static_cast<Value*>(parameters.pointers.workspace) + block.window * geometry.chunks * pitch;
  Value* group_parts = static_cast<Value*>(parameters.pointers.workspace) +
                       (int64_t{geometry.windows} * geometry.chunks + block.window * plan.groups) * pitch;
  uint32_t* counters = parameters.pointers.counters + block.window * (plan.groups + 1);
  for_each_sum<kBins>(plan, block, bins,
                      [&](int output, Value sum) { parts[block.chunk * pitch + output] = sum; });
  const int group = block.chunk / plan.fan;
  const int members = min(plan.fan, geometry.chunks - group * plan.fan);
  if (!is_last_to_arrive(counters + group, members, scratch)) return;
  for_each_sum_of_parts(parts + group * plan.fan * pitch, members, pitch, outputs, [&](int output, double sum) {
    group_parts[group * pitch + output] = static_cast<Value>(sum);
  });
  if (!is_last_to_arrive(counters + plan.groups, plan.groups, scratch)) return;
  write_padding();
  for_each_sum_of_parts(group_parts, plan.groups, pitch, outputs, write);
}

template <class SearchKind, Bins kBins>
__global__ void __launch_bounds__(kMaxBackwardThreads) backward_kernel(const __grid_constant__ BackwardParameters parameters) {
  unsigned char* memory = qlae_dynamic_shared_memory();
  const Plan& plan = parameters.plan;
  const Geometry& geometry = plan.geometry;
  const BackwardPointers& pointers = parameters.pointers;
  const bool aligned = parameters.aligned;
  const Block block(geometry);
  const Columns columns = columns_of_thread(geometry, block);
  const int thread = static_cast<int>(threadIdx.x);

  // All bins of the block, and the part of them that this thread adds to.
  Value* bins = reinterpret_cast<Value*>(memory + kScratchBytes + plan.table_bytes);
  Value* own_bins;
  if constexpr (kBins == Bins::kThread) {
    const int active = geometry.row_threads * geometry.stack;
    own_bins = bins + (thread % plan.classes) * plan.member_pitch + thread / plan.classes;
    if (thread < active)
      for (int bin = 0; bin < plan.slots * plan.num_codes; ++bin) own_bins[bin * plan.bins_pitch] = 0;
  } else {
    const int warps = static_cast<int>(blockDim.x) / kLanes;
    if constexpr (kBins == Bins::kGlobal) {
      const int64_t results = int64_t{geometry.windows} * (plan.counts ? geometry.chunks + plan.groups : 0) *
                              geometry.window_latents * plan.num_codes;
      bins = static_cast<Value*>(pointers.workspace) + results +
             static_cast<int64_t>(blockIdx.x) * warps * plan.bins_pitch;
    }
    own_bins = bins + static_cast<int64_t>(thread / kLanes) * plan.bins_pitch;
    for (int bin = thread % kLanes; bin < plan.bins_pitch; bin += kLanes) own_bins[bin] = 0;
  }
  const SearchKind search(parameters, block, columns, memory + kScratchBytes);
  __syncwarp();

  const double grad_loss = static_cast<double>(*static_cast<const Value*>(pointers.grad_loss));
  const Value scale = static_cast<Value>(grad_loss * parameters.commitment_scale);
  const uint32_t rows_of_step = static_cast<uint32_t>(geometry.chunks) * geometry.stack;
  for (uint32_t row = block.chunk * geometry.stack; row < geometry.rows; row += kRowsAtOnce * rows_of_step) {
    uint4 raw[kRowsAtOnce], raw_gradient[kRowsAtOnce];
    Place place[kRowsAtOnce];
#pragma unroll
    for (int u = 0; u < kRowsAtOnce; ++u) {
      place[u] = place_of(geometry, block, columns, row + columns.row + u * rows_of_step);
      raw[u] = load_vector(pointers.z, place[u], aligned);
      raw_gradient[u] = make_uint4(0, 0, 0, 0);
      if (pointers.grad_quantized && pointers.grad_z)
        raw_gradient[u] = load_vector(pointers.grad_quantized, place[u], aligned);
    }
#pragma unroll
    for (int u = 0; u < kRowsAtOnce; ++u) {
      Value z[kVector], code[kVector], gradient[kVector];
      int position[kVector];
      unpack(raw[u], z);
      unpack(raw_gradient[u], gradient);
      search.find(z, position, code);
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        // From here on `code` holds the residual.
        code[j] = is_finite(z[j]) ? z[j] - code[j] : not_a_number();
        gradient[j] += scale * code[j];
      }
      if (pointers.grad_z) store_values(pointers.grad_z, place[u], gradient, aligned);
      if (!pointers.grad_codebook) continue;
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        const bool exists = j < place[u].count;
        if constexpr (kBins == Bins::kThread) {
          const int slot = plan.slots == 1 ? 0 : j;
          if (exists) own_bins[(slot * plan.num_codes + position[j]) * plan.bins_pitch] += code[j];
        } else {
          add_in_turns(own_bins, columns.local_latent[j] * plan.num_codes + position[j], code[j], exists);
        }
      }
    }
  }
  if (!pointers.grad_codebook) return;
  __syncthreads();
  reduce_codebook_gradient<kBins>(parameters, block, search, bins, grad_loss * parameters.quantization_scale,
                                  reinterpret_cast<int*>(memory));
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
  if (plan.search == Search::kDirect) return backward_kernel<DirectSearch, Bins::kThread>;
  return backward_kernel<SortedSearch, Bins::kThread>;
}

void forward(const ForwardParameters& parameters, void* stream) {
  launch(forward_kernel_for(parameters.plan), parameters, stream);
}

void backward(const BackwardParameters& parameters, void* stream) {
  launch(backward_kernel_for(parameters.plan), parameters, stream);
}

void allow_shared_memory(const Plan& plan, bool backward, int64_t most) {
  const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
  const int bytes = static_cast<int>(most);
  check(backward ? cudaFuncSetAttribute(backward_kernel_for(plan), attribute, bytes)
                 : cudaFuncSetAttribute(forward_kernel_for(plan), attribute, bytes),
        "asking for shared memory");
}

}  // namespace

const Kernels QLAE_KERNELS{forward, backward, allow_shared_memory};

}  // namespace qlae::cuda
