"""What the downloaded sets have in common."""

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from qlae.data import DATASETS
from qlae.data.base import Factor
from qlae.data.converted import ConvertedDataset, grid_order, resident, resized
from qlae.data.files import SourceFile
from qlae.errors import UserError

LENGTH = 6


class Grey(ConvertedDataset):
    """Six grey images that are a file's bytes."""

    name = "grey"
    title = "Grey"
    summary = "for tests"
    channels = 1
    factors = (Factor("a", 2), Factor("b", 3))
    files = (SourceFile("grey/images.bin", "https://example.org/images.bin"),)

    @classmethod
    def check(cls, root: Path) -> None:
        pass

    @classmethod
    def blocks(cls, root: Path) -> Iterator[np.ndarray]:
        data = np.fromfile(root / cls.files[0].path, np.uint8).reshape(LENGTH, 1, 64, 64)
        yield from (data[:4], data[4:])


@pytest.fixture
def pixels(tmp_path: Path) -> np.ndarray:
    data = np.random.default_rng(0).integers(0, 256, (LENGTH, 1, 64, 64), dtype=np.uint8)
    (tmp_path / "grey").mkdir()
    data.tofile(tmp_path / "grey" / "images.bin")
    return data


@pytest.mark.parametrize("kind", [kind for kind in DATASETS.values() if issubclass(kind, ConvertedDataset)])
def test_every_set_declares_itself(kind: type[ConvertedDataset]) -> None:
    assert kind.title and kind.summary and kind.licence and kind.factors and kind.files
    assert all(file.address.startswith(("https://", "http://")) for file in kind.files)
    for digest in (file.digest for file in kind.files if file.digest):
        algorithm, _, value = digest.partition(":")
        assert len(value) == {"md5": 32, "sha256": 64}[algorithm] and int(value, 16) > 0


def test_grey_becomes_three_equal_channels(tmp_path: Path, pixels: np.ndarray) -> None:
    images = Grey.load(root=tmp_path).images(torch.tensor([5, 0]))
    assert images.shape == (2, 3, 64, 64) and images.dtype == torch.float32 and images.is_contiguous()
    for channel in range(3):
        assert np.array_equal(images[:, channel].numpy(), pixels[[5, 0], 0].astype(np.float32) / np.float32(255))


def test_the_source_may_be_deleted_afterwards(tmp_path: Path, pixels: np.ndarray) -> None:
    before = Grey.load(root=tmp_path).images(torch.arange(LENGTH))
    shutil.rmtree(tmp_path / "grey")
    assert torch.equal(Grey.load(root=tmp_path).images(torch.arange(LENGTH)), before)


def test_a_changed_source_is_converted_again(tmp_path: Path, pixels: np.ndarray) -> None:
    Grey.load(root=tmp_path)
    (255 - pixels).tofile(tmp_path / "grey" / "images.bin")
    image = Grey.load(root=tmp_path).images(torch.tensor([0]))[0, 0]
    assert np.array_equal(image.numpy(), (255 - pixels[0, 0]).astype(np.float32) / np.float32(255))


def test_state_follows_what_is_there(tmp_path: Path, pixels: np.ndarray) -> None:
    assert Grey.state(tmp_path / "elsewhere") == "missing"
    assert Grey.state(tmp_path) == "downloaded"
    Grey.load(root=tmp_path)
    assert Grey.state(tmp_path) == "converted"


def test_state_follows_a_changed_source(tmp_path: Path, pixels: np.ndarray) -> None:
    Grey.load(root=tmp_path)
    (255 - pixels).tofile(tmp_path / "grey" / "images.bin")
    assert Grey.state(tmp_path) == "downloaded"
    Grey.load(root=tmp_path)
    assert Grey.state(tmp_path) == "converted"
    (tmp_path / "grey" / "images.bin").unlink()
    assert Grey.state(tmp_path) == "converted"


