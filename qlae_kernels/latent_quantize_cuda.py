"""The op `latent_quantize` on NVIDIA GPUs: CUDA C++ kernels (csrc/)."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from qlae_kernels.gpu_tensors import counters, levels_on
from qlae_kernels.latent_quantize_cpu import _native
from qlae_kernels.problem import INDEX_DTYPES, VALUE_DTYPES, Backward, Forward, Problem
from qlae_kernels.torch_internals import current_raw_stream

DEVICE_TYPES: tuple[str, ...] = ("cuda",)

# Architectures that the kernels are built for begin here.
MIN_CAPABILITY = (8, 0)

_VALUE_TYPE = {dtype: number for number, dtype in enumerate(VALUE_DTYPES)}
_INDEX_TYPE = {dtype: number for number, dtype in enumerate(INDEX_DTYPES)}


def unavailable_reason() -> str | None:
    """Why the CUDA kernels cannot serve, with the remedy; None if they can."""
    if _native is None:
        return "the compiled module is missing; run `pip install .` in the project's folder"
    if not hasattr(_native, "CudaLatentQuantize"):
        return (
            "this build has no CUDA kernels; install the CUDA toolkit (nvcc) and run `QLAE_CUDA=1 pip install .` in "
            "the project's folder, or use backend='triton' or 'auto'"
        )
    if torch.version.cuda is None:
        return "this build of torch does not use CUDA; install one that does, or use backend='triton' or 'auto'"
    if not torch.cuda.is_available():
        return "torch finds no NVIDIA GPU and driver here; use backend='auto'"
    newest = max(torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count()))
    if newest < MIN_CAPABILITY:
        return (
            f"the GPU has compute capability {newest[0]}.{newest[1]} and the kernels need "
            f"{MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}; use backend='triton' or 'auto'"
        )
    return None


def prepare(problem: Problem) -> tuple[Forward, Backward]:
    """See `qlae_kernels.problem.Backend.prepare`."""
    return prepare_with(_native, problem)


def prepare_with(native: ModuleType, problem: Problem) -> tuple[Forward, Backward]:
    """The two functions that solve `problem` with the class `CudaLatentQuantize` of `native`."""
    device, index_dtype, return_indices = problem.device, problem.index_dtype, problem.return_indices
    if problem.size == 0:
        return _prepare_empty(problem)
    device_index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index or 0
    levels = levels_on(device, problem.levels, torch.int64)
    launcher = native.CudaLatentQuantize(
        _VALUE_TYPE[problem.value_dtype],
        problem.outer,
        problem.num_latents,
        problem.inner,
        problem.rows,
        problem.stride,
        0 if levels is None else levels.data_ptr(),
        problem.stride if problem.levels is None else int(problem.levels.max()),
        _INDEX_TYPE[index_dtype],
        problem.quantization_weight,
        problem.commitment_weight,
        device_index,
    )
    launch_forward, launch_backward = launcher.forward, launcher.backward
    forward_bytes, backward_bytes = launcher.forward_workspace_bytes, launcher.backward_workspace_bytes
    forward_counters, backward_counters = launcher.forward_counters, launcher.backward_counters
    bytes_like = torch.empty(0, dtype=torch.uint8, device=device)
    empty_like = torch.empty_like
    stream_of = current_raw_stream if device.type == "cuda" else lambda _: 0

    def forward(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        quantized = empty_like(z)
        indices = empty_like(z, dtype=index_dtype) if return_indices else None
        loss = codebook.new_empty(())
        stream = stream_of(device_index)
        # Kept until the launch is enqueued; torch reuses the memory for later work of the same stream only.
        workspace = bytes_like.new_empty(forward_bytes) if forward_bytes else None
        counts = counters(device, stream, forward_counters) if forward_counters else None
        launch_forward(
            codebook.data_ptr(),
            z.data_ptr(),
            quantized.data_ptr(),
            indices.data_ptr() if return_indices else 0,
            loss.data_ptr(),
            workspace.data_ptr() if forward_bytes else 0,
            counts.data_ptr() if forward_counters else 0,
            stream,
        )
        return quantized, indices, loss

    def backward(
        z: Tensor,
        codebook: Tensor,
        grad_quantized: Tensor | None,
        grad_loss: Tensor,
        need_grad_z: bool,
        need_grad_codebook: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        grad_z = empty_like(z) if need_grad_z else None
        grad_codebook = empty_like(codebook) if need_grad_codebook else None
        stream = stream_of(device_index)
        workspace = bytes_like.new_empty(backward_bytes) if backward_bytes else None
        counts = counters(device, stream, backward_counters) if backward_counters else None
        launch_backward(
            codebook.data_ptr(),
            z.data_ptr(),
            0 if grad_quantized is None else grad_quantized.data_ptr(),
            grad_loss.data_ptr(),
            grad_z.data_ptr() if need_grad_z else 0,
            grad_codebook.data_ptr() if need_grad_codebook else 0,
            workspace.data_ptr() if backward_bytes else 0,
            counts.data_ptr() if backward_counters else 0,
            stream,
        )
        return grad_z, grad_codebook

    # The kernels read the levels for as long as they are called.
    forward.levels = backward.levels = levels
    return forward, backward


def _prepare_empty(problem: Problem) -> tuple[Forward, Backward]:
    """Nothing to launch: empty outputs, loss 0, zero gradients."""

    def forward(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        indices = torch.empty_like(z, dtype=problem.index_dtype) if problem.return_indices else None
        return torch.empty_like(z), indices, codebook.new_zeros(())

    def backward(
        z: Tensor,
        codebook: Tensor,
        grad_quantized: Tensor | None,
        grad_loss: Tensor,
        need_grad_z: bool,
        need_grad_codebook: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        return (
            torch.empty_like(z) if need_grad_z else None,
            torch.zeros_like(codebook) if need_grad_codebook else None,
        )

    return forward, backward
