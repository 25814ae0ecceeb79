"""SmallNORB's loader against small files in the true format."""

import gzip
import hashlib
import itertools
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from qlae.data.base import Factor
from qlae.data.smallnorb import SmallNORB
from qlae.errors import UserError

SIZES = (2, 4, 1, 3, 2)
FACTORS = tuple(
    Factor(name, size)
    for name, size in zip(("category", "instance", "elevation", "azimuth", "lighting"), SIZES, strict=True)
)
LENGTH, HALF = 48, 24
BYTE, INTEGER, DOUBLE = 0x1E3D4C55, 0x1E3D4C54, 0x1E3D4C53
TRAINING = "smallnorb-5x46789x9x18x6x2x96x96-training"
TESTING = "smallnorb-5x01235x9x18x6x2x96x96-testing"


def matrix(array: np.ndarray, magic: int) -> bytes:
    """Magic number, number of dimensions, at least three sizes, elements: all little-endian."""
    sizes = [*array.shape, 1, 1][: max(3, array.ndim)]
    return struct.pack(f"<ii{len(sizes)}i", magic, array.ndim, *sizes) + array.tobytes()


def combinations() -> np.ndarray:
    """All labels in the order of their index; azimuths are even, as published."""
    rows = np.array(list(itertools.product(*(range(size) for size in SIZES))), dtype="<i4")
    rows[:, 3] *= 2
    return rows


def parts() -> dict[str, np.ndarray]:
    """Labels of both parts in a random order; instances 1 and 3 for training, the others for testing."""
    rows = combinations()[np.random.default_rng(0).permutation(LENGTH)]
    odd = rows[:, 1] % 2 == 1
    return {TRAINING: rows[odd], TESTING: rows[~odd]}


def images(rows: np.ndarray) -> np.ndarray:
    """Flat pictures that tell the labels, uint8 [N, 2, 96, 96]; the second camera sees something else."""
    grey = (rows @ np.array([100, 20, 0, 3, 1])).astype(np.uint8)
    pictures = np.zeros((len(rows), 2, 96, 96), np.uint8)
    pictures[:, 0] = grey[:, None, None]
    pictures[:, 1] = 255
    return pictures


def contents() -> dict[str, bytes]:
    files = {}
    for part, rows in parts().items():
        files[f"{part}-dat"] = matrix(images(rows), BYTE)
        files[f"{part}-cat"] = matrix(np.ascontiguousarray(rows[:, 0]), INTEGER)
        files[f"{part}-info"] = matrix(np.ascontiguousarray(rows[:, 1:]), INTEGER)
    return files


def write(root: Path, files: dict[str, bytes]) -> type[SmallNORB]:
    folder = root / "smallnorb"
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.mat.gz").write_bytes(gzip.compress(content, compresslevel=1))
    return small(root)


def small(root: Path) -> type[SmallNORB]:
    declared = tuple(
        replace(file, digest=f"md5:{hashlib.md5((root / file.path).read_bytes()).hexdigest()}")
        for file in SmallNORB.files
    )
    return type("Small", (SmallNORB,), {"factors": FACTORS, "files": declared})


def test_both_parts_are_put_in_the_order_of_their_labels(tmp_path: Path) -> None:
    dataset = write(tmp_path, contents()).load(root=tmp_path)
    index = torch.arange(LENGTH)
    expected = torch.from_numpy(images(combinations())[:, :1, :64, :64].astype(np.float32)) / 255
    pictures = dataset.images(index)
    assert pictures.shape == (LENGTH, 3, 64, 64)
    assert torch.equal(pictures, expected.expand(-1, 3, -1, -1))
    sources = combinations()
    sources[:, 3] //= 2
    assert np.array_equal(dataset.sources(index).numpy(), sources)


def test_the_published_set_is_declared() -> None:
    assert [factor.size for factor in SmallNORB.factors] == [5, 10, 9, 18, 6]
    assert SmallNORB.cache(Path()).shape == (48_600, 1, 64, 64)
    names = [f"smallnorb/{part}-{kind}.mat.gz" for part in (TRAINING, TESTING) for kind in ("dat", "cat", "info")]
    assert [file.path for file in SmallNORB.files] == names


def test_a_missing_file_is_named_and_counted(tmp_path: Path) -> None:
    loader = write(tmp_path, contents())
    (tmp_path / "smallnorb" / f"{TESTING}-info.mat.gz").unlink()
    assert loader.state(tmp_path) == "1 of 6 files missing"
    with pytest.raises(UserError, match=f"{TESTING}-info.mat.gz is missing: download https://cs.nyu.edu"):
        loader.load(root=tmp_path)


ROWS = parts()[TRAINING]


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("dat", matrix(images(ROWS)[:-1], BYTE), r"it is uint8 \(23, 2, 96, 96\), wanted uint8 \(24, 2, 96, 96\)"),
        ("dat", matrix(images(ROWS)[:, :1], BYTE), r"\(24, 1, 96, 96\)"),
        ("dat", matrix(images(ROWS), INTEGER), "it is int32"),
        ("cat", matrix(ROWS[:, 0].astype(np.float64), DOUBLE), "cannot be read as a gzipped binary matrix"),
        ("cat", matrix(ROWS[:, 0] * 0, INTEGER), "do not name every image once"),
        ("info", matrix(ROWS[:, 1:4], INTEGER), r"\(24, 3\), wanted int32 \(24, 4\)"),
        ("info", matrix(ROWS[:, 1:][:, [1, 0, 2, 3]], INTEGER), "values, wanted|do not name every image once"),
        ("dat", b"\x00\x01", "it ends too early"),
        ("dat", matrix(images(ROWS), BYTE)[:-1], "it ends too early"),
        ("dat", matrix(images(ROWS), BYTE) + b"\x00", "goes on after its last element"),
        ("info", b"a file of another kind", "cannot be read as a gzipped binary matrix"),
    ],
)
def test_near_misses(tmp_path: Path, kind: str, content: bytes, message: str) -> None:
    loader = write(tmp_path, contents() | {f"{TRAINING}-{kind}": content})
    with pytest.raises(UserError, match=message):
        loader.load(root=tmp_path)
    assert not list(tmp_path.rglob("*.npy")) + list(tmp_path.rglob("*.partial"))


def test_the_parts_swapped_for_one(tmp_path: Path) -> None:
    files = contents()
    files |= {name.replace(TRAINING, TESTING): content for name, content in files.items() if TRAINING in name}
    with pytest.raises(UserError, match="'instance' has 2 values, wanted 4"):
        write(tmp_path, files).load(root=tmp_path)


@pytest.mark.parametrize("kept", [0, 8, 30])
def test_truncated_gzip(tmp_path: Path, kept: int) -> None:
    write(tmp_path, contents())
    path = tmp_path / "smallnorb" / f"{TRAINING}-dat.mat.gz"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match="cannot be read as a gzipped binary matrix"):
        small(tmp_path).load(root=tmp_path)


def test_another_file_of_the_right_layout(tmp_path: Path) -> None:
    loader = write(tmp_path, contents())
    write(tmp_path, contents() | {f"{TRAINING}-dat": matrix(255 - images(ROWS), BYTE)})
    with pytest.raises(UserError, match="its md5 is"):
        loader.load(root=tmp_path)
