"""Modularity and explicitness of Ridgeway and Mozer."""

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from qlae.metrics.fitting import fit, warn_unless_converged
from qlae.metrics.mutual_information import binned_information, standardise
from qlae.metrics.samples import check_lengths, relabel, sources_of, split, values_of


def modularity(
    latents: np.ndarray | torch.Tensor,  # [N, n_z]
    sources: np.ndarray | torch.Tensor,  # [N, n_s]
    discrete: bool = True,
    *,
    bins: int = 20,
) -> float:
    """Mean over latents of 1 - (sum of I^2 over all sources but the best) / (I of the best)^2 / (n_s - 1), in [0, 1].

    Source: Ridgeway and Mozer, "Learning Deep Disentangled Embeddings with the F-Statistic Loss" (NeurIPS 2018,
    arXiv 1802.05312), section 3, with the plug-in estimate in nats, and the value 0 of latents that inform about
    nothing, of Locatello et al. 2019. So a dead latent lowers the score, and, unlike in InfoM, a source of high
    entropy weighs more than one of low. Constant sources count nowhere; with one varying source an informative
    latent counts as 1; without any the score is 0.

    Args:
        latents: integer codes, or with `discrete=False` real numbers.
        sources: whole numbers.
        discrete: True for codes. Continuous latents are cut into bins.
        bins: bins of equal width over each continuous latent's range.

    Raises:
        ValueError: as `infomec`; for `bins` below 2.
    """
    information, _, source_sizes = binned_information(
        latents, sources, discrete=discrete, bins=bins, score="modularity"
    )
    squares = information[source_sizes > 1] ** 2
    if len(squares) == 0:
        return 0.0
    best = squares.max(axis=0)
    informative = best > 0
    others = (squares.sum(axis=0) - best)[informative] / best[informative] / max(1, len(squares) - 1)
    return float((1.0 - others).sum() / squares.shape[1])


def explicitness(
    latents: np.ndarray | torch.Tensor,  # [N, n_z]
    sources: np.ndarray | torch.Tensor,  # [N, n_s]
    *,
    held_out: float = 1 / 3,
    seed: int = 0,
) -> float:
    """Mean over sources and their classes of the area under the ROC curve, in [0, 1]; 0.5 is chance.

    A logistic regression (scikit-learn's defaults, C = 1) from all standardised latents gives each class of a source
    its probability; the curve is that of the class against the rest on samples held out.

    Source: Ridgeway and Mozer 2018, section 3, as Locatello et al. 2019 compute it, who fit 10,000 samples and score
    5,000: the default share. Latents enter as numbers. Classes without a sample held out are left out, a source
    where that leaves none counts as 0.5; without a varying latent or source the score is 0.5. A regression that does
    not converge is reported by scikit-learn's ConvergenceWarning.

    Args:
        latents: real numbers or codes.
        sources: whole numbers.
        held_out: share of each class that is scored and not fitted.
        seed: of the split.

    Raises:
        ValueError: as `infomec`; for a share that leaves nothing to score.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must be a share in (0, 1), got {held_out}")
    values, (labels, sizes) = values_of(latents), relabel(sources_of(sources))
    check_lengths(values, labels, score="explicitness")
    values = values[:, np.ptp(values, axis=0) > 0]
    if values.shape[1] == 0 or not (sizes > 1).any():
        return 0.5
    features = standardise(values)
    of_source = [_area(features, labels[:, source], held_out, seed) for source in np.flatnonzero(sizes > 1)]
    areas, converged = zip(*of_source, strict=True)
    warn_unless_converged("explicitness", converged)
    return float(np.mean(areas))


def _area(features: np.ndarray, labels: np.ndarray, held_out: float, seed: int) -> tuple[float, bool]:
    """Mean area of the classes of one source, and whether the regression converged."""
    fitted, scored = split(labels, held_out, seed)
    regression = LogisticRegression()
    converged = fit(regression, features[fitted], labels[fitted])
    probabilities = regression.predict_proba(features[scored])
    present = np.unique(labels[scored])
    if len(present) < 2:
        return 0.5, converged
    areas = [roc_auc_score(labels[scored] == name, probabilities[:, name]) for name in present]
    return float(np.mean(areas)), converged
