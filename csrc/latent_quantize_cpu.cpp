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
using cpu::Range;
using cpu::Search;
using cpu::Traversal;
using cpu::Work;

// Measured crossovers: samples per latent that repay sorting few codes, and the fraction of them that repays sorting
// many, and using many that are in order already; where there are few codes it takes more samples. Then codes per
// vector lane up to which comparing to every boundary is faster than searching in cells.
std::atomic<int64_t> min_samples_to_sort = 512;
constexpr int64_t kManyCodes = 2;
constexpr int64_t kSortedAlready = 8;
constexpr int64_t kMinCodesToSort = 64;
constexpr int64_t kThresholdCodesPerLane = 4;
// Codes per latent up to which summing by table row is faster than adding element by element.
constexpr int64_t kMaxRowsToSum = 64;
constexpr int64_t kMaxPeriodicTable = int64_t{1} << 17;
// Bytes of tables from which columns are visited in groups, and of the tables of one group. Cells are read here and
// there, other tables from end to end, which asks for a faster cache.
constexpr int64_t kMinBytesToGroup = int64_t{128} << 10, kMinCellBytesToGroup = int64_t{384} << 10;
constexpr int64_t kGroupBytes = int64_t{32} << 10, kCellGroupBytes = int64_t{256} << 10;
// Tables up to this size let short runs be traversed as a period, with whole vectors.
constexpr int64_t kMaxShortRunsTable = 2048;
// Neighbouring latents in a group, at least: they fill a cache line in every element type.
constexpr int64_t kMinGroupLatents = 32;
constexpr int64_t kMaxParts = 64;
// Parts that the elements are cut into though each must clear and add up sums for all codes.
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

template <class T>
int64_t lanes_of(const Kernels& kernels) {
  return kernels.vector_bytes / static_cast<int64_t>(sizeof(T));
}

// How z is traversed. `latent_bytes` are those of the tables of one latent.
Traversal plan_traversal(const LatentLayout& layout, int64_t lanes, Search search, int64_t max_codes,
                         int64_t latent_bytes) {
  const bool in_cells = search == Search::kCells;
  const int64_t period = layout.num_latents * layout.inner;
  const int64_t table = period * (in_cells ? 1 : max_codes);
  const bool short_runs = layout.inner < 4 * lanes ? table <= std::max(kMaxPeriodicTable, layout.size() / 4)
                                                   : layout.inner < 8 * lanes && table <= kMaxShortRunsTable;
  const int64_t min_bytes_to_group = in_cells ? kMinCellBytesToGroup : kMinBytesToGroup;
  if (layout.inner > 1 && !short_runs) {
    const int64_t length = 4096;
    const int64_t units = layout.outer * layout.num_latents * ((layout.inner + length - 1) / length);
    const int64_t groups = layout.num_latents * latent_bytes > min_bytes_to_group ? layout.num_latents : 1;
    return {false, layout.size(), layout.inner, layout.num_latents, length, units, groups, layout.num_latents / groups};
  }
  // The tables of columns have an entry for each element of a period, those of cells for each latent.
  const int64_t element_bytes = in_cells ? std::max<int64_t>(1, latent_bytes / layout.inner) : latent_bytes;
  const bool grouped = period * element_bytes > min_bytes_to_group && period >= 2 * kMinGroupLatents;
  // Short periods repeat until they fill whole vectors; for long ones a partial vector per period costs less.
  const int64_t segment = period < 128 && !grouped ? std::lcm(period, lanes) : period;
  const int64_t used = std::min(segment, layout.size());
  const int64_t columns = (used + lanes - 1) / lanes;
  const int64_t in_cache = (in_cells ? kCellGroupBytes : kGroupBytes) / element_bytes;
  const int64_t group_columns = grouped ? std::min(columns, std::max(kMinGroupLatents, in_cache) / lanes) : columns;
  const int64_t groups = (columns + group_columns - 1) / group_columns;
  const int64_t length = std::clamp<int64_t>(8192 / (groups == 1 ? segment : group_columns * lanes), 4, 256);
  const int64_t units = std::max<int64_t>(1, (layout.size() / segment + length - 1) / length);
  return {true, layout.size(), segment, columns, length, groups * units, groups, group_columns};
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

// The distinct codes of one row in ascending order, each under its smallest index, with the boundaries between them.
template <class T>
struct SortedCodes {
  std::vector<T> values;
  std::vector<int64_t> indices;
  std::vector<T> thresholds;
  Range<T> exact;

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
    if (finite) exact = cpu::exact_range(values.data(), static_cast<int64_t>(values.size()));
    thresholds.assign(values.size(), std::numeric_limits<T>::infinity());
    for (size_t rank = 1; finite && rank < values.size(); ++rank)
      thresholds[rank] = threshold_between(values[rank - 1], values[rank], indices[rank] < indices[rank - 1]);
  }
};

