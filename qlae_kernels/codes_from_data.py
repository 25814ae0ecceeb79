"""Codes that are taken from latents: their quantiles, and single values in place of dead codes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def usable(rows: Tensor, codebook_dtype: torch.dtype) -> Tensor:
    """Latents [N, D] in float32, or float64 if they or the codes are; NaN for what a code cannot be: NaN and infinity.

    What is infinite in the codebook's dtype alone counts as infinite.
    """
    dtype = torch.promote_types(torch.promote_types(rows.dtype, codebook_dtype), torch.float32)
    return rows.to(dtype).masked_fill(~rows.to(codebook_dtype).isfinite(), torch.nan)


def quantile_codes(rows: Tensor, levels: Sequence[int]) -> Tensor:
    """Code k of latent d is the (k + 1/2) / levels[d] quantile of column d; float64 [D, K], 0 in padding.

    rows [N, D] may hold NaN, which is left out. Between two values the quantile is interpolated linearly. Raises
    ValueError where a column holds nothing but NaN.
    """
    counts = rows.isfinite().sum(0)
    empty = (counts == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"every latent needs at least one finite value that the mask keeps; none in latents {empty}")
    # NaN comes last. torch.quantile would take the same quantiles of all latents, and has limited sizes.
    ascending = rows.T.contiguous().sort(1).values
    k = torch.arange(max(levels), device=rows.device)
    of_latent = torch.tensor(levels, device=rows.device).unsqueeze(1)
    padding = k >= of_latent
    positions = ((k + 0.5).double() / of_latent).masked_fill(padding, 0) * (counts - 1).unsqueeze(1)
    below = positions.floor()
    lower = ascending.gather(1, below.long()).double()
    upper = ascending.gather(1, positions.ceil().long()).double()
    return torch.lerp(lower, upper, positions - below).masked_fill(padding, 0)


def replace_codes(
    codes: Tensor, used: Tensor, dead: Tensor, rows: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Set the dead codes of each latent to values of that latent, drawn uniformly without replacement.

    codes [D, K], used and dead bool [D, K] (both False in padding), rows [N, D] with NaN for what may not be drawn.
    A value that equals a used code or one drawn before it is passed over: of equal codes only the first is ever used.
    Returns the codes and which of them were replaced (bool [D, K]): fewer than dead where a latent has not enough
    values.
    """
    values = rows.T.to(codes.dtype)
    keys = torch.rand(values.shape, generator=generator, device=rows.device)
    shuffled = values.gather(1, keys.argsort(1))
    # Used codes stand first: of equal candidates the first is kept, in the order in which they are drawn.
    candidates = torch.cat((codes.masked_fill(~used, torch.nan), shuffled), 1)
    ascending, places = candidates.sort(dim=1, stable=True)
    taken = torch.nn.functional.pad(ascending[:, 1:] == ascending[:, :-1], (1, 0))
    taken |= ascending.isnan() | (places < codes.size(1))
    # Behind the last candidate one NaN, for the dead codes that are left without a value.
    places = places.masked_fill(taken, candidates.size(1))
    drawn = places.topk(codes.size(1), largest=False).values
    drawn = torch.nn.functional.pad(candidates, (0, 1), value=torch.nan).gather(1, drawn)
    drawn = drawn.gather(1, (dead.cumsum(1) - 1).clamp(min=0))
    replaced = dead & ~drawn.isnan()
    return torch.where(replaced, drawn, codes), replaced
