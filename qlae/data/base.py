"""What every data set offers: images in [0, 1] by index and, where known, the factors behind them."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factor:
    """One source of variation with `size` values, numbered from 0."""

    name: str
    size: int


class Dataset(ABC):
    """A finite set of RGB images, addressed by int64 indices from 0 to `len(dataset) - 1`.

    Attributes:
        name: what a person types to get it.
        summary: one line about the set as such; `describe()` speaks of this instance.
        image_shape: (3, height, width).
        factors: the known sources in stored order, the last one varying fastest; empty if none are known.
        resolutions: heights and widths, in pixels, at which it can be loaded.
        licence: under which the images may be used.
        device: where images and sources are returned.
    """

    name: str
    summary: str
    image_shape: tuple[int, int, int]
    factors: tuple[Factor, ...] = ()
    resolutions: tuple[int, ...] = ()
    licence: str = ""
    device: torch.device

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def images(self, index: Tensor) -> Tensor:
        """Images of `index` (int64 [B]) as float32 [B, 3, H, W] in [0, 1] on `device`."""

    @abstractmethod
    def sources(self, index: Tensor) -> Tensor:
        """Factor positions of `index` (int64 [B]) as int64 [B, n_s] on `device`; n_s = 0 without factors."""

    @classmethod
    def state(cls, root: Path) -> str:
        """Whether the set can be loaded from the data root: built in, converted, downloaded, damaged or missing.

        `downloaded`: the files are there, and are verified and converted at the next use as far as they have to be.
        """
        return "built in"

    def fingerprint(self) -> str:
        """What tells these images from others: a run is scored and continued on the images it was trained with."""
        return f"{self.name}, {len(self)} images"

    @abstractmethod
    def describe(self) -> str:
        """One line for a person: what the set is, how many images it has, and their size."""


def factors_of_index(index: Tensor, factors: tuple[Factor, ...]) -> Tensor:
    """Row-major factor positions, int64 [B, n_s], of int64 `index` [B]; the last factor varies fastest."""
    columns = []
    for factor in reversed(factors):
        columns.append(index % factor.size)
        index = index // factor.size
    return torch.stack(columns[::-1], dim=1)


def index_of_factors(sources: Tensor, factors: tuple[Factor, ...]) -> Tensor:
    """The inverse of `factors_of_index`: int64 [B] of int64 `sources` [B, n_s]."""
    sizes = [factor.size for factor in factors]
    strides = [prod(sizes[position + 1 :]) for position in range(len(sizes))]
    return (sources * torch.tensor(strides, device=sources.device)).sum(dim=1)