int64_t max_num_codes(const CodebookView& codebook) {
  if (!codebook.levels) return codebook.stride;
  return *std::max_element(codebook.levels, codebook.levels + codebook.rows);
}

template <class T>
const T* codes_of(const CodebookView& codebook, int64_t row) {
  return static_cast<const T*>(codebook.values) + row * codebook.stride;
}

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
    const T* codes = codes_of<T>(work.codebook, codebook_row);
    const int64_t count = work.codebook.num_codes(codebook_row);
    for (int64_t row = 0; row < count; ++row) values[at + row * lanes] = codes[row];
    for (int64_t row = count; row < max_codes; ++row) values[at + row * lanes] = std::numeric_limits<T>::quiet_NaN();
  });
}

template <class T, class RangeOf>
void build_ranges(Work<T>& work, Workspace& workspace, int64_t lanes, RangeOf range_of) {
  const int64_t size = work.traversal.columns * lanes;
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
  std::vector<SortedCodes<T>> sorted;
  sorted.reserve(work.codebook.rows);
  for (int64_t row = 0; row < work.codebook.rows; ++row)
    sorted.emplace_back(codes_of<T>(work.codebook, row), work.codebook.num_codes(row));
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

// Fills the cells of a row with `count` ascending codes; returns the largest number of codes in one cell.
template <class T, class Index>
int64_t fill_cells(const T* values, int64_t count, T origin, T scale, int64_t cells, Index* starts) {
  constexpr int64_t kChunk = 256;
  const T last_cell = static_cast<T>(cells - 1);
  std::fill(starts, starts + cells, Index{-1});
  // The last code of each cell that has one: later codes overwrite earlier ones.
  for (int64_t begin = 0; begin < count; begin += kChunk) {
    const int64_t size = std::min(kChunk, count - begin);
    int32_t cell[kChunk];
    for (int64_t k = 0; k < size; ++k) {
      // The same arithmetic as the kernels': monotone in z, so a code in an earlier cell lies below z.
      const T place = (values[begin + k] - origin) * scale;
      const T clamped = place > T(0) ? place : T(0);
      cell[k] = static_cast<int32_t>(clamped < last_cell ? clamped : last_cell);
    }
    for (int64_t k = 0; k < size; ++k) starts[cell[k]] = static_cast<Index>(begin + k);
  }
  Index before = -1, most = 0;
  for (int64_t cell = 0; cell < cells; ++cell) {
    const Index last = std::max(starts[cell], before);
    most = std::max<Index>(most, last - before);
    starts[cell] = std::max<Index>(before, 0);
    before = last;
  }
  return most;
}

template <class T>
void build_cell_tables(Work<T>& work, Workspace& workspace, int64_t lanes, int64_t cells, bool in_order, int threads) {
  using Index = typename cpu::VectorIndex<T>::type;
  const CodebookView& codebook = work.codebook;
  const int64_t rows = codebook.rows, stride = codebook.stride;
  Index* starts = workspace.array<Index>(rows * cells);
  Index* lasts = workspace.array<Index>(rows);
  T* origins = workspace.array<T>(rows);
  T* scales = workspace.array<T>(rows);
  Range<T>* ranges = workspace.array<Range<T>>(rows);
  int64_t* most_in_one_cell = workspace.array<int64_t>(rows);
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
    }
    const T width = values[count - 1] - values[0], scale = static_cast<T>(cells) / width;
    lasts[row] = static_cast<Index>(count - 1);
    origins[row] = values[0];
    scales[row] = width > T(0) && std::isfinite(scale) ? scale : T(0);
    ranges[row] = values[0] == values[0] ? cpu::exact_range(values, count) : Range<T>{};
    most_in_one_cell[row] = fill_cells(values, count, origins[row], scales[row], cells, starts + row * cells);
  });
  build_ranges(work, workspace, lanes, [&](int64_t codebook_row) { return ranges[codebook_row]; });
  const int64_t most = *std::max_element(most_in_one_cell, most_in_one_cell + rows);
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

