"""Groups of samples that share the value of one source, drawn from given pairs of latents and sources."""

import numpy as np

from qlae.metrics.samples import TooFewSamplesError


class FixedFactorSampler:
    """Draws samples that agree in one source and are random in the others.

    The scores of FactorVAE and beta-VAE ask a generator for such samples. Here they are drawn with replacement from
    those given, which is the same as far as every value of a source has many samples and the sources are
    independent in the data. Samples whose value nobody shares are not drawn for that source.
    """

    def __init__(self, labels: np.ndarray, generator: np.random.Generator) -> None:
        """Prepares the groups of source labels int64 [N, n_s], numbered from 0.

        Raises:
            TooFewSamplesError: if all samples differ in one of the sources.
        """
        self._generator = generator
        self._orders = [np.argsort(column, kind="stable") for column in labels.T]
        self._counts = [np.bincount(column) for column in labels.T]
        self._labels = labels
        self._shared = [
            np.flatnonzero(counts[column] > 1) for counts, column in zip(self._counts, labels.T, strict=True)
        ]
        for source, shared in enumerate(self._shared):
            if len(shared) == 0:
                raise TooFewSamplesError(f"no two samples share a value of varying source {source}: give more samples")

    def sources(self, count: int) -> np.ndarray:
        """Random sources, int64 [count]."""
        return self._generator.integers(len(self._orders), size=count)

    def groups(self, source: int, count: int, size: int) -> np.ndarray:
        """`count` groups of `size` samples with one value of `source` each, positions int64 [count, size].

        A group's value is that of a random sample.
        """
        anchors = self._anchors(source, (count, 1))
        return self._mates(source, np.broadcast_to(anchors, (count, size)))

    def pairs(self, source: int, count: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """`count` times `size` pairs of samples with one value of `source` a pair, positions int64 [count, size]."""
        first = self._anchors(source, (count, size))
        return first, self._mates(source, first)

    def _anchors(self, source: int, shape: tuple[int, int]) -> np.ndarray:
        return self._generator.choice(self._shared[source], size=shape)

    def _mates(self, source: int, anchors: np.ndarray) -> np.ndarray:
        counts = self._counts[source]
        values = self._labels[anchors, source]
        starts = np.cumsum(counts) - counts
        within = self._generator.integers(counts[values])
        return self._orders[source][starts[values] + within]
