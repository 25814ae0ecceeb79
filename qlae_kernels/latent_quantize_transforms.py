"""The op `latent_quantize` under torch.func (vmap, grad, vjp, jvp, ...) and differentiated again."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from qlae_kernels.latent_quantize_reference import values_of
from qlae_kernels.problem import Options, compute_dtype_of


def gradients_at(
    indices: Tensor,
    z: Tensor,
    codebook: Tensor,
    grad_quantized: Tensor | None,
    grad_loss: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """The gradients of z and of the codebook in plain PyTorch, in their own dtypes, given the indices.

    Differentiable in every tensor again.
    """
    channel_dim = options.channel_dim
    compute_dtype = compute_dtype_of(z.dtype)
    values = z.to(compute_dtype)
    residual = values - values_of(indices.long(), codebook.to(compute_dtype), channel_dim)
    residual = residual.masked_fill(~z.isfinite(), torch.nan)
    scale = grad_loss * (2.0 / max(1, z.numel()))
    grad_z = scale * options.commitment_weight * residual
    if grad_quantized is not None:
        grad_z = grad_quantized.to(compute_dtype) + grad_z
    rows, levels = codebook.shape
    position = indices.long().movedim(channel_dim, -1)
    if rows > 1:
        position = position + levels * torch.arange(rows, device=z.device)
    sums = residual.new_zeros(rows * levels)
    sums = sums.scatter_add(0, position.reshape(-1), residual.movedim(channel_dim, -1).reshape(-1))
    grad_codebook = -scale * options.quantization_weight * sums.view(rows, levels)
    return grad_z.to(z.dtype), grad_codebook.to(codebook.dtype)


def transformed_latent_quantize(
    z: Tensor, codebook: Tensor, options: Options, counts: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The op's indices, and from these in plain PyTorch what any transform can pass through.

    Losses are written with stop-gradients, as in arXiv 2305.18378, section 3; elements where `counts`, which broadcasts
    with z, is False are left out of their sum.
    """
    call = options._replace(return_indices=True)
    _, indices, _ = torch.ops.qlae.latent_quantize(z.detach(), codebook.detach(), *call)
    compute_dtype = compute_dtype_of(z.dtype)
    values = z.to(compute_dtype)
    # Minus 0, or minus NaN where z is not finite.
    not_finite = values.detach() - values.detach()
    codes = values_of(indices.long(), codebook.to(compute_dtype), options.channel_dim) - not_finite
    quantization = options.quantization_weight * (codes - values.detach()).square()
    commitment = options.commitment_weight * (values - codes.detach()).square()
    losses = quantization + commitment
    if counts is not None:
        losses = losses.masked_fill(~counts, 0)
    # Divided element by element: vmap over an empty dimension divides no tensor without dimensions.
    loss = (losses / max(1, z.numel())).sum()
    # Straight through: minus a zero with the gradient of -z, which leaves the code as it is to the bit.
    quantized = codes.detach().to(z.dtype) - (z.detach() - z)
    return quantized, indices, loss


def batched_latent_quantize(
    info: Any, in_dims: tuple[int | None, ...], z: Tensor, codebook: Tensor, *arguments: Any
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[int, int, int]]:
    """The op for every latent batch of a vmapped dimension, in one call: the rule that torch.vmap follows.

    Codebooks of their own make B * D latents of the D of each of B entries; a common one makes B times as many
    samples. The loss is each entry's own mean.
    """
    options = Options(*arguments)
    of_z, of_codebook, *_ = in_dims
    dtype = z.dtype
    # In the compute dtype `quantized` is the code itself, from which the loss follows.
    z = z.to(compute_dtype_of(dtype))
    z = z.unsqueeze(0).expand(info.batch_size, *z.shape) if of_z is None else z.movedim(of_z, 0)
    if not -(z.dim() - 1) <= options.channel_dim < z.dim() - 1:
        raise ValueError(f"channel_dim {options.channel_dim} is out of range for z of shape {tuple(z.shape[1:])}")
    channel_dim = options.channel_dim % (z.dim() - 1)
    if of_codebook is None:
        call = options._replace(channel_dim=channel_dim + 1, return_indices=True)
        codes, indices, _ = torch.ops.qlae.latent_quantize(z, codebook, *call)
    else:
        codebook = codebook.movedim(of_codebook, 0)
        num_latents = z.size(channel_dim + 1)
        levels = options.levels
        if codebook.size(1) == 1:
            codebook = codebook.expand(-1, num_latents, -1)
            levels = None if levels is None else [*levels] * num_latents
        levels = None if levels is None else [*levels] * info.batch_size
        call = options._replace(channel_dim=channel_dim, levels=levels, return_indices=True)
        # [B, ..., D, ...] to [..., B * D, ...]
        latents = z.movedim(0, channel_dim).flatten(channel_dim, channel_dim + 1)
        codes, indices, _ = torch.ops.qlae.latent_quantize(latents, codebook.flatten(0, 1), *call)
        codes, indices = (
            value.unflatten(channel_dim, (info.batch_size, num_latents)).movedim(channel_dim, 0)
            for value in (codes, indices)
        )
    squared_error = (z - codes).square().flatten(1).sum(1)
    weight = options.quantization_weight + options.commitment_weight
    loss = weight * squared_error / max(1, math.prod(codes.shape[1:]))
    return (codes.to(dtype), indices, loss), (0, 0, 0)
