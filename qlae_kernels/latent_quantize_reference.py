"""The op `latent_quantize` in plain PyTorch: the readable definition, on any device, differentiable again."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from qlae_kernels.problem import Backward, Forward, Problem

DEVICE_TYPES: tuple[str, ...] = ("cpu", "cuda", "xpu", "mps", "meta")

# Distances held at a time, so that nothing of size N * D * K is ever allocated.
MAX_DISTANCES = 1 << 22


def unavailable_reason() -> str | None:
    """Plain PyTorch serves everywhere."""
    return None


def nearest_indices(z: Tensor, codebook: Tensor, problem: Problem) -> Tensor:
    """The smallest k that attains the minimum of |z - codebook[d, k]|; 0 where z is not finite.

    z is [..., D, ...] of the compute dtype with D at `problem.channel_dim`, codebook [D or 1, K]; returns int64 of
    z's shape.
    """
    channel_last = z.movedim(problem.channel_dim, -1)
    rows = channel_last.reshape(problem.size // max(1, problem.num_latents), problem.num_latents, 1)  # [N, D, 1]
    padding = None
    if problem.levels is not None:
        codes = torch.arange(codebook.size(1), device=z.device)
        padding = codes >= problem.levels.to(z.device).unsqueeze(1)  # [D, K]
    length = max(1, MAX_DISTANCES // max(1, problem.num_latents * problem.stride))
    # Written piece by piece into one tensor: small results that outlive their piece would keep its memory apart.
    indices = torch.empty(rows.shape[:2], dtype=torch.int64, device=z.device)
    for part, part_indices in zip(rows.split(length), indices.split(length), strict=True):
        distance = (part - codebook).abs()  # [n, D, K]
        if padding is not None:
            distance = distance.masked_fill(padding, torch.inf)
        torch.argmin(distance, -1, out=part_indices)
    indices = indices.view(channel_last.shape).movedim(-1, problem.channel_dim)
    return indices.masked_fill(~z.isfinite(), 0)


def values_of(indices: Tensor, codebook: Tensor, channel_dim: int) -> Tensor:
    """codebook[d, indices]: int64 indices [..., D, ...] to values of the same shape, differentiable in the codebook."""
    channel_last = indices.movedim(channel_dim, -1)
    if codebook.size(0) == 1:
        values = codebook[0][channel_last]
    else:
        values = codebook[torch.arange(codebook.size(0), device=codebook.device), channel_last]
    return values.movedim(-1, channel_dim)


def quantize(z: Tensor, codebook: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """Indices (int64) and codes (compute dtype) of z; the code of a z that is not finite is NaN."""
    z = z.to(problem.compute_dtype)
    indices = nearest_indices(z.detach(), codebook.detach(), problem)
    return indices, values_of(indices, codebook, problem.channel_dim).masked_fill(~z.isfinite(), torch.nan)


def forward(z: Tensor, codebook: Tensor, problem: Problem) -> tuple[Tensor, Tensor | None, Tensor]:
    """Quantize z; see `qlae_kernels.problem.Forward`."""
    indices, codes = quantize(z, codebook, problem)
    squared_error = (z.to(problem.compute_dtype) - codes).square().sum()
    loss = (problem.quantization_weight + problem.commitment_weight) * squared_error / max(1, problem.size)
    quantized = torch.empty_like(z).copy_(codes)
    if not problem.return_indices:
        return quantized, None, loss
    return quantized, torch.empty_like(z, dtype=problem.index_dtype).copy_(indices), loss


def backward(
    z: Tensor,
    codebook: Tensor,
    grad_quantized: Tensor | None,
    grad_loss: Tensor,
    need_grad_z: bool,
    need_grad_codebook: bool,
    problem: Problem,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients; see `qlae_kernels.problem.Backward`. Itself differentiable in every tensor argument."""
    indices, codes = quantize(z, codebook, problem)
    residual = z.to(problem.compute_dtype) - codes
    scale = 2.0 / max(1, problem.size) * grad_loss
    grad_z = grad_codebook = None
    if need_grad_z:
        grad_z = scale * problem.commitment_weight * residual
        if grad_quantized is not None:
            grad_z = grad_quantized.to(problem.compute_dtype) + grad_z
        grad_z = grad_z.to(z.dtype)
    if need_grad_codebook:
        rows = torch.arange(problem.num_latents, device=z.device) if problem.rows > 1 else 0
        position = indices.movedim(problem.channel_dim, -1) + problem.stride * rows
        sums = torch.zeros(codebook.numel(), dtype=problem.compute_dtype, device=z.device)
        sums = sums.index_add(0, position.flatten(), residual.movedim(problem.channel_dim, -1).flatten())
        grad_codebook = -scale * problem.quantization_weight * sums.view_as(codebook)
    return grad_z, grad_codebook


def prepare(problem: Problem) -> tuple[Forward, Backward]:
    """See `qlae_kernels.problem.Backend.prepare`."""
    return partial(forward, problem=problem), partial(backward, problem=problem)
