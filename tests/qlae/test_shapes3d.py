"""Shapes3D's loader against small files in the true format."""

import hashlib
import itertools
import os
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch

from qlae.data.base import Factor
from qlae.data.shapes3d import ADDRESS, Release, Shapes3D
from qlae.errors import UserError

SIZES = (2, 2, 1, 2, 2, 3)
FACTORS = tuple(Factor(f"f{position}", size) for position, size in enumerate(SIZES))
LENGTH = 48


def labels() -> np.ndarray:
    """Float labels like the published ones: hues from 0, a scale from 0.75, angles from -30."""
    values = ([0.0, 0.1], [0.0, 0.1], [0.5], [0.75, 1.25], [0.0, 1.0], [-30.0, 0.0, 30.0])
    return np.array(list(itertools.product(*values)))


def write(path: Path, arrays: dict[str, np.ndarray]) -> Release:
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array, chunks=(7, *array.shape[1:]), compression="gzip")
    return Release(hashlib.sha256(path.read_bytes()).hexdigest(), FACTORS)


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (LENGTH, 64, 64, 3), dtype=np.uint8)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "3dshapes.h5"


@pytest.fixture
def release(path: Path, pixels: np.ndarray) -> Release:
    return write(path, {"images": pixels, "labels": labels()})


def test_images_are_those_of_the_file(path: Path, release: Release, pixels: np.ndarray) -> None:
    dataset = Shapes3D(path, release=release)
    index = torch.tensor([5, 47, 0, 5])
    expected = pixels[index.numpy()].transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
    images = dataset.images(index)
    assert (len(dataset), dataset.image_shape) == (LENGTH, (3, 64, 64))
    assert images.dtype == torch.float32
    assert images.is_contiguous()
    assert torch.equal(images, torch.from_numpy(expected))


def test_sources_are_positions_of_the_labels(path: Path, release: Release) -> None:
    dataset = Shapes3D(path, release=release)
    expected = list(itertools.product(*(range(size) for size in SIZES)))
    assert dataset.sources(torch.arange(LENGTH)).tolist() == [list(row) for row in expected]


def test_lower_resolution_averages_blocks(path: Path, release: Release, pixels: np.ndarray) -> None:
    images = Shapes3D(path, 16, release=release).images(torch.tensor([3]))
    expected = pixels[3].reshape(16, 4, 16, 4, 3).mean(axis=(1, 3)).transpose(2, 0, 1) / 255
    # 16 float32 values below 1 are summed
    assert np.allclose(images[0].numpy(), expected, atol=16 * np.finfo(np.float32).eps, rtol=0)


def test_file_is_decoded_and_checked_once(path: Path, release: Release, pixels: np.ndarray) -> None:
    Shapes3D(path, release=release)
    decoded = [file for file in path.parent.iterdir() if file.suffix == ".npy"]
    assert len(decoded) == 1
    changed = pixels.copy()
    changed[0] = 0
    np.save(decoded[0], changed)
    assert Shapes3D(path, release=release).images(torch.tensor([0])).sum() == 0


def test_changed_file_is_checked_again(path: Path, release: Release) -> None:
    Shapes3D(path, release=release)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(0, 0))
    with pytest.raises(UserError, match="sha256"):
        Shapes3D(path, release=release)


@pytest.mark.parametrize("note", ["", "{", '{"size": 1}', "[]"])
def test_damaged_note_of_a_check_is_not_trusted(path: Path, release: Release, note: str) -> None:
    path.with_name("3dshapes.h5.checked").write_text(note)
    with pytest.raises(UserError, match="sha256"):
        Shapes3D(path, release=Release("0" * 64, FACTORS))
    Shapes3D(path, release=release)


def test_nothing_unfinished_is_left_behind(path: Path, release: Release) -> None:
    Shapes3D(path, release=release)
    assert not list(path.parent.glob("*.partial"))


def test_missing_file_says_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        Shapes3D.load(root=tmp_path)
    assert str(tmp_path / "3dshapes.h5") in str(caught.value)
    assert ADDRESS in str(caught.value)


def test_wrong_digest(path: Path, release: Release) -> None:
    with pytest.raises(UserError, match="download it again"):
        Shapes3D(path, release=Release("0" * 64, FACTORS))


def test_small_file_is_not_the_published_set(path: Path, release: Release) -> None:
    with pytest.raises(UserError, match=r"\(48, 64, 64, 3\), wanted uint8 \(480000, 64, 64, 3\)"):
        Shapes3D.load(root=path.parent)


@pytest.mark.parametrize("kept", [0, 100, 20_000])
def test_truncated_file(path: Path, release: Release, kept: int) -> None:
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"3dshapes\.h5 cannot be read as HDF5"):
        Shapes3D(path, release=release)


def test_other_content(path: Path) -> None:
    path.write_text("not HDF5")
    with pytest.raises(UserError, match="cannot be read as HDF5"):
        Shapes3D(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": None}, "no array 'images'"),
        ({"labels": None}, "no array 'labels'"),
        ({"images": np.zeros((LENGTH, 32, 32, 3), np.uint8)}, "'images' is uint8"),
        ({"images": np.zeros((LENGTH, 64, 64, 3), np.int16)}, "'images' is int16"),
        ({"labels": labels()[:, :5]}, "'labels' is float64"),
        ({"labels": labels()[::-1]}, "not in the published order"),
        ({"labels": np.round(labels())}, "'f0' has 1 values, wanted 2"),
    ],
)
def test_wrong_arrays(path: Path, pixels: np.ndarray, change: dict[str, np.ndarray | None], message: str) -> None:
    arrays = {"images": pixels, "labels": labels()} | change
    release = write(path, {name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(UserError, match=message):
        Shapes3D(path, release=release)
    assert not list(path.parent.glob("*.npy"))


def test_no_room_to_decode(path: Path, release: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=LENGTH * 64 * 64 * 3 - 1))
    with pytest.raises(UserError, match="no room"):
        Shapes3D(path, release=release)


def test_other_resolutions_are_refused(path: Path, release: Release) -> None:
    with pytest.raises(UserError, match="16, 32 and 64"):
        Shapes3D(path, 48, release=release)
