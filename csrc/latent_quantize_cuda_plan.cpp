#include "latent_quantize_cuda_plan.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <stdexcept>

namespace qlae::cuda {

int64_t stored_bytes(ValueType type) { return type == ValueType::kFloat64 ? 8 : type == ValueType::kFloat32 ? 4 : 2; }
int64_t compute_bytes(ValueType type) { return type == ValueType::kFloat64 ? 8 : 4; }

namespace {

constexpr int64_t kUsualThreads = 256;
constexpr int64_t kWarpThreads = 32;
// Elements up to which one block keeps all positions and residuals.
constexpr int64_t kMaxStagedElements = 4096;
constexpr int64_t kMaxStagedCodes = 64;
// Partial results that one block adds up at once without losing time against two steps.
constexpr int64_t kMaxPartsAtOnce = 16;
// Vectors that are worth a thread with bins of its own, and a block's fewest threads where work is scarce.
constexpr int64_t kVectorsPerThread = 4;
constexpr int64_t kMinThreadsOfBlock = 128;
// Threads from which bins per thread are worth having, warps from which bins per warp are.
constexpr int64_t kMinThreadsWithBins = 384;
constexpr int64_t kEnoughWarps = 8;
// A run that fills this many vectors has its own rows.
constexpr int64_t kMinVectorsOfRun = 64;
constexpr int64_t kMaxGlobalBinsBytes = int64_t{64} << 20;
// Positions in the sorted table have 16 bits.
constexpr int64_t kMaxSortedCodes = 1 << 15;

int64_t divide_up(int64_t number, int64_t divisor) { return (number + divisor - 1) / divisor; }
int64_t round_up(int64_t number, int64_t multiple) { return divide_up(number, multiple) * multiple; }

// Rows are counted in 31 bits; each holds hundreds of elements or one latent vector.
uint32_t checked_rows(int64_t rows) {
  if (rows > std::numeric_limits<int32_t>::max())
    throw std::invalid_argument("latent_quantize: more than 2**31 - 1 rows; split the batch");
  return static_cast<uint32_t>(rows);
}

struct Sizes {
  LatentLayout layout;
  int64_t period;
  int64_t vector_length;
  int64_t value_bytes;
  int64_t num_codes;
  int64_t shared_bytes;

  explicit Sizes(const PlanRequest& request)
      : layout(request.problem.layout),
        vector_length(vector_length_of(static_cast<int>(stored_bytes(request.problem.value_type)))),
        value_bytes(compute_bytes(request.problem.value_type)),
        num_codes(request.problem.max_codes),
        shared_bytes(request.device.max_shared_per_block - kScratchBytes) {
    // Where all elements share their codes, the layout says nothing.
    if (request.problem.codebook.rows == 1 || layout.num_latents == 1) layout = {layout.size(), 1, 1};
    period = layout.num_latents * layout.inner;
  }
  int64_t vectors() const { return divide_up(layout.size(), vector_length); }
};

// The pitch of a latent's table, from `entries` on, with which the latents that lanes read side by side begin far apart
// in the 32 banks of shared memory.
int64_t spread_pitch(const Sizes& sizes, int64_t entries) {
  const int64_t side_by_side = sizes.period / std::gcd(sizes.period, sizes.vector_length);
  if (sizes.layout.inner > 1 || side_by_side == 1 || side_by_side > 8) return entries | 1;
  int64_t best = entries;
  const auto distance = [&](int64_t pitch) { return std::abs(pitch * sizes.vector_length % 32 - 32 / side_by_side); };
  for (int64_t pitch = entries; pitch < entries + 8; ++pitch)
    if (distance(pitch) < distance(best)) best = pitch;
  return best;
}

struct Table {
  Search search;
  int64_t pitch;
  int64_t levels;
  int64_t bytes_per_latent;

  Table(Search kind, const Sizes& sizes) : search(kind), pitch(sizes.num_codes), levels(0), bytes_per_latent(0) {
    // Odd, so that the same position of different latents lies in different banks.
    if (kind == Search::kDirect) bytes_per_latent = (pitch |= 1) * sizes.value_bytes;
    if (kind != Search::kSorted) return;
    levels = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(sizes.num_codes)));
    pitch = spread_pitch(sizes, levels + levels / 32);
    bytes_per_latent = pitch * (2 * sizes.value_bytes + 2) + sizes.value_bytes;
  }
  int64_t bytes(int64_t latents) const { return round_up(latents * bytes_per_latent + kTableSlackBytes, 16); }
};

