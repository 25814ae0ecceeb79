"""The op `latent_quantize` on the CPU: C++ kernels for baseline, AVX2 and AVX-512 processors (csrc/)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from qlae_kernels.problem import INDEX_DTYPES, VALUE_DTYPES, Problem

# torch comes first, so that its OpenMP runtime serves the kernels too.
try:
    from qlae_kernels import _native
except ImportError as error:
    _native = None
    _import_error: ImportError | None = error
else:
    _import_error = None

DEVICE_TYPES: tuple[str, ...] = ("cpu",)

_VALUE_TYPE = {dtype: number for number, dtype in enumerate(VALUE_DTYPES)}
_INDEX_TYPE = {dtype: number for number, dtype in enumerate(INDEX_DTYPES)}


def unavailable_reason() -> str | None:
    """Why the compiled kernels cannot serve, with the remedy; None if they can."""
    if _native is None:
        return f"the compiled module is missing ({_import_error}); run `pip install .` in the project's folder"
    return None


def instruction_sets() -> tuple[str, ...]:
    """The instruction sets that this build holds and this processor runs, slowest first."""
    return tuple(_native.instruction_sets())


def active_instruction_set() -> str:
    """The instruction set in use: the fastest of `instruction_sets()` unless another was chosen."""
    return _native.active_instruction_set()


@contextmanager
def use_instruction_set(name: str) -> Iterator[None]:
    """Run the kernels with the named instruction set inside the `with` block, process-wide.

    The environment variable `QLAE_CPU_INSTRUCTION_SET` chooses one for the whole process.
    """
    before = active_instruction_set()
    _choose_instruction_set(name)
    try:
        yield
    finally:
        _native.use_instruction_set(before)


def _choose_instruction_set(name: str) -> None:
    if name not in instruction_sets():
        raise ValueError(f"instruction set {name!r} is not available here; choose from {', '.join(instruction_sets())}")
    _native.use_instruction_set(name)


if _native is not None and "QLAE_CPU_INSTRUCTION_SET" in os.environ:
    _choose_instruction_set(os.environ["QLAE_CPU_INSTRUCTION_SET"])


# Outputs of this size and more come from the pool; smaller ones the system's allocator recycles by itself.
_POOLED_BYTES = 8 << 20


def empty_cache() -> None:
    """Give the idle memory of freed large outputs back to the system."""
    limit = _native.max_idle_bytes()
    _native.set_max_idle_bytes(0)
    _native.set_max_idle_bytes(limit)


def set_max_cached_bytes(limit: int) -> None:
    """Keep at most `limit` bytes of freed large outputs for reuse (at the start 1 GiB); 0 keeps none."""
    if limit < 0:
        raise ValueError(f"limit must be a number of bytes >= 0; got {limit}")
    _native.set_max_idle_bytes(limit)


def cached_bytes() -> int:
    """The bytes of freed large outputs that are kept for reuse."""
    return _native.idle_bytes()


def _empty_like(z: Tensor, dtype: torch.dtype, size: int) -> Tensor:
    """An uninitialised tensor with z's shape and strides."""
    if size * dtype.itemsize < _POOLED_BYTES:
        return torch.empty_like(z, dtype=dtype)
    memory = torch.frombuffer(_native.PooledBuffer(size * dtype.itemsize), dtype=dtype)
    return memory.as_strided(z.shape, z.stride())


def forward(z: Tensor, codebook: Tensor, problem: Problem) -> tuple[Tensor, Tensor | None, Tensor]:
    """See `qlae_kernels.problem.Backend.forward`."""
    quantized = _empty_like(z, problem.value_dtype, problem.size)
    indices = _empty_like(z, problem.index_dtype, problem.size) if problem.return_indices else None
    loss = codebook.new_empty(())
    _native.latent_quantize_forward_cpu(
        _VALUE_TYPE[problem.value_dtype],
        problem.outer,
        problem.num_latents,
        problem.inner,
        codebook.data_ptr(),
        codebook.size(0),
        codebook.size(1),
        0 if problem.levels is None else problem.levels.data_ptr(),
        z.data_ptr(),
        quantized.data_ptr(),
        0 if indices is None else indices.data_ptr(),
        _INDEX_TYPE[problem.index_dtype],
        loss.data_ptr(),
        problem.quantization_weight + problem.commitment_weight,
        torch.get_num_threads(),
    )
    return quantized, indices, loss


def backward(
    z: Tensor,
    codebook: Tensor,
    grad_quantized: Tensor | None,
    grad_loss: Tensor,
    problem: Problem,
    need_grad_z: bool,
    need_grad_codebook: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """See `qlae_kernels.problem.Backend.backward`."""
    grad_z = _empty_like(z, problem.value_dtype, problem.size) if need_grad_z else None
    grad_codebook = torch.empty_like(codebook) if need_grad_codebook else None
    _native.latent_quantize_backward_cpu(
        _VALUE_TYPE[problem.value_dtype],
        problem.outer,
        problem.num_latents,
        problem.inner,
        codebook.data_ptr(),
        codebook.size(0),
        codebook.size(1),
        0 if problem.levels is None else problem.levels.data_ptr(),
        z.data_ptr(),
        0 if grad_quantized is None else grad_quantized.data_ptr(),
        grad_loss.data_ptr(),
        0 if grad_z is None else grad_z.data_ptr(),
        0 if grad_codebook is None else grad_codebook.data_ptr(),
        problem.quantization_weight,
        problem.commitment_weight,
        torch.get_num_threads(),
    )
    return grad_z, grad_codebook
