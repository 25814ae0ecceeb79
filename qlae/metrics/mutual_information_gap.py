"""Mutual information gap (MIG): how far the best latent for a source is ahead of the second."""

import numpy as np
import torch

from qlae.metrics.mutual_information import binned_information, normalised


def mutual_information_gap(
    latents: np.ndarray | torch.Tensor,  # [N, n_z]
    sources: np.ndarray | torch.Tensor,  # [N, n_s]
    discrete: bool = True,
    *,
    bins: int = 20,
) -> float:
    """Mean over the varying sources of (largest - second largest I(source; latent)) / H(source), in [0, 1].

    Source: Chen et al., "Isolating Sources of Disentanglement in VAEs" (NeurIPS 2018, arXiv 1802.04942),
    with the plug-in estimate of Locatello et al. (ICML 2019, arXiv 1811.12359), whose code takes 20 bins.
    Without a varying source 0; a single latent has 0 for a second.

    Args:
        latents: integer codes, or with `discrete=False` real numbers.
        sources: whole numbers.
        discrete: True for codes. Continuous latents are cut into bins.
        bins: bins of equal width over each continuous latent's range.

    Raises:
        ValueError: as `infomec`; for `bins` below 2.
    """
    information, source_labels, source_sizes = binned_information(
        latents, sources, discrete=discrete, bins=bins, score="mutual_information_gap"
    )
    shares = normalised(information, source_labels, source_sizes)[source_sizes > 1]
    if len(shares) == 0:
        return 0.0
    ascending = np.sort(np.insert(shares, 0, 0.0, axis=1), axis=1)
    return float((ascending[:, -1] - ascending[:, -2]).mean())