// What the codes of a codebook allow.
struct Survey {
  bool has_nan;
  bool in_order;
};

template <class T>
Survey survey_codebook(const CodebookView& codebook, int threads) {
  std::atomic<bool> has_nan = false, in_order = true;
  for_each_row(codebook, threads, [&](int64_t row, int64_t) {
    const T* codes = codes_of<T>(codebook, row);
    const int64_t count = codebook.num_codes(row);
    if (cpu::is_ascending(codes, count)) return;
    in_order = false;
    int nans = 0;
    for (int64_t k = 0; k < count; ++k) nans |= codes[k] != codes[k];
    if (nans) has_nan = true;
  });
  return {has_nan, in_order};
}

// More cells than that pay neither for themselves nor for the search.
int64_t count_cells(int64_t samples, int64_t max_codes) {
  return static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(std::min(samples, 2 * max_codes))));
}

Search choose_search(int64_t samples, int64_t lanes, int64_t max_codes, int64_t rows, const Survey& survey) {
  const bool few_codes = max_codes <= kThresholdCodesPerLane * lanes;
  const int64_t share = few_codes ? 1 : survey.in_order ? kSortedAlready : kManyCodes;
  const int64_t enough = min_samples_to_sort.load(std::memory_order_relaxed) / share;
  const bool sort = samples >= enough && samples * max_codes >= enough * kMinCodesToSort;
  // A NaN code makes every z of its row an exception, and the direct search knows none.
  if (!sort && !survey.has_nan) return Search::kDirect;
  // Vector lanes hold 32-bit positions in the cell tables, and T must hold a cell's number exactly.
  const int64_t positions = rows * std::max(count_cells(samples, max_codes), max_codes);
  const bool fits = positions < std::numeric_limits<int32_t>::max() && max_codes <= 1 << 22;
  if (!fits) return survey.has_nan ? Search::kThresholds : Search::kDirect;
  return few_codes ? Search::kThresholds : Search::kCells;
}

// Bytes of tables that the search of one latent reads.
template <class T>
int64_t table_bytes(Search search, int64_t samples, int64_t max_codes, bool in_order) {
  switch (search) {
    case Search::kDirect: return max_codes * int64_t{sizeof(T)};
    case Search::kThresholds: return 3 * max_codes * int64_t{sizeof(T)};
    case Search::kCells: return (count_cells(samples, max_codes) + (in_order ? 1 : 2) * max_codes) * int64_t{sizeof(T)};
  }
  return 0;
}

template <class T>
void prepare(Work<T>& work, Workspace& workspace, LatentLayout layout, const CodebookView& codebook, int64_t lanes,
             int threads) {
  using Index = typename cpu::VectorIndex<T>::type;
  // A shared codebook makes all elements alike.
  if (codebook.rows == 1) layout = {1, 1, layout.size()};
  const int64_t max_codes = max_num_codes(codebook), samples = layout.outer * layout.inner;
  const Survey survey = survey_codebook<T>(codebook, threads);
  work.codebook = codebook;
  work.search = choose_search(samples, lanes, max_codes, codebook.rows, survey);
  work.traversal = plan_traversal(layout, lanes, work.search, max_codes,
                                  table_bytes<T>(work.search, samples, max_codes, survey.in_order));
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
    case Search::kCells:
      return build_cell_tables(work, workspace, lanes, count_cells(samples, max_codes), survey.in_order, threads);
  }
}

