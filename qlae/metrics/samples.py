"""What every score takes: latents and sources of the same samples, checked and brought into one form."""

import numpy as np
import torch

# Floats beyond it are refused: squares of sums stay far inside float64 below it.
LARGEST = 1e30


class TooFewSamplesError(ValueError):
    """The samples allow other scores, but not this one."""


def array_of(values: np.ndarray | torch.Tensor, name: str, columns: str) -> np.ndarray:
    """A NumPy array of the values, which may share their memory.

    Raises:
        ValueError: unless they have two dimensions and a column; the message calls them `name` [N, `columns`].
    """
    if isinstance(values, torch.Tensor):
        # NumPy has no bfloat16, and float32 holds every bfloat16 exactly.
        values = values.detach().cpu()
        array = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    else:
        array = np.asarray(values)
    if array.ndim != 2 or array.shape[1] == 0:
        raise ValueError(f"{name} must have shape [N, {columns}] with {columns} >= 1, got {list(array.shape)}")
    return array


def codes_of(latents: np.ndarray | torch.Tensor) -> np.ndarray:
    """Discrete latents as an integer array [N, n_z].

    Raises:
        ValueError: for another shape, or values that are not integers.
    """
    array = array_of(latents, "latents", "n_z")
    if array.dtype.kind not in "iub":
        raise ValueError(
            f"latents must be integer codes when discrete=True, got {array.dtype}: pass the quantizer's indices"
        )
    return array


def numbers_of(latents: np.ndarray | torch.Tensor) -> np.ndarray:
    """Latents as an array [N, n_z] of real numbers, in the type they came in.

    Raises:
        ValueError: for another shape, values that are not real numbers, NaN or infinity among them, or floats beyond
            1e30.
    """
    array = array_of(latents, "latents", "n_z")
    if array.dtype.kind not in "iubf":
        raise ValueError(f"latents must be real numbers, got {array.dtype}")
    if array.dtype.kind != "f":
        return array
    finite = np.isfinite(array).all(axis=0)
    if not finite.all():
        raise ValueError(f"latents must be finite, got NaN or infinity in column {int(np.argmin(finite))}")
    largest = np.abs(array.astype(np.float64)).max(axis=0, initial=0.0)
    if (largest > LARGEST).any():
        raise ValueError(
            f"latents must lie within {LARGEST:g} of 0, got {largest.max():g} in column {int(np.argmax(largest))}: "
            "rescale them"
        )
    return array


def values_of(latents: np.ndarray | torch.Tensor) -> np.ndarray:
    """Latents as float64 [N, n_z], each column less its least value: no score depends on a latent's place.

    Integers are subtracted before they become floats, which tell large neighbours apart no more.

    Raises:
        ValueError: as `numbers_of`.
    """
    return from_least(numbers_of(latents))


def from_least(array: np.ndarray) -> np.ndarray:
    """Each column of numbers [N, n] less its least value, float64."""
    if array.size == 0 or array.dtype.kind == "f":
        array = array.astype(np.float64)
        return array - array.min(axis=0, initial=np.inf)
    # Integers modulo 2**64, in which no difference overflows.
    return (array.astype(np.uint64) - array.min(axis=0).astype(np.uint64)).astype(np.float64)


def sources_of(sources: np.ndarray | torch.Tensor) -> np.ndarray:
    """Sources as an array [N, n_s] of whole numbers.

    Raises:
        ValueError: for another shape, or values that are not whole numbers.
    """
    array = array_of(sources, "sources", "n_s")
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


def check_lengths(latents: np.ndarray, sources: np.ndarray, *, score: str, minimum: int = 2) -> None:
    """Raises ValueError unless both have the same number of samples, at least `minimum`."""
    if len(latents) != len(sources):
        raise ValueError(f"latents and sources must have the same length, got {len(latents)} and {len(sources)} rows")
    if len(latents) < minimum:
        raise ValueError(f"{score} needs at least {minimum} samples, got {len(latents)}")


def relabel(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers each column's distinct values from 0, in ascending order: labels int64 [N, n] and their number [n]."""
    labels = np.empty(codes.shape, dtype=np.int64)
    sizes = np.empty(codes.shape[1], dtype=np.int64)
    for column in range(codes.shape[1]):
        labels[:, column], sizes[column] = _relabel_column(codes[:, column])
    return labels, sizes


def _relabel_column(codes: np.ndarray) -> tuple[np.ndarray, int]:
    low, high = int(codes.min()), int(codes.max())
    if codes.dtype.kind in "iub" and high - low < 2 * len(codes) and high < 2**63:
        # A table of the values that occur is several times faster than sorting all.
        shifted = codes.astype(np.int64) - low
        occurs = np.bincount(shifted) > 0
        return (np.cumsum(occurs) - 1)[shifted], int(occurs.sum())
    values, labels = np.unique(codes, return_inverse=True)
    return labels, len(values)


def split(labels: np.ndarray, held_out: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions to fit and positions to score, both of all samples where `held_out` is 0.

    Each class gives floor(held_out * its size) random samples to score, so that none is missing from the fit.

    Raises:
        TooFewSamplesError: if fewer than two samples are left to score.
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
        raise TooFewSamplesError(
            f"held_out={held_out:g} of {len(labels)} samples in {len(counts)} classes leaves {to_score.sum()} "
            "to score, at least 2 are needed: give more samples or a larger share"
        )
    return np.sort(order[~to_score]), np.sort(order[to_score])
