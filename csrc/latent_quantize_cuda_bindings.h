// The class `CudaLatentQuantize` of a Python module: kernels over addresses on the device. Python checks shapes and
// dtypes.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <vector>

#include "latent_quantize_cuda.h"

namespace qlae::cuda {

class PythonLauncher {
 public:
  PythonLauncher(int value_type, int64_t outer, int64_t num_latents, int64_t inner, int64_t rows, int64_t stride,
                 uintptr_t levels, int64_t max_codes, int index_type, double quantization_weight,
                 double commitment_weight, int device)
      : launcher_({.value_type = static_cast<ValueType>(value_type),
                   .index_type = static_cast<IndexType>(index_type),
                   .layout = {outer, num_latents, inner},
                   .codebook = {nullptr, rows, stride, reinterpret_cast<const int64_t*>(levels)},
                   .max_codes = max_codes,
                   .quantization_weight = quantization_weight,
                   .commitment_weight = commitment_weight,
                   .device = device}) {}

  void forward(uintptr_t codebook, uintptr_t z, uintptr_t quantized, uintptr_t indices, uintptr_t loss,
               uintptr_t workspace, uintptr_t counters, uintptr_t stream) const {
    launcher_.forward(
        {pointer<const void>(codebook), pointer<const void>(z), pointer<void>(quantized), pointer<void>(indices),
         pointer<void>(loss), pointer<void>(workspace), pointer<uint32_t>(counters)},
        pointer<void>(stream));
  }

  void backward(uintptr_t codebook, uintptr_t z, uintptr_t grad_quantized, uintptr_t grad_loss, uintptr_t grad_z,
                uintptr_t grad_codebook, uintptr_t workspace, uintptr_t counters, uintptr_t stream) const {
    launcher_.backward({pointer<const void>(codebook), pointer<const void>(z), pointer<const void>(grad_quantized),
                        pointer<const void>(grad_loss), pointer<void>(grad_z), pointer<void>(grad_codebook),
                        pointer<void>(workspace), pointer<uint32_t>(counters)},
                       pointer<void>(stream));
  }

  const Launcher& launcher() const { return launcher_; }

 private:
  template <class T>
  static T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
  }

  Launcher launcher_;
};

inline void bind_cuda(pybind11::module_& module) {
  namespace py = pybind11;
  py::class_<PythonLauncher>(module, "CudaLatentQuantize", py::module_local())
      .def(py::init<int, int64_t, int64_t, int64_t, int64_t, int64_t, uintptr_t, int64_t, int, double, double, int>())
      .def("forward", &PythonLauncher::forward)
      .def("backward", &PythonLauncher::backward)
      .def_property_readonly("forward_workspace_bytes",
                             [](const PythonLauncher& self) { return self.launcher().forward_workspace_bytes(); })
      .def_property_readonly("backward_workspace_bytes",
                             [](const PythonLauncher& self) { return self.launcher().backward_workspace_bytes(); })
      .def_property_readonly("forward_counters",
                             [](const PythonLauncher& self) { return self.launcher().forward_counters(); })
      .def_property_readonly("backward_counters",
                             [](const PythonLauncher& self) { return self.launcher().backward_counters(); });
  module.def("set_cuda_choices", [](int search, int bins) {
    set_choices(static_cast<SearchChoice>(search), static_cast<BinsChoice>(bins));
  });
}

}  // namespace qlae::cuda
