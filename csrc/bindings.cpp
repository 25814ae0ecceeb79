// The native module `qlae_kernels._native`: kernels over addresses and sizes. Python checks shapes and dtypes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "buffer_pool.h"
#include "latent_quantize_cpu.h"
#ifdef QLAE_CUDA
#include "latent_quantize_cuda_bindings.h"
#endif

namespace py = pybind11;

namespace {

// Calls shorter than handing the interpreter lock over keep it.
constexpr int64_t kReleaseLockElements = 32768;

// Owns a block of the pool for as long as a tensor refers to it.
class PooledBuffer {
 public:
  explicit PooledBuffer(int64_t bytes) : bytes_(bytes), block_(qlae::BufferPool::instance().acquire(bytes)) {}
  ~PooledBuffer() { qlae::BufferPool::instance().release(block_); }
  PooledBuffer(const PooledBuffer&) = delete;
  PooledBuffer& operator=(const PooledBuffer&) = delete;

  py::buffer_info view() { return {static_cast<uint8_t*>(block_.memory), bytes_}; }

 private:
  int64_t bytes_;
  qlae::BufferPool::Block block_;
};

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

template <class Call>
void without_lock(int64_t size, Call call) {
  if (size < kReleaseLockElements) return call();
  py::gil_scoped_release release;
  call();
}

// One problem of fixed sizes: what its calls share is converted from Python once.
class LatentQuantize {
 public:
  LatentQuantize(int value_type, int64_t outer, int64_t num_latents, int64_t inner, int64_t rows, int64_t stride,
                 uintptr_t levels, int index_type, double quantization_weight, double commitment_weight)
      : value_type_(static_cast<qlae::ValueType>(value_type)),
        layout_{outer, num_latents, inner},
        codebook_{nullptr, rows, stride, pointer<const int64_t>(levels)},
        index_type_(static_cast<qlae::IndexType>(index_type)),
        quantization_weight_(quantization_weight),
        commitment_weight_(commitment_weight) {}

  void forward(uintptr_t codebook, uintptr_t z, uintptr_t quantized, uintptr_t indices, uintptr_t loss,
               int threads) const {
    const qlae::ForwardArguments arguments{
        .value_type = value_type_,
        .layout = layout_,
        .codebook = {pointer<const void>(codebook), codebook_.rows, codebook_.stride, codebook_.levels},
        .z = pointer<const void>(z),
        .quantized = pointer<void>(quantized),
        .indices = pointer<void>(indices),
        .index_type = index_type_,
        .loss = pointer<void>(loss),
        .loss_weight = quantization_weight_ + commitment_weight_,
        .threads = threads,
    };
    without_lock(layout_.size(), [&] { qlae::latent_quantize_forward(arguments); });
  }

  void backward(uintptr_t codebook, uintptr_t z, uintptr_t grad_quantized, uintptr_t grad_loss, uintptr_t grad_z,
                uintptr_t grad_codebook, int threads) const {
    const qlae::BackwardArguments arguments{
        .value_type = value_type_,
        .layout = layout_,
        .codebook = {pointer<const void>(codebook), codebook_.rows, codebook_.stride, codebook_.levels},
        .z = pointer<const void>(z),
        .grad_quantized = pointer<const void>(grad_quantized),
        .grad_loss = pointer<const void>(grad_loss),
        .grad_z = pointer<void>(grad_z),
        .grad_codebook = pointer<void>(grad_codebook),
        .quantization_weight = quantization_weight_,
        .commitment_weight = commitment_weight_,
        .threads = threads,
    };
    without_lock(layout_.size(), [&] { qlae::latent_quantize_backward(arguments); });
  }

 private:
  qlae::ValueType value_type_;
  qlae::LatentLayout layout_;
  qlae::CodebookView codebook_;
  qlae::IndexType index_type_;
  double quantization_weight_;
  double commitment_weight_;
};

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "Kernels of qlae_kernels over raw addresses; use qlae_kernels.latent_quantize instead.";
  py::class_<LatentQuantize>(module, "LatentQuantize")
      .def(py::init<int, int64_t, int64_t, int64_t, int64_t, int64_t, uintptr_t, int, double, double>())
      .def("forward", &LatentQuantize::forward)
      .def("backward", &LatentQuantize::backward);
  py::class_<PooledBuffer>(module, "PooledBuffer", py::buffer_protocol())
      .def(py::init<int64_t>(), py::arg("bytes"))
      .def_buffer(&PooledBuffer::view);
  module.def("set_max_idle_bytes", [](int64_t bytes) { qlae::BufferPool::instance().set_max_idle_bytes(bytes); });
  module.def("max_idle_bytes", [] { return qlae::BufferPool::instance().max_idle_bytes(); });
  module.def("idle_bytes", [] { return qlae::BufferPool::instance().idle_bytes(); });
  module.def("set_min_samples_to_sort", &qlae::set_min_samples_to_sort, py::arg("samples"));
  module.def("instruction_sets", &qlae::instruction_sets);
  module.def("active_instruction_set", &qlae::active_instruction_set);
  module.def("use_instruction_set", &qlae::use_instruction_set, py::arg("name"));
#ifdef QLAE_CUDA
  qlae::cuda::bind_cuda(module);
#endif
}