// What multiplies and compares cost per element, and what preparing costs per block, in cycles of a multiprocessor.
Search cheapest_search(const Sizes& sizes, int64_t elements_of_block) {
  if (sizes.num_codes <= 2) return Search::kDirect;
  const double codes = static_cast<double>(sizes.num_codes);
  const double levels = std::bit_width(static_cast<uint64_t>(sizes.num_codes - 1));
  const double latents = static_cast<double>(std::min<int64_t>(sizes.layout.num_latents, 64));
  const double elements = static_cast<double>(elements_of_block);
  const double direct = elements * 5 * codes / 128;
  const double sorted = elements * (8 + 5 * levels) / 128 + 1500 + latents * codes * 150 / kUsualThreads;
  return direct <= sorted ? Search::kDirect : Search::kSorted;
}

Search choose_search(const PlanRequest& request, const Sizes& sizes) {
  const int64_t blocks = std::clamp<int64_t>(sizes.vectors() / kUsualThreads, 1, 4 * request.device.multiprocessors);
  const bool sortable = sizes.num_codes <= kMaxSortedCodes;
  switch (request.search) {
    case SearchChoice::kDirect: return Search::kDirect;
    case SearchChoice::kSorted: return sortable ? Search::kSorted : Search::kGlobal;
    case SearchChoice::kGlobal: return Search::kGlobal;
    case SearchChoice::kAuto: break;
  }
  const Search search = cheapest_search(sizes, sizes.layout.size() / blocks);
  return search == Search::kSorted && !sortable ? Search::kGlobal : search;
}

// A column that no thread owns.
constexpr uint32_t kNeverReached = 1u << 31;

// The multiple of `unit` up to `most` that fills whole warps best; near `wanted` among equals.
int64_t choose_threads(int64_t unit, int64_t wanted, int64_t most) {
  int64_t best = unit;
  double best_score = -1;
  for (int64_t threads = unit; threads <= most; threads += unit) {
    const double filled = static_cast<double>(threads) / static_cast<double>(round_up(threads, kWarpThreads));
    const double distance = std::abs(std::log2(static_cast<double>(threads) / static_cast<double>(wanted)));
    const double score = std::min(filled, 0.97) - 0.04 * distance + (threads == wanted ? 0.01 : 0);
    if (score > best_score) best = threads, best_score = score;
  }
  return best;
}

// Threads of a block and what they may at most be; `unit` classes always fit.
struct ThreadBudget {
  int64_t wanted;
  int64_t most;
};

struct Shape {
  Geometry geometry;
  int64_t classes;
};

void set_threads(Geometry& geometry, int64_t row_threads, int64_t stack) {
  geometry.row_threads = FastDivisor(static_cast<uint32_t>(row_threads));
  geometry.stack = static_cast<int32_t>(stack);
  geometry.threads = static_cast<int32_t>(round_up(row_threads * stack, kWarpThreads));
}

std::optional<Shape> flat_shape(const Sizes& sizes, ThreadBudget budget) {
  const int64_t vectors = sizes.vectors();
  const int64_t classes = std::lcm(sizes.period, sizes.vector_length) / sizes.vector_length;
  const bool one_row = vectors <= budget.most && (vectors <= budget.wanted || classes > budget.most);
  if (!one_row && classes > budget.most) return std::nullopt;
  const int64_t active = one_row ? vectors : choose_threads(classes, budget.wanted, budget.most);
  Geometry geometry{};
  set_threads(geometry, active, 1);
  geometry.row_pitch = active * sizes.vector_length;
  geometry.rows = checked_rows(divide_up(vectors, active));
  geometry.rows_per_group = FastDivisor(geometry.rows);
  geometry.limit = geometry.last_limit = sizes.layout.size();
  geometry.windows = 1;
  geometry.num_latents = geometry.window_latents = static_cast<int32_t>(sizes.layout.num_latents);
  geometry.column_period = FastDivisor(static_cast<uint32_t>(sizes.period));
  geometry.column_inner = FastDivisor(static_cast<uint32_t>(sizes.layout.inner));
  geometry.aligned = true;
  // Only whole rows of whole classes repeat the same latents.
  return Shape{geometry, active % classes == 0 ? classes : active};
}

