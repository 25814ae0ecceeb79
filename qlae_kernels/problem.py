"""What a backend is asked: one validated description of a call, shared by forward and backward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

VALUE_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INDEX_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)


class Options(NamedTuple):
    """The arguments of `latent_quantize` that are no tensors, in the order of the ops' schemas."""

    levels: Sequence[int] | None
    channel_dim: int
    quantization_weight: float
    commitment_weight: float
    index_dtype: torch.dtype
    return_indices: bool
    backend: str


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """Latents seen as [outer, num_latents, inner] in memory order, `size` in all, and what to do with them.

    `levels` holds the number of codes per latent (int64 [num_latents], on the CPU), or None where all latents use
    every column of the codebook, which has shape [rows, stride]. `channel_dim` counts from 0.
    `device` is where z, the codebook and the results are.
    """

    outer: int
    num_latents: int
    inner: int
    size: int
    channel_dim: int
    rows: int
    stride: int
    levels: Tensor | None
    quantization_weight: float
    commitment_weight: float
    value_dtype: torch.dtype
    index_dtype: torch.dtype
    return_indices: bool
    device: torch.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """float64 for float64, float32 for all others."""
        return compute_dtype_of(self.value_dtype)


def compute_dtype_of(value_dtype: torch.dtype) -> torch.dtype:
    """What latents of `value_dtype` are computed in: float64 for float64, float32 for all others."""
    return torch.float64 if value_dtype is torch.float64 else torch.float32


class Forward(Protocol):
    """Quantizes a dense z with a contiguous codebook of the compute dtype."""

    def __call__(self, z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return quantized (z's dtype), indices or None, and the loss (compute dtype, no dimensions)."""


class Backward(Protocol):
    """Gradients for the same z and codebook; `grad_quantized` (None counts as zero) is stored as z is."""

    def __call__(
        self,
        z: Tensor,
        codebook: Tensor,
        grad_quantized: Tensor | None,
        grad_loss: Tensor,
        need_grad_z: bool,
        need_grad_codebook: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of z (z's dtype) and of the codebook (compute dtype), None where not needed."""


class Backend(Protocol):
    """A module that carries out the op `latent_quantize`."""

    DEVICE_TYPES: tuple[str, ...]

    @staticmethod
    def unavailable_reason() -> str | None:
        """Why this backend cannot serve here and what to do about it; None if it can."""

    @staticmethod
    def prepare(problem: Problem) -> tuple[Forward, Backward]:
        """The two functions that solve `problem`; all that depends on the problem alone is worked out here."""


def memory_order(z: Tensor) -> tuple[int, ...]:
    """The dimensions of a dense tensor from the slowest to the fastest in memory."""
    return tuple(sorted(range(z.dim()), key=lambda dim: (-z.stride(dim), -z.size(dim))))


def as_dense(z: Tensor) -> Tensor:
    """Return z, or a copy where its elements do not fill one block of memory or are stored negated."""
    z = z.resolve_neg()
    dense = z.is_contiguous() or z.permute(memory_order(z)).is_contiguous()
    return z if dense else z.clone()


def has_strides_of(other: Tensor, z: Tensor) -> bool:
    """True where two tensors of one shape store the same elements at the same places."""
    same = (other.is_contiguous() and z.is_contiguous()) or other.stride() == z.stride()
    return same and not other.is_neg()


def layout_of(shape: torch.Size, channel_dim: int, order: tuple[int, ...] | None) -> tuple[int, int, int]:
    """The sizes (outer, num_latents, inner) around `channel_dim` in memory order; None is the order of dimensions."""
    order = tuple(range(len(shape))) if order is None else order
    position = order.index(channel_dim)
    sizes = [shape[dim] for dim in order]
    return math.prod(sizes[:position]), sizes[position], math.prod(sizes[position + 1 :])