int64_t count_parts(const Traversal& traversal) {
  return std::clamp<int64_t>(std::min(traversal.size / kMinElementsPerPart, traversal.units), 1, kMaxParts);
}

int64_t element_bytes(ValueType type) { return type == ValueType::kFloat64 ? 8 : type == ValueType::kFloat32 ? 4 : 2; }

// Whole aligned vectors only, in whole cache lines, and outputs that the cache would not keep.
template <class T>
bool may_stream(const Work<T>& work, std::initializer_list<const void*> outputs, int64_t bytes, int64_t lanes) {
  const bool aligned = std::all_of(outputs.begin(), outputs.end(),
                                   [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 64 == 0; });
  const Traversal& t = work.traversal;
  const bool whole_lines = !t.periodic || t.groups == 1 || (t.segment % 64 == 0 && t.group_columns * lanes % 64 == 0);
  return aligned && bytes >= kStreamBytes && t.segment % lanes == 0 && whole_lines;
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
    prepare<T>(work, workspace, arguments.layout, arguments.codebook, lanes, arguments.threads);
    work.stream =
        may_stream(work, {arguments.quantized, arguments.indices}, size * element_bytes(arguments.value_type), lanes);
    const int64_t parts = count_parts(work.traversal);
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

// The gradient of the codes [begin, end) from their sums, which may lie in the same place.
template <class T, class Sum>
void scale_sums(const Sum* sums, T* gradients, int64_t count, double scale) {
  for (int64_t code = 0; code < count; ++code)
    gradients[code] = static_cast<T>(scale * static_cast<double>(sums[code]));
}

// The codebook's gradient where the work is split by latents: a group at a time, each part with room for one group.
template <class T>
void sum_by_groups(const BackwardWork<T>& work, Workspace& workspace, void (*kernel)(const BackwardWork<T>&),
                   int64_t lanes, T* grad_codebook, double scale, bool is_short, T* scratch) {
  const Traversal& t = work.traversal;
  const int64_t stride = work.codebook.stride, group_rows = t.periodic ? t.group_columns * lanes : 1;
  const int64_t table_size = is_short ? 0 : std::min(group_rows, work.codebook.rows) * stride;
  const int64_t by_memory = kMaxPartialBytes / std::max<int64_t>(1, table_size * int64_t{sizeof(double)});
  const int64_t parts = std::min({t.groups, count_parts(t), std::max(kMinPartsWithSums, by_memory)});
  double* tables = workspace.array<double>(parts * table_size);
  for_each_part(parts, work.arguments->threads, [&](int64_t part) {
    const int64_t end_group = t.groups * (part + 1) / parts;
    for (int64_t group = t.groups * part / parts; group < end_group; ++group) {
      const int64_t first_row = group * group_rows;
      const int64_t count = std::min(group_rows, work.codebook.rows - first_row) * stride;
      T* gradients = grad_codebook + first_row * stride;
      double* sums = tables + part * table_size;
      BackwardWork<T> own = work;
      own.scratch = scratch;
      own.first_code = first_row * stride;
      own.residual_sums = is_short ? nullptr : sums;
      own.short_sums = is_short ? gradients : nullptr;
      if (is_short) {
        std::fill(gradients, gradients + count, T(0));
      } else {
        std::fill(sums, sums + count, 0.0);
      }
      assign_units(own, group, t.groups);
      kernel(own);
      if (is_short) {
        scale_sums(gradients, gradients, count, scale);
      } else {
        scale_sums(sums, gradients, count, scale);
      }
    }
  });
}

// The codebook's gradient where the work is split by samples: each part has sums for all codes.
template <class T>
void sum_by_samples(const BackwardWork<T>& work, Workspace& workspace, void (*kernel)(const BackwardWork<T>&),
                    T* grad_codebook, double scale, int64_t scratch_size) {
  const int64_t num_codes = work.codebook.rows * work.codebook.stride;
  const int64_t partial_bytes = num_codes * int64_t{sizeof(double)} + scratch_size * int64_t{sizeof(T)};
  const int64_t by_codes = std::max(kMinPartsWithSums, work.traversal.size / (2 * (num_codes + scratch_size)));
  const int64_t by_memory = std::max<int64_t>(1, kMaxPartialBytes / partial_bytes);
  const int64_t parts = std::min({count_parts(work.traversal), by_codes, by_memory});
  double* sums = workspace.array<double>(parts * num_codes);
  T* scratch = scratch_size ? workspace.zeros<T>(parts * scratch_size) : nullptr;
  for_each_part(parts, work.arguments->threads, [&](int64_t part) {
    BackwardWork<T> own = work;
    own.residual_sums = sums + part * num_codes;
    own.scratch = scratch ? scratch + part * scratch_size : nullptr;
    std::fill(own.residual_sums, own.residual_sums + num_codes, 0.0);
    assign_units(own, part, parts);
    kernel(own);
  });
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t code = 0; code < num_codes; ++code) sums[code] += sums[part * num_codes + code];
  scale_sums(sums, grad_codebook, num_codes, scale);
}

