// Prepares the search tables, splits the work over threads, and adds up what the parts return. The number of parts
// depends on sizes alone, so that results do not depend on the number of threads.
#include "latent_quantize_cpu.h"

#include <algorithm>
#include <atomic>
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

#include "latent_quantize_cpu_kernels.h"

namespace qlae {
namespace {

using cpu::BackwardWork;
using cpu::ForwardWork;
using cpu::Kernels;
using cpu::Search;
using cpu::Traversal;
using cpu::Work;

// Measured crossovers: samples per latent that repay sorting the codebook (with few codes it takes more of them), and
// codes per vector lane up to which comparing to every boundary is faster than searching in cells.
std::atomic<int64_t> min_samples_to_sort = 512;
constexpr int64_t kMinCodesToSort = 64;
constexpr int64_t kThresholdCodesPerLane = 4;
// Codes per latent up to which summing by table row is faster than adding element by element.
constexpr int64_t kMaxRowsToSum = 64;
constexpr int64_t kMaxPeriodicTable = int64_t{1} << 17;
constexpr int64_t kMaxParts = 64;
constexpr int64_t kMinElementsPerPart = 16384;
constexpr int64_t kMaxPartialBytes = int64_t{64} << 20;
constexpr int64_t kStreamBytes = int64_t{4} << 20;

// Hands out aligned arrays that live until it dies. A small block is kept per thread, so that a call on a
// small tensor allocates nothing.
class Workspace {
 public:
  ~Workspace() {
    for (const auto& [pointer, bytes] : blocks_) ::operator delete(pointer, std::align_val_t{kAlignment});
  }

  template <class T>
  T* zeros(int64_t count) {
    T* block = array<T>(count);
    std::memset(block, 0, count * sizeof(T));
    return block;
  }

