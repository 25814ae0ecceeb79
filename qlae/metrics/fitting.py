"""Fitting scikit-learn's models, with one word about all that did not converge."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from scipy import sparse
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning


def fit(model: BaseEstimator, features: sparse.csr_array | np.ndarray, labels: np.ndarray) -> bool:
    """Fits `model` in place and returns whether it converged.

    That a source has many values for its samples is no news either; any other warning passes.
    """
    with collected(ConvergenceWarning) as stopped:
        warnings.filterwarnings("ignore", message="The number of unique classes is greater than 50%")
        model.fit(features, labels)
    return not stopped


@contextmanager
def collected(category: type[Warning]) -> Iterator[list[str]]:
    """A list that holds, after the block, the messages of its warnings of one category; others pass."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", category)
        yield messages
    for entry in caught:
        if issubclass(entry.category, category):
            messages.append(str(entry.message))
        else:
            warnings.warn_explicit(entry.message, entry.category, entry.filename, entry.lineno)


def warn_unless_converged(score: str, converged: Sequence[bool]) -> None:
    """Warns with scikit-learn's ConvergenceWarning if some of the models behind `score` did not converge."""
    stopped = len(converged) - sum(converged)
    if stopped:
        text = f"{score}: {stopped} of {len(converged)} models had not converged at their last iteration"
        warnings.warn(text, ConvergenceWarning, stacklevel=3)
