"""Falcor3D's and Isaac3D's loaders against small folders in the true format."""

import itertools
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qlae.data.base import Factor
from qlae.data.falcor3d import Falcor3D
from qlae.data.isaac3d import Isaac3D
from qlae.data.labelled_pngs import LabelledPNGs
from qlae.errors import UserError

SIZES = (2, 3, 2)
FACTORS = tuple(Factor(f"f{position}", size) for position, size in enumerate(SIZES))
LENGTH = 12


def labels() -> np.ndarray:
    """Values in [0, 1], evenly spaced, as the published ones."""
    return np.array(list(itertools.product(*(np.linspace(0.0, 1.0, size) for size in SIZES))))


def picture(number: int) -> np.ndarray:
    """Flat, so that resizing keeps its colour."""
    return np.full((128, 128, 3), (number * 20, 255 - number, number), dtype=np.uint8)


@pytest.fixture(params=[Falcor3D, Isaac3D])
def loader(request: pytest.FixtureRequest) -> type[LabelledPNGs]:
    return type("Small", (request.param,), {"factors": FACTORS})


def write(root: Path, loader: type[LabelledPNGs], rows: np.ndarray, numbers: range = range(LENGTH)) -> Path:
    """Labels and pictures; returns the folder of pictures."""
    path = root / loader.files[0].path
    (path.parent / "images").mkdir(parents=True)
    with path.open("wb") as file:
        np.save(file, rows)
    for number in numbers:
        Image.fromarray(picture(number)).save(path.parent / "images" / f"{number:06}.png")
    return path.parent / "images"


def test_images_are_those_of_the_folder(tmp_path: Path, loader: type[LabelledPNGs]) -> None:
    write(tmp_path, loader, labels())
    dataset = loader.load(root=tmp_path)
    images = dataset.images(torch.arange(LENGTH))
    assert images.shape == (LENGTH, 3, 64, 64)
    for number in range(LENGTH):
        expected = torch.tensor([number * 20, 255 - number, number]) / 255
        assert torch.equal(images[number], expected[:, None, None].expand(3, 64, 64))
    assert dataset.sources(torch.tensor([0, 1, 2, 6, 11])).tolist() == [
        [0, 0, 0],
        [0, 0, 1],
        [0, 1, 0],
        [1, 0, 0],
        [1, 2, 1],
    ]


def test_labels_decide_the_order(tmp_path: Path, loader: type[LabelledPNGs]) -> None:
    order = np.random.default_rng(0).permutation(LENGTH)
    write(tmp_path, loader, labels()[order])
    red = loader.load(root=tmp_path).images(torch.arange(LENGTH))[:, 0, 0, 0] * 255
    # picture `number` has the labels of index order[number]
    assert red.round().long().tolist() == (np.argsort(order) * 20).tolist()


def test_few_pictures_are_decoded_at_a_time(tmp_path: Path, loader: type[LabelledPNGs]) -> None:
    large = type("Large", (loader,), {"factors": (Factor("a", 600),)})
    path = tmp_path / loader.files[0].path
    (path.parent / "images").mkdir(parents=True)
    with path.open("wb") as file:
        np.save(file, np.arange(600.0)[:, None])
    Image.fromarray(picture(0)).save(path.parent / "images" / "000000.png")
    for number in range(1, 600):
        os.link(path.parent / "images" / "000000.png", path.parent / "images" / f"{number:06}.png")
    assert [len(block) for block in large.blocks(tmp_path)] == [512, 88]


def test_the_published_sets_are_declared() -> None:
    assert [factor.size for factor in Falcor3D.factors] == [5, 6, 6, 6, 6, 6, 6]
    assert Falcor3D.cache(Path()).shape == (233_280, 3, 64, 64)
    assert Falcor3D.files[0].path == "Falcor3D_down128/train-rec.labels"
    assert [factor.size for factor in Isaac3D.factors] == [3, 8, 5, 4, 4, 4, 6, 4, 4]
    assert Isaac3D.cache(Path()).shape == (737_280, 3, 64, 64)
    assert Isaac3D.files[0].path == "Isaac3D_down128/labels.npy"


