"""Random batches of 64 x 64 images from a memory-mapped set that lies in the page cache; and the conversion."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from qlae.data.base import Factor
from qlae.data.converted import ConvertedDataset
from qlae.data.files import SourceFile

BLOCKS, BLOCK_IMAGES = 20, 2_000
LENGTH = BLOCKS * BLOCK_IMAGES


class Noise(ConvertedDataset):
    """40,000 images of noise, 492 MB converted."""

    name = "noise"
    title = "noise"
    summary = "for benchmarks"
    factors = (Factor("image", LENGTH),)
    files = (SourceFile("noise", "https://example.org"),)

    @classmethod
    def check(cls, root: Path) -> None:
        pass

    @classmethod
    def blocks(cls, root: Path) -> Iterator[np.ndarray]:
        generator = np.random.default_rng(0)
        for _ in range(BLOCKS):
            yield generator.integers(0, 256, (BLOCK_IMAGES, 3, 64, 64), dtype=np.uint8)


class Grey(Noise):
    """The same as one channel, 164 MB converted."""

    name = "grey"
    channels = 1

    @classmethod
    def blocks(cls, root: Path) -> Iterator[np.ndarray]:
        for block in super().blocks(root):
            yield block[:, :1]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "noise").touch()
    return folder


def random_batches(size: int) -> list[Tensor]:
    return torch.randperm(LENGTH, generator=torch.Generator().manual_seed(0)).split(size)[:-1]


def assert_images_are_right(dataset: ConvertedDataset, root: Path, index: Tensor) -> None:
    stored = np.load(root / "cache" / f"{dataset.name}-64.npy", mmap_mode="r")[index.numpy()]
    expected = stored.astype(np.float32) / np.float32(255)
    np.testing.assert_array_equal(dataset.images(index).numpy(), np.broadcast_to(expected, (len(index), 3, 64, 64)))


@pytest.mark.parametrize("size", [64, 128, 500])
@pytest.mark.parametrize("kind", [Noise, Grey])
def test_batches(benchmark: BenchmarkFixture, root: Path, kind: type[ConvertedDataset], size: int) -> None:
    benchmark.group = f"a batch of {size} x 3 x 64 x 64, float32"
    dataset = kind.load(root=root)
    batches = random_batches(size)
    # every page is mapped before the clock starts, as after the first pass over a set
    for index in batches:
        dataset.images(index)
    assert_images_are_right(dataset, root, batches[0])
    turn = iter(batches * 1000)
    benchmark(lambda: dataset.images(next(turn)))
    benchmark.extra_info["images_per_second"] = round(size / benchmark.stats.stats.median)


@pytest.mark.benchmark(group=f"conversion of {LENGTH:,} images, making them included")
def test_conversion(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    (tmp_path / "noise").touch()

    def convert() -> None:
        Noise.cache(tmp_path).record_path.unlink(missing_ok=True)
        Noise.load(root=tmp_path)

    benchmark.pedantic(convert, rounds=2)
