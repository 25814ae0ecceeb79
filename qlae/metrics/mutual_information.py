"""Mutual information of each latent with each source, in nats."""

import numpy as np
import torch
from scipy import sparse
from scipy.special import digamma
from sklearn.preprocessing import StandardScaler

from qlae.metrics.samples import check_lengths, codes_of, relabel, sources_of, values_of

# Sums of some ten thousand float64 terms of size one carry errors near 1e-13: less is rounding alone.
_ROUNDING_NATS = 1e-12

# Relative size of the noise that parts equal values, as in scikit-learn's `mutual_info_classif`.
_TIE_NOISE = 1e-10


def binned_labels(latents: np.ndarray | torch.Tensor, *, discrete: bool, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels int64 [N, n_z] and their number [n_z] of codes, or of `bins` equal parts of each continuous range.

    Raises:
        ValueError: for latents that `codes_of` or `values_of` refuse; for `bins` below 2.
    """
    if bins < 2:
        raise ValueError(f"bins must be at least 2, got {bins}")
    if discrete:
        return relabel(codes_of(latents))
    values = values_of(latents)
    binned = np.empty(values.shape, dtype=np.int64)
    for latent, column in enumerate(values.T):
        # The last edge is left out, so that the largest value falls into the last bin.
        binned[:, latent] = np.digitize(column, np.linspace(column.min(), column.max(), bins + 1)[:-1])
    return relabel(binned)


def binned_information(
    latents: np.ndarray | torch.Tensor,  # [N, n_z]
    sources: np.ndarray | torch.Tensor,  # [N, n_s]
    *,
    discrete: bool,
    bins: int,
    score: str,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # [n_s, n_z], [N, n_s], [n_s]
    """Plug-in I(source; latent) in nats, continuous latents cut into bins; the sources' labels and their numbers.

    Args:
        score: named in errors.

    Raises:
        ValueError: as `binned_labels`; for sources that are not whole numbers, and for other lengths.
    """
    labels, sizes = binned_labels(latents, discrete=discrete, bins=bins)
    source_labels, source_sizes = relabel(sources_of(sources))
    check_lengths(labels, source_labels, score=score)
    return discrete_information(labels, sizes, source_labels, source_sizes), source_labels, source_sizes


def one_hot(labels: np.ndarray, sizes: np.ndarray) -> sparse.csr_array:
    """One-hot codes of all columns side by side, float64 [N, sum of sizes]."""
    samples, columns = labels.shape
    positions = labels + (np.cumsum(sizes) - sizes)
    row_starts = columns * np.arange(samples + 1)
    entries = (np.ones(positions.size), positions.ravel(), row_starts)
    return sparse.csr_array(entries, shape=(samples, int(sizes.sum())))


def standardise(values: np.ndarray) -> np.ndarray:
    """Columns float64 [N, n] with mean 0 and standard deviation 1; a constant column becomes 0."""
    # Squares of very large or very small values would leave the range of float64.
    largest = np.abs(values).max(axis=0)
    return StandardScaler().fit_transform(values / np.where(largest > 0, largest, 1.0))


def entropies(labels: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Plug-in entropy of each column of labels [N, n], float64 [n]."""
    return np.array([_entropy(column, size) for column, size in zip(labels.T, sizes, strict=True)])


def discrete_information(
    latent_labels: np.ndarray, latent_sizes: np.ndarray, source_labels: np.ndarray, source_sizes: np.ndarray
) -> np.ndarray:
    """Plug-in I(source; latent) of labels [N, n_z] and [N, n_s], float64 [n_s, n_z]."""
    samples = len(latent_labels)
    latents = one_hot(latent_labels, latent_sizes)
    sources = one_hot(source_labels, source_sizes)
    # One product gives the contingency tables of all pairs, as blocks.
    joint = (sources.T @ latents).tocoo()
    row, column = joint.row, joint.col
    independent = sources.sum(axis=0)[row] * latents.sum(axis=0)[column] / samples
    terms = (joint.data / samples) * np.log(joint.data / independent)
    source_of_row = np.repeat(np.arange(len(source_sizes)), source_sizes)
    latent_of_column = np.repeat(np.arange(len(latent_sizes)), latent_sizes)
    pair = source_of_row[row] * len(latent_sizes) + latent_of_column[column]
    information = np.bincount(pair, weights=terms, minlength=len(source_sizes) * len(latent_sizes))
    information = information.reshape(len(source_sizes), len(latent_sizes))
    information[information < _ROUNDING_NATS] = 0.0
    return information


def continuous_information(
    latents: np.ndarray, source_labels: np.ndarray, source_sizes: np.ndarray, *, neighbors: int, seed: int
) -> np.ndarray:
    """I(source; latent) of continuous latents [N, n_z] and source labels [N, n_s], float64 [n_s, n_z].

    The estimator of Ross, "Mutual Information between Discrete and Continuous Data Sets" (PLoS ONE 2014), on
    standardised latents: psi(N) + mean psi(k) - mean psi(size of the sample's class) - mean psi(m), where m
    counts the samples nearer than the k-th neighbour of the sample's own class, itself included. As in
    scikit-learn's `mutual_info_classif`, k falls to one less than the class where that is small, samples that
    are alone in their class are left out, equal values are parted by noise of 1e-10, and estimates below 0
    become 0. A constant latent, or sources that are all alone in their class, give 0.
    """
    values = standardise(latents)
    noise = np.random.default_rng(seed).standard_normal(values.shape)
    values += _TIE_NOISE * np.maximum(1.0, np.abs(values).mean(axis=0)) * noise
    information = np.zeros((source_labels.shape[1], latents.shape[1]))
    for latent in np.flatnonzero(np.ptp(latents, axis=0) > 0):
        order = np.argsort(values[:, latent])
        ascending = values[order, latent]
        for source in np.flatnonzero(source_sizes > 1):
            information[source, latent] = _neighbor_information(ascending, source_labels[order, source], neighbors)
    return information


def normalised(information: np.ndarray, source_labels: np.ndarray, source_sizes: np.ndarray) -> np.ndarray:
    """I(source; latent) [n_s, n_z] divided by H(source); 0 for a constant source."""
    entropy = entropies(source_labels, source_sizes)[:, None]
    # Where the entropy is 0 the information is 0 too.
    return information / np.where(source_sizes[:, None] > 1, entropy, 1.0)


def _entropy(labels: np.ndarray, size: int) -> float:
    frequencies = np.bincount(labels, minlength=size) / len(labels)
    return float(-(frequencies * np.log(frequencies)).sum())


def _neighbor_information(ascending: np.ndarray, labels: np.ndarray, neighbors: int) -> float:
    """Ross's estimate from one latent's distinct values in ascending order, and the labels in that order."""
    by_class = np.argsort(labels, kind="stable")
    sizes = np.bincount(labels)
    ranks = np.split(by_class, np.cumsum(sizes)[:-1])
    kept = [rank for rank in ranks if len(rank) > 1]
    if not kept:
        return 0.0
    # Only classes that are kept are among the neighbours.
    population = ascending[np.sort(np.concatenate(kept))] if len(kept) < len(ranks) else ascending
    centres = [ascending[rank] for rank in kept]
    radii = [_neighbor_distances(centre, min(neighbors, len(centre) - 1)) for centre in centres]
    within = _count_nearer(population, np.concatenate(centres), np.concatenate(radii))
    class_sizes = np.array([len(rank) for rank in kept])
    shares = class_sizes / len(population)
    information = (
        digamma(len(population))
        + shares @ digamma(np.minimum(neighbors, class_sizes - 1))
        - shares @ digamma(class_sizes)
        - digamma(within).mean()
    )
    return max(0.0, float(information))


def _neighbor_distances(ascending: np.ndarray, neighbors: int) -> np.ndarray:
    """Distance of each value to its k-th nearest other one: the least over the windows of k + 1 that hold it."""
    windows = len(ascending) - neighbors
    first, last = ascending[:windows], ascending[neighbors:]
    distances = np.full(len(ascending), np.inf)
    for offset in range(neighbors + 1):
        inside = slice(offset, offset + windows)
        reach = np.maximum(ascending[inside] - first, last - ascending[inside])
        distances[inside] = np.minimum(distances[inside], reach)
    return distances


def _count_nearer(ascending: np.ndarray, centres: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """How many of the values lie nearer to each centre than its radius, at least 1."""
    low = np.searchsorted(ascending, centres - radii, side="left")
    high = np.searchsorted(ascending, centres + radii, side="right")
    # The sums are rounded: decide about the outermost values by their distances.
    low += centres - ascending[low] >= radii
    low -= (low > 0) & (centres - ascending[low - 1] < radii)
    high -= ascending[high - 1] - centres >= radii
    next_value = ascending[np.minimum(high, len(ascending) - 1)]
    high += (high < len(ascending)) & (next_value - centres < radii)
    return np.maximum(high - low, 1)
