// A Python module with the CUDA kernels compiled for the CPU, for tests: the class `CudaLatentQuantize` over host
// memory.
#include "cuda_emulation.h"
#include "latent_quantize_cuda_bindings.h"

PYBIND11_MODULE(_emulated_cuda, module) { qlae::cuda::bind_cuda(module); }
