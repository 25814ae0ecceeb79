"""`CodeUsage`: how often each code was used, over batches and over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from qlae_kernels.ranks import summed
from qlae_kernels.torch_internals import register_namedtuple

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class CodeUsage(NamedTuple):
    """How often each code was used. `a + b` is the usage of both together, as if counted at once; `sum` adds many.

    counts: int64 [D, K], 0 in the padding of latents with fewer than K codes.
    perplexity: float64 [D], exp of the entropy of each latent's code frequencies: 1 to K; 0 without samples.
    dead: bool [D, K], codes that were never used; False in padding.
    """

    counts: Tensor
    perplexity: Tensor
    dead: Tensor

    def __add__(self, other: CodeUsage) -> CodeUsage:
        """Add the counts, for batches one after another; ValueError if the two have not the same codes."""
        if not isinstance(other, CodeUsage):
            return NotImplemented
        if self.counts.shape != other.counts.shape:
            raise ValueError(
                "only usages of the same codes can be added; got counts of shapes "
                f"{tuple(self.counts.shape)} and {tuple(other.counts.shape)}"
            )
        counts = self.counts + other.counts
        return CodeUsage(counts, perplexity_of(counts), self.dead & other.dead)

    def __radd__(self, other: int) -> CodeUsage:
        """0 + usage, with which `sum` starts."""
        return self if isinstance(other, int) and other == 0 else NotImplemented


# Lets torch.export save programs that return it.
register_namedtuple(CodeUsage, "qlae_kernels.CodeUsage")


def count_codes(
    indices: Tensor, levels: Sequence[int], group: ProcessGroup | None, counted: Tensor | None = None
) -> CodeUsage:
    """The usage of `indices` (int64 [N, D], each in 0..levels[d] - 1), those of all ranks of `group` together.

    `counted`, bool [N, D], is True where an index counts; None: everywhere.
    """
    num_latents, most = len(levels), max(levels)
    positions = indices + most * torch.arange(num_latents, device=indices.device)
    positions = positions.flatten() if counted is None else positions[counted]
    counts = torch.bincount(positions, minlength=num_latents * most).view(num_latents, most)
    counts = summed(counts, group)
    return CodeUsage(counts, perplexity_of(counts), dead_codes(counts, levels))


def dead_codes(counts: Tensor, levels: Sequence[int]) -> Tensor:
    """bool [D, K]: codes, not padding, with count 0 in counts [D, K]."""
    codes = torch.arange(counts.size(1), device=counts.device)
    return (counts == 0) & (codes < torch.tensor(levels, device=counts.device).unsqueeze(1))


def perplexity_of(counts: Tensor) -> Tensor:
    """exp(-sum over k of p_k ln p_k) with p = counts / total for each row of counts [D, K]; 0 for a row of zeros."""
    totals = counts.sum(1)
    frequencies = counts.double() / totals.clamp(min=1).unsqueeze(1)
    perplexity = -torch.xlogy(frequencies, frequencies).sum(1)
    return perplexity.exp().masked_fill(totals == 0, 0)
