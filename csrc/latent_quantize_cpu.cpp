// Prepares the search tables, splits the work over threads, and adds up what the parts return. The number of parts
// depends on sizes alone, so that results do not depend on the number of threads.
#include "latent_quantize_cpu.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <stdexcept>
#include <type_traits>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "latent_quantize_cpu_kernels.h"

namespace qlae {
namespace {

using cpu::BackwardWork;
using cpu::ForwardWork;
using cpu::Kernels;
using cpu::Search;
using cpu::Traversal;
using cpu::Work;

// Measured crossovers (docs/latent_quantize.md): samples per latent that repay sorting, codes that repay cells.
constexpr int64_t kMinSamplesToSort = 512;
constexpr int64_t kMaxThresholdCodes = 24;
constexpr int64_t kMaxParts = 64;
constexpr int64_t kMinElementsPerPart = 16384;
constexpr int64_t kMaxPartialBytes = int64_t{64} << 20;
constexpr int64_t kStreamBytes = int64_t{4} << 20;
constexpr int64_t kHugePageBytes = int64_t{2} << 20;

// Hands out zero-initialised arrays that live until it dies. A small block is kept per thread, so that a call on a
// small tensor allocates nothing.
class Workspace {
 public:
  ~Workspace() {
    for (const auto& [pointer, bytes] : blocks_) ::operator delete(pointer, std::align_val_t{kAlignment});
  }

  template <class T>
  T* zeros(int64_t count) {
    const int64_t bytes = (count * int64_t{sizeof(T)} + kAlignment - 1) / kAlignment * kAlignment;
    std::byte* block = used_ + bytes <= kKept ? kept() + used_ : allocate(bytes);
    used_ += used_ + bytes <= kKept ? bytes : 0;
    std::memset(block, 0, bytes);
    return reinterpret_cast<T*>(block);
  }

 private:
  static constexpr int64_t kAlignment = 64;
  static constexpr int64_t kKept = int64_t{64} << 10;

  static std::byte* kept() {
    alignas(kAlignment) static thread_local std::byte block[kKept];
    return block;
  }
  std::byte* allocate(int64_t bytes) {
    auto* block = static_cast<std::byte*>(::operator new(bytes, std::align_val_t{kAlignment}));
    blocks_.emplace_back(block, bytes);
    return block;
  }

  int64_t used_ = 0;
  std::vector<std::pair<std::byte*, int64_t>> blocks_;
};

const Kernels*& active_kernels() {
  static const Kernels* active = nullptr;
  return active;
}

std::vector<const Kernels*> runnable_kernels() {
  std::vector<const Kernels*> runnable{&cpu::kBaselineKernels};
#ifdef QLAE_X86_VARIANTS
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2) runnable.push_back(&cpu::kAvx2Kernels);
  if (avx512) runnable.push_back(&cpu::kAvx512Kernels);
#endif
  return runnable;
}

const Kernels& kernels() {
  if (!active_kernels()) active_kernels() = runnable_kernels().back();
  return *active_kernels();
}

// How z is traversed, and which codebook row each lane of each column belongs to.
Traversal plan_traversal(const LatentLayout& layout, int64_t lanes) {
  const int64_t period = layout.num_latents * layout.inner;
  const bool runs = layout.inner >= 4 * lanes || (layout.inner > 1 && period > 16384);
  if (runs) {
    const int64_t length = 4096;
    const int64_t units = layout.outer * layout.num_latents * ((layout.inner + length - 1) / length);
    return {false, layout.size(), layout.inner, layout.num_latents, length, units};
  }
  // Short periods repeat until they fill whole vectors; for long ones a partial vector per period costs less.
  const int64_t segment = period < 128 ? std::lcm(period, lanes) : period;
  const int64_t used = std::min(segment, layout.size());
  const int64_t length = std::clamp<int64_t>(8192 / segment, 4, 256);
  const int64_t units = std::max<int64_t>(1, (layout.size() / segment + length - 1) / length);
  return {true, layout.size(), segment, (used + lanes - 1) / lanes, length, units};
}

template <class T>
bool is_nearer(T z, T lower, T upper, bool upper_wins_tie) {
  return upper_wins_tie ? upper - z <= z - lower : upper - z < z - lower;
}

// Floats in their numeric order as consecutive integers.
template <class T>
auto to_ordered(T value) {
  using I = typename cpu::VectorIndex<T>::type;
  const I bits = std::bit_cast<I>(value);
  return bits < 0 ? std::numeric_limits<I>::min() - bits : bits;
}

template <class T>
T from_ordered(typename cpu::VectorIndex<T>::type order) {
  using I = typename cpu::VectorIndex<T>::type;
  return std::bit_cast<T>(order < 0 ? static_cast<I>(std::numeric_limits<I>::min() - order) : order);
}

// The smallest z in (lower, upper] that is assigned to `upper`. The predicate is monotone there: both distances are,
// in rounded arithmetic too. It mostly flips within a few units in the last place of the midpoint.
template <class T>
T threshold_between(T lower, T upper, bool upper_wins_tie) {
  auto low = to_ordered(lower), high = to_ordered(upper);
  const auto middle = to_ordered(lower + (upper - lower) / 2);
  for (auto near : {middle - 2, middle + 2}) {
    if (near <= low || near >= high) continue;
    (is_nearer(from_ordered<T>(near), lower, upper, upper_wins_tie) ? high : low) = near;
  }
  while (high - 1 != low) {
    const auto half = std::midpoint(low, high);
    (is_nearer(from_ordered<T>(half), lower, upper, upper_wins_tie) ? high : low) = half;
  }
  return from_ordered<T>(high);
}

// The distinct codes of one row in ascending order, each under its smallest index, with the boundaries between them.
template <class T>
struct SortedCodes {
  std::vector<T> values;
  std::vector<int64_t> indices;
  std::vector<T> thresholds;
  T bound;