def test_a_missing_set_is_asked_for(tmp_path: Path, loader: type[LabelledPNGs]) -> None:
    with pytest.raises(UserError, match=r"drive\.google\.com/uc.*unpack it, so that .* is there"):
        loader.load(root=tmp_path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (labels()[:-1], r"it is float64 \(11, 3\), wanted float64 \(12, 3\)"),
        (labels()[:, :2], r"it is float64 \(12, 2\)"),
        (labels().astype(np.float32), "it is float32"),
        (labels()[:, [1, 0, 2]], "'f0' has 3 values, wanted 2"),
        (np.concatenate([labels()[:-1], labels()[:1]]), "do not name every image once"),
        (np.where(labels() == 0.5, np.nan, labels()), "labels that are not numbers"),
    ],
)
def test_wrong_labels(tmp_path: Path, loader: type[LabelledPNGs], rows: np.ndarray, message: str) -> None:
    write(tmp_path, loader, rows)
    with pytest.raises(UserError, match=message):
        loader.load(root=tmp_path)


@pytest.mark.parametrize("content", [b"", b"not an array", b"\x93NUMPY\x01\x00"])
def test_labels_that_are_no_array(tmp_path: Path, loader: type[LabelledPNGs], content: bytes) -> None:
    write(tmp_path, loader, labels())
    (tmp_path / loader.files[0].path).write_bytes(content)
    with pytest.raises(UserError, match="cannot be read as a NumPy file"):
        loader.load(root=tmp_path)


def test_truncated_labels(tmp_path: Path, loader: type[LabelledPNGs]) -> None:
    write(tmp_path, loader, labels())
    path = tmp_path / loader.files[0].path
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="cannot be read as a NumPy file"):
        loader.load(root=tmp_path)


def test_a_missing_picture_is_named(tmp_path: Path, loader: type[LabelledPNGs]) -> None:
    write(tmp_path, loader, labels(), range(LENGTH - 1))
    with pytest.raises(UserError, match=r"000011\.png is missing: unpack the whole archive"):
        loader.load(root=tmp_path)
    assert not list(tmp_path.rglob("*-64.npy"))


@pytest.mark.parametrize("content", ["truncated", "small"])
def test_a_wrong_picture_is_named(tmp_path: Path, loader: type[LabelledPNGs], content: str) -> None:
    path = write(tmp_path, loader, labels()) / "000007.png"
    if content == "small":
        Image.new("RGB", (64, 128)).save(path)
    else:
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)).save(path)
        os.truncate(path, 20_000)
    with pytest.raises(UserError, match=r"000007\.png (is 64 x 128 pixels, wanted 128 x 128|cannot be read)"):
        loader.load(root=tmp_path)


@pytest.mark.parametrize("kept", ["", "labels", "images", "labels and an empty folder"])
def test_pictures_and_labels_may_be_deleted_once_converted(
    tmp_path: Path, loader: type[LabelledPNGs], kept: str
) -> None:
    folder = write(tmp_path, loader, labels())
    before = loader.load(root=tmp_path).images(torch.arange(LENGTH))
    if kept != "images":
        shutil.rmtree(folder)
    if "labels" not in kept:
        (tmp_path / loader.files[0].path).unlink()
    if "empty" in kept:
        folder.mkdir()
    assert torch.equal(loader.load(root=tmp_path).images(torch.arange(LENGTH)), before)
    assert loader.state(tmp_path) == "converted"


def test_missing_pictures_are_asked_for(tmp_path: Path, loader: type[LabelledPNGs]) -> None:
    shutil.rmtree(write(tmp_path, loader, labels()))
    with pytest.raises(UserError, match=r"images is missing: open https://drive\.google.* and unpack it, so that"):
        loader.load(root=tmp_path)
    assert loader.state(tmp_path) == "1 of 2 files missing"


def test_pictures_that_came_or_went_are_noticed(tmp_path: Path, loader: type[LabelledPNGs]) -> None:
    folder = write(tmp_path, loader, labels())
    loader.load(root=tmp_path)
    (folder / "000000.png").unlink()
    with pytest.raises(UserError, match=r"000000\.png is missing"):
        loader.load(root=tmp_path)
