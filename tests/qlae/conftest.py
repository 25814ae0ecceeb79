"""A data set of 64 tiny images with three factors, and a configuration that trains on it in a moment."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qlae.config import TrainConfig
from qlae.data import DATASETS, Dataset, Factor
from qlae.data.base import factors_of_index


class TinyDataset(Dataset):
    """Three factors with four values each: the brightness of the three colour channels of 4 x 4 pixels."""

    name = "tiny"
    summary = "for tests"
    factors = (Factor("red", 4), Factor("green", 4), Factor("blue", 4))

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.image_shape = (3, 4, 4)

    @classmethod
    def load(
        cls,
        *,
        resolution: int | None = None,
        root: Path | None = None,
        device: torch.device | str = "cpu",
    ) -> "TinyDataset":
        return cls(device)

    def __len__(self) -> int:
        return 64

    def images(self, index: Tensor) -> Tensor:
        brightness = self.sources(index).float() / 3.0
        return brightness[:, :, None, None].expand(-1, *self.image_shape).contiguous()

    def sources(self, index: Tensor) -> Tensor:
        return factors_of_index(index.to(self.device), self.factors)

    def describe(self) -> str:
        return "tiny: 64 images of 4 x 4 pixels"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> TinyDataset:
    """The data set, known by the name `tiny` for the length of a test."""
    monkeypatch.setitem(DATASETS, "tiny", TinyDataset)
    return TinyDataset("cpu")


@pytest.fixture
def tiny_config(tiny: TinyDataset) -> TrainConfig:
    return TrainConfig(
        data="tiny",
        steps=20,
        evaluation_every=8,
        batch_size=24,
        learning_rate=1e-3,
        schedule="constant",
        device="cpu",
    )