  SortedCodes(const T* codes, int64_t count) {
    std::vector<int64_t> order(count);
    std::iota(order.begin(), order.end(), int64_t{0});
    const bool finite = std::all_of(codes, codes + count, [](T code) { return std::isfinite(code); });
    if (finite) std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return codes[a] < codes[b]; });
    for (const int64_t index : order) {
      if (finite && !values.empty() && values.back() == codes[index]) continue;
      values.push_back(codes[index]);
      indices.push_back(index);
    }
    bound = finite ? exact_bound() : T(-1);
    thresholds.assign(values.size(), std::numeric_limits<T>::infinity());
    for (size_t rank = 1; finite && rank < values.size(); ++rank)
      thresholds[rank] = threshold_between(values[rank - 1], values[rank], indices[rank] < indices[rank - 1]);
  }

 private:
  // Up to this |z| two codes on the same side of z differ in distance by more than the spacing of such distances, so
  // only the two neighbours of z compete. Negative if nowhere.
  T exact_bound() const {
    const T magnitude = std::max(std::abs(values.front()), std::abs(values.back()));
    const T limit = std::numeric_limits<T>::max() / 4;
    T gap = limit;
    for (size_t rank = 1; rank < values.size(); ++rank) gap = std::min(gap, values[rank] - values[rank - 1]);
    if (magnitude > limit) return T(-1);
    const T reach = std::min(limit, gap * (T(0.5) / std::numeric_limits<T>::epsilon()));
    return reach > magnitude ? reach - magnitude : T(-1);
  }
};

template <class T>
void fill_direct(Work<T>& work, int64_t codebook_row, int64_t rows, std::vector<T>& values,
                 std::vector<int64_t>& indices) {
  const T* codes = static_cast<const T*>(work.codebook.values) + codebook_row * work.codebook.stride;
  const int64_t count = work.codebook.num_codes(codebook_row);
  const T nan = std::numeric_limits<T>::quiet_NaN();
  values.assign(rows, nan);
  indices.assign(rows, -1);
  const int64_t first_nan = std::find_if(codes, codes + count, [](T code) { return std::isnan(code); }) - codes;
  if (first_nan < count) {
    // Every finite z is assigned to the first NaN, every other z to index 0.
    indices[0] = first_nan;
    if (first_nan > 0) indices[1] = 0;
    return;
  }
  std::copy(codes, codes + count, values.begin());
  std::iota(indices.begin(), indices.begin() + count, int64_t{0});
}

