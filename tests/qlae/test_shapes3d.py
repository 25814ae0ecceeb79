"""Shapes3D's loader against small files in the true format."""

import hashlib
import itertools
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch

from qlae.data.base import Factor
from qlae.data.shapes3d import Shapes3D
from qlae.errors import UserError

SIZES = (2, 2, 1, 2, 2, 3)
FACTORS = tuple(Factor(f"f{position}", size) for position, size in enumerate(SIZES))
LENGTH = 48
ADDRESS = "https://storage.googleapis.com/3d-shapes/3dshapes.h5"


def labels() -> np.ndarray:
    """Float labels like the published ones: hues from 0, a scale from 0.75, angles from -30."""
    values = ([0.0, 0.1], [0.0, 0.1], [0.5], [0.75, 1.25], [0.0, 1.0], [-30.0, 0.0, 30.0])
    return np.array(list(itertools.product(*values)))


def small(digest: str) -> type[Shapes3D]:
    """The loader of a file of 48 images with that sha256."""
    file = replace(Shapes3D.files[0], digest=f"sha256:{digest}")
    return type("Small", (Shapes3D,), {"factors": FACTORS, "files": (file,)})


def write(path: Path, arrays: dict[str, np.ndarray]) -> type[Shapes3D]:
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array, chunks=(7, *array.shape[1:]), compression="gzip")
    return small(hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (LENGTH, 64, 64, 3), dtype=np.uint8)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "3dshapes.h5"


@pytest.fixture
def loader(path: Path, pixels: np.ndarray) -> type[Shapes3D]:
    return write(path, {"images": pixels, "labels": labels()})


def test_images_are_those_of_the_file(tmp_path: Path, loader: type[Shapes3D], pixels: np.ndarray) -> None:
    dataset = loader.load(root=tmp_path)
    index = torch.tensor([5, 47, 0, 5])
    expected = pixels[index.numpy()].transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
    images = dataset.images(index)
    assert (len(dataset), dataset.image_shape) == (LENGTH, (3, 64, 64))
    assert images.dtype == torch.float32
    assert images.is_contiguous()
    assert torch.equal(images, torch.from_numpy(expected))


def test_sources_are_positions_of_the_labels(tmp_path: Path, loader: type[Shapes3D]) -> None:
    expected = list(itertools.product(*(range(size) for size in SIZES)))
    sources = loader.load(root=tmp_path).sources(torch.arange(LENGTH))
    assert sources.tolist() == [list(row) for row in expected]


def test_lower_resolution_averages_blocks(tmp_path: Path, loader: type[Shapes3D], pixels: np.ndarray) -> None:
    images = loader.load(root=tmp_path, resolution=16).images(torch.tensor([3]))
    expected = pixels[3].reshape(16, 4, 16, 4, 3).mean(axis=(1, 3)).transpose(2, 0, 1) / 255
    # 16 float32 values below 1 are summed
    assert np.allclose(images[0].numpy(), expected, atol=16 * np.finfo(np.float32).eps, rtol=0)


def test_the_published_set_is_declared() -> None:
    assert [factor.size for factor in Shapes3D.factors] == [10, 10, 10, 8, 4, 15]
    digest = "0a0f6ed98baff276a50f3a081a7434d788da63cb135a98189b2a5b5769be1785"
    assert (Shapes3D.files[0].path, Shapes3D.files[0].digest) == ("3dshapes.h5", f"sha256:{digest}")


def test_changed_file_is_checked_again(tmp_path: Path, path: Path, loader: type[Shapes3D]) -> None:
    loader.load(root=tmp_path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(0, 0))
    with pytest.raises(UserError, match="sha256"):
        loader.load(root=tmp_path)


@pytest.mark.parametrize("note", ["", "{", '{"size": 1}', "[]"])
def test_damaged_note_of_a_check_is_not_trusted(tmp_path: Path, path: Path, loader: type[Shapes3D], note: str) -> None:
    path.with_name("3dshapes.h5.checked").write_text(note)
    with pytest.raises(UserError, match="sha256"):
        small("0" * 64).load(root=tmp_path)
    loader.load(root=tmp_path)


def test_missing_file_says_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        Shapes3D.load(root=tmp_path)
    assert str(tmp_path / "3dshapes.h5") in str(caught.value)
    assert ADDRESS in str(caught.value)


def test_wrong_digest(tmp_path: Path, loader: type[Shapes3D]) -> None:
    with pytest.raises(UserError, match="delete it and run `qlae data prepare NAME`"):
        small("0" * 64).load(root=tmp_path)


def test_small_file_is_not_the_published_set(tmp_path: Path, loader: type[Shapes3D]) -> None:
    with pytest.raises(UserError, match=r"\(48, 64, 64, 3\), wanted uint8 \(480000, 64, 64, 3\)"):
        Shapes3D.load(root=tmp_path)


@pytest.mark.parametrize("kept", [0, 100, 20_000])
def test_truncated_file(tmp_path: Path, path: Path, loader: type[Shapes3D], kept: int) -> None:
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"3dshapes\.h5 cannot be read as HDF5"):
        loader.load(root=tmp_path)


def test_other_content(tmp_path: Path, path: Path) -> None:
    path.write_text("not HDF5")
    with pytest.raises(UserError, match="cannot be read as HDF5"):
        Shapes3D.load(root=tmp_path)


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
        ({"labels": np.concatenate([labels()[:-1], labels()[:1]])}, "do not name every image once"),
    ],
)
def test_wrong_arrays(
    tmp_path: Path, path: Path, pixels: np.ndarray, change: dict[str, np.ndarray | None], message: str
) -> None:
    arrays = {"images": pixels, "labels": labels()} | change
    loader = write(path, {name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(UserError, match=message):
        loader.load(root=tmp_path)
    assert not list(tmp_path.rglob("*.npy")) + list(tmp_path.rglob("*.partial"))


def test_no_room_to_convert(tmp_path: Path, loader: type[Shapes3D], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=LENGTH * 64 * 64 * 3 - 1))
    with pytest.raises(UserError, match="no room"):
        loader.load(root=tmp_path)


def test_other_resolutions_are_refused(tmp_path: Path, loader: type[Shapes3D]) -> None:
    with pytest.raises(UserError, match="16, 32 and 64"):
        loader.load(root=tmp_path, resolution=48)
