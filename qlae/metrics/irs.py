"""Interventional robustness score (IRS): how little each latent moves while its source stays and the others change."""

import numpy as np
import torch

from qlae.metrics.samples import check_lengths, relabel, sources_of, values_of


def irs(
    latents: np.ndarray | torch.Tensor,  # [N, n_z]
    sources: np.ndarray | torch.Tensor,  # [N, n_s]
    *,
    quantile: float = 0.99,
) -> float:
    """Mean over the varying latents of their robustness for the source that suits them best, at most 1.

    A latent's robustness for a source is 1 - (mean over the source's values of the largest deviation from the
    latent's mean under that value) / (largest deviation from its mean over all). The mean over latents is weighted
    by that last number.

    Source: Suter et al., "Robustly Disentangled Causal Mechanisms" (ICML 2019, arXiv 1811.00007), as
    computed in disentanglement_lib, which takes the 99 % quantile for the largest deviation under a value. Latents
    enter as numbers and are not rescaled, so one of large range weighs most. A value with one sample has no
    deviation, so few samples a value flatter the score. Random codes score about 0, or a little below, where the
    means of the values lie off the mean over all. Constant latents and sources take no part; without a
    varying one of each the score is 0.

    Args:
        latents: real numbers or codes.
        sources: whole numbers.
        quantile: what stands for the largest deviation; 1 is the paper's.

    Raises:
        ValueError: as `infomec`; for a quantile outside (0, 1].
    """
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile must be in (0, 1], got {quantile}")
    values, (labels, sizes) = values_of(latents), relabel(sources_of(sources))
    check_lengths(values, labels, score="irs")
    values, labels = values[:, np.ptp(values, axis=0) > 0], labels[:, sizes > 1]
    if values.shape[1] == 0 or labels.shape[1] == 0:
        return 0.0
    largest = np.abs(values - values.mean(axis=0)).max(axis=0)
    deviations = np.stack([_mean_deviation(values, column, quantile) for column in labels.T])
    robustness = (1.0 - deviations / largest).max(axis=0)
    return float(np.average(robustness, weights=largest))


def _mean_deviation(values: np.ndarray, labels: np.ndarray, quantile: float) -> np.ndarray:
    """Mean over the labels of the quantile of deviations from the label's mean, float64 [n_z]."""
    order = np.argsort(labels, kind="stable")
    groups = np.split(values[order], np.cumsum(np.bincount(labels))[:-1])
    return np.mean([np.quantile(np.abs(group - group.mean(axis=0)), quantile, axis=0) for group in groups], axis=0)