// Elements of one latent between two clearings of its scratch sums; each clearing costs as much as its table.
bool sums_by_row(const Traversal& traversal, Search search, int64_t rows, int64_t lanes) {
  if (search == Search::kCells || rows > kMaxRowsToSum) return false;
  return traversal.periodic || traversal.groups > 1 || traversal.segment >= 8 * rows * lanes;
}

template <class T>
void backward(const BackwardArguments& arguments, void (*kernel)(const BackwardWork<T>&), int64_t lanes) {
  const int64_t size = arguments.layout.size();
  const CodebookView& codebook = arguments.codebook;
  T* grad_codebook = static_cast<T*>(arguments.grad_codebook);
  if (size == 0) {
    if (grad_codebook) std::fill(grad_codebook, grad_codebook + codebook.rows * codebook.stride, T(0));
    return;
  }
  Workspace workspace;
  BackwardWork<T> work{};
  const double scale =
      2.0 * static_cast<double>(*static_cast<const T*>(arguments.grad_loss)) / static_cast<double>(size);
  work.arguments = &arguments;
  work.residual_scale = static_cast<T>(scale * arguments.commitment_weight);
  prepare<T>(work, workspace, arguments.layout, codebook, lanes, arguments.threads);
  const int64_t value_bytes = size * element_bytes(arguments.value_type);
  work.stream = may_stream(work, {arguments.grad_z}, value_bytes, lanes);

  const Traversal& traversal = work.traversal;
  if (!grad_codebook) {
    const int64_t parts = count_parts(traversal);
    for_each_part(parts, arguments.threads, [&](int64_t part) {
      BackwardWork<T> own = work;
      assign_units(own, part, parts);
      kernel(own);
    });
    return;
  }
  const double to_gradient = -scale * arguments.quantization_weight;
  const bool by_row = sums_by_row(traversal, work.search, work.columns.rows, lanes);
  const int64_t scratch_size = by_row ? traversal.columns * work.columns.rows * lanes : 0;
  // Groups that begin and end with a latent share no code.
  const bool by_groups = traversal.groups >= kMinPartsWithSums && (!traversal.periodic || arguments.layout.inner == 1);
  if (!by_groups) return sum_by_samples(work, workspace, kernel, grad_codebook, to_gradient, scratch_size);
  T* scratch = by_row ? workspace.zeros<T>(scratch_size) : nullptr;
  const bool is_short = size / arguments.layout.num_latents <= cpu::kMaxAccumulations;
  sum_by_groups(work, workspace, kernel, lanes, grad_codebook, to_gradient, is_short, scratch);
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
