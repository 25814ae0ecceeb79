"""The beta-VAE score: does a linear classifier tell which source pairs of samples share?"""

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from qlae.metrics.fitting import fit, warn_unless_converged
from qlae.metrics.fixed_factor import FixedFactorSampler
from qlae.metrics.samples import check_lengths, relabel, sources_of, values_of

# Points whose pairs are held at a time, to bound the memory.
_CHUNK = 1000


def beta_vae(
    latents: np.ndarray | torch.Tensor,  # [N, n_z]
    sources: np.ndarray | torch.Tensor,  # [N, n_s]
    *,
    pairs: int = 64,
    train_points: int = 10_000,
    test_points: int = 5_000,
    seed: int = 0,
) -> float:
    """Accuracy of a logistic regression for the source that pairs share, in [0, 1]; chance is about 1 / n_s.

    A point: choose a random source, draw `pairs` pairs of samples that agree in it, and take the mean over the
    pairs of the absolute difference of their latents. The regression (scikit-learn's defaults, C = 1) tells the
    source from the point.

    Source: Higgins et al., "beta-VAE" (ICLR 2017, openreview Sy2fzU9gl); the sizes are those of
    Locatello et al. 2019. The pairs are drawn from the samples given (see `FixedFactorSampler`), for training and
    test alike. Latents enter as numbers and as they are, and the penalty makes their scale matter. Constant sources
    take no part; with one varying source the score is 1, with none, or without a varying latent, 0. A regression that
    does not converge is reported by scikit-learn's ConvergenceWarning.

    Args:
        latents: real numbers or codes.
        sources: whole numbers.
        pairs: pairs a point.
        train_points: points that the regression is fitted to.
        test_points: points that are scored.
        seed: of the draws.

    Raises:
        ValueError: as `infomec`; for sizes below 1, or so few points that all are of one source; if all samples differ
            in a source.
    """
    if pairs < 1 or train_points < 1 or test_points < 1:
        raise ValueError(f"pairs and points must be at least 1, got {pairs}, {train_points}, {test_points}")
    values, (labels, sizes) = values_of(latents), relabel(sources_of(sources))
    check_lengths(values, labels, score="beta_vae")
    labels = labels[:, sizes > 1]
    if labels.shape[1] == 0 or (np.ptp(values, axis=0) == 0).all():
        return 0.0
    if labels.shape[1] == 1:
        return 1.0
    sampler = FixedFactorSampler(labels, np.random.default_rng(seed))
    regression = LogisticRegression()
    points, shared = _points(sampler, values, labels.shape[1], train_points, pairs)
    if len(np.unique(shared)) < 2:
        raise ValueError(f"beta_vae: train_points={train_points} drew points of one source only: give more")
    warn_unless_converged("beta_vae", [fit(regression, points, shared)])
    return float(regression.score(*_points(sampler, values, labels.shape[1], test_points, pairs)))


def _points(
    sampler: FixedFactorSampler, values: np.ndarray, num_sources: int, count: int, pairs: int
) -> tuple[np.ndarray, np.ndarray]:
    """Mean absolute differences float64 [count, n_z], and the source that each shares, int64 [count]."""
    rounds = np.bincount(sampler.sources(count), minlength=num_sources)
    points = []
    for source, total in enumerate(rounds):
        for start in range(0, total, _CHUNK):
            first, second = sampler.pairs(source, min(_CHUNK, total - start), pairs)
            points.append(np.abs(values[first] - values[second]).mean(axis=1))
    return np.concatenate(points), np.repeat(np.arange(num_sources), rounds)
