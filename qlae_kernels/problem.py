"""What a backend is asked: one validated description of a call, shared by forward and backward."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

VALUE_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INDEX_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """Latents seen as [outer, num_latents, inner] in memory order, and what to do with them.

    `levels` holds the number of codes per latent (int64 [num_latents], on the CPU), or None where all latents use
    every column of the codebook. `channel_dim` counts from 0.
    """

    outer: int
    num_latents: int
    inner: int
    channel_dim: int
    levels: Tensor | None
    quantization_weight: float
    commitment_weight: float
    value_dtype: torch.dtype
    index_dtype: torch.dtype
    return_indices: bool

    @property
    def size(self) -> int:
        """The number of elements of z."""
        return self.outer * self.num_latents * self.inner

    @property
    def compute_dtype(self) -> torch.dtype:
        """float64 for float64, float32 for all others."""
        return torch.float64 if self.value_dtype is torch.float64 else torch.float32


class Backend(Protocol):
    """A module that carries out the op `latent_quantize`. z and its gradients are dense in one memory order."""

    DEVICE_TYPES: tuple[str, ...]

    @staticmethod
    def unavailable_reason() -> str | None:
        """Why this backend cannot serve here and what to do about it; None if it can."""

    @staticmethod
    def forward(z: Tensor, codebook: Tensor, problem: Problem) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return quantized (z's dtype), indices or None, and the loss (compute dtype, no dimensions)."""

    @staticmethod
    def backward(
        z: Tensor,
        codebook: Tensor,
        grad_quantized: Tensor | None,
        grad_loss: Tensor,
        problem: Problem,
        need_grad_z: bool,
        need_grad_codebook: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of z (z's dtype) and of the codebook (compute dtype)."""


def memory_order(z: Tensor) -> list[int]:
    """The dimensions of a dense tensor from the slowest to the fastest in memory."""
    return sorted(range(z.dim()), key=lambda dim: (-z.stride(dim), -z.size(dim)))


def is_dense(z: Tensor) -> bool:
    """True where z's elements fill one block of memory without gaps or overlaps, in any order of dimensions."""
    return z.is_contiguous() or z.permute(memory_order(z)).is_contiguous()


def layout_of(z: Tensor, channel_dim: int) -> tuple[int, int, int]:
    """The sizes (outer, num_latents, inner) of a dense z around `channel_dim`, in memory order."""
    order = list(range(z.dim())) if z.is_contiguous() else memory_order(z)
    position = order.index(channel_dim)
    sizes = [z.size(dim) for dim in order]
    return math.prod(sizes[:position]), sizes[position], math.prod(sizes[position + 1 :])
