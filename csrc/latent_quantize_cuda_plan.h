// How a launch of `latent_quantize` on a GPU is cut into blocks, threads and shared memory. Host code, no CUDA calls.
#pragma once

#include <bit>
#include <cstdint>

#include "latent_quantize_cuda.h"

namespace qlae::cuda {

#ifdef __CUDACC__
#define QLAE_DEVICE __device__ __forceinline__
#else
#define QLAE_DEVICE inline
#endif

// Divides numbers below 2**31 by a constant with one multiplication (Granlund and Montgomery 1994).
struct FastDivisor {
  uint32_t divisor = 1;
  uint32_t multiplier = (1u << 31) + 1;
  uint32_t shift = 31;

  FastDivisor() = default;
  explicit FastDivisor(uint32_t value)
      : divisor(value),
        multiplier(static_cast<uint32_t>((uint64_t{1} << (31 + std::bit_width(value - 1))) / value + 1)),
        shift(31 + static_cast<uint32_t>(std::bit_width(value - 1))) {}
  QLAE_DEVICE uint32_t quotient(uint32_t number) const {
    return static_cast<uint32_t>((static_cast<uint64_t>(number) * multiplier) >> shift);
  }
};

enum class Search : int32_t {
  kDirect,  // compare the distance to every code, held in shared memory
  kSorted,  // binary search among the boundaries of the sorted codes, held in shared memory
  kGlobal,  // compare to every code, read from the codebook itself: for tables that fit nowhere
};

// Where residuals are summed per code.
enum class Bins : int32_t {
  kNone,
  kStaged,  // nowhere: positions and residuals of all elements lie in shared memory until a warp sums each latent's
  kThread,  // shared memory, per thread
  kWarp,    // shared memory, per warp
  kGlobal,  // the workspace, per warp
};

// Memory is a sequence of groups of rows. A window is a range of latents whose codes one block holds; `chunks` blocks
// share the rows of a window, `stack` rows at a time. A thread owns a vector of neighbouring columns, whose latents are
// the same in every row.
//   flat:    one window; a row is as long as the threads' columns are, a multiple of the period D * inner.
//   windows: a row is one period, of which a window is a part. (Long periods, or tables that fill shared memory.)
//   runs:    a window is one latent; a group holds the rows of one run of `inner` elements. (Long inner dimension.)
struct Geometry {
  uint32_t rows;  // of one window
  FastDivisor rows_per_group;
  int64_t group_pitch;   // elements from a group to the next
  int64_t row_pitch;     // elements from a row to the next within a group
  int64_t window_pitch;  // elements from a window to the next
  int64_t limit;         // elements of a group that belong to a window
  int64_t last_limit;    // the same for the last window
  int32_t windows;
  int32_t chunks;
  int32_t num_latents;        // of all windows
  int32_t window_latents;     // of one window; the last may have fewer
  FastDivisor column_period;  // column c belongs to local latent (c % column_period) / column_inner
  FastDivisor column_inner;
  FastDivisor chunks_divisor;
  FastDivisor row_threads;  // threads that share a row
  int32_t stack;            // rows of a block at a time; row_threads * stack threads own columns
  int32_t threads;          // of a block
  bool aligned;             // rows start at multiples of a vector
};

struct Plan {
  Geometry geometry;
  Search search;
  int32_t num_codes;      // largest number of codes of a latent
  int32_t num_positions;  // places of a latent's codes in its table: for kSorted, skewed
  int32_t table_pitch;    // entries of a latent's table
  int32_t table_levels;   // the power of two that holds num_codes
  int32_t table_bytes;
  FastDivisor positions_divisor;
  FastDivisor latents_divisor;  // window_latents

  Bins bins;
  int32_t slots;             // sets of bins of a thread: one, or one per column
  int32_t classes;           // threads whose numbers differ by a multiple of this own the same latents
  int32_t members;           // threads of a class
  int32_t member_pitch;      // the threads of one class lie side by side in shared memory
  int32_t bins_pitch;        // classes * member_pitch for kThread; bins of a warp for the others
  FastDivisor peer_divisor;  // lanes of a warp that share latents differ by a multiple of this
  bool columns_apart;        // different columns of any two lanes belong to different latents

  int32_t fan;     // partial results that a block adds up at a time
  int32_t groups;  // of chunks
  int64_t shared_bytes;
  int64_t workspace_bytes;
  int32_t counters;  // 0 where a block has no other to wait for
};

// Threads of a block at most: more would leave too few registers for each.
inline constexpr int kMaxForwardThreads = 512;
inline constexpr int kMaxBackwardThreads = 768;

// At the start of shared memory, for reductions over a block.
inline constexpr int64_t kScratchBytes = 512;
// Room for the arrays of a table to start at multiples of 8 bytes.
inline constexpr int64_t kTableSlackBytes = 32;

// The skewed place of sorted position m: one entry is left free after every 32, so that the boundaries that a binary
// search reads in the same step lie in different banks of shared memory.
QLAE_DEVICE int32_t skewed(int32_t position) { return position + position / 32; }

struct Device {
  int32_t multiprocessors;
  int64_t max_shared_per_block;
};

struct PlanRequest {
  Problem problem;
  Device device;
  bool backward;
  SearchChoice search;
  BinsChoice bins;
};

// Neighbouring elements of a thread: 16 bytes of float32 and float64. Half types take 8 bytes, since what a thread
// keeps per element is as much as for float32.
constexpr int vector_length_of(int stored_bytes) { return stored_bytes == 2 ? 4 : 16 / stored_bytes; }

int64_t stored_bytes(ValueType type);
int64_t compute_bytes(ValueType type);

// Everything but how many blocks there are. Throws std::invalid_argument for sizes beyond what indices hold.
Plan plan_blocks(const PlanRequest& request);

// Completes the plan for a device that runs `resident_blocks` such blocks per multiprocessor at a time.
void plan_grid(Plan& plan, const PlanRequest& request, int32_t resident_blocks);

}  // namespace qlae::cuda
