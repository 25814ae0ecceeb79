"""How much of each source a linear model reads off the latents, as a share of what there is to read."""

import math

import numpy as np
from scipy import sparse
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.metrics import log_loss, r2_score

from qlae.metrics.fitting import fit
from qlae.metrics.samples import split

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
    converged = fit(regression, features[fitted], labels[fitted])
    predicted = log_loss(labels[scored], regression.predict_proba(features[scored]), labels=np.arange(size))
    null = math.log(size)
    return (null - float(predicted)) / null, converged


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
