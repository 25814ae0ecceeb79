// What the per-instruction-set kernels and the code that prepares and splits their work agree on.
#pragma once

#include "latent_quantize_cpu.h"

namespace qlae::cpu {

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

// How a vector of z finds its codes; docs/latent_quantize.md derives all three and proves them exact.
enum class Search {
  kDirect,      // compare the distance to every code: nothing to prepare, for small inputs
  kThresholds,  // compare z to the exact boundary of each gap: least work per element, for few codes
  kCells,       // uniform cells, then a short binary search among boundaries: for many codes
};

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
  const T* bounds;             // [columns, lanes]; the boundaries decide exactly where |z| <= bound
  const Index* codebook_rows;  // [columns, lanes]
};

// Tables of kCells, per codebook row: `cells` cell starts, and `stride` sorted boundaries, codes and indices.
template <class T>
struct CellTables {
  using Index = typename VectorIndex<T>::type;
  int64_t cells;
  int64_t stride;
  int64_t first_step;    // largest power of two <= the largest number of boundaries in one cell; 0 if none
  const Index* starts;   // [codebook rows, cells]
  const T* values;       // [codebook rows, stride]
  const T* thresholds;   // [codebook rows, stride], padded with NaN, which no z reaches
  const Index* indices;  // [codebook rows, stride]
  const T* origins;      // [codebook rows]
  const T* scales;       // [codebook rows]
};

// Periodic: memory is a sequence of segments of `segment` elements, each of `columns` columns; a unit is
// `unit_length` segments. Runs: memory is a sequence of runs of `segment` elements of one latent, whose column is the
// latent; a unit is up to `unit_length` elements of one run.
struct Traversal {
  bool periodic;
  int64_t size;
  int64_t segment;
  int64_t columns;
  int64_t unit_length;
  int64_t units;
};

template <class T>
struct Work {
  Search search;
  Traversal traversal;
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
  // Sums of (z - code) per code, [rows, stride]; null when no codebook gradient is wanted.
  double* residual_sums;
  // Sums per table row and lane, [columns, rows, lanes], zero on entry; null where they would cost more than they save.
  T* scratch;
};

struct Kernels {
  const char* name;
  int64_t vector_bytes;
  void (*forward_float)(const ForwardWork<float>&);
  void (*forward_double)(const ForwardWork<double>&);
  void (*backward_float)(const BackwardWork<float>&);
  void (*backward_double)(const BackwardWork<double>&);
};

extern const Kernels kBaselineKernels;
#ifdef QLAE_X86_VARIANTS
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

}  // namespace qlae::cpu