// Tables of kDirect and kThresholds: one row's codes repeated into every lane that uses them.
template <class T>
void build_column_tables(Work<T>& work, Workspace& workspace, int64_t lanes, int64_t max_codes) {
  using Index = typename cpu::VectorIndex<T>::type;
  const int64_t columns = work.traversal.columns;
  const int64_t entries = columns * max_codes * lanes;
  T* values = workspace.zeros<T>(entries);
  Index* indices = workspace.zeros<Index>(entries);
  const bool sorted = work.search == Search::kThresholds;
  T* thresholds = sorted ? workspace.zeros<T>(entries) : nullptr;
  T* bounds = sorted ? workspace.zeros<T>(columns * lanes) : nullptr;
  const Index* codebook_rows = work.columns.codebook_rows;

  std::vector<std::vector<int64_t>> positions(work.codebook.rows);
  for (int64_t position = 0; position < columns * lanes; ++position)
    positions[codebook_rows[position]].push_back(position);

  std::vector<T> row_values, row_thresholds(max_codes);
  std::vector<int64_t> row_indices;
  for (int64_t codebook_row = 0; codebook_row < work.codebook.rows; ++codebook_row) {
    T bound = 0;
    if (sorted) {
      const T* codes = static_cast<const T*>(work.codebook.values) + codebook_row * work.codebook.stride;
      SortedCodes<T> sorted_codes(codes, work.codebook.num_codes(codebook_row));
      row_values = std::move(sorted_codes.values);
      row_indices = std::move(sorted_codes.indices);
      row_thresholds = std::move(sorted_codes.thresholds);
      row_values.resize(max_codes, T(0));
      row_indices.resize(max_codes, -1);
      row_thresholds.resize(max_codes, std::numeric_limits<T>::infinity());
      bound = sorted_codes.bound;
    } else {
      fill_direct(work, codebook_row, max_codes, row_values, row_indices);
    }
    for (const int64_t position : positions[codebook_row]) {
      const int64_t at = position / lanes * max_codes * lanes + position % lanes;
      for (int64_t row = 0; row < max_codes; ++row) {
        values[at + row * lanes] = row_values[row];
        indices[at + row * lanes] = static_cast<Index>(row_indices[row]);
        if (sorted) thresholds[at + row * lanes] = row_thresholds[row];
      }
      if (sorted) bounds[position] = bound;
    }
  }
  work.columns.rows = max_codes;
  work.columns.values = values;
  work.columns.indices = indices;
  work.columns.thresholds = thresholds;
  work.columns.bounds = bounds;
}

template <class T>
void build_cell_tables(Work<T>& work, Workspace& workspace, int64_t lanes, int64_t max_codes) {
  using Index = typename cpu::VectorIndex<T>::type;
  const int64_t rows = work.codebook.rows;
  const int64_t cells = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(2 * max_codes)));
  // The binary search may look this far beyond the last boundary.
  const int64_t stride = 2 * max_codes;
  Index* starts = workspace.zeros<Index>(rows * cells);
  T* values = workspace.zeros<T>(rows * stride);
  T* thresholds = workspace.zeros<T>(rows * stride);
  Index* indices = workspace.zeros<Index>(rows * stride);
  T* origins = workspace.zeros<T>(rows);
  T* scales = workspace.zeros<T>(rows);
  std::vector<T> row_bounds(rows);
  std::fill(thresholds, thresholds + rows * stride, std::numeric_limits<T>::infinity());
  int64_t most_in_one_cell = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const T* codes = static_cast<const T*>(work.codebook.values) + row * work.codebook.stride;
    const SortedCodes<T> sorted(codes, work.codebook.num_codes(row));
    const int64_t count = static_cast<int64_t>(sorted.values.size());
    row_bounds[row] = sorted.bound;
    if (sorted.bound < T(0)) continue;
    std::copy(sorted.values.begin(), sorted.values.end(), values + row * stride);
    std::copy(sorted.thresholds.begin(), sorted.thresholds.end(), thresholds + row * stride);
    std::copy(sorted.indices.begin(), sorted.indices.end(), indices + row * stride);
    const T width = sorted.values.back() - sorted.values.front();
    origins[row] = sorted.values.front();
    scales[row] = width > T(0) && std::isfinite(static_cast<T>(cells) / width) ? static_cast<T>(cells) / width : T(0);
    // The same arithmetic as the kernels': monotone in z, so a boundary in an earlier cell lies below z.
    int64_t rank = 0;
    for (int64_t cell = 0; cell < cells; ++cell) {
      starts[row * cells + cell] = static_cast<Index>(rank);
      const int64_t before = rank;
      while (rank + 1 < count) {
        const T place = (sorted.thresholds[rank + 1] - origins[row]) * scales[row];
        const T clamped = std::min(place > T(0) ? place : T(0), static_cast<T>(cells - 1));
        if (static_cast<int64_t>(clamped) != cell) break;
        ++rank;
      }
      most_in_one_cell = std::max(most_in_one_cell, rank - before);
    }
  }
  const int64_t positions = work.traversal.columns * lanes;
  T* bounds = workspace.zeros<T>(positions);
  for (int64_t position = 0; position < positions; ++position)
    bounds[position] = row_bounds[work.columns.codebook_rows[position]];
  work.columns.bounds = bounds;
  work.cells = {cells,   stride,  static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(most_in_one_cell))),
                starts,  values,  thresholds,
                indices, origins, scales};
}

