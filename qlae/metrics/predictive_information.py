"""How much of each source a linear model reads off the latents, as a share of what there is to read."""

import math
import warnings

import numpy as np
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.metrics import log_loss, r2_score

Features = sparse.csr_array | np.ndarray


def classification_information(
    features: Features, labels: np.ndarray, size: int, *, held_out: float, iterations: int, seed: int
) -> tuple[float, bool]:
    """(H_null - H_pred) / H_null of one source, and whether the regression converged.

    H_pred is the log loss in nats of an unpenalised multinomial logistic regression with balanced classes; H_null
    that of the same regression from zeros, which predicts every class evenly.

    Args:
        features: float64 [N, F].
        labels: int64 [N], each of 0..size - 1 at least once.
        size: number of classes, at least 2.
        held_out: share of each class that is scored and not fitted; 0 scores what was fitted.
        iterations: most iterations of lbfgs.
        seed: of the split.
    """
    fitted, scored = split(labels, held_out, seed)
    regression = LogisticRegression(C=np.inf, class_weight="balanced", solver="lbfgs", max_iter=iterations)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        regression.fit(features[fitted], labels[fitted])
    stopped = [entry for entry in caught if issubclass(entry.category, ConvergenceWarning)]
    for entry in caught:
        if entry not in stopped:
            warnings.warn_explicit(entry.message, entry.category, entry.filename, entry.lineno)
    predicted = log_loss(labels[scored], regression.predict_proba(features[scored]), labels=np.arange(size))
    null = math.log(size)
    return (null - float(predicted)) / null, not stopped


def regression_information(
    features: Features, source: np.ndarray, labels: np.ndarray, *, held_out: float, seed: int
) -> float:
    """R^2 of an unpenalised linear regression of one source's values [N] from features [N, F].

    The split of `held_out` is that of `classification_information`, by the labels.
    """
    fitted, scored = split(labels, held_out, seed)
    dense = features.toarray() if sparse.issparse(features) else features
    regression = LinearRegression().fit(dense[fitted], source[fitted])
    return float(r2_score(source[scored], regression.predict(dense[scored])))


def split(labels: np.ndarray, held_out: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions to fit and positions to score, both of all samples where `held_out` is 0.

    Each class gives floor(held_out * its size) random samples to score, so that none is missing from the fit.

    Raises:
        ValueError: if fewer than two samples are left to score.
    """
    if held_out == 0:
        everything = np.arange(len(labels))
        return everything, everything
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    counts = np.bincount(labels)
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    to_score = rank < np.floor(held_out * counts).repeat(counts)
    if to_score.sum() < 2:
        raise ValueError(
            f"held_out={held_out:g} of {len(labels)} samples in {len(counts)} classes leaves {to_score.sum()} "
            "to score, at least 2 are needed: give more samples or a larger share"
        )
    return np.sort(order[~to_score]), np.sort(order[to_score])