Shape runs_shape(const Sizes& sizes, ThreadBudget budget) {
  const int64_t vectors = divide_up(sizes.layout.inner, sizes.vector_length);
  const int64_t row_threads = std::min(vectors, budget.wanted);
  const int64_t segments = divide_up(vectors, row_threads);
  Geometry geometry{};
  set_threads(geometry, row_threads, std::max<int64_t>(1, budget.wanted / row_threads));
  geometry.row_pitch = row_threads * sizes.vector_length;
  geometry.group_pitch = sizes.period;
  geometry.window_pitch = sizes.layout.inner;
  geometry.rows = checked_rows(sizes.layout.outer * segments);
  geometry.rows_per_group = FastDivisor(static_cast<uint32_t>(segments));
  geometry.limit = geometry.last_limit = sizes.layout.inner;
  geometry.windows = geometry.num_latents = static_cast<int32_t>(sizes.layout.num_latents);
  geometry.window_latents = 1;
  geometry.column_period = geometry.column_inner = FastDivisor(kNeverReached);
  geometry.aligned = sizes.layout.inner % sizes.vector_length == 0;
  return {geometry, 1};
}

Shape windows_shape(const Sizes& sizes, ThreadBudget budget, int64_t latents) {
  const int64_t width = latents * sizes.layout.inner;
  const int64_t windows = divide_up(sizes.layout.num_latents, latents);
  const int64_t row_threads = divide_up(width, sizes.vector_length);
  Geometry geometry{};
  const int64_t stack = std::min(budget.wanted / row_threads, divide_up(sizes.layout.outer, 1));
  set_threads(geometry, row_threads, std::max<int64_t>(1, stack));
  geometry.group_pitch = sizes.period;
  geometry.window_pitch = width;
  geometry.rows = checked_rows(sizes.layout.outer);
  geometry.rows_per_group = FastDivisor(1);
  geometry.limit = width;
  geometry.last_limit = sizes.period - (windows - 1) * width;
  geometry.windows = static_cast<int32_t>(windows);
  geometry.num_latents = static_cast<int32_t>(sizes.layout.num_latents);
  geometry.window_latents = static_cast<int32_t>(latents);
  geometry.column_period = FastDivisor(kNeverReached);
  geometry.column_inner = FastDivisor(static_cast<uint32_t>(sizes.layout.inner));
  geometry.aligned = width % sizes.vector_length == 0 && sizes.period % sizes.vector_length == 0;
  return {geometry, row_threads};
}

// The latents of a window that keep its rows aligned, where rows can be aligned at all.
int64_t window_unit(const Sizes& sizes) {
  if (sizes.period % sizes.vector_length != 0) return 1;
  return sizes.vector_length / std::gcd(sizes.layout.inner, sizes.vector_length);
}

bool has_long_runs(const Sizes& sizes) { return sizes.layout.inner >= kMinVectorsOfRun * sizes.vector_length; }

// As many latents as `threads` have columns for and as the table leaves room for; 0 where not even the fewest fit.
int64_t latents_of_window(const Sizes& sizes, int64_t threads, int64_t bytes_per_latent, int64_t bytes) {
  const int64_t by_columns = threads * sizes.vector_length / sizes.layout.inner;
  const int64_t by_memory = bytes_per_latent == 0 ? by_columns : bytes / bytes_per_latent;
  const int64_t latents = std::min({by_columns, by_memory, sizes.layout.num_latents});
  const int64_t unit = window_unit(sizes);
  // Fewer latents than that are read element by element.
  return latents >= unit ? latents / unit * unit : latents;
}

std::optional<Shape> shape_for(const Sizes& sizes, ThreadBudget budget, int64_t bytes_per_latent, int64_t bytes) {
  if (sizes.layout.num_latents * bytes_per_latent <= bytes)
    if (auto shape = flat_shape(sizes, budget)) return shape;
  if (has_long_runs(sizes)) {
    if (bytes_per_latent > bytes) return std::nullopt;
    return runs_shape(sizes, budget);
  }
  const int64_t threads = std::max(budget.wanted, divide_up(sizes.layout.inner, sizes.vector_length));
  const int64_t latents = latents_of_window(sizes, threads, bytes_per_latent, bytes);
  if (latents == 0) return std::nullopt;
  return windows_shape(sizes, budget, latents);
}

