"""The op `latent_quantize` as torch.onnx exports it: plain operators that every ONNX runtime has."""

from __future__ import annotations

import torch
from torch import Tensor

from qlae_kernels.latent_quantize_reference import values_of
from qlae_kernels.problem import Options, compute_dtype_of


def decomposed_latent_quantize(z: Tensor, codebook: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """The definition in one piece, for sizes that are not known; the runtime holds all N * D * K distances."""
    compute_dtype = compute_dtype_of(z.dtype)
    values, codebook = z.to(compute_dtype), codebook.to(compute_dtype)
    finite = values.isfinite()
    distance = (values.movedim(options.channel_dim, -1).unsqueeze(-1) - codebook).abs()
    # PyTorch's argmin stops at the first NaN, which ONNX leaves open; z itself is looked at below.
    distance = torch.where(distance.isnan(), -1.0, distance)
    if options.levels is not None:
        counts = torch.tensor(options.levels, device=z.device).unsqueeze(1)
        distance = distance.masked_fill(torch.arange(codebook.size(1), device=z.device) >= counts, torch.inf)
    indices = distance.argmin(-1).movedim(-1, options.channel_dim)
    indices = torch.where(finite, indices, 0)
    codes = torch.where(finite, values_of(indices, codebook, options.channel_dim), torch.nan)
    weight = options.quantization_weight + options.commitment_weight
    return codes.to(z.dtype), indices.to(options.index_dtype), weight * (values - codes).square().mean()