Search choose_search(int64_t samples, int64_t max_codes) {
  if (samples < kMinSamplesToSort) return Search::kDirect;
  return max_codes <= kMaxThresholdCodes ? Search::kThresholds : Search::kCells;
}

int64_t max_num_codes(const CodebookView& codebook) {
  if (!codebook.levels) return codebook.stride;
  return *std::max_element(codebook.levels, codebook.levels + codebook.rows);
}

template <class T>
void prepare(Work<T>& work, Workspace& workspace, LatentLayout layout, const CodebookView& codebook) {
  using Index = typename cpu::VectorIndex<T>::type;
  // A shared codebook makes all elements alike.
  if (codebook.rows == 1) layout = {1, 1, layout.size()};
  const int64_t lanes = kernels().vector_bytes / static_cast<int64_t>(sizeof(T));
  const int64_t max_codes = max_num_codes(codebook);
  work.codebook = codebook;
  work.traversal = plan_traversal(layout, lanes);
  work.search = choose_search(layout.outer * layout.inner, max_codes);
  Index* codebook_rows = workspace.zeros<Index>(work.traversal.columns * lanes);
  const int64_t period = layout.num_latents * layout.inner;
  for (int64_t position = 0; position < work.traversal.columns * lanes; ++position) {
    const int64_t latent = work.traversal.periodic ? position % period / layout.inner : position / lanes;
    codebook_rows[position] = static_cast<Index>(latent);
  }
  work.columns.codebook_rows = codebook_rows;
  if (work.search == Search::kCells) {
    build_cell_tables(work, workspace, lanes, max_codes);
  } else {
    build_column_tables(work, workspace, lanes, max_codes);
  }
}

int64_t count_parts(const Traversal& traversal, int64_t partial_bytes) {
  const int64_t by_size = traversal.size / kMinElementsPerPart;
  const int64_t by_memory = kMaxPartialBytes / std::max<int64_t>(1, partial_bytes);
  return std::clamp<int64_t>(std::min({by_size, by_memory, traversal.units}), 1, kMaxParts);
}

int64_t element_bytes(ValueType type) { return type == ValueType::kFloat64 ? 8 : type == ValueType::kFloat32 ? 4 : 2; }

int64_t index_bytes(IndexType type) {
  constexpr int64_t kBytes[] = {1, 2, 4, 8};
  return kBytes[static_cast<int>(type)];
}

// Whole aligned vectors only, and outputs that the cache would not keep.
template <class T>
bool may_stream(const Work<T>& work, std::initializer_list<const void*> outputs, int64_t bytes) {
  const int64_t lanes = kernels().vector_bytes / static_cast<int64_t>(sizeof(T));
  const bool aligned = std::all_of(outputs.begin(), outputs.end(),
                                   [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 64 == 0; });
  return aligned && bytes >= kStreamBytes && work.traversal.segment % lanes == 0;
}

