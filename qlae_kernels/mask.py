"""Positions that do not count: left out of the losses, the gradients and the outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from qlae_kernels.problem import compute_dtype_of


def check_mask(mask: Tensor, shape: torch.Size, channel_dim: int, device: torch.device) -> None:
    """Raise unless `mask` is bool [...], on `device`, for tensors of `shape` [..., D, ...] with D at `channel_dim`."""
    if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
        given = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool tensor, True where a position counts; got {given}")
    positions = list(shape)
    del positions[channel_dim]
    if list(mask.shape) != positions:
        raise ValueError(
            f"mask must have shape {tuple(positions)}, that of {tuple(shape)} without dimension {channel_dim}; "
            f"got {tuple(mask.shape)}"
        )
    if mask.device != device:
        raise ValueError(f"mask must be on {device}, as the latents are; got {mask.device}")


def counting(mask: Tensor, z: Tensor, channel_dim: int) -> Tensor:
    """The mask [..., 1, ...], stored in the order of z, which `torch.where` then gives its result."""
    mask = mask.unsqueeze(channel_dim)
    if z.is_contiguous():
        return mask
    one_latent = z.detach().narrow(channel_dim, 0, min(1, z.size(channel_dim)))
    # The first operand decides the order of the result.
    return torch.zeros_like(one_latent, dtype=torch.bool) | mask


def fill(z: Tensor, codebook: Tensor, counts: Tensor, channel_dim: int) -> Tensor:
    """z in its compute dtype with each latent's first finite code where `counts`, which broadcasts with z, is False.

    Such an element has no distance from its code, so it adds nothing to the loss or to the codebook's gradient. It
    moves with its code, so it adds nothing to second derivatives either. The code need not be a number of a half type,
    hence the compute dtype.
    """
    compute_dtype = compute_dtype_of(z.dtype)
    codebook = codebook.to(compute_dtype)
    # A later one of two equal codes would not do: the index is that of the first.
    first = codebook.detach().isfinite().int().argmax(1, keepdim=True)
    shape = [1] * z.dim()
    shape[channel_dim] = codebook.size(0)
    return torch.where(counts, z.to(compute_dtype), codebook.gather(1, first).view(shape))


def mean_over_mask(mean: Tensor, mask: Tensor) -> Tensor:
    """The mean over the positions that count, of a mean over all of them where the others are 0; 0 if none counts."""
    return mean * (mask.numel() / mask.sum().clamp(min=1)).to(mean.dtype)
