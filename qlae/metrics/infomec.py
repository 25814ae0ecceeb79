"""InfoMEC: modularity, compactness and explicitness of a latent code, measured against known sources.

The definitions follow Hsu et al., "Disentanglement via Latent Quantization" (arXiv 2305.18378), section 4.
"""

import math
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from qlae.metrics.mutual_information import (
    continuous_information,
    discrete_information,
    normalised,
    one_hot,
    standardise,
)
from qlae.metrics.samples import check_lengths, codes_of, relabel, sources_of, values_of

_REGRESSION_ITERATIONS = 100

# A continuous latent is active if its range is more than this part of the largest one.
_ACTIVE_RANGE = 1 / 20


@dataclass(frozen=True)
class InfoMEC:
    """Scores of `n_z` latents against `n_s` sources.

    Attributes:
        infom: modularity; 1 when every active latent informs about one source only.
        infoc: compactness; 1 when every source is told by one active latent only.
        infoe: explicitness; 1 when a linear classifier reads every source off the latents without error.
            In-sample, so latents without information score slightly above 0.
        nmi: float64 [n_s, n_z], I(source; latent) / H(source). In [0, 1] for discrete latents; the estimator
            for continuous ones may pass 1 a little, by about (classes - 1) / (2 N H(source)) where a latent
            tells all.
        active: bool [n_z]. Discrete latents that take more than one value; continuous ones whose range, as
            given, is more than 1/20 of the largest. InfoM and InfoC use these alone.
        varying: bool [n_s], sources that take more than one value. The scores use these alone.
        converged: whether every regression behind `infoe` converged within its 100 iterations. If not,
            more iterations would give a higher `infoe`; the protocol is to report it as it is.
    """

    infom: float
    infoc: float
    infoe: float
    nmi: np.ndarray
    active: np.ndarray
    varying: np.ndarray
    converged: bool


def infomec(
    latents: np.ndarray | torch.Tensor,  # [N, n_z]
    sources: np.ndarray | torch.Tensor,  # [N, n_s]
    discrete: bool = True,
    *,
    neighbors: int = 10,
    seed: int = 0,
) -> InfoMEC:
    """Scores how modular, compact and explicit latents are about the sources that made the data.

    With NMI[i, j] = I(source i; latent j) / H(source i) over the active latents and the varying sources:

    - InfoM = mean over latents of (max / sum of NMI over sources - 1/n_s) / (1 - 1/n_s)
    - InfoC = mean over sources of (max / sum of NMI over latents - 1/n_a) / (1 - 1/n_a), n_a active latents
    - InfoE = mean over sources of (H_null - H_pred) / H_null, where H_pred is the log loss of an unpenalised
      multinomial logistic regression from the latents (balanced classes, lbfgs, 100 iterations) and H_null
      that of the same regression from zeros, which is the log of the number of classes.

    Discrete latents enter I by their frequencies (plug-in) and the regression as one-hot codes; continuous ones
    enter I by the estimator of Ross (PLoS ONE 2014) from nearest neighbours and the regression as standardised
    values, those that are not active included, as in the reference implementation.

    Where a formula has no value, these are given, so that no score is ever NaN:

    - A constant source carries no information: its row of `nmi` is 0 and no mean (nor n_s) counts it.
    - An active latent that informs about no source counts as 0 in InfoM, a source that no latent tells as 0
      in InfoC: the formulas' value for information that is spread evenly.
    - With one varying source, an informative latent counts as 1 in InfoM; with one active latent, a source
      that it tells counts as 1 in InfoC. That is the formulas' value with one more source or latent that has
      no part in the information. It holds trivially, so read it together with `active` and `nmi`.
    - No active latent, or no varying source: all three scores are 0.

    InfoE can fall below 0 on uneven classes, since the regression balances them and the log loss does not.

    Args:
        latents: integer codes [N, n_z] of any values, since each column is relabelled; indices, not the
            quantized values. With `discrete=False` finite real numbers [N, n_z].
        sources: integers [N, n_s], of any values. Floats are taken where all are whole numbers.
        discrete: True for codes, False for continuous latents.
        neighbors: k of the estimator for continuous latents.
        seed: of the noise of 1e-10 that parts equal values of continuous latents.

    Raises:
        ValueError: for arrays that are not two-dimensional, without columns, of different lengths or with
            fewer than two samples; for codes or sources that are not integers; for continuous latents that are
            not finite; for `neighbors` below 1.
    """
    if neighbors < 1:
        raise ValueError(f"neighbors must be at least 1, got {neighbors}")
    latent_array = codes_of(latents) if discrete else values_of(latents)
    source_array = sources_of(sources)
    check_lengths(latent_array, source_array, score="infomec")

    source_labels, source_sizes = relabel(source_array)
    if discrete:
        latent_labels, latent_sizes = relabel(latent_array)
        active = latent_sizes > 1
        information = discrete_information(latent_labels, latent_sizes, source_labels, source_sizes)
        features = one_hot(latent_labels[:, active], latent_sizes[active])
    else:
        ranges = np.ptp(latent_array, axis=0)
        active = active_latents(latent_array, discrete=False)
        information = continuous_information(latent_array, source_labels, source_sizes, neighbors=neighbors, seed=seed)
        features = standardise(latent_array)[:, ranges > 0]
    varying = source_sizes > 1
    nmi = normalised(information, source_labels, source_sizes)
    scored = nmi[varying][:, active]
    explicitness, converged = _explicitness(features, source_labels[:, varying], source_sizes[varying])
    return InfoMEC(
        infom=_concentration(scored.T),
        infoc=_concentration(scored),
        infoe=explicitness,
        nmi=nmi,
        active=active,
        varying=varying,
        converged=converged,
    )