// Fresh large outputs are touched page by page: huge pages cost a fraction of the faults.
void prefer_huge_pages([[maybe_unused]] void* pointer, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (!pointer || bytes < 2 * kHugePageBytes) return;
  const auto begin = (reinterpret_cast<uintptr_t>(pointer) + 4095) / 4096 * 4096;
  const auto end = (reinterpret_cast<uintptr_t>(pointer) + bytes) / 4096 * 4096;
  // Advice: a kernel that declines it serves small pages, and nothing else changes.
  (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Calls body(part) for every part; parts are independent.
template <class Body>
void for_each_part(int64_t parts, int threads, Body body) {
  const int team = static_cast<int>(std::min<int64_t>(parts, std::max(threads, 1)));
  if (team == 1) {
    for (int64_t part = 0; part < parts; ++part) body(part);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(team)
  for (int64_t part = 0; part < parts; ++part) body(part);
}

template <class W>
void assign_units(W& work, int64_t part, int64_t parts) {
  work.unit_begin = work.traversal.units * part / parts;
  work.unit_end = work.traversal.units * (part + 1) / parts;
}

template <class T>
void forward(const ForwardArguments& arguments, void (*kernel)(const ForwardWork<T>&)) {
  const int64_t size = arguments.layout.size();
  double squared_error = 0;
  if (size > 0) {
    Workspace workspace;
    ForwardWork<T> work{};
    work.arguments = &arguments;
    prepare<T>(work, workspace, arguments.layout, arguments.codebook);
    work.stream =
        may_stream(work, {arguments.quantized, arguments.indices}, size * element_bytes(arguments.value_type));
    prefer_huge_pages(arguments.quantized, size * element_bytes(arguments.value_type));
    prefer_huge_pages(arguments.indices, size * index_bytes(arguments.index_type));
    const int64_t parts = count_parts(work.traversal, sizeof(double));
    double* sums = workspace.zeros<double>(parts);
    for_each_part(parts, arguments.threads, [&](int64_t part) {
      ForwardWork<T> own = work;
      own.squared_error = sums + part;
      assign_units(own, part, parts);
      kernel(own);
    });
    squared_error = std::accumulate(sums, sums + parts, 0.0);
  }
  if (!arguments.loss) return;
  const double mean = size > 0 ? squared_error / static_cast<double>(size) : 0.0;
  *static_cast<T*>(arguments.loss) = static_cast<T>(arguments.loss_weight * mean);
}

template <class T>
void backward(const BackwardArguments& arguments, void (*kernel)(const BackwardWork<T>&)) {
  const int64_t size = arguments.layout.size();
  const int64_t num_codes = arguments.codebook.rows * arguments.codebook.stride;
  T* grad_codebook = static_cast<T*>(arguments.grad_codebook);
  if (grad_codebook) std::fill(grad_codebook, grad_codebook + num_codes, T(0));
  if (size == 0) return;

  Workspace workspace;
  BackwardWork<T> work{};
  const double scale =
      2.0 * static_cast<double>(*static_cast<const T*>(arguments.grad_loss)) / static_cast<double>(size);
  work.arguments = &arguments;
  work.residual_scale = static_cast<T>(scale * arguments.commitment_weight);
  prepare<T>(work, workspace, arguments.layout, arguments.codebook);
  const int64_t value_bytes = size * element_bytes(arguments.value_type);
  work.stream = may_stream(work, {arguments.grad_z}, value_bytes);
  prefer_huge_pages(arguments.grad_z, value_bytes);

  const int64_t parts = count_parts(work.traversal, num_codes * static_cast<int64_t>(sizeof(double)));
  const bool by_row = grad_codebook && work.search != Search::kCells;
  const int64_t scratch_size =
      by_row ? work.traversal.columns * work.columns.rows * (kernels().vector_bytes / static_cast<int64_t>(sizeof(T)))
             : 0;
  double* sums = grad_codebook ? workspace.zeros<double>(parts * num_codes) : nullptr;
  T* scratch = by_row ? workspace.zeros<T>(parts * scratch_size) : nullptr;
  for_each_part(parts, arguments.threads, [&](int64_t part) {
    BackwardWork<T> own = work;
    own.residual_sums = sums ? sums + part * num_codes : nullptr;
    own.scratch = scratch ? scratch + part * scratch_size : nullptr;
    assign_units(own, part, parts);
    kernel(own);
  });
  if (!grad_codebook) return;
  for (int64_t code = 0; code < num_codes; ++code) {
    double sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += sums[part * num_codes + code];
    grad_codebook[code] = static_cast<T>(-scale * arguments.quantization_weight * sum);
  }
}

}  // namespace

void latent_quantize_forward(const ForwardArguments& arguments) {
  if (arguments.value_type == ValueType::kFloat64) return forward<double>(arguments, kernels().forward_double);
  forward<float>(arguments, kernels().forward_float);
}

void latent_quantize_backward(const BackwardArguments& arguments) {
  if (arguments.value_type == ValueType::kFloat64) return backward<double>(arguments, kernels().backward_double);
  backward<float>(arguments, kernels().backward_float);
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels* candidate : runnable_kernels()) names.emplace_back(candidate->name);
  return names;
}

std::string active_instruction_set() { return kernels().name; }

void use_instruction_set(const std::string& name) {
  for (const Kernels* candidate : runnable_kernels()) {
    if (name != candidate->name) continue;
    active_kernels() = candidate;
    return;
  }
  throw std::invalid_argument("instruction set '" + name + "' is not available here");
}

}  // namespace qlae
