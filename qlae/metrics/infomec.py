"""InfoMEC: modularity, compactness and explicitness of a latent code, measured against known sources.

The definitions follow Hsu et al., "Disentanglement via Latent Quantization" (arXiv 2305.18378).
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from scipy import sparse

from qlae.metrics.mutual_information import (
    continuous_information,
    discrete_information,
    normalised,
    one_hot,
    standardise,
)
from qlae.metrics.predictive_information import classification_information, regression_information
from qlae.metrics.samples import array_of, check_lengths, codes_of, from_least, relabel, sources_of, values_of

Protocol = Literal["standalone", "training", "tripod"]
Explicitness = Literal["classification", "regression"]

# k of the nearest-neighbour estimator, by protocol; 3 is scikit-learn's default.
NEIGHBORS: dict[Protocol, int] = {"standalone": 10, "training": 3, "tripod": 10}
# Interquartile range that tripod asks of quantized values, which lie in [-1, 1] there.
TRIPOD_RANGE = 0.1


@dataclass(frozen=True)
class InfoMEC:
    """Scores of `n_z` latents against `n_s` sources.

    Attributes:
        infom: modularity; 1 when every active latent informs about one source only.
        infoc: compactness; 1 when every source is told by one active latent only.
        infoe: explicitness; 1 when a linear model reads every source off the latents without error.
            In-sample unless `held_out` is given, so latents without information score slightly above 0.
        infoe_of_source: float64 [n_s], what `infoe` is the mean of; 0 for a constant source.
        nmi: float64 [n_s, n_z], I(source; latent) / H(source). In [0, 1] for discrete latents; the estimator
            for continuous ones may pass 1 a little, by about (classes - 1) / (2 N H(source)) where a latent
            tells all.
        active: bool [n_z], the latents that InfoM and InfoC use, by the protocol's rule.
        varying: bool [n_s], sources that take more than one value. The scores use these alone.
        converged: whether every logistic regression behind `infoe` converged within its iterations. If not, more
            iterations would give a higher in-sample `infoe`; the published protocols report it as it is.
    """

    infom: float
    infoc: float
    infoe: float
    infoe_of_source: np.ndarray
    nmi: np.ndarray
    active: np.ndarray
    varying: np.ndarray
    converged: bool


def infomec(
    latents: np.ndarray | torch.Tensor,  # [N, n_z]
    sources: np.ndarray | torch.Tensor,  # [N, n_s]
    discrete: bool = True,
    *,
    values: np.ndarray | torch.Tensor | None = None,  # [N, n_z]
    protocol: Protocol = "standalone",
    neighbors: int | None = None,
    explicitness: Explicitness = "classification",
    held_out: float = 0.0,
    iterations: int = 100,
    seed: int = 0,
) -> InfoMEC:
    """Scores how modular, compact and explicit latents are about the sources that made the data.

    With NMI[i, j] = I(source i; latent j) / H(source i) over the active latents and the varying sources:

    - InfoM = mean over latents of (max / sum of NMI over sources - 1/n_s) / (1 - 1/n_s)
    - InfoC = mean over sources of (max / sum of NMI over latents - 1/n_a) / (1 - 1/n_a), n_a active latents
    - InfoE = mean over sources of (H_null - H_pred) / H_null, where H_pred is the log loss of an unpenalised
      multinomial logistic regression from the latents (balanced classes, lbfgs, 100 iterations) and H_null
      that of the same regression from zeros, which is the log of the number of classes.
      With `explicitness="regression"`: the mean R^2 of linear regressions of the sources' values.

    Discrete latents enter I by their frequencies (plug-in), continuous ones by the estimator of Ross (PLoS ONE
    2014) from nearest neighbours. InfoE sees every latent that varies, active or not.

    The protocols, each as the named code computes it:

    - `standalone`, of the reference's file for use elsewhere (latent_quantization, disentangle/metrics/infomec.py).
      Active: discrete latents that take more than one value, continuous ones whose range is more than 1/20 of
      the largest. k = 10. InfoE from one-hot codes, or from standardised values if continuous.
    - `training`, of what the reference's training scripts log (mutual_information.py and explicitness.py there).
      Active: range more than 1/8 of the largest, codes taken as numbers. k = 3. An active latent that informs
      about no source is left out of InfoM. InfoE from standardised values, discrete or not. Its InfoM divides by
      the number of all sources, and a constant one makes InfoC NaN and InfoE fail: here constant sources are left out.
    - `tripod`, of the follow-up (Hsu et al. 2024; tripod, disentangle/metrics/infomec.py). Active: continuous
      latents whose interquartile range is more than 1/10 of the largest, discrete ones where that of the
      quantized values, which lie in [-1, 1] there, is more than 0.1. InfoE is 0 where no latent is active. The rest
      as `standalone`.

    What `training` and `tripod` compute of discrete latents depends on the quantized values: give them as `values`.
    Without them the codes stand for them. That is the same for `training` if the values of every latent are in order
    and evenly spaced, one step for all latents, so not with different numbers of codes over one range; `tripod` then
    takes 1/20 of the largest range of codes for the 0.1, which is the same if also the latents have as many codes
    as each other, over [-1, 1], and one of them takes its first and its last code.

    Where a formula has no value, these are given, so that no score is ever NaN:

    - A constant source carries no information: its row of `nmi` is 0 and no mean (nor n_s) counts it.
    - An active latent that informs about no source counts as 0 in InfoM, a source that no latent tells as 0
      in InfoC: the formulas' value for information that is spread evenly.
    - With one varying source, an informative latent counts as 1 in InfoM; with one active latent, a source
      that it tells counts as 1 in InfoC. That is the formulas' value with one more source or latent that has
      no part in the information. It holds trivially, so read it together with `active` and `nmi`.
    - No active latent: InfoM and InfoC are 0. No varying latent or no varying source: all three are 0.

    InfoE can fall below 0: on uneven classes, since the regression balances them and the log loss does not, and
    held out, where an unpenalised regression can be sure of what is wrong.

    Args:
        latents: integer codes [N, n_z] of any values, since each column is relabelled; indices, not the
            quantized values. With `discrete=False` finite real numbers [N, n_z].
        sources: integers [N, n_s], of any values. Floats are taken where all are whole numbers.
        discrete: True for codes, False for continuous latents.
        values: finite real numbers [N, n_z], what each discrete latent was quantized to; `standalone` has no use for
            them.
        protocol: one of the above.
        neighbors: k of the estimator for continuous latents; the protocol's by default.
        explicitness: what InfoE predicts, classes or values of the sources. Published scores are of classes.
        held_out: share of each class of a source that InfoE is scored on and not fitted to; 0, as published,
            scores the samples that were fitted.
        iterations: most iterations of each logistic regression.
        seed: of the noise of 1e-10 that parts equal values of continuous latents, and of the split.

    Raises:
        ValueError: for arrays that are not two-dimensional, without columns, of different lengths or with
            fewer than two samples; for codes or sources that are not integers; for continuous latents or values that
            are not finite; for values of another shape than the latents, or of continuous latents; for options out of
            range; for too few samples to hold out.
    """
    _check_options(protocol, neighbors, explicitness, held_out, iterations)
    latent_array = codes_of(latents) if discrete else values_of(latents)
    source_array = sources_of(sources)
    check_lengths(latent_array, source_array, score="infomec")
    quantized = _numbers(latent_array, values, discrete, protocol)

    source_labels, source_sizes = relabel(source_array)
    varying = source_sizes > 1
    if discrete:
        information = discrete_information(*relabel(latent_array), source_labels, source_sizes)
    else:
        information = continuous_information(
            latent_array, source_labels, source_sizes, neighbors=neighbors or NEIGHBORS[protocol], seed=seed
        )
    nmi = normalised(information, source_labels, source_sizes)
    nmi = np.minimum(nmi, 1.0) if discrete else nmi
    active = _active(quantized, discrete, protocol, as_given=values is not None)
    scored = nmi[varying][:, active]
    features = _features(latent_array) if discrete and protocol != "training" else _standardised(quantized)
    told, converged = np.zeros(len(varying)), np.ones(len(varying), dtype=bool)
    readable = features.shape[1] > 0 and (protocol != "tripod" or active.any())
    for source in np.flatnonzero(varying & readable):
        labels = source_labels[:, source]
        if explicitness == "regression":
            told[source] = regression_information(
                features, source_array[:, source], labels, held_out=held_out, seed=seed
            )
        else:
            told[source], converged[source] = classification_information(
                features, labels, source_sizes[source], held_out=held_out, iterations=iterations, seed=seed
            )
    return InfoMEC(
        infom=concentration(scored.T, leave_out_empty=protocol == "training"),
        infoc=concentration(scored),
        infoe=float(told[varying].mean()) if varying.any() else 0.0,
        infoe_of_source=told,
        nmi=nmi,
        active=active,
        varying=varying,
        converged=bool(converged.all()),
    )


def active_latents(
    latents: np.ndarray | torch.Tensor,  # [N, n_z]
    discrete: bool = True,
    *,
    values: np.ndarray | torch.Tensor | None = None,  # [N, n_z]
    protocol: Protocol = "standalone",
) -> np.ndarray:  # [n_z]
    """Which latents count in InfoM and InfoC, bool [n_z]: `InfoMEC.active`, which needs no sources.

    Raises:
        ValueError: for latents or values that `infomec` would refuse.
    """
    latent_array = codes_of(latents) if discrete else values_of(latents)
    return _active(_numbers(latent_array, values, discrete, protocol), discrete, protocol, as_given=values is not None)


def _numbers(
    latents: np.ndarray, values: np.ndarray | torch.Tensor | None, discrete: bool, protocol: Protocol
) -> np.ndarray:
    """The numbers that the protocol takes for the latents, less their least, float64 [N, n_z]."""
    if values is None:
        return from_least(latents)
    if not discrete:
        raise ValueError("values are what codes were quantized to: give none with discrete=False")
    quantized = array_of(values, "values", "n_z")
    if quantized.shape != latents.shape:
        raise ValueError(f"values must have the shape of latents, {list(latents.shape)}, got {list(quantized.shape)}")
    return from_least(latents) if protocol == "standalone" else values_of(quantized)


def _active(values: np.ndarray, discrete: bool, protocol: Protocol, *, as_given: bool) -> np.ndarray:
    """`active_latents` of values float64 [N, n_z]; `as_given`: whether these are quantized values, or else codes."""
    ranges = np.ptp(values, axis=0)
    match protocol:
        case "standalone" if discrete:
            return ranges > 0
        case "standalone":
            return ranges > ranges.max() / 20
        case "training":
            return ranges > ranges.max() / 8
        case "tripod":
            lower, upper = np.quantile(values, [0.25, 0.75], axis=0)
            middle = upper - lower
            if discrete:
                return middle > (TRIPOD_RANGE if as_given else ranges.max() / 20)
            return middle > middle.max() / 10


def concentration(nmi: np.ndarray, *, leave_out_empty: bool = False) -> float:
    """Mean over rows of (max / sum - 1/n) / (1 - 1/n), n columns; the values of `infomec` where that has none.

    A row of zeros counts as 0, or not at all with `leave_out_empty`.
    """
    rows, columns = nmi.shape
    total = nmi.sum(axis=1)
    informative = total > 0
    if not informative.any():
        return 0.0
    share = nmi.max(axis=1)[informative] / total[informative]
    if columns > 1:
        share = (share - 1 / columns) / (1 - 1 / columns)
    return float(share.sum() / (informative.sum() if leave_out_empty else rows))


def _check_options(protocol: str, neighbors: int | None, explicitness: str, held_out: float, iterations: int) -> None:
    if protocol not in get_args(Protocol):
        raise ValueError(f"protocol must be one of {', '.join(get_args(Protocol))}, got {protocol!r}")
    if explicitness not in get_args(Explicitness):
        raise ValueError(f"explicitness must be one of {', '.join(get_args(Explicitness))}, got {explicitness!r}")
    if neighbors is not None and neighbors < 1:
        raise ValueError(f"neighbors must be at least 1, got {neighbors}")
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out must be a share in [0, 1), got {held_out}")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")


def _features(codes: np.ndarray) -> sparse.csr_array:
    """One-hot codes of the latents that vary."""
    return one_hot(*relabel(codes[:, (codes != codes[0]).any(axis=0)]))


def _standardised(values: np.ndarray) -> np.ndarray:
    """Standardised values of the latents that vary."""
    varying = values[:, np.ptp(values, axis=0) > 0]
    return standardise(varying) if varying.size else np.empty((len(values), 0))
