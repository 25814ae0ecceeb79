"""Cars3D's loader against small archives in the true format."""

import hashlib
import io
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat

from qlae.data.base import Factor
from qlae.data.cars3d import Cars3D
from qlae.errors import UserError

ELEVATIONS, AZIMUTHS, CARS = 2, 3, 4
LENGTH = ELEVATIONS * AZIMUTHS * CARS
NAME = "nips2015-analogy-data.tar.gz"


def meshes() -> dict[str, np.ndarray]:
    """Flat pictures by car, uint8 [128, 128, 3, azimuths, elevations]; red is the car, green and blue its pose."""
    cars = {}
    for car in range(CARS):
        image = np.zeros((128, 128, 3, AZIMUTHS, ELEVATIONS), np.uint8)
        image[:, :, 0] = 10 * car
        image[:, :, 1] = 20 * np.arange(AZIMUTHS)[:, None]
        image[:, :, 2] = 30 * np.arange(ELEVATIONS)
        cars[f"car_{car:03}_mesh"] = image
    return cars


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def write(root: Path, images: dict[str, np.ndarray], *, key: str = "im") -> type[Cars3D]:
    path = root / NAME
    with tarfile.open(path, "w:gz") as archive:
        add(archive, "data/cars/list.txt", "\n".join(images).encode())
        add(archive, "data/shapes48.mat", b"another set of the archive")
        # not in the order of their names
        for name in reversed(images):
            file = io.BytesIO()
            savemat(file, {key: images[name], "mask": images[name][:, :, 0]}, do_compression=True)
            add(archive, f"data/cars/{name}.mat", file.getvalue())
    return small(path)


def small(path: Path) -> type[Cars3D]:
    file = replace(Cars3D.files[0], digest=f"md5:{hashlib.md5(path.read_bytes()).hexdigest()}")
    factors = (Factor("elevation", ELEVATIONS), Factor("azimuth", AZIMUTHS), Factor("object_type", CARS))
    return type("Small", (Cars3D,), {"factors": factors, "files": (file,)})


def test_images_follow_elevation_azimuth_and_car(tmp_path: Path) -> None:
    dataset = write(tmp_path, meshes()).load(root=tmp_path)
    index = torch.arange(LENGTH)
    images, sources = dataset.images(index), dataset.sources(index)
    assert images.shape == (LENGTH, 3, 64, 64)
    elevation, azimuth, car = sources.T
    expected = torch.stack([10 * car, 20 * azimuth, 30 * elevation], dim=1) / 255
    assert torch.equal(images, expected[:, :, None, None].expand(-1, -1, 64, 64))
    assert sources[-1].tolist() == [1, 2, 3]


def test_an_archive_made_elsewhere_is_read(tmp_path: Path) -> None:
    expected = write(tmp_path, meshes()).load(root=tmp_path).images(torch.arange(LENGTH))
    with tarfile.open(tmp_path / NAME, "w:gz") as archive:
        for name, image in meshes().items():
            file = io.BytesIO()
            savemat(file, {"im": image})
            add(archive, f"./data/cars/._{name}.mat", b"what macOS puts beside a file")
            add(archive, f"./data/cars/{name}.mat", file.getvalue())
    assert torch.equal(small(tmp_path / NAME).load(root=tmp_path).images(torch.arange(LENGTH)), expected)


def test_rows_and_columns_are_not_swapped(tmp_path: Path) -> None:
    images = meshes()
    images["car_000_mesh"][:64] = 200
    image = write(tmp_path, images).load(root=tmp_path).images(torch.tensor([0]))[0]
    assert (image[:, :28] * 255).mean() > 190
    assert (image[:, 36:] * 255).mean() < 10


def test_the_published_set_is_declared() -> None:
    assert [factor.size for factor in Cars3D.factors] == [4, 24, 183]
    assert Cars3D.cache(Path()).shape == (17_568, 3, 64, 64)
    assert Cars3D.files[0].path == NAME


def test_a_missing_car(tmp_path: Path) -> None:
    images = meshes()
    images.pop("car_002_mesh")
    with pytest.raises(UserError, match="it has 3 cars, wanted 4"):
        write(tmp_path, images).load(root=tmp_path)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.zeros((128, 128, 3, ELEVATIONS, AZIMUTHS), np.uint8), r"'im' in data/cars/car_001_mesh\.mat is uint8"),
        (np.zeros((128, 128, 3, AZIMUTHS, ELEVATIONS), np.float64), "is float64"),
        (np.zeros((64, 64, 3, AZIMUTHS, ELEVATIONS), np.uint8), "wanted uint8"),
    ],
)
def test_a_car_of_another_layout(tmp_path: Path, wrong: np.ndarray, message: str) -> None:
    with pytest.raises(UserError, match=message):
        write(tmp_path, meshes() | {"car_001_mesh": wrong}).load(root=tmp_path)


def test_a_missing_array(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is missing, wanted uint8"):
        write(tmp_path, meshes(), key="picture").load(root=tmp_path)


def test_a_car_that_is_no_matlab_file(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / NAME, "w:gz") as archive:
        add(archive, "data/cars/car_000_mesh.mat", b"not a MATLAB file" * 20)
    with pytest.raises(UserError, match=r"car_000_mesh\.mat cannot be read as a MATLAB file"):
        small(tmp_path / NAME).load(root=tmp_path)


@pytest.mark.parametrize("kept", [0, 100, 0.6, 0.9])
def test_a_truncated_archive(tmp_path: Path, kept: float) -> None:
    write(tmp_path, meshes())
    path = tmp_path / NAME
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if kept < 1 else int(kept)])
    # the digest of what is there, so that reading itself has to notice
    with pytest.raises(UserError, match=r"cannot be read as a \.tar\.gz archive"):
        small(path).load(root=tmp_path)
    assert not list(tmp_path.rglob("*.npy")) + list(tmp_path.rglob("*.partial"))


def test_another_file_of_the_right_layout(tmp_path: Path) -> None:
    loader = write(tmp_path, meshes())
    write(tmp_path, meshes() | {"car_001_mesh": meshes()["car_000_mesh"]})
    with pytest.raises(UserError, match="its md5 is"):
        loader.load(root=tmp_path)
