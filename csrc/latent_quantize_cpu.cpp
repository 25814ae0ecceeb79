// Splits the work into groups of latents and parts, prepares the search tables of each group, and adds up what the
// parts return. The number of parts depends on sizes alone, so that results do not depend on the number of threads.
#include "latent_quantize_cpu.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <exception>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <utility>

#include "buffer_pool.h"
#include "latent_quantize_cpu_codebook.h"
#include "latent_quantize_cpu_kernels.h"

namespace qlae {
namespace {

using cpu::BackwardWork;
using cpu::CodeKey;
using cpu::ForwardWork;
using cpu::Kernels;
using cpu::KernelsFor;
using cpu::Range;
using cpu::Search;
using cpu::Traversal;
using cpu::Work;

// Measured crossovers. Few codes: samples per latent that repay sorting, and codes below which it takes more samples;
// for many codes, 64 times the square of the samples must reach the samples here times the codes. Then codes per vector
// lane up to which codes are few: comparing to every boundary is faster than searching in cells.
std::atomic<int64_t> min_samples_to_sort = 512;
constexpr int64_t kMinCodesToSort = 64;
constexpr int64_t kSquaresPerCode = 64;
constexpr int64_t kFewCodesPerLane = 4;
// Codes per latent up to which summing by table row is faster than adding element by element.
constexpr int64_t kMaxRowsToSum = 64;
constexpr int64_t kMaxPeriodicTable = int64_t{1} << 17;
// Bytes of tables from which columns are visited in groups, and of the tables of one group. Cells are read here and
// there, other tables from end to end, which asks for a faster cache.
constexpr int64_t kMinBytesToGroup = int64_t{128} << 10, kMinCellBytesToGroup = int64_t{384} << 10;
constexpr int64_t kGroupBytes = int64_t{32} << 10, kCellGroupBytes = int64_t{256} << 10;
// Tables up to this size let short runs be traversed as a period, with whole vectors.
constexpr int64_t kMaxShortRunsTable = 2048;
// Groups from which on the threads divide them, where a latent has few samples and where it has many.
constexpr int64_t kMinGroupsToShare = 4, kManyGroups = 32;
constexpr int64_t kMaxParts = 64;
// Parts that the elements of a group are cut into though each must clear and add up sums for all of its codes.
constexpr int64_t kMinPartsWithSums = 4;
constexpr int64_t kMinElementsPerPart = 16384;
constexpr int64_t kMinCodesPerPiece = 16384;
constexpr int64_t kMaxPartialBytes = int64_t{64} << 20;
constexpr int64_t kStreamBytes = int64_t{4} << 20;

// Hands out aligned arrays that live until it dies. A small block is kept per thread, so that a call on a small tensor
// allocates nothing; large ones come from the pool, whose pages are there already.
class Workspace {
 public:
  ~Workspace() {
    for (const BufferPool::Block& block : pooled_) BufferPool::instance().release(block);
    for (std::byte* block : owned_) ::operator delete(block, std::align_val_t{kAlignment});
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
  static constexpr int64_t kPooled = int64_t{256} << 10;

  static std::byte* kept() {
    alignas(kAlignment) static thread_local std::byte block[kKept];
    return block;
  }
  std::byte* allocate(int64_t bytes) {
    if (bytes < kPooled) {
      owned_.push_back(static_cast<std::byte*>(::operator new(bytes, std::align_val_t{kAlignment})));
      return owned_.back();
    }
    pooled_.push_back(BufferPool::instance().acquire(bytes));
    return static_cast<std::byte*>(pooled_.back().memory);
  }

  int64_t used_ = 0;
  std::vector<std::byte*> owned_;
  std::vector<BufferPool::Block> pooled_;
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

int64_t max_num_codes(const CodebookView& codebook) {
  if (!codebook.levels) return codebook.stride;
  return *std::max_element(codebook.levels, codebook.levels + codebook.rows);
}

// How many cells a row is divided into, and one code in how many they are filled with.
struct CellPlan {
  int64_t cells;
  int64_t step;
};

// More cells and codes in them than samples do not pay for themselves, and more than two cells a code not for the
// search.
CellPlan plan_cells(int64_t samples, int64_t max_codes) {
  const uint64_t cells = std::bit_ceil(static_cast<uint64_t>(std::min(samples, 2 * max_codes)));
  const uint64_t step = std::bit_floor(static_cast<uint64_t>(std::max<int64_t>(1, max_codes / samples)));
  return {static_cast<int64_t>(cells), static_cast<int64_t>(step)};
}

// What sizes alone decide.
struct Plan {
  LatentLayout layout;
  int64_t lanes;
  int64_t max_codes;
  int64_t samples;
  // Many codes are searched per latent, few in tables with an entry for every lane.
  bool many_codes;
  // Whether sums per code are wanted.
  bool sums_codes;
  Traversal traversal;

  // Whether the threads divide the groups; if not, they work on one group after the other, each on some samples, and
  // then need sums of their own for its codes, which few samples do not repay.
  bool shares_groups() const {
    const bool few_samples = sums_codes && samples < 2 * kMinPartsWithSums * max_codes;
    return traversal.groups >= (few_samples ? kMinGroupsToShare : kManyGroups);
  }
  int64_t group_size() const { return layout.size() / traversal.groups; }
  // Of each group.
  int64_t count_parts() const {
    if (shares_groups()) return 1;
    return std::clamp<int64_t>(std::min(group_size() / kMinElementsPerPart, traversal.units), 1, kMaxParts);
  }
};

// Bytes of tables that the search of one latent reads.
template <class T>
int64_t latent_bytes(const Plan& plan) {
  if (!plan.many_codes) return 3 * plan.max_codes * int64_t{sizeof(T)};
  return (plan_cells(plan.samples, plan.max_codes).cells + 2 * plan.max_codes) * int64_t{sizeof(T)};
}

// How z is traversed; `bytes` are those of the tables of one latent.
Traversal plan_traversal(const Plan& plan, int64_t bytes) {
  const LatentLayout& layout = plan.layout;
  const int64_t lanes = plan.lanes;
  const int64_t period = layout.num_latents * layout.inner;
  const int64_t table = period * (plan.many_codes ? 1 : plan.max_codes);
  const bool short_runs = layout.inner < 4 * lanes ? table <= std::max(kMaxPeriodicTable, layout.size() / 4)
                                                   : layout.inner < 8 * lanes && table <= kMaxShortRunsTable;
  const int64_t min_bytes_to_group = plan.many_codes ? kMinCellBytesToGroup : kMinBytesToGroup;
  if (layout.inner > 1 && !short_runs) {
    const int64_t length = 4096;
    const int64_t groups = layout.num_latents * bytes > min_bytes_to_group ? layout.num_latents : 1;
    const int64_t group_columns = layout.num_latents / groups;
    const int64_t units = layout.outer * group_columns * ((layout.inner + length - 1) / length);
    return {false, layout.size(), layout.inner, layout.num_latents, length, units, groups, group_columns};
  }
  // The tables of columns have an entry for each element of a period, those of cells for each latent.
  const int64_t element_bytes = plan.many_codes ? std::max<int64_t>(1, bytes / layout.inner) : bytes;
  const bool grouped = period * element_bytes > min_bytes_to_group && period >= kMinGroupsToShare * lanes;
  // Short periods repeat until they fill whole vectors; for long ones a partial vector per period costs less.
  const int64_t segment = period < 128 && !grouped ? std::lcm(period, lanes) : period;
  const int64_t used = std::min(segment, layout.size());
  const int64_t columns = (used + lanes - 1) / lanes;
  const int64_t in_cache = (plan.many_codes ? kCellGroupBytes : kGroupBytes) / element_bytes;
  // Groups begin with a latent, so that no two share a code.
  const int64_t whole = layout.inner / std::gcd(layout.inner, lanes);
  const int64_t wanted = std::max<int64_t>(1, in_cache / lanes);
  const int64_t group_columns = grouped ? std::min(columns, (wanted + whole - 1) / whole * whole) : columns;
  const int64_t groups = (columns + group_columns - 1) / group_columns;
  const int64_t length = std::clamp<int64_t>(8192 / (groups == 1 ? segment : group_columns * lanes), 4, 256);
  const int64_t units = std::max<int64_t>(1, (layout.size() / segment + length - 1) / length);
  return {true, layout.size(), segment, columns, length, units, groups, group_columns};
}

template <class T>
Plan plan_call(LatentLayout layout, const CodebookView& codebook, int64_t lanes, bool sums_codes) {
  // A shared codebook makes all elements alike.
  if (codebook.rows == 1) layout = {1, 1, layout.size()};
  const int64_t max_codes = max_num_codes(codebook);
  const bool many_codes = max_codes > kFewCodesPerLane * lanes;
  Plan plan{layout, lanes, max_codes, layout.outer * layout.inner, many_codes, sums_codes, {}};
  plan.traversal = plan_traversal(plan, latent_bytes<T>(plan));
  return plan;
}

// Calls body(part) for every part; parts are independent.
template <class Body>
void for_each_part(int64_t parts, int threads, Body body) {
  const int team = static_cast<int>(std::min<int64_t>(parts, std::max(threads, 1)));
  if (team == 1) {
    for (int64_t part = 0; part < parts; ++part) body(part);
    return;
  }
  // No exception may leave a thread of the team.
  std::exception_ptr error;
#pragma omp parallel for schedule(dynamic, 1) num_threads(team)
  for (int64_t part = 0; part < parts; ++part) {
    try {
      body(part);
    } catch (...) {
#pragma omp critical(qlae_error)
      error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
}

// One piece of a codebook per thread, where they are worth one; what is made of them does not depend on their number.
int64_t count_pieces(const CodebookView& codebook, int threads) {
  const int64_t most = std::min<int64_t>(codebook.rows, std::max(threads, 1));
  return std::clamp<int64_t>(codebook.rows * codebook.stride / kMinCodesPerPiece, 1, most);
}

// Calls body(row, piece) for every row of the codebook.
template <class Body>
void for_each_row(const CodebookView& codebook, int threads, Body body) {
  const int64_t pieces = count_pieces(codebook, threads);
  for_each_part(pieces, threads, [&](int64_t piece) {
    const int64_t end = codebook.rows * (piece + 1) / pieces;
    for (int64_t row = codebook.rows * piece / pieces; row < end; ++row) body(row, piece);
  });
}

// Of codes in ascending order, or with one that is not finite, for which it is empty.
template <class T>
Range<T> exact_range_of(const KernelsFor<T>& kernels, const T* codes, int64_t count) {
  return cpu::exact_range(codes, count, kernels.order_of).value_or(Range<T>{});
}

// The distinct codes of one row in ascending order, each under its smallest index, with the boundaries between them.
template <class T>
struct SortedCodes {
  std::vector<T> values;
  std::vector<int64_t> indices;
  std::vector<T> thresholds;
  Range<T> exact;

  SortedCodes(const KernelsFor<T>& kernels, const T* codes, int64_t count) {
    std::vector<int64_t> order(count);
    std::iota(order.begin(), order.end(), int64_t{0});
    const bool finite = std::all_of(codes, codes + count, [](T code) { return std::isfinite(code); });
    if (finite) std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return codes[a] < codes[b]; });
    for (const int64_t index : order) {
      if (finite && !values.empty() && values.back() == codes[index]) continue;
      values.push_back(codes[index]);
      indices.push_back(index);
    }
    exact = exact_range_of(kernels, values.data(), static_cast<int64_t>(values.size()));
    thresholds.assign(values.size(), std::numeric_limits<T>::infinity());
    for (size_t rank = 1; finite && rank < values.size(); ++rank)
      thresholds[rank] = threshold_between(values[rank - 1], values[rank], indices[rank] < indices[rank - 1]);
  }
};

template <class T>
const T* codes_of(const CodebookView& codebook, int64_t row) {
  return static_cast<const T*>(codebook.values) + row * codebook.stride;
}

// Calls fill(codebook_row, at) for every lane of every column; entry r of the lane's table is at `at + r * lanes`.
template <class T, class Fill>
void for_each_lane(const Work<T>& work, int64_t lanes, Fill fill) {
  for (int64_t column = 0; column < work.num_columns; ++column)
    for (int64_t lane = 0; lane < lanes; ++lane)
      fill(int64_t{work.columns.codebook_rows[column * lanes + lane]}, column * work.columns.rows * lanes + lane);
}

template <class T>
void build_direct_tables(Work<T>& work, Workspace& workspace, int64_t lanes, int64_t max_codes) {
  work.columns.rows = max_codes;
  if (!work.traversal.periodic) return;
  T* values = workspace.array<T>(work.num_columns * max_codes * lanes);
  work.columns.values = values;
  for_each_lane(work, lanes, [&](int64_t codebook_row, int64_t at) {
    const T* codes = codes_of<T>(work.codebook, codebook_row);
    const int64_t count = work.codebook.num_codes(codebook_row);
    for (int64_t row = 0; row < count; ++row) values[at + row * lanes] = codes[row];
    for (int64_t row = count; row < max_codes; ++row) values[at + row * lanes] = std::numeric_limits<T>::quiet_NaN();
  });
}

template <class T, class RangeOf>
void build_ranges(Work<T>& work, Workspace& workspace, int64_t lanes, RangeOf range_of) {
  const int64_t size = work.num_columns * lanes;
  T* lows = workspace.array<T>(size);
  T* highs = workspace.array<T>(size);
  for (int64_t position = 0; position < size; ++position) {
    const Range<T> exact = range_of(work.columns.codebook_rows[position]);
    lows[position] = exact.low;
    highs[position] = exact.high;
  }
  work.columns.lows = lows;
  work.columns.highs = highs;
}

template <class T>
void build_threshold_tables(const KernelsFor<T>& kernels, Work<T>& work, Workspace& workspace, int64_t max_codes) {
  const int64_t lanes = kernels.lanes;
  using Index = typename cpu::VectorIndex<T>::type;
  const int64_t entries = work.num_columns * max_codes * lanes;
  T* values = workspace.array<T>(entries);
  T* thresholds = workspace.array<T>(entries);
  Index* indices = workspace.array<Index>(entries);
  work.columns.rows = max_codes;
  work.columns.values = values;
  work.columns.thresholds = thresholds;
  work.columns.indices = indices;
  std::vector<SortedCodes<T>> sorted;
  sorted.reserve(work.codebook.rows);
  for (int64_t row = 0; row < work.codebook.rows; ++row)
    sorted.emplace_back(kernels, codes_of<T>(work.codebook, row), work.codebook.num_codes(row));
  build_ranges(work, workspace, lanes, [&](int64_t codebook_row) { return sorted[codebook_row].exact; });
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

// The distinct codes of a row in ascending order, each with its smallest index; a NaN first if one is not finite.
// Returns how many; `keys` is room for two per code.
template <class T, class Index>
int64_t sort_row(const T* codes, int64_t count, CodeKey<T>* keys, T* values, Index* indices) {
  if (!std::all_of(codes, codes + count, [](T code) { return std::isfinite(code); })) {
    values[0] = std::numeric_limits<T>::quiet_NaN();
    return 1;
  }
  for (int64_t k = 0; k < count; ++k) keys[k] = cpu::key_of(codes[k], k);
  const CodeKey<T>* sorted = cpu::sort_keys(keys, keys + count, count);
  int64_t distinct = 0;
  for (int64_t rank = 0; rank < count; ++rank) {
    if (rank && sorted[rank].order == sorted[rank - 1].order) continue;
    indices[distinct] = static_cast<Index>(sorted[rank].index);
    values[distinct++] = codes[sorted[rank].index];
  }
  return distinct;
}

// Fills the cells of a row with every `step`-th of `count` ascending codes; returns how far above the start of its cell
// the code below a z can be.
template <class T, class Index>
int64_t fill_cells(const T* values, int64_t count, int64_t step, T origin, T scale, int64_t cells, Index* starts) {
  constexpr int64_t kChunk = 256;
  const T last_cell = static_cast<T>(cells - 1);
  std::fill(starts, starts + cells, Index{-1});
  const int64_t placed = (count + step - 1) / step;
  // The last code of each cell that has one: later codes overwrite earlier ones.
  for (int64_t begin = 0; begin < placed; begin += kChunk) {
    const int64_t size = std::min(kChunk, placed - begin);
    int32_t cell[kChunk];
    for (int64_t k = 0; k < size; ++k) {
      // The same arithmetic as the kernels': monotone in z, so a code in an earlier cell lies below z.
      const T place = (values[(begin + k) * step] - origin) * scale;
      const T clamped = place > T(0) ? place : T(0);
      cell[k] = static_cast<int32_t>(clamped < last_cell ? clamped : last_cell);
    }
    for (int64_t k = 0; k < size; ++k) starts[cell[k]] = static_cast<Index>((begin + k) * step);
  }
  Index before = -1, most = 0;
  for (int64_t cell = 0; cell < cells; ++cell) {
    const Index last = std::max(starts[cell], before);
    most = std::max<Index>(most, last - before);
    starts[cell] = std::max<Index>(before, 0);
    before = last;
  }
  return most + step - 1;
}

template <class T>
bool has_nan(const CodebookView& codebook) {
  int nans = 0;
  for (int64_t row = 0; row < codebook.rows; ++row) {
    const T* codes = codes_of<T>(codebook, row);
    const int64_t count = codebook.num_codes(row);
    for (int64_t k = 0; k < count; ++k) nans |= codes[k] != codes[k];
  }
  return nans != 0;
}

// Whether all rows are in order; fills `ranges` with the exact range of each that is.
template <class T>
bool survey_order(const KernelsFor<T>& kernels, const CodebookView& codebook, int threads, Range<T>* ranges) {
  std::atomic<bool> in_order = true;
  for_each_row(codebook, threads, [&](int64_t row, int64_t) {
    const std::optional<Range<T>> exact =
        cpu::exact_range(codes_of<T>(codebook, row), codebook.num_codes(row), kernels.order_of);
    ranges[row] = exact.value_or(Range<T>{});
    if (!exact) in_order = false;
  });
  return in_order;
}

template <class T>
void build_cell_tables(const KernelsFor<T>& kernels, Work<T>& work, Workspace& workspace, const CellPlan& plan,
                       bool in_order, Range<T>* ranges, int threads) {
  using Index = typename cpu::VectorIndex<T>::type;
  const CodebookView& codebook = work.codebook;
  const int64_t rows = codebook.rows, stride = codebook.stride, cells = plan.cells;
  Index* starts = workspace.array<Index>(rows * cells);
  Index* lasts = workspace.array<Index>(rows);
  T* origins = workspace.array<T>(rows);
  T* scales = workspace.array<T>(rows);
  int64_t* most_above = workspace.array<int64_t>(rows);
  T* sorted = in_order ? nullptr : workspace.array<T>(rows * stride);
  Index* indices = in_order ? nullptr : workspace.array<Index>(rows * stride);
  const int64_t keys_each = in_order ? 0 : 2 * stride;
  CodeKey<T>* keys = workspace.array<CodeKey<T>>(keys_each * count_pieces(codebook, threads));
  for_each_row(codebook, threads, [&](int64_t row, int64_t piece) {
    const T* values = codes_of<T>(codebook, row);
    int64_t count = codebook.num_codes(row);
    if (!in_order) {
      count = sort_row(values, count, keys + piece * keys_each, sorted + row * stride, indices + row * stride);
      values = sorted + row * stride;
      ranges[row] = exact_range_of(kernels, values, count);
    }
    const T width = values[count - 1] - values[0], scale = static_cast<T>(cells) / width;
    lasts[row] = static_cast<Index>(count - 1);
    origins[row] = values[0];
    scales[row] = width > T(0) && std::isfinite(scale) ? scale : T(0);
    most_above[row] = fill_cells(values, count, plan.step, origins[row], scales[row], cells, starts + row * cells);
  });
  build_ranges(work, workspace, kernels.lanes, [&](int64_t codebook_row) { return ranges[codebook_row]; });
  const int64_t most = *std::max_element(most_above, most_above + rows);
  work.cells = {cells,
                stride,
                static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(most))),
                starts,
                in_order ? static_cast<const T*>(codebook.values) : sorted,
                indices,
                lasts,
                origins,
                scales};
}

bool repays_sorting(const Plan& plan) {
  const double samples = static_cast<double>(plan.samples), codes = static_cast<double>(plan.max_codes);
  const double enough = static_cast<double>(min_samples_to_sort.load(std::memory_order_relaxed));
  if (plan.many_codes) return samples * samples * kSquaresPerCode >= enough * codes;
  return samples >= enough && samples * codes >= enough * kMinCodesToSort;
}

// The search for few codes; the results do not depend on the choice.
template <class T>
void prepare_few_codes(const KernelsFor<T>& kernels, Work<T>& work, Workspace& workspace, const Plan& plan) {
  // A NaN code makes every z of its row an exception, and the direct search knows none.
  const bool sort = repays_sorting(plan) || has_nan<T>(work.codebook);
  work.search = sort ? Search::kThresholds : Search::kDirect;
  if (sort) return build_threshold_tables(kernels, work, workspace, plan.max_codes);
  build_direct_tables(work, workspace, plan.lanes, plan.max_codes);
}

template <class T>
void prepare_many_codes(const KernelsFor<T>& kernels, Work<T>& work, Workspace& workspace, const Plan& plan,
                        int threads) {
  const CellPlan cells = plan_cells(plan.samples, plan.max_codes);
  // Vector lanes hold 32-bit positions in the cell tables, and T must hold a cell's number exactly.
  const int64_t positions = (work.codebook.rows + 1) * std::max(cells.cells, work.codebook.stride);
  const bool fits = positions < std::numeric_limits<int32_t>::max() && plan.max_codes <= 1 << 22;
  Range<T>* ranges = workspace.array<Range<T>>(work.codebook.rows);
  const bool in_order = fits && survey_order(kernels, work.codebook, threads, ranges);
  work.search = fits && (in_order || repays_sorting(plan)) ? Search::kCells : Search::kScan;
  if (work.search == Search::kCells) build_cell_tables(kernels, work, workspace, cells, in_order, ranges, threads);
}

// Makes `work` the work on one group: its rows of the codebook, and the tables for its columns.
template <class T>
void prepare(const KernelsFor<T>& kernels, Work<T>& work, Workspace& workspace, const Plan& plan,
             const CodebookView& codebook, int64_t group, int threads) {
  using Index = typename cpu::VectorIndex<T>::type;
  const Traversal& t = plan.traversal;
  const int64_t lanes = plan.lanes, inner = plan.layout.inner;
  // Elements, or in runs vectors, that belong to one latent.
  const int64_t positions = t.periodic ? inner : lanes;
  work.traversal = t;
  work.first_column = group * t.group_columns;
  work.num_columns = std::min(t.group_columns, t.columns - work.first_column);
  work.first_row = work.first_column * lanes / positions;
  const int64_t end_row = ((work.first_column + work.num_columns) * lanes + positions - 1) / positions;
  const int64_t rows = std::min(end_row, codebook.rows) - work.first_row;
  work.codebook = {codes_of<T>(codebook, work.first_row), rows, codebook.stride,
                   codebook.levels ? codebook.levels + work.first_row : nullptr};
  Index* codebook_rows = workspace.array<Index>(work.num_columns * lanes);
  int64_t row = 0, in_row = 0;
  for (int64_t position = 0; position < work.num_columns * lanes; ++position) {
    codebook_rows[position] = static_cast<Index>(row);
    if (++in_row < positions) continue;
    in_row = 0;
    // A segment may hold several periods, and lanes beyond it belong to no latent.
    row = row + 1 < rows ? row + 1 : 0;
  }
  work.columns.codebook_rows = codebook_rows;
  if (plan.many_codes) return prepare_many_codes(kernels, work, workspace, plan, threads);
  prepare_few_codes(kernels, work, workspace, plan);
}

// Calls body(work, group, workspace, threads) for every group, with `work` prepared.
template <class T, class W, class Body>
void for_each_group(const KernelsFor<T>& kernels, const W& common, const Plan& plan, const CodebookView& codebook,
                    int threads, Body body) {
  const auto visit = [&](int64_t group, int group_threads) {
    Workspace workspace;
    W work = common;
    prepare(kernels, work, workspace, plan, codebook, group, group_threads);
    body(work, group, workspace, group_threads);
  };
  if (plan.shares_groups())
    return for_each_part(plan.traversal.groups, threads, [&](int64_t group) { visit(group, 1); });
  for (int64_t group = 0; group < plan.traversal.groups; ++group) visit(group, threads);
}

int64_t element_bytes(ValueType type) { return type == ValueType::kFloat64 ? 8 : type == ValueType::kFloat32 ? 4 : 2; }

// Whole aligned vectors only, in whole cache lines, and outputs that the cache would not keep.
bool may_stream(const Plan& plan, std::initializer_list<const void*> outputs, ValueType type) {
  const bool aligned = std::all_of(outputs.begin(), outputs.end(),
                                   [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 64 == 0; });
  const Traversal& t = plan.traversal;
  const int64_t lanes = plan.lanes;
  const bool whole_lines = !t.periodic || t.groups == 1 || (t.segment % 64 == 0 && t.group_columns * lanes % 64 == 0);
  return aligned && t.size * element_bytes(type) >= kStreamBytes && t.segment % lanes == 0 && whole_lines;
}

template <class W>
W part_of(const W& work, int64_t part, int64_t parts) {
  W own = work;
  own.unit_begin = work.traversal.units * part / parts;
  own.unit_end = work.traversal.units * (part + 1) / parts;
  return own;
}

template <class T>
void forward(const ForwardArguments& arguments, const KernelsFor<T>& kernels) {
  const int64_t size = arguments.layout.size();
  double squared_error = 0;
  if (size > 0) {
    const Plan plan = plan_call<T>(arguments.layout, arguments.codebook, kernels.lanes, false);
    const int64_t parts = plan.count_parts(), num_sums = plan.traversal.groups * parts;
    // Few sums need no allocation.
    std::array<double, kMaxParts> few_sums{};
    std::vector<double> many_sums(num_sums > kMaxParts ? num_sums : 0);
    double* sums = many_sums.empty() ? few_sums.data() : many_sums.data();
    ForwardWork<T> work{};
    work.arguments = &arguments;
    work.stream = may_stream(plan, {arguments.quantized, arguments.indices}, arguments.value_type);
    for_each_group(kernels, work, plan, arguments.codebook, arguments.threads,
                   [&](const ForwardWork<T>& of_group, int64_t group, Workspace&, int threads) {
                     for_each_part(parts, threads, [&](int64_t part) {
                       ForwardWork<T> own = part_of(of_group, part, parts);
                       own.squared_error = sums + group * parts + part;
                       kernels.forward(own);
                     });
                   });
    squared_error = std::accumulate(sums, sums + num_sums, 0.0);
  }
  if (!arguments.loss) return;
  const double mean = size > 0 ? squared_error / static_cast<double>(size) : 0.0;
  *static_cast<T*>(arguments.loss) = static_cast<T>(arguments.loss_weight * mean);
}

// The gradient of codes from their sums, which may lie in the same place.
template <class T, class Sum>
void scale_sums(const Sum* sums, T* gradients, int64_t count, double scale) {
  for (int64_t code = 0; code < count; ++code)
    gradients[code] = static_cast<T>(scale * static_cast<double>(sums[code]));
}

// The gradient of a group's codes where one thread does the whole group.
template <class T>
void sum_at_once(BackwardWork<T> work, Workspace& workspace, void (*kernel)(const BackwardWork<T>&), T* gradients,
                 double scale, bool is_short, int64_t scratch_size) {
  const int64_t num_codes = work.codebook.rows * work.codebook.stride;
  work.scratch = scratch_size ? workspace.zeros<T>(scratch_size) : nullptr;
  if (is_short) {
    work.short_sums = gradients;
    std::fill(gradients, gradients + num_codes, T(0));
    kernel(work);
    return scale_sums(gradients, gradients, num_codes, scale);
  }
  work.residual_sums = workspace.zeros<double>(num_codes);
  kernel(work);
  scale_sums(work.residual_sums, gradients, num_codes, scale);
}

// The gradient of a group's codes where the threads divide the samples: each part has sums for all codes.
template <class T>
void sum_by_samples(const BackwardWork<T>& work, Workspace& workspace, void (*kernel)(const BackwardWork<T>&),
                    T* gradients, double scale, const Plan& plan, int64_t scratch_size, int threads) {
  const int64_t num_codes = work.codebook.rows * work.codebook.stride;
  const int64_t partial_bytes = num_codes * int64_t{sizeof(double)} + scratch_size * int64_t{sizeof(T)};
  const int64_t by_codes = std::max(kMinPartsWithSums, plan.group_size() / (2 * (num_codes + scratch_size)));
  const int64_t by_memory = std::max<int64_t>(1, kMaxPartialBytes / partial_bytes);
  const int64_t parts = std::min({plan.count_parts(), by_codes, by_memory});
  double* sums = workspace.array<double>(parts * num_codes);
  T* scratch = scratch_size ? workspace.zeros<T>(parts * scratch_size) : nullptr;
  for_each_part(parts, threads, [&](int64_t part) {
    BackwardWork<T> own = part_of(work, part, parts);
    own.residual_sums = sums + part * num_codes;
    own.scratch = scratch ? scratch + part * scratch_size : nullptr;
    std::fill(own.residual_sums, own.residual_sums + num_codes, 0.0);
    kernel(own);
  });
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t code = 0; code < num_codes; ++code) sums[code] += sums[part * num_codes + code];
  scale_sums(sums, gradients, num_codes, scale);
}

// Elements of sums per table row, zero where these do not pay: each clearing costs as much as the table.
template <class T>
int64_t count_row_sums(const Work<T>& work, int64_t lanes) {
  const Traversal& t = work.traversal;
  const int64_t rows = work.columns.rows;
  const bool in_table = work.search == Search::kDirect || work.search == Search::kThresholds;
  if (!in_table || rows > kMaxRowsToSum) return 0;
  return t.periodic || t.groups > 1 || t.segment >= 8 * rows * lanes ? work.num_columns * rows * lanes : 0;
}

template <class T>
void backward(const BackwardArguments& arguments, const KernelsFor<T>& kernels) {
  const int64_t size = arguments.layout.size();
  const CodebookView& codebook = arguments.codebook;
  T* grad_codebook = static_cast<T*>(arguments.grad_codebook);
  if (size == 0) {
    if (grad_codebook) std::fill(grad_codebook, grad_codebook + codebook.rows * codebook.stride, T(0));
    return;
  }
  const Plan plan = plan_call<T>(arguments.layout, codebook, kernels.lanes, grad_codebook != nullptr);
  const double scale =
      2.0 * static_cast<double>(*static_cast<const T*>(arguments.grad_loss)) / static_cast<double>(size);
  const double to_gradient = -scale * arguments.quantization_weight;
  const int64_t parts = plan.count_parts();
  BackwardWork<T> common{};
  common.arguments = &arguments;
  common.residual_scale = static_cast<T>(scale * arguments.commitment_weight);
  common.stream = may_stream(plan, {arguments.grad_z}, arguments.value_type);
  for_each_group(
      kernels, common, plan, codebook, arguments.threads,
      [&](const BackwardWork<T>& work, int64_t, Workspace& workspace, int threads) {
        if (!grad_codebook)
          return for_each_part(parts, threads, [&](int64_t part) { kernels.backward(part_of(work, part, parts)); });
        T* gradients = grad_codebook + work.first_row * codebook.stride;
        const int64_t scratch_size = count_row_sums(work, kernels.lanes);
        if (!plan.shares_groups())
          return sum_by_samples(work, workspace, kernels.backward, gradients, to_gradient, plan, scratch_size, threads);
        const bool is_short = plan.samples <= cpu::kMaxAccumulations;
        sum_at_once(part_of(work, 0, 1), workspace, kernels.backward, gradients, to_gradient, is_short, scratch_size);
      });
}

}  // namespace

int64_t cpu::nearest_of_sorted(float z, const float* codes, const int32_t* indices, int64_t count) {
  return nearest_in_order(z, codes, indices, count);
}

int64_t cpu::nearest_of_sorted(double z, const double* codes, const int64_t* indices, int64_t count) {
  return nearest_in_order(z, codes, indices, count);
}

void latent_quantize_forward(const ForwardArguments& arguments) {
  const Kernels& kernels = *active_kernels().load();
  if (arguments.value_type == ValueType::kFloat64) return forward(arguments, kernels.for_double);
  forward(arguments, kernels.for_float);
}

void latent_quantize_backward(const BackwardArguments& arguments) {
  const Kernels& kernels = *active_kernels().load();
  if (arguments.value_type == ValueType::kFloat64) return backward(arguments, kernels.for_double);
  backward(arguments, kernels.for_float);
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