def test_state_follows_a_source_that_is_no_longer_the_published_one(tmp_path: Path, pixels: np.ndarray) -> None:
    file = replace(Grey.files[0], digest=f"md5:{hashlib.md5(pixels.tobytes()).hexdigest()}")
    published = type("Published", (Grey,), {"files": (file,)})
    published.load(root=tmp_path)
    assert published.state(tmp_path) == "converted"
    (255 - pixels).tofile(tmp_path / "grey" / "images.bin")
    assert published.state(tmp_path) == "downloaded"
    with pytest.raises(UserError, match="delete it and run `qlae data prepare NAME` with the set's name"):
        published.load(root=tmp_path)


def test_an_index_beyond_the_end_is_an_error(tmp_path: Path, pixels: np.ndarray) -> None:
    with pytest.raises((IndexError, RuntimeError)):
        Grey.load(root=tmp_path).images(torch.tensor([LENGTH]))


def keys_kernel(distance: np.ndarray) -> np.ndarray:
    """Keys 1981 with a = -0.5."""
    x = np.abs(distance)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def resize_matrix(size: int, target: int) -> np.ndarray:
    """Weights [target, size]: the kernel widened by the scale (antialiasing), normalised at the borders."""
    scale = size / target
    centres = (np.arange(target) + 0.5) * scale - 0.5
    weights = keys_kernel((np.arange(size) - centres[:, None]) / scale)
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("size", [96, 128])
def test_resizing_is_bicubic_antialiased_and_clipped(size: int) -> None:
    # black and white noise overshoots, so that clipping shows
    images = np.random.default_rng(0).integers(0, 2, (3, 3, size, size), dtype=np.uint8) * np.uint8(255)
    images[1] = np.random.default_rng(1).integers(0, 256, (3, size, size), dtype=np.uint8)
    images[2, :, : size // 2] = 0
    images[2, :, size // 2 :] = 255
    matrix = resize_matrix(size, 64)
    exact = (matrix @ images.astype(np.float64) @ matrix.T).clip(0, 255)
    result = resized(images)
    assert result.dtype == np.uint8 and result.shape == (3, 3, 64, 64)
    # rounding to integers, and float32 in place of float64 before it
    assert np.abs(result - exact).max() <= 0.5 + 1e-3


def test_images_of_the_right_size_are_kept() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 64, 64), dtype=np.uint8)
    assert np.array_equal(resized(images), images)


FACTORS = (Factor("a", 2), Factor("b", 3))


def test_grid_order_sorts_by_the_labels() -> None:
    labels = np.array([[0.5, 7], [0.1, 9], [0.5, 8], [0.1, 7], [0.5, 9], [0.1, 8]])
    # a = 0.1 first, then b ascending
    assert grid_order(Path("labels"), labels, FACTORS).tolist() == [3, 5, 1, 0, 2, 4]


def test_grid_order_wants_every_combination_once() -> None:
    labels = np.array([[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 1]])
    with pytest.raises(UserError, match="do not name every image once"):
        grid_order(Path("labels"), labels, FACTORS)
    with pytest.raises(UserError, match="'b' has 2 values, wanted 3"):
        grid_order(Path("labels"), labels[:2].repeat(3, axis=0), (Factor("a", 1), Factor("b", 3)))


def test_on_the_cpu_images_stay_mapped() -> None:
    pixels = torch.zeros(4, 1, 64, 64, dtype=torch.uint8)
    assert resident(pixels, torch.device("cpu")) is pixels


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_set_that_fits_is_resident_on_the_gpu(tmp_path: Path, pixels: np.ndarray) -> None:
    dataset = Grey.load(root=tmp_path, device="cuda")
    assert dataset._pixels.is_cuda
    expected = Grey.load(root=tmp_path).images(torch.arange(LENGTH))
    assert torch.equal(dataset.images(torch.arange(LENGTH)).cpu(), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_set_that_does_not_fit_is_gathered_from_the_map(
    tmp_path: Path, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (pixels.nbytes, pixels.nbytes))
    dataset = Grey.load(root=tmp_path, device="cuda")
    assert not dataset._pixels.is_cuda
    images = dataset.images(torch.arange(LENGTH))
    assert images.is_cuda
    assert torch.equal(images.cpu(), Grey.load(root=tmp_path).images(torch.arange(LENGTH)))
