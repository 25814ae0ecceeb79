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

# Sums of some ten thousand float64 terms of size one carry errors near 1e-13: less is rounding alone.
_ROUNDING_NATS = 1e-12

_REGRESSION_ITERATIONS = 100


@dataclass(frozen=True)
class InfoMEC:
    """Scores of `n_z` latents against `n_s` sources.

    Attributes:
        infom: modularity; 1 when every active latent informs about one source only.
        infoc: compactness; 1 when every source is told by one active latent only.
        infoe: explicitness; 1 when a linear classifier reads every source off the latents without error.
            In-sample, so latents without information score slightly above 0.
        nmi: float64 [n_s, n_z], I(source; latent) / H(source), in [0, 1].
        active: bool [n_z], latents that take more than one value. The scores use these alone.
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


def infomec(latents: np.ndarray | torch.Tensor, sources: np.ndarray | torch.Tensor, discrete: bool = True) -> InfoMEC:
    """Scores how modular, compact and explicit latents are about the sources that made the data.

    With NMI[i, j] = I(source i; latent j) / H(source i) over the active latents and the varying sources:

    - InfoM = mean over latents of (max / sum of NMI over sources - 1/n_s) / (1 - 1/n_s)
    - InfoC = mean over sources of (max / sum of NMI over latents - 1/n_a) / (1 - 1/n_a), n_a active latents
    - InfoE = mean over sources of (H_null - H_pred) / H_null, where H_pred is the log loss of an unpenalised
      multinomial logistic regression from the one-hot codes (balanced classes, lbfgs, 100 iterations) and
      H_null that of the same regression from zeros, which is the log of the number of classes.

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
            quantized values.
        sources: integers [N, n_s], of any values. Floats are taken where all are whole numbers.
        discrete: True for codes. Continuous latents are not there yet.

    Raises:
        ValueError: for arrays that are not two-dimensional, without columns, of different lengths or with
            fewer than two samples; for codes or sources that are not integers; for `discrete=False`.
    """
    if not discrete:
        raise ValueError("infomec scores discrete latents only so far: pass integer codes [N, n_z] with discrete=True")
    latent_codes = _latent_codes(latents)
    source_codes = _source_codes(sources)
    if len(latent_codes) != len(source_codes):
        raise ValueError(
            f"latents and sources must have the same length, got {len(latent_codes)} and {len(source_codes)} rows"
        )
    if len(latent_codes) < 2:
        raise ValueError(f"infomec needs at least 2 samples, got {len(latent_codes)}")

    latent_labels, latent_sizes = _relabel(latent_codes)
    source_labels, source_sizes = _relabel(source_codes)
    active = latent_sizes > 1
    varying = source_sizes > 1
    nmi = _discrete_nmi(latent_labels, latent_sizes, source_labels, source_sizes)
    scored = nmi[varying][:, active]
    features = _one_hot(latent_labels[:, active], latent_sizes[active])
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


def _latent_codes(latents: np.ndarray | torch.Tensor) -> np.ndarray:
    array = _two_dimensional(latents, "latents", "n_z")
    if array.dtype.kind not in "iub":
        raise ValueError(
            f"latents must be integer codes when discrete=True, got {array.dtype}: pass the quantizer's indices"
        )
    return array


def _source_codes(sources: np.ndarray | torch.Tensor) -> np.ndarray:
    array = _two_dimensional(sources, "sources", "n_s")
    if array.dtype.kind in "iub":
        return array
    if array.dtype.kind != "f":
        raise ValueError(f"sources must be integers, got {array.dtype}: number each factor's values from 0")
    if not np.isfinite(array).all() or (array != np.rint(array)).any():
        raise ValueError(
            f"sources must be whole numbers, got {array.dtype} with others among them: "
            "number each factor's values from 0"
        )
    return array


def _two_dimensional(values: np.ndarray | torch.Tensor, name: str, columns: str) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        # NumPy has no bfloat16, and float32 holds every bfloat16 exactly.
        values = values.detach().cpu()
        array = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    else:
        array = np.asarray(values)
    if array.ndim != 2 or array.shape[1] == 0:
        raise ValueError(f"{name} must have shape [N, {columns}] with {columns} >= 1, got {list(array.shape)}")
    return array


def _relabel(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers each column's distinct values from 0: labels int64 [N, n] and their number int64 [n]."""
    labels = np.empty(codes.shape, dtype=np.int64)
    sizes = np.empty(codes.shape[1], dtype=np.int64)
    for column in range(codes.shape[1]):
        values, labels[:, column] = np.unique(codes[:, column], return_inverse=True)
        sizes[column] = len(values)
    return labels, sizes


def _one_hot(labels: np.ndarray, sizes: np.ndarray) -> sparse.csr_array:
    """One-hot codes of all columns side by side, float64 [N, sum of sizes]."""
    samples, columns = labels.shape
    positions = labels + (np.cumsum(sizes) - sizes)
    row_starts = columns * np.arange(samples + 1)
    entries = (np.ones(positions.size), positions.ravel(), row_starts)
    return sparse.csr_array(entries, shape=(samples, int(sizes.sum())))


def _discrete_nmi(
    latent_labels: np.ndarray, latent_sizes: np.ndarray, source_labels: np.ndarray, source_sizes: np.ndarray
) -> np.ndarray:
    """Plug-in I(source; latent) / H(source), float64 [n_s, n_z]; 0 for a constant source."""
    samples = len(latent_labels)
    latents = _one_hot(latent_labels, latent_sizes)
    sources = _one_hot(source_labels, source_sizes)
    # One product gives the contingency tables of all pairs, as blocks.
    joint = (sources.T @ latents).tocoo()
    row, column = joint.row, joint.col
    source_counts = sources.sum(axis=0)
    latent_counts = latents.sum(axis=0)
    independent = source_counts[row] * latent_counts[column] / samples
    terms = (joint.data / samples) * np.log(joint.data / independent)
    source_of_row = np.repeat(np.arange(len(source_sizes)), source_sizes)
    latent_of_column = np.repeat(np.arange(len(latent_sizes)), latent_sizes)
    pair = source_of_row[row] * len(latent_sizes) + latent_of_column[column]
    information = np.bincount(pair, weights=terms, minlength=len(source_sizes) * len(latent_sizes))
    information = information.reshape(len(source_sizes), len(latent_sizes))
    information[information < _ROUNDING_NATS] = 0.0

    frequencies = source_counts / samples
    entropy = np.bincount(source_of_row, weights=-frequencies * np.log(frequencies))[:, None]
    # Where the entropy is 0 the information is 0 too.
    return np.minimum(information / np.where(source_sizes[:, None] > 1, entropy, 1.0), 1.0)


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
    features: sparse.csr_array, source_labels: np.ndarray, source_sizes: np.ndarray
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


def _regression_log_loss(features: sparse.csr_array, labels: np.ndarray) -> tuple[float, bool]:
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
