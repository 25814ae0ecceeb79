"""`FusedLatentQuantizer`: the quantizer as an nn.Module with a codebook that learns."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from operator import index
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qlae_kernels.backends import check_name
from qlae_kernels.latent_quantize import LatentQuantizerOutput, check_index_dtype, latent_quantize
from qlae_kernels.latent_quantize_reference import values_of
from qlae_kernels.problem import INDEX_DTYPES

MAX_INT64 = 2**63 - 1


class CodeUsage(NamedTuple):
    """How often each code was used.

    counts: int64 [D, K], 0 in the padding of latents with fewer than K codes.
    perplexity: float64 [D], exp of the entropy of each latent's code frequencies: 1 to K; 0 without samples.
    dead: bool [D, K], codes that were never used; False in padding.
    """

    counts: Tensor
    perplexity: Tensor
    dead: Tensor


class FusedLatentQuantizer(nn.Module):
    """Quantize each latent to the nearest value of its own learned scalar codebook (arXiv 2305.18378, section 3).

    Calling it on z [..., D, ...] returns `LatentQuantizerOutput(quantized, indices, loss)`; add `loss` to the
    objective. See `latent_quantize` for the formulas, the gradients and the errors of a call.

    Args:
        num_latents: the number of latents D.
        levels: codes per latent: one K for all, or D values.
        channel_dim: the dimension of z that counts the latents: 1 for (B, D) and (B, D, H, W), -1 for (B, N, D).
        quantization_weight: weight of the loss that moves the codes towards z.
        commitment_weight: weight of the loss that moves z towards the codes.
        init_range: first and last of the K evenly spaced initial codes.
        learnable: False keeps the codes fixed, as a buffer.
        shared_codebook: True uses one codebook for all latents (the paper's 'global' ablation); needs one K.
        index_dtype: dtype of indices; torch.uint8, int16, int32 or int64.
        backend: "auto", "cpu", "reference", "triton" or "cuda".
        device, dtype: of the codebook.

    The attribute `codebook` is a Parameter (a buffer if fixed) of shape [D, max K], or [1, K] if shared; a latent with
    fewer codes leaves the rest of its row unused.

    Raises:
        ValueError: sizes, levels or `init_range` that make no codebook, or `index_dtype` too small for K.
        TypeError: `index_dtype` is no index dtype.
    """

    codebook: Tensor

    def __init__(
        self,
        num_latents: int,
        levels: int | Sequence[int] = 10,
        *,
        channel_dim: int = 1,
        quantization_weight: float = 0.01,
        commitment_weight: float = 0.01,
        init_range: tuple[float, float] = (-0.5, 0.5),
        learnable: bool = True,
        shared_codebook: bool = False,
        index_dtype: torch.dtype = torch.int32,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        per_latent = tuple(map(index, levels)) if isinstance(levels, Iterable) else (index(levels),) * num_latents
        if num_latents < 1 or len(per_latent) != num_latents or min(per_latent, default=0) < 1:
            raise ValueError(
                f"levels must be one number >= 1 or one per latent, with num_latents >= 1; "
                f"got num_latents={num_latents}, levels={levels}"
            )
        if shared_codebook and len(set(per_latent)) > 1:
            raise ValueError(f"a shared codebook needs the same number of codes for all latents; got levels={levels}")
        if len(init_range) != 2 or not all(map(math.isfinite, init_range)) or init_range[0] > init_range[1]:
            raise ValueError(f"init_range must be two finite numbers (low, high); got {init_range}")
        check_index_dtype(index_dtype, max(per_latent))
        check_name(backend)
        self.num_latents = num_latents
        self.levels = per_latent
        self.channel_dim = channel_dim
        self.quantization_weight = quantization_weight
        self.commitment_weight = commitment_weight
        self.init_range = (float(init_range[0]), float(init_range[1]))
        self.shared_codebook = shared_codebook
        self.index_dtype = index_dtype
        self.backend = backend
        self._ragged_levels = per_latent if len(set(per_latent)) > 1 else None
        rows = 1 if shared_codebook else num_latents
        codebook = torch.empty(rows, max(per_latent), device=device, dtype=dtype)
        if learnable:
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)
        self.reset_parameters()

    @property
    def learnable(self) -> bool:
        """Whether the codes receive gradients."""
        return isinstance(self.codebook, nn.Parameter)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set each latent's codes to evenly spaced values over `init_range`, both ends included."""
        self.codebook.zero_()
        for row, count in zip(self.codebook, self.levels, strict=False):
            row[:count] = torch.linspace(*self.init_range, count, device=row.device, dtype=row.dtype)

    def forward(self, z: Tensor, mask: Tensor | None = None) -> LatentQuantizerOutput:
        """Quantize z [..., D, ...]; returns (quantized, indices, loss), see `LatentQuantizerOutput`.

        `mask`, bool of z's shape without `channel_dim`, is True where a position counts; see `latent_quantize`.
        """
        return self._quantize(z, self.codebook, mask)

    @torch.no_grad()
    def encode(self, z: Tensor) -> Tensor:
        """The index of the nearest code for each element of z [..., D, ...], of `index_dtype`; no gradient."""
        return self._quantize(z, self.codebook).indices

    def decode(self, indices: Tensor) -> Tensor:
        """The codes at `indices` [..., D, ...] (any integer dtype), of the codebook's dtype; differentiable in it.

        Raises ValueError where an index is outside its latent's codes.
        """
        return values_of(self._checked(indices), self.codebook, self.channel_dim)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n latent vectors [n, D] with each latent uniform over its codes; differentiable in the codebook."""
        counts = torch.tensor(self.levels, device=self.codebook.device)
        uniform = torch.rand(n, self.num_latents, generator=generator, dtype=torch.float64, device=self.codebook.device)
        # The product can round up to the count itself.
        indices = (uniform * counts).long().minimum(counts - 1)
        return values_of(indices, self.codebook, 1)

    def pack(self, indices: Tensor) -> Tensor:
        """One int64 per latent vector: the mixed-radix number whose digits are `indices`, the first latent lowest.

        indices [..., D, ...] of any integer dtype; returns int64 without the dimension `channel_dim`. Raises
        ValueError where the product of levels passes 2**63 - 1, or an index is outside its latent's codes.
        """
        indices = self._checked(indices)
        return (indices * self._along_channel(self._radices(), indices)).sum(self.channel_dim)

    def unpack(self, codes: Tensor) -> Tensor:
        """The inverse of `pack`: int64 codes [...] to indices [..., D, ...] of `index_dtype`.

        Raises ValueError where a code is outside 0..product of levels - 1.
        """
        radices = self._radices()
        if not torch.compiler.is_compiling() and ((codes < 0) | (codes >= math.prod(self.levels))).any():
            raise ValueError(f"codes must be in 0..{math.prod(self.levels) - 1}")
        channel_dim = self.channel_dim % (codes.dim() + 1)
        codes = codes.long().unsqueeze(channel_dim)
        digits = codes.div(self._along_channel(radices, codes), rounding_mode="floor")
        return digits.remainder(self._along_channel(self.levels, codes)).to(self.index_dtype)

    def usage(self, indices: Tensor) -> CodeUsage:
        """Counts, perplexity and dead codes of `indices` [..., D, ...]; see `CodeUsage`."""
        most = max(self.levels)
        rows = self._checked(indices).movedim(self.channel_dim, -1).reshape(-1, self.num_latents)
        positions = rows + most * torch.arange(self.num_latents, device=rows.device)
        counts = torch.bincount(positions.flatten(), minlength=self.num_latents * most)
        counts = counts.view(self.num_latents, most)
        frequencies = counts.double() / max(1, rows.size(0))
        entropy = -torch.xlogy(frequencies, frequencies).sum(1)
        perplexity = entropy.exp() if rows.size(0) else torch.zeros_like(entropy)
        codes = torch.arange(most, device=rows.device)
        exists = codes < torch.tensor(self.levels, device=rows.device).unsqueeze(1)
        return CodeUsage(counts, perplexity, exists & (counts == 0))

    def extra_repr(self) -> str:
        """The arguments that tell this quantizer from another."""
        return (
            f"{self.num_latents}, levels={self._describe_levels()}, channel_dim={self.channel_dim}, "
            f"quantization_weight={self.quantization_weight}, commitment_weight={self.commitment_weight}, "
            f"learnable={self.learnable}, shared_codebook={self.shared_codebook}, backend={self.backend!r}"
        )

    def _quantize(self, z: Tensor, codebook: Tensor, mask: Tensor | None = None) -> LatentQuantizerOutput:
        if self.shared_codebook or codebook.size(0) == 1:
            self._check_channels(z)
        return latent_quantize(
            z,
            codebook,
            levels=self._ragged_levels,
            channel_dim=self.channel_dim,
            quantization_weight=self.quantization_weight,
            commitment_weight=self.commitment_weight,
            index_dtype=self.index_dtype,
            mask=mask,
            backend=self.backend,
        )

    def _check_channels(self, value: Tensor) -> None:
        dims = value.dim()
        if not -dims <= self.channel_dim < dims or value.size(self.channel_dim) != self.num_latents:
            raise ValueError(
                f"expected {self.num_latents} latents at dimension {self.channel_dim}; got shape {tuple(value.shape)}"
            )

    def _checked(self, indices: Tensor) -> Tensor:
        """The indices as int64, their dtype, shape and range checked; a traced call cannot look at the range."""
        if indices.dtype not in INDEX_DTYPES:
            raise TypeError(f"indices must be uint8, int16, int32 or int64; got {indices.dtype}")
        self._check_channels(indices)
        indices = indices.long()
        if not torch.compiler.is_compiling():
            counts = self._along_channel(self.levels, indices)
            if ((indices < 0) | (indices >= counts)).any():
                raise ValueError(f"indices must be in 0..levels - 1 with levels {self._describe_levels()}")
        return indices

    def _along_channel(self, values: Sequence[int], like: Tensor) -> Tensor:
        shape = [1] * like.dim()
        shape[self.channel_dim] = len(values)
        return torch.tensor(values, device=like.device).view(shape)

    def _radices(self) -> list[int]:
        if math.prod(self.levels) > MAX_INT64:
            raise ValueError(
                f"the product of levels, {math.prod(self.levels)}, passes 2**63 - 1: one int64 cannot hold the codes"
            )
        return [math.prod(self.levels[:latent]) for latent in range(self.num_latents)]

    def _describe_levels(self) -> int | list[int]:
        return self.levels[0] if self._ragged_levels is None else list(self.levels)
