// What the kernels per value type and the code that launches them agree on.
#pragma once

#include "latent_quantize_cuda_plan.h"

namespace qlae::cuda {

struct ForwardParameters {
  Plan plan;
  ForwardPointers pointers;
  IndexType index_type;
  const int64_t* levels;
  int64_t codebook_stride;
  double loss_scale;  // (quantization weight + commitment weight) / elements
  bool aligned;       // rows and addresses
};

struct BackwardParameters {
  Plan plan;
  BackwardPointers pointers;
  const int64_t* levels;
  int64_t codebook_stride;
  double commitment_scale;    // commitment weight * 2 / elements
  double quantization_scale;  // quantization weight * 2 / elements
  bool aligned;
};

// Launches of one value type; both throw std::runtime_error where CUDA reports an error.
struct Kernels {
  void (*forward)(const ForwardParameters& parameters, void* stream);
  void (*backward)(const BackwardParameters& parameters, void* stream);
  // Lets the plan's kernel use up to `most_shared` bytes of shared memory on the current device, and returns how many
  // of its blocks run on a multiprocessor at a time.
  int (*resident_blocks)(const Plan& plan, bool backward, int64_t most_shared);
};

extern const Kernels kFloat32Kernels;
extern const Kernels kFloat64Kernels;
extern const Kernels kFloat16Kernels;
extern const Kernels kBFloat16Kernels;

// Throws std::runtime_error with CUDA's message unless `error` (a cudaError_t) is success.
void check(int error, const char* what);

}  // namespace qlae::cuda
