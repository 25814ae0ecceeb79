"""How evenly each latent uses its codes."""

from collections.abc import Sequence

import numpy as np
import torch


def code_counts(
    indices: np.ndarray | torch.Tensor,  # [N, D]
    levels: int | Sequence[int],
) -> list[np.ndarray]:
    """How often each latent takes each of its codes.

    Args:
        indices: integers [N, D], each in [0, levels of its latent).
        levels: number of codes, one for all latents or one per latent.

    Returns:
        D arrays, int64 [levels of the latent]; 0 marks a dead code.

    Raises:
        ValueError: for indices of another shape or type or out of range; for levels that do not match them.
    """
    array = indices.detach().cpu().numpy() if isinstance(indices, torch.Tensor) else np.asarray(indices)
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"indices must have shape [N, D] with N, D >= 1, got {list(array.shape)}")
    if array.dtype.kind not in "iu":
        raise ValueError(f"indices must be integers, got {array.dtype}")
    num_latents = array.shape[1]
    sizes = [levels] * num_latents if isinstance(levels, int) else [int(size) for size in levels]
    if len(sizes) != num_latents:
        raise ValueError(f"levels must be one integer or one per latent ({num_latents}), got {len(sizes)}")
    return [_count(array[:, latent], sizes[latent], latent) for latent in range(num_latents)]


def perplexity(
    indices: np.ndarray | torch.Tensor,  # [N, D]
    levels: int | Sequence[int],
) -> np.ndarray:  # [D]
    """Effective number of codes each latent uses, exp of the entropy of its code frequencies.

    1 where a latent always takes the same code, `levels` where it takes all equally often. Arguments and
    errors as for `code_counts`.

    Returns:
        float64 [D].
    """
    return np.array([_perplexity_of_counts(counts) for counts in code_counts(indices, levels)])


def _count(codes: np.ndarray, size: int, latent: int) -> np.ndarray:
    low, high = int(codes.min()), int(codes.max())
    if low < 0 or high >= size:
        raise ValueError(f"indices of latent {latent} must be in [0, {size}), got values from {low} to {high}")
    return np.bincount(codes.astype(np.int64), minlength=size)


def _perplexity_of_counts(counts: np.ndarray) -> float:
    frequencies = counts[counts > 0] / counts.sum()
    return float(np.exp(-(frequencies * np.log(frequencies)).sum()))