int64_t positions_of(Search search, const Sizes& sizes) {
  return search == Search::kSorted ? skewed(static_cast<int32_t>(sizes.num_codes - 1)) + 1 : sizes.num_codes;
}

void use_table(Plan& plan, const Table& table, const Sizes& sizes) {
  plan.search = table.search;
  plan.num_codes = static_cast<int32_t>(sizes.num_codes);
  plan.num_positions = static_cast<int32_t>(positions_of(table.search, sizes));
  plan.positions_divisor = FastDivisor(static_cast<uint32_t>(plan.num_positions));
  plan.latents_divisor = FastDivisor(static_cast<uint32_t>(plan.geometry.window_latents));
  plan.table_pitch = static_cast<int32_t>(table.pitch);
  plan.table_levels = static_cast<int32_t>(table.levels);
  plan.table_bytes =
      static_cast<int32_t>(table.search == Search::kGlobal ? 0 : table.bytes(plan.geometry.window_latents));
}

// Threads whose bins lie side by side must not meet in a bank, neither as neighbours nor as members of a class.
int64_t pitch_of_members(int64_t classes, int64_t members) {
  if (classes == 1 || members == 1) return members;
  if (classes >= kWarpThreads) return members | 1;
  const int64_t apart = divide_up(kWarpThreads, classes);
  return members <= apart ? apart : apart + round_up(members - apart, kWarpThreads);
}

void place_bins_per_thread(Plan& plan, const Shape& shape) {
  const int64_t active = int64_t{shape.geometry.row_threads.divisor} * shape.geometry.stack;
  plan.bins = Bins::kThread;
  plan.slots = shape.geometry.window_latents == 1 ? 1 : plan.slots;
  plan.classes = shape.geometry.window_latents == 1 ? 1 : static_cast<int32_t>(shape.classes);
  plan.members = static_cast<int32_t>(active / plan.classes);
  plan.member_pitch = static_cast<int32_t>(pitch_of_members(plan.classes, plan.members));
  plan.bins_pitch = plan.classes * plan.member_pitch;
}

int64_t thread_bins_bytes(const Plan& plan, const Sizes& sizes) {
  return int64_t{plan.slots} * plan.num_positions * plan.bins_pitch * sizes.value_bytes;
}

bool plan_thread_bins(Plan& plan, const PlanRequest& request, const Sizes& sizes, Search search) {
  const Table table(search == Search::kGlobal ? Search::kDirect : search, sizes);
  const int64_t vectors = sizes.vectors();
  // Each thread's bins have to be cleared and added up: only as many threads as find a few vectors each.
  const int64_t useful = vectors / (kVectorsPerThread * request.device.multiprocessors);
  int64_t most = std::min(std::max(kMinThreadsOfBlock, useful / kWarpThreads * kWarpThreads),
                          std::clamp<int64_t>(vectors, kWarpThreads, kMaxBackwardThreads));
  const int64_t least = request.bins == BinsChoice::kThread ? kWarpThreads : std::min(most, kMinThreadsWithBins);
  for (; most >= least; most -= most > kWarpThreads ? kWarpThreads : 1) {
    const auto shape = shape_for(sizes, {most, most}, table.bytes_per_latent, sizes.shared_bytes / 2);
    if (!shape || int64_t{shape->geometry.row_threads.divisor} * shape->geometry.stack < least) return false;
    plan.geometry = shape->geometry;
    plan.slots = static_cast<int32_t>(sizes.vector_length);
    place_bins_per_thread(plan, *shape);
    use_table(plan, table, sizes);
    if (plan.table_bytes + thread_bins_bytes(plan, sizes) <= sizes.shared_bytes) return true;
  }
  return false;
}

// With a longer inner dimension neighbouring lanes share latents, too.
uint32_t peer_step(const Sizes& sizes, int64_t classes) {
  return sizes.layout.inner == 1 ? static_cast<uint32_t>(std::min<int64_t>(classes, kWarpThreads)) : 1;
}