def active_latents(
    latents: np.ndarray | torch.Tensor,  # [N, n_z]
    discrete: bool = True,
) -> np.ndarray:  # [n_z]
    """Which latents vary, bool [n_z]: `InfoMEC.active`, which needs no sources.

    Raises:
        ValueError: for latents that `infomec` would refuse.
    """
    if discrete:
        return np.ptp(codes_of(latents), axis=0) > 0
    ranges = np.ptp(values_of(latents), axis=0)
    return ranges > _ACTIVE_RANGE * ranges.max()


def _concentration(nmi: np.ndarray) -> float:
    """Mean over rows of (max / sum - 1/n) / (1 - 1/n), with the values of `infomec` where that has none."""
    rows, columns = nmi.shape
    if rows == 0 or columns == 0:
        return 0.0
    total = nmi.sum(axis=1)
    informative = total > 0
    share = nmi.max(axis=1)[informative] / total[informative]
    if columns > 1:
        share = (share - 1 / columns) / (1 - 1 / columns)
    return float(share.sum() / rows)


def _explicitness(
    features: sparse.csr_array | np.ndarray, source_labels: np.ndarray, source_sizes: np.ndarray
) -> tuple[float, bool]:
    """InfoE from features [N, F] about varying sources [N, n_s], and whether every regression converged."""
    if features.shape[1] == 0 or source_labels.shape[1] == 0:
        return 0.0, True
    scores = []
    all_converged = True
    for labels, size in zip(source_labels.T, source_sizes, strict=True):
        predicted_entropy, converged = _regression_log_loss(features, labels)
        # The balanced regression from zeros predicts every class evenly.
        null_entropy = math.log(size)
        scores.append((null_entropy - predicted_entropy) / null_entropy)
        all_converged = all_converged and converged
    return float(np.mean(scores)), all_converged


def _regression_log_loss(features: sparse.csr_array | np.ndarray, labels: np.ndarray) -> tuple[float, bool]:
    """In-sample log loss of the balanced, unpenalised logistic regression, and whether it converged."""
    regression = LogisticRegression(C=np.inf, class_weight="balanced", solver="lbfgs", max_iter=_REGRESSION_ITERATIONS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        regression.fit(features, labels)
    stopped = [entry for entry in caught if issubclass(entry.category, ConvergenceWarning)]
    for entry in caught:
        if entry not in stopped:
            warnings.warn_explicit(entry.message, entry.category, entry.filename, entry.lineno)
    return float(log_loss(labels, regression.predict_proba(features))), not stopped
