"""Scores over batches, and over the ranks of a distributed run."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import distributed

from qlae.metrics.samples import array_of

Scores = TypeVar("Scores")


class ScoreAccumulator(Generic[Scores]):
    """Collects latents and sources batch by batch, and scores all of them together.

    The scores are no means over batches, so the samples themselves are kept, on the CPU. With torch.distributed
    initialised, `compute` gathers the samples of all ranks, in the ranks' order, and every rank returns the same
    scores; a sampler that repeats samples to fill up the last batch has them counted twice.

    Example:
        accumulator = ScoreAccumulator(infomec, protocol="tripod")
        for images, sources in loader:
            accumulator.update(model.encode(images), sources)
        scores = accumulator.compute()
        accumulator.reset()
    """

    def __init__(self, score: Callable[..., Scores], **options: Any) -> None:
        """Prepares to call `score(latents, sources, **options)`: any of `qlae.metrics`, `all_scores` among them."""
        self._score = score
        self._options = options
        self._batches: list[tuple[np.ndarray, np.ndarray]] = []

    def update(
        self,
        latents: np.ndarray | torch.Tensor,  # [B, n_z]
        sources: np.ndarray | torch.Tensor,  # [B, n_s]
    ) -> None:
        """Adds a batch, which is copied.

        Raises:
            ValueError: for another number of dimensions or of columns than before, or lengths that differ.
        """
        # A view would change with the buffer that the next batch is written into.
        batch = np.array(array_of(latents, "latents", "n_z")), np.array(array_of(sources, "sources", "n_s"))
        if len(batch[0]) != len(batch[1]):
            raise ValueError(f"latents and sources must have the same length, got {len(batch[0])} and {len(batch[1])}")
        first = self._batches[0] if self._batches else batch
        for name, array, before in zip(("latents", "sources"), batch, first, strict=True):
            if array.shape[1] != before.shape[1]:
                raise ValueError(f"{name} had {before.shape[1]} columns before, got {array.shape[1]}: call reset first")
        self._batches.append(batch)

    def compute(self) -> Scores:
        """Scores of all samples since the last reset. All ranks of a distributed run have to call it.

        Raises:
            ValueError: if there are none, or as the score does.
        """
        batches = _gathered(self._batches)
        if not batches:
            raise ValueError("there is nothing to score: call update before compute")
        latents, sources = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
        return self._score(latents, sources, **self._options)

    def reset(self) -> None:
        """Forgets all samples of this rank."""
        self._batches.clear()


def _gathered(batches: list[tuple[np.ndarray, np.ndarray]]) -> list[tuple[np.ndarray, np.ndarray]]:
    if not (distributed.is_available() and distributed.is_initialized()):
        return batches
    of_rank: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(of_rank, batches)
    return [batch for rank in of_rank for batch in rank]
