"""The op `latent_quantize` on the CPU: C++ kernels for baseline, AVX2 and AVX-512 processors (csrc/)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from qlae_kernels.problem import INDEX_DTYPES, VALUE_DTYPES, Backward, Forward, Problem

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


def _choose_instruction_set(name: str, origin: str = "") -> None:
    if name not in instruction_sets():
        available = ", ".join(instruction_sets())
        raise ValueError(f"instruction set {name!r}{origin} is not available here; choose from {available}")
    _native.use_instruction_set(name)


if _native is not None and os.environ.get("QLAE_CPU_INSTRUCTION_SET"):
    _choose_instruction_set(
        os.environ["QLAE_CPU_INSTRUCTION_SET"], " (from the environment variable QLAE_CPU_INSTRUCTION_SET)"
    )


# Outputs of this size and more come from the pool; smaller ones the system's allocator recycles by itself.
_POOLED_BYTES = 256 << 10


def empty_cache() -> None:
    """Give the idle memory of freed large outputs back to the system.

    The storage of a large output (256 KiB and more) is not torch's own and cannot be resized: `resize_` to a larger
    size and `untyped_storage().resize_` raise RuntimeError, and work after `clone()`.
    """
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


def _pooled_like(z: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor with the shape and strides of z; its memory is from the pool and cannot be resized."""
    dtype = dtype or z.dtype
    memory = torch.frombuffer(_native.PooledBuffer(z.numel() * dtype.itemsize), dtype=dtype)
    # A tensor of its own, not a view: users may change it in place.
    return torch.empty(0, dtype=dtype, device="cpu").set_(memory.untyped_storage(), 0, z.shape, z.stride())


def prepare(problem: Problem) -> tuple[Forward, Backward]:
    """See `qlae_kernels.problem.Backend.prepare`."""
    index_dtype = problem.index_dtype
    return_indices = problem.return_indices
    # The address of the levels is good for as long as `problem` lives, which its `Call` sees to.
    native = _native.LatentQuantize(
        _VALUE_TYPE[problem.value_dtype],
        problem.outer,
        problem.num_latents,
        problem.inner,
        problem.rows,
        problem.stride,
        0 if problem.levels is None else problem.levels.data_ptr(),
        _INDEX_TYPE[index_dtype],
        problem.quantization_weight,
        problem.commitment_weight,
    )
    native_forward, native_backward = native.forward, native.backward
    scalar = torch.empty((), dtype=problem.compute_dtype, device="cpu")
    # Allocating like a tensor is faster than from a size and a dtype.
    empty_like = torch.empty_like
    value_like = _pooled_like if problem.size * problem.value_dtype.itemsize >= _POOLED_BYTES else empty_like
    index_like = _pooled_like if problem.size * index_dtype.itemsize >= _POOLED_BYTES else empty_like
    codes_bytes = problem.rows * problem.stride * problem.compute_dtype.itemsize
    codebook_like = _pooled_like if codes_bytes >= _POOLED_BYTES else empty_like
    get_num_threads = torch.get_num_threads

    def forward(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        quantized = value_like(z)
        indices = index_like(z, dtype=index_dtype) if return_indices else None
        loss = empty_like(scalar)
        native_forward(
            codebook.data_ptr(),
            z.data_ptr(),
            quantized.data_ptr(),
            indices.data_ptr() if return_indices else 0,
            loss.data_ptr(),
            get_num_threads(),
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
        grad_z = value_like(z) if need_grad_z else None
        grad_codebook = codebook_like(codebook) if need_grad_codebook else None
        native_backward(
            codebook.data_ptr(),
            z.data_ptr(),
            0 if grad_quantized is None else grad_quantized.data_ptr(),
            grad_loss.data_ptr(),
            grad_z.data_ptr() if need_grad_z else 0,
            grad_codebook.data_ptr() if need_grad_codebook else 0,
            get_num_threads(),
        )
        return grad_z, grad_codebook

    return forward, backward