// All elements in one block, a vector per thread.
bool plan_staged(Plan& plan, const PlanRequest& request, const Sizes& sizes, Search search) {
  if (request.bins != BinsChoice::kAuto || search == Search::kGlobal) return false;
  if (sizes.vectors() > kMaxBackwardThreads || sizes.layout.size() > kMaxStagedElements) return false;
  const Table table(search, sizes);
  if (sizes.num_codes > kMaxStagedCodes || table.bytes(sizes.layout.num_latents) > sizes.shared_bytes / 2) return false;
  const auto shape = flat_shape(sizes, {sizes.vectors(), kMaxBackwardThreads});
  if (!shape) return false;
  plan.geometry = shape->geometry;
  plan.bins = Bins::kStaged;
  plan.slots = plan.classes = plan.members = plan.member_pitch = 1;
  use_table(plan, table, sizes);
  return true;
}

// Positions and residuals of all elements, skewed.
int64_t staged_bytes(const Sizes& sizes) {
  return (skewed(static_cast<int32_t>(sizes.layout.size())) + 1) * (sizes.value_bytes + int64_t{sizeof(int32_t)}) + 8;
}

bool plan_warp_bins(Plan& plan, const Sizes& sizes) {
  const Table table(Search::kSorted, sizes);
  const int64_t unit = window_unit(sizes);
  // A bin lies as far from the first as its code does in the table.
  const int64_t bins_of_latent = table.pitch * sizes.value_bytes;
  std::optional<Plan> best;
  for (int64_t latents = sizes.layout.num_latents; latents > 0;) {
    const int64_t left = sizes.shared_bytes - table.bytes(latents);
    const int64_t warps = std::min<int64_t>(left / (latents * bins_of_latent), kMaxBackwardThreads / kWarpThreads);
    if (warps >= 1) {
      const ThreadBudget budget{warps * kWarpThreads, warps * kWarpThreads};
      const auto shape = shape_for(sizes, budget, table.bytes_per_latent + bins_of_latent,
                                   latents * (table.bytes_per_latent + bins_of_latent));
      if (shape && shape->geometry.threads <= budget.most) {
        Plan candidate = plan;
        candidate.geometry = shape->geometry;
        candidate.bins = Bins::kWarp;
        candidate.slots = candidate.classes = candidate.members = candidate.member_pitch = 1;
        use_table(candidate, table, sizes);
        candidate.num_positions = candidate.table_pitch;
        candidate.positions_divisor = FastDivisor(static_cast<uint32_t>(candidate.num_positions));
        candidate.bins_pitch = candidate.geometry.window_latents * candidate.num_positions;
        candidate.columns_apart = sizes.layout.inner == 1 && sizes.period % sizes.vector_length == 0 &&
                                  candidate.geometry.window_latents % sizes.vector_length == 0;
        candidate.peer_divisor = FastDivisor(peer_step(sizes, shape->classes));
        if (!best || candidate.geometry.threads > best->geometry.threads) best = candidate;
        if (warps >= kEnoughWarps) break;
      }
    }
    latents = latents > unit ? std::max(unit, latents / 2 / unit * unit) : best ? 0 : latents / 2;
  }
  if (!best) return false;
  plan = *best;
  return true;
}

void plan_global_bins(Plan& plan, const Sizes& sizes) {
  const Table table(Search::kGlobal, sizes);
  const auto shape = shape_for(sizes, {kUsualThreads, kMaxBackwardThreads}, 0, sizes.shared_bytes);
  if (!shape) throw std::invalid_argument("latent_quantize: the inner dimension is too long for a block");
  plan.geometry = shape->geometry;
  plan.bins = Bins::kGlobal;
  plan.slots = plan.classes = plan.members = plan.member_pitch = 1;
  if (int64_t{shape->geometry.window_latents} * sizes.num_codes > std::numeric_limits<int32_t>::max())
    throw std::invalid_argument("latent_quantize: the codebook has more codes than a block can count");
  plan.bins_pitch = static_cast<int32_t>(shape->geometry.window_latents * sizes.num_codes);
  use_table(plan, table, sizes);
}

// Bins of the warps of a block.
int64_t warp_bins_bytes(const Plan& plan, const Sizes& sizes) {
  return int64_t{plan.geometry.threads} / kWarpThreads * plan.bins_pitch * sizes.value_bytes;
}

void plan_forward(Plan& plan, const PlanRequest& request, const Sizes& sizes) {
  const Search search = choose_search(request, sizes);
  const bool one_block = sizes.vectors() <= kMaxForwardThreads;
  const ThreadBudget budget{one_block ? sizes.vectors() : kUsualThreads, kMaxForwardThreads};
  plan.bins = Bins::kNone;
  for (const Search kind : {search, Search::kGlobal}) {
    const Table table(kind, sizes);
    const auto shape = shape_for(sizes, budget, table.bytes_per_latent, sizes.shared_bytes - kTableSlackBytes - 16);
    if (!shape) continue;
    plan.geometry = shape->geometry;
    use_table(plan, table, sizes);
    return;
  }
  throw std::invalid_argument("latent_quantize: the inner dimension is too long for a block");
}