  template <class T>
  T* array(int64_t count) {
    const int64_t bytes = (count * int64_t{sizeof(T)} + kAlignment - 1) / kAlignment * kAlignment;
    std::byte* block = used_ + bytes <= kKept ? kept() + used_ : allocate(bytes);
    used_ += used_ + bytes <= kKept ? bytes : 0;
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

// Another thread may choose other kernels at any time: a call reads this once and keeps what it got.
std::atomic<const Kernels*>& active_kernels() {
  static std::atomic<const Kernels*> active = runnable_kernels().back();
  return active;
}

template <class T>
int64_t lanes_of(const Kernels& kernels) {
  return kernels.vector_bytes / static_cast<int64_t>(sizeof(T));
}

// How z is traversed, and which codebook row each lane of each column belongs to.
Traversal plan_traversal(const LatentLayout& layout, int64_t lanes, int64_t max_codes) {
  const int64_t period = layout.num_latents * layout.inner;
  const bool runs = layout.inner >= 4 * lanes || (layout.inner > 1 && period * max_codes > kMaxPeriodicTable);
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
    bound = finite ? exact_bound(std::max(std::abs(values.front()), std::abs(values.back())), smallest_gap()) : T(-1);
    thresholds.assign(values.size(), std::numeric_limits<T>::infinity());
    for (size_t rank = 1; finite && rank < values.size(); ++rank)
      thresholds[rank] = threshold_between(values[rank - 1], values[rank], indices[rank] < indices[rank - 1]);
  }

 private:
  T smallest_gap() const {
    T gap = std::numeric_limits<T>::max();
    for (size_t rank = 1; rank < values.size(); ++rank) gap = std::min(gap, values[rank] - values[rank - 1]);
    return gap;
  }
};

// Calls fill(codebook_row, at) for every lane of every column; entry r of the lane's table is at `at + r * lanes`.
template <class T, class Fill>
void for_each_lane(const Work<T>& work, int64_t lanes, Fill fill) {
  for (int64_t column = 0; column < work.traversal.columns; ++column)
    for (int64_t lane = 0; lane < lanes; ++lane)
      fill(int64_t{work.columns.codebook_rows[column * lanes + lane]}, column * work.columns.rows * lanes + lane);
}

template <class T>
void build_direct_tables(Work<T>& work, Workspace& workspace, int64_t lanes, int64_t max_codes) {
  work.columns.rows = max_codes;
  if (!work.traversal.periodic) return;
  T* values = workspace.array<T>(work.traversal.columns * max_codes * lanes);
  work.columns.values = values;
  for_each_lane(work, lanes, [&](int64_t codebook_row, int64_t at) {
    const T* codes = static_cast<const T*>(work.codebook.values) + codebook_row * work.codebook.stride;
    const int64_t count = work.codebook.num_codes(codebook_row);
    for (int64_t row = 0; row < count; ++row) values[at + row * lanes] = codes[row];
    for (int64_t row = count; row < max_codes; ++row) values[at + row * lanes] = std::numeric_limits<T>::quiet_NaN();
  });
}

template <class T>
std::vector<SortedCodes<T>> sort_codebook(const CodebookView& codebook) {
  std::vector<SortedCodes<T>> sorted;
  sorted.reserve(codebook.rows);
  for (int64_t row = 0; row < codebook.rows; ++row)
    sorted.emplace_back(static_cast<const T*>(codebook.values) + row * codebook.stride, codebook.num_codes(row));
  return sorted;
}

template <class T>
void build_bounds(Work<T>& work, Workspace& workspace, int64_t lanes, const std::vector<SortedCodes<T>>& sorted) {
  T* bounds = workspace.array<T>(work.traversal.columns * lanes);
  for (int64_t position = 0; position < work.traversal.columns * lanes; ++position)
    bounds[position] = sorted[work.columns.codebook_rows[position]].bound;
  work.columns.bounds = bounds;
}

template <class T>
void build_threshold_tables(Work<T>& work, Workspace& workspace, int64_t lanes, int64_t max_codes) {
  using Index = typename cpu::VectorIndex<T>::type;
  const int64_t entries = work.traversal.columns * max_codes * lanes;
  T* values = workspace.array<T>(entries);
  T* thresholds = workspace.array<T>(entries);
  Index* indices = workspace.array<Index>(entries);
  work.columns.rows = max_codes;
  work.columns.values = values;
  work.columns.thresholds = thresholds;
  work.columns.indices = indices;
  const std::vector<SortedCodes<T>> sorted = sort_codebook<T>(work.codebook);
  build_bounds(work, workspace, lanes, sorted);
  for_each_lane(work, lanes, [&](int64_t codebook_row, int64_t at) {
    const SortedCodes<T>& codes = sorted[codebook_row];
    const int64_t count = static_cast<int64_t>(codes.values.size());
    for (int64_t row = 0; row < max_codes; ++row, at += lanes) {
      values[at] = row < count ? codes.values[row] : T(0);
      thresholds[at] = row < count ? codes.thresholds[row] : std::numeric_limits<T>::infinity();
      indices[at] = row < count ? static_cast<Index>(codes.indices[row]) : Index{-1};
    }
  });
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
  const std::vector<SortedCodes<T>> codebook = sort_codebook<T>(work.codebook);
  build_bounds(work, workspace, lanes, codebook);
  std::fill(thresholds, thresholds + rows * stride, std::numeric_limits<T>::quiet_NaN());
  int64_t most_in_one_cell = 0;
  bool sorted_already = true;
  for (int64_t row = 0; row < rows; ++row) {
    const SortedCodes<T>& sorted = codebook[row];
    const int64_t count = static_cast<int64_t>(sorted.values.size());
    if (sorted.bound < T(0)) continue;
    sorted_already = sorted_already && std::is_sorted(sorted.indices.begin(), sorted.indices.end()) &&
                     sorted.indices.back() == count - 1;
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
  work.cells = {cells,
                stride,
                static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(most_in_one_cell))),
                starts,
                values,
                thresholds,
                sorted_already ? nullptr : indices,
                origins,
                scales};
}

template <class T>
Search choose_search(int64_t samples, int64_t lanes, int64_t max_codes, const CodebookView& codebook) {
  const T* codes = static_cast<const T*>(codebook.values);
  const int64_t count = codebook.rows * codebook.stride;
  // A NaN code makes every z of its row an exception, and the direct search knows none.
  bool has_nan = false;
  for (int64_t code = 0; code < count; ++code) has_nan |= codes[code] != codes[code];
  const int64_t enough = min_samples_to_sort.load(std::memory_order_relaxed);
  const bool sort = samples >= enough && samples * max_codes >= enough * kMinCodesToSort;
  if (!sort && !has_nan) return Search::kDirect;
  // Vector lanes hold 32-bit positions in the cell tables,
  // and T must hold a cell's number exactly.
  const bool fits = codebook.rows * 4 * max_codes < std::numeric_limits<int32_t>::max() && max_codes <= 1 << 22;
  if (!fits) return has_nan ? Search::kThresholds : Search::kDirect;
  return max_codes <= kThresholdCodesPerLane * lanes ? Search::kThresholds : Search::kCells;
}

int64_t max_num_codes(const CodebookView& codebook) {
  if (!codebook.levels) return codebook.stride;
  return *std::max_element(codebook.levels, codebook.levels + codebook.rows);
}

template <class T>
void prepare(Work<T>& work, Workspace& workspace, LatentLayout layout, const CodebookView& codebook, int64_t lanes) {
  using Index = typename cpu::VectorIndex<T>::type;
  // A shared codebook makes all elements alike.
  if (codebook.rows == 1) layout = {1, 1, layout.size()};
  const int64_t max_codes = max_num_codes(codebook);
  work.codebook = codebook;
  work.traversal = plan_traversal(layout, lanes, max_codes);
  work.search = choose_search<T>(layout.outer * layout.inner, lanes, max_codes, codebook);
  Index* codebook_rows = workspace.array<Index>(work.traversal.columns * lanes);
  int64_t latent = 0, inner = 0;
  for (int64_t position = 0; position < work.traversal.columns * lanes; ++position) {
    if (!work.traversal.periodic) latent = position / lanes;
    codebook_rows[position] = static_cast<Index>(latent);
    if (!work.traversal.periodic || ++inner < layout.inner) continue;
    inner = 0;
    latent = latent + 1 < layout.num_latents ? latent + 1 : 0;
  }
  work.columns.codebook_rows = codebook_rows;
  switch (work.search) {
    case Search::kDirect: return build_direct_tables(work, workspace, lanes, max_codes);
    case Search::kThresholds: return build_threshold_tables(work, workspace, lanes, max_codes);
    case Search::kCells: return build_cell_tables(work, workspace, lanes, max_codes);
  }
}

int64_t count_parts(const Traversal& traversal, int64_t partial_bytes) {
  const int64_t by_size = traversal.size / kMinElementsPerPart;
  const int64_t by_memory = kMaxPartialBytes / std::max<int64_t>(1, partial_bytes);
  return std::clamp<int64_t>(std::min({by_size, by_memory, traversal.units}), 1, kMaxParts);
}

int64_t element_bytes(ValueType type) { return type == ValueType::kFloat64 ? 8 : type == ValueType::kFloat32 ? 4 : 2; }

// Whole aligned vectors only, and outputs that the cache would not keep.
template <class T>
bool may_stream(const Work<T>& work, std::initializer_list<const void*> outputs, int64_t bytes, int64_t lanes) {
  const bool aligned = std::all_of(outputs.begin(), outputs.end(),
                                   [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 64 == 0; });
  return aligned && bytes >= kStreamBytes && work.traversal.segment % lanes == 0;
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
void forward(const ForwardArguments& arguments, void (*kernel)(const ForwardWork<T>&), int64_t lanes) {
  const int64_t size = arguments.layout.size();
  double squared_error = 0;
  if (size > 0) {
    Workspace workspace;
    ForwardWork<T> work{};
    work.arguments = &arguments;
    prepare<T>(work, workspace, arguments.layout, arguments.codebook, lanes);
    work.stream =
        may_stream(work, {arguments.quantized, arguments.indices}, size * element_bytes(arguments.value_type), lanes);
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
void backward(const BackwardArguments& arguments, void (*kernel)(const BackwardWork<T>&), int64_t lanes) {
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
  prepare<T>(work, workspace, arguments.layout, arguments.codebook, lanes);
  const int64_t value_bytes = size * element_bytes(arguments.value_type);
  work.stream = may_stream(work, {arguments.grad_z}, value_bytes, lanes);

  const bool by_row = grad_codebook && work.search != Search::kCells && work.columns.rows <= kMaxRowsToSum;
  const int64_t scratch_size = by_row ? work.traversal.columns * work.columns.rows * lanes : 0;
  const int64_t partial_bytes = num_codes * int64_t{sizeof(double)} + scratch_size * int64_t{sizeof(T)};
  const int64_t parts = count_parts(work.traversal, partial_bytes);
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
  const Kernels& kernels = *active_kernels().load();
  if (arguments.value_type == ValueType::kFloat64)
    return forward<double>(arguments, kernels.forward_double, lanes_of<double>(kernels));
  forward<float>(arguments, kernels.forward_float, lanes_of<float>(kernels));
}

void latent_quantize_backward(const BackwardArguments& arguments) {
  const Kernels& kernels = *active_kernels().load();
  if (arguments.value_type == ValueType::kFloat64)
    return backward<double>(arguments, kernels.backward_double, lanes_of<double>(kernels));
  backward<float>(arguments, kernels.backward_float, lanes_of<float>(kernels));
}

int64_t set_min_samples_to_sort(int64_t samples) { return min_samples_to_sort.exchange(samples); }

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels* candidate : runnable_kernels()) names.emplace_back(candidate->name);
  return names;
}

std::string active_instruction_set() { return active_kernels().load()->name; }

void use_instruction_set(const std::string& name) {
  for (const Kernels* candidate : runnable_kernels()) {
    if (name != candidate->name) continue;
    active_kernels() = candidate;
    return;
  }
  throw std::invalid_argument("instruction set '" + name + "' is not available here");
}

}  // namespace qlae
