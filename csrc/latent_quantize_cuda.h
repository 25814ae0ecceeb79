// CUDA entry points of the op `latent_quantize`. Torch-free: raw pointers, 64-bit sizes, a stream.
#pragma once

#include <memory>

#include "latent_quantize.h"

namespace qlae::cuda {

// One problem of fixed sizes on one device. `layout` and `codebook` are as for the CPU; `codebook.levels` lies on the
// device, `codebook.values` is ignored.
struct Problem {
  ValueType value_type;
  IndexType index_type;
  LatentLayout layout;
  CodebookView codebook;
  // The largest number of codes of a latent.
  int64_t max_codes;
  double quantization_weight;
  double commitment_weight;
  int device;
};

// Addresses on the device; null pointers switch parts off. `workspace` holds the bytes that the launcher asks for, and
// `counters` are zero before and after a launch.
struct ForwardPointers {
  const void* codebook;
  const void* z;
  void* quantized;
  void* indices;
  void* loss;
  void* workspace;
  uint32_t* counters;
};

struct BackwardPointers {
  const void* codebook;
  const void* z;
  const void* grad_quantized;
  const void* grad_loss;
  void* grad_z;
  void* grad_codebook;
  void* workspace;
  uint32_t* counters;
};

// How codes are found and where residuals are summed: as the sizes suggest, or one way (for tests and tuning).
enum class SearchChoice : int32_t { kAuto, kDirect, kSorted, kGlobal };
enum class BinsChoice : int32_t { kAuto, kThread, kWarp };

class Launcher {
 public:
  // Throws std::runtime_error when the device does not answer.
  explicit Launcher(const Problem& problem);
  ~Launcher();

  // Enqueues one kernel on `stream` (a CUstream) of the problem's device. An empty problem must not be launched.
  void forward(const ForwardPointers& pointers, void* stream) const;
  void backward(const BackwardPointers& pointers, void* stream) const;

  int64_t forward_workspace_bytes() const;
  int64_t backward_workspace_bytes() const;
  // How many counters a launch uses.
  int64_t forward_counters() const;
  int64_t backward_counters() const;

 private:
  struct Plans;
  std::unique_ptr<const Plans> plans_;
};

// For problems planned from now on; what cannot be had for a problem's sizes gives way to what can.
void set_choices(SearchChoice search, BinsChoice bins);

// Counters that a launch may use at most.
inline constexpr int64_t kMaxCounters = 4096;

}  // namespace qlae::cuda
