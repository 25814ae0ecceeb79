// What the per-instruction-set kernels and the code that prepares and splits their work agree on.
#pragma once

#include "latent_quantize_cpu.h"

namespace qlae::cpu {

// Values added in one number of T before the sum moves on to double.
constexpr int64_t kMaxAccumulations = 512;

template <class T>
struct VectorIndex;
template <>
struct VectorIndex<float> {
  using type = int32_t;
};
template <>
struct VectorIndex<double> {
  using type = int64_t;
};

// How a vector of z finds its codes; docs/latent_quantize.md derives them and proves them exact. Few codes are compared
// in a table with an entry for every lane.
enum class Search {
  kDirect,      // compare the distance to each of few codes: hardly anything to prepare, for small inputs
  kThresholds,  // compare z to the exact boundary of each gap between few codes: least work per element
  kScan,        // compare the distance to each of many codes, in vectors of codes: nothing to prepare
  kCells,       // uniform cells, then a short binary search among many codes in order
};

// How the codes of a row follow one another: none if one is not larger than the one before, uneven if of two
// consecutive gaps one is less than the spacing of floats at the other.
enum class Order { kNone, kUneven, kEven };

// A column is a group of `lanes` neighbouring elements whose latents are the same wherever the column occurs. Row r of
// a column's table holds, per lane, a code and, for kThresholds, its index in the codebook (-1 in padding) and the
// smallest z that belongs to it rather than to row r - 1. For kDirect, row r is code r and padding is NaN; only
// periodic traversals need its table.
template <class T>
struct ColumnTables {
  using Index = typename VectorIndex<T>::type;
  int64_t rows;
  const T* values;             // [columns, rows, lanes]
  const T* thresholds;         // [columns, rows, lanes]
  const Index* indices;        // [columns, rows, lanes]
  const T* lows;               // [columns, lanes]; the order of the codes decides exactly where low <= z <= high
  const T* highs;              // [columns, lanes]
  const Index* codebook_rows;  // [columns, lanes]
};

// Tables of kCells, per codebook row: `cells` cell starts, and `stride` distinct codes in ascending order. A row whose
// codes have no order (one is not finite) starts with NaN.
template <class T>
struct CellTables {
  using Index = typename VectorIndex<T>::type;
  int64_t cells;
  int64_t stride;
  int64_t first_step;    // largest power of two <= how far above its cell's start a code below z can be
  const Index* starts;   // [codebook rows, cells]: the last code in an earlier cell, or 0
  const T* values;       // [codebook rows, stride]; the codebook itself where it is in order
  const Index* indices;  // [codebook rows, stride]; null where the codebook is in order
  const Index* lasts;    // [codebook rows]: the place of the largest code
  const T* origins;      // [codebook rows]
  const T* scales;       // [codebook rows]
};

// Periodic: memory is a sequence of segments of `segment` elements, each of `columns` columns; a unit is
// `unit_length` segments. Runs: memory is a sequence of runs of `segment` elements of one latent, whose column is the
// latent; a unit is up to `unit_length` elements of one run.
// Where the tables of all columns would leave the cache, columns are visited in `groups` of `group_columns`, each over
// all of memory, in `units` units. Two groups share no latent.
struct Traversal {
  bool periodic;
  int64_t size;
  int64_t segment;
  int64_t columns;
  int64_t unit_length;
  int64_t units;
  int64_t groups;
  int64_t group_columns;
};

// The work on one group: columns, rows of tables and rows of the codebook are counted from the group's first.
template <class T>
struct Work {
  Search search;
  Traversal traversal;
  int64_t first_column;
  int64_t num_columns;
  int64_t first_row;
  ColumnTables<T> columns;
  CellTables<T> cells;
  CodebookView codebook;
  int64_t unit_begin;
  int64_t unit_end;
  // Non-temporal stores, for outputs that do not fit into the cache.
  bool stream;
};

template <class T>
struct ForwardWork : Work<T> {
  const ForwardArguments* arguments;
  // The sum of squared residuals of these units.
  double* squared_error;
};

template <class T>
struct BackwardWork : Work<T> {
  const BackwardArguments* arguments;
  // What multiplies (z - quantized) in grad_z.
  T residual_scale;
  // Sums of (z - code) per code, [rows, stride], in float64, or in T where no code can receive more than
  // kMaxAccumulations values; both null when no codebook gradient is wanted.
  double* residual_sums;
  T* short_sums;
  // Sums per table row and lane, [columns, rows, lanes], zero on entry; null where they would cost more than they save.
  T* scratch;
};

// See latent_quantize_cpu_codebook.h; compiled once, for every instruction set.
int64_t nearest_of_sorted(float z, const float* codes, const int32_t* indices, int64_t count);
int64_t nearest_of_sorted(double z, const double* codes, const int64_t* indices, int64_t count);

template <class T>
struct KernelsFor {
  int64_t lanes;
  Order (*order_of)(const T* codes, int64_t count);
  void (*forward)(const ForwardWork<T>&);
  void (*backward)(const BackwardWork<T>&);
};

struct Kernels {
  const char* name;
  KernelsFor<float> for_float;
  KernelsFor<double> for_double;
};

extern const Kernels kBaselineKernels;
#ifdef QLAE_X86_VARIANTS
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

}  // namespace qlae::cpu
