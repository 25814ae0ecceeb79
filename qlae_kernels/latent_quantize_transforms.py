"""The op `latent_quantize` under torch.func: vmap, grad, vjp, jvp, jacrev, jacfwd and what is made of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlae_kernels.latent_quantize_reference import values_of
from qlae_kernels.problem import compute_dtype_of


class Options(NamedTuple):
    """The arguments of the op that are no tensors."""

    levels: list[int] | None
    channel_dim: int
    quantization_weight: float
    commitment_weight: float
    index_dtype: torch.dtype
    return_indices: bool
    backend: str


def gradients_at(
    indices: Tensor,
    z: Tensor,
    codebook: Tensor,
    grad_quantized: Tensor,
    grad_loss: Tensor,
    channel_dim: int,
    quantization_weight: float,
    commitment_weight: float,
) -> tuple[Tensor, Tensor]:
    """The gradients of z and of the codebook in plain PyTorch, in their own dtypes, given the indices.

    Every transform and every order of differentiation passes through; nothing is larger than z or the codebook.
    """
    residual = residual_at(indices, z, codebook, channel_dim)
    scale = grad_loss * (2.0 / max(1, z.numel()))
    grad_z = grad_quantized.to(residual.dtype) + scale * commitment_weight * residual
    rows, levels = codebook.shape
    position = indices.long().movedim(channel_dim, -1)
    if rows > 1:
        position = position + levels * torch.arange(rows, device=z.device)
    sums = residual.new_zeros(rows * levels)
    sums = sums.scatter_add(0, position.reshape(-1), residual.movedim(channel_dim, -1).reshape(-1))
    grad_codebook = -scale * quantization_weight * sums.view(rows, levels)
    return grad_z.to(z.dtype), grad_codebook.to(codebook.dtype)


def residual_at(indices: Tensor, z: Tensor, codebook: Tensor, channel_dim: int) -> Tensor:
    """z - codebook[d, indices] in the compute dtype; NaN where z is not finite."""
    compute_dtype = compute_dtype_of(z.dtype)
    z = z.to(compute_dtype)
    codes = values_of(indices.long(), codebook.to(compute_dtype), channel_dim)
    return (z - codes).masked_fill(~z.isfinite(), torch.nan)


class TransformedLatentQuantize(torch.autograd.Function):
    """The op's kernels forward; its derivatives in plain PyTorch, from the indices that the kernels found."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, codebook: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.qlae.latent_quantize(z, codebook, *options._replace(return_indices=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Options], output: tuple[Tensor, Tensor, Tensor]) -> None:
        z, codebook, ctx.options = inputs
        _, indices, _ = output
        ctx.mark_non_differentiable(indices)
        ctx.save_for_backward(z, codebook, indices)
        ctx.save_for_forward(z, codebook, indices)

    @staticmethod
    def backward(
        ctx: Any, grad_quantized: Tensor, _: Tensor | None, grad_loss: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        z, codebook, indices = ctx.saved_tensors
        _, channel_dim, quantization_weight, commitment_weight, *_ = ctx.options
        weights = (quantization_weight, commitment_weight)
        return (*gradients_at(indices, z, codebook, grad_quantized, grad_loss, channel_dim, *weights), None)

    @staticmethod
    def jvp(
        ctx: Any, tangent_z: Tensor | None, tangent_codebook: Tensor | None, _: None
    ) -> tuple[Tensor, None, Tensor]:
        z, codebook, indices = ctx.saved_tensors
        channel_dim = ctx.options.channel_dim
        residual = residual_at(indices, z, codebook, channel_dim)
        change = torch.zeros_like(residual)
        if tangent_z is not None:
            change = change + ctx.options.commitment_weight * tangent_z.to(residual.dtype)
        if tangent_codebook is not None:
            of_codes = values_of(indices.long(), tangent_codebook.to(residual.dtype), channel_dim)
            change = change - ctx.options.quantization_weight * of_codes
        loss = (residual * change).sum() * (2.0 / max(1, z.numel()))
        quantized = torch.zeros_like(z) if tangent_z is None else tangent_z.clone()
        return quantized, None, loss


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
    loss = (options.quantization_weight + options.commitment_weight) * squared_error / max(1, codes[0].numel())
    return (codes.to(dtype), indices, loss), (0, 0, 0)
