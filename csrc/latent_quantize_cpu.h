// CPU entry points of the op `latent_quantize`. Torch-free: raw pointers, 64-bit sizes, a thread count.
#pragma once

#include <string>
#include <vector>

#include "latent_quantize.h"

namespace qlae {

// Null pointers switch parts off: `quantized`, `indices` and `loss` are written only where given.
struct ForwardArguments {
  ValueType value_type;
  LatentLayout layout;
  CodebookView codebook;
  const void* z;
  void* quantized;
  void* indices;
  IndexType index_type;
  void* loss;          // one value of the compute type
  double loss_weight;  // quantization weight + commitment weight
  int threads;
};

// `grad_quantized` null counts as zero; `grad_z` and `grad_codebook` are written only where given.
struct BackwardArguments {
  ValueType value_type;
  LatentLayout layout;
  CodebookView codebook;
  const void* z;
  const void* grad_quantized;
  const void* grad_loss;  // one value of the compute type
  void* grad_z;
  void* grad_codebook;  // [rows, stride] of the compute type
  double quantization_weight;
  double commitment_weight;
  int threads;
};

void latent_quantize_forward(const ForwardArguments& arguments);
void latent_quantize_backward(const BackwardArguments& arguments);

// Samples per latent from which few codes are sorted, many in proportion; tests lower it to reach every search with
// little data. Returns the value before. The results do not depend on it.
int64_t set_min_samples_to_sort(int64_t samples);

// Instruction sets that this build holds and this processor runs, slowest first.
std::vector<std::string> instruction_sets();
std::string active_instruction_set();
// Throws std::invalid_argument when `name` is not one of instruction_sets().
void use_instruction_set(const std::string& name);

}  // namespace qlae
