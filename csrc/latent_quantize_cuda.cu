#include "latent_quantize_cuda.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "cuda_emulation.h"
#endif

#include <atomic>
#include <stdexcept>
#include <string>

#include "latent_quantize_cuda_kernels.h"

namespace qlae::cuda {

void check(int error, const char* what) {
  if (error == cudaSuccess) return;
  const char* reason = cudaGetErrorString(static_cast<cudaError_t>(error));
  // Errors of a launch stay behind and would be reported by the next call of somebody else.
  (void)cudaGetLastError();
  throw std::runtime_error(std::string("CUDA error while ") + what + ": " + reason);
}

namespace {

std::atomic<SearchChoice> search_choice{SearchChoice::kAuto};
std::atomic<BinsChoice> bins_choice{BinsChoice::kAuto};

// Makes a device current for as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    check(cudaGetDevice(&before_), "asking for the current device");
    if (device_ != before_) check(cudaSetDevice(device_), "choosing a device");
  }
  ~DeviceGuard() {
    if (device_ != before_) (void)cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_;
  int before_ = 0;
};

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "asking for a property of the device");
  return value;
}

Device describe(int device) {
  return {attribute(cudaDevAttrMultiProcessorCount, device),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)};
}

const Kernels& kernels_for(ValueType type) {
  switch (type) {
    case ValueType::kFloat32: return kFloat32Kernels;
    case ValueType::kFloat64: return kFloat64Kernels;
    case ValueType::kFloat16: return kFloat16Kernels;
    case ValueType::kBFloat16: break;
  }
  return kBFloat16Kernels;
}

template <class... Pointers>
bool at_multiples_of_16(Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

}  // namespace

struct Launcher::Plans {
  Problem problem;
  const Kernels& kernels;
  Plan forward;
  Plan backward;
};

Launcher::Launcher(const Problem& problem) {
  const DeviceGuard guard(problem.device);
  const Device device = describe(problem.device);
  const Kernels& kernels = kernels_for(problem.value_type);
  const auto plan_for = [&](bool backward) {
    const PlanRequest request{problem, device, backward, search_choice.load(), bins_choice.load()};
    Plan plan = plan_blocks(request);
    plan_grid(plan, request, kernels.resident_blocks(plan, backward, device.max_shared_per_block));
    return plan;
  };
  plans_ = std::make_unique<const Plans>(Plans{problem, kernels, plan_for(false), plan_for(true)});
}

Launcher::~Launcher() = default;

void Launcher::forward(const ForwardPointers& pointers, void* stream) const {
  const Problem& problem = plans_->problem;
  const ForwardParameters parameters{
      .plan = plans_->forward,
      .pointers = pointers,
      .index_type = problem.index_type,
      .levels = problem.codebook.levels,
      .codebook_stride = problem.codebook.stride,
      .loss_scale =
          (problem.quantization_weight + problem.commitment_weight) / static_cast<double>(problem.layout.size()),
      .aligned =
          plans_->forward.geometry.aligned && at_multiples_of_16(pointers.z, pointers.quantized, pointers.indices),
  };
  const DeviceGuard guard(problem.device);
  plans_->kernels.forward(parameters, stream);
}

void Launcher::backward(const BackwardPointers& pointers, void* stream) const {
  const Problem& problem = plans_->problem;
  const double elements = static_cast<double>(problem.layout.size());
  const BackwardParameters parameters{
      .plan = plans_->backward,
      .pointers = pointers,
      .levels = problem.codebook.levels,
      .codebook_stride = problem.codebook.stride,
      .commitment_scale = problem.commitment_weight * 2 / elements,
      .quantization_scale = problem.quantization_weight * 2 / elements,
      .aligned =
          plans_->backward.geometry.aligned && at_multiples_of_16(pointers.z, pointers.grad_quantized, pointers.grad_z),
  };
  const DeviceGuard guard(problem.device);
  plans_->kernels.backward(parameters, stream);
}

int64_t Launcher::forward_workspace_bytes() const { return plans_->forward.workspace_bytes; }
int64_t Launcher::backward_workspace_bytes() const { return plans_->backward.workspace_bytes; }
int64_t Launcher::forward_counters() const { return plans_->forward.counters; }
int64_t Launcher::backward_counters() const { return plans_->backward.counters; }

void set_choices(SearchChoice search, BinsChoice bins) {
  search_choice = search;
  bins_choice = bins;
}

}  // namespace qlae::cuda