void plan_backward(Plan& plan, const PlanRequest& request, const Sizes& sizes) {
  const Search search = choose_search(request, sizes);
  const bool sortable = sizes.num_codes <= kMaxSortedCodes;
  if (plan_staged(plan, request, sizes, search)) return;
  if (search != Search::kGlobal && request.bins != BinsChoice::kWarp && plan_thread_bins(plan, request, sizes, search))
    return;
  if (search != Search::kGlobal && sortable && plan_warp_bins(plan, sizes)) return;
  plan_global_bins(plan, sizes);
}

// Few enough partial results at a time, and few enough counters.
void plan_reduction(Plan& plan, bool backward) {
  Geometry& geometry = plan.geometry;
  const int64_t parts = backward ? geometry.chunks : int64_t{geometry.windows} * geometry.chunks;
  int64_t fan = 1;
  while (fan * fan < parts) ++fan;
  // The loss is one number per block: any block can add up many.
  if (!backward || parts <= kMaxPartsAtOnce) fan = parts;
  plan.fan = static_cast<int32_t>(fan);
  plan.groups = static_cast<int32_t>(divide_up(parts, fan));
  const int64_t counters = (backward ? geometry.windows : 1) * (int64_t{plan.groups} + 1);
  if (counters > kMaxCounters) {
    geometry.chunks = 1;
    plan.fan = plan.groups = 1;
  }
  const bool alone = backward ? geometry.chunks == 1 : parts == 1;
  plan.counters = alone ? 0 : static_cast<int32_t>(counters);
}

}  // namespace

Plan plan_blocks(const PlanRequest& request) {
  const Sizes sizes(request);
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  if (sizes.layout.num_latents > kMost || sizes.num_codes > kMost)
    throw std::invalid_argument("latent_quantize: more than 2**31 - 1 latents or codes");
  Plan plan{};
  request.backward ? plan_backward(plan, request, sizes) : plan_forward(plan, request, sizes);
  plan.shared_bytes = kScratchBytes + plan.table_bytes;
  if (plan.bins == Bins::kStaged) plan.shared_bytes += staged_bytes(sizes);
  if (plan.bins == Bins::kThread) plan.shared_bytes += thread_bins_bytes(plan, sizes);
  if (plan.bins == Bins::kWarp) plan.shared_bytes += warp_bins_bytes(plan, sizes);
  return plan;
}

void plan_grid(Plan& plan, const PlanRequest& request, int32_t resident_blocks) {
  const Sizes sizes(request);
  Geometry& geometry = plan.geometry;
  int64_t blocks = int64_t{request.device.multiprocessors} * std::max(1, resident_blocks);
  if (plan.bins == Bins::kGlobal)
    blocks = std::min(blocks, std::max<int64_t>(1, kMaxGlobalBinsBytes / warp_bins_bytes(plan, sizes)));
  const int64_t rows_of_block = request.backward ? int64_t{2} * geometry.stack : geometry.stack;
  const int64_t most = divide_up(geometry.rows, rows_of_block);
  geometry.chunks = static_cast<int32_t>(std::clamp<int64_t>(blocks / geometry.windows, 1, most));
  plan_reduction(plan, request.backward);
  geometry.chunks_divisor = FastDivisor(static_cast<uint32_t>(geometry.chunks));

  const int64_t all_blocks = int64_t{geometry.windows} * geometry.chunks;
  plan.workspace_bytes = 0;
  if (request.backward) {
    const int64_t results = int64_t{geometry.window_latents} * plan.num_positions * sizes.value_bytes;
    if (plan.counters > 0) plan.workspace_bytes = (all_blocks + int64_t{geometry.windows} * plan.groups) * results;
    if (plan.bins == Bins::kGlobal) plan.workspace_bytes += all_blocks * warp_bins_bytes(plan, sizes);
  } else if (plan.counters > 0) {
    plan.workspace_bytes = all_blocks * int64_t{sizeof(double)};
  }
}

}  // namespace qlae::cuda
