"""MPI3D's loaders against small files in the true format."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from qlae.data.base import Factor
from qlae.data.mpi3d import MPI3D, MPI3DComplex, MPI3DReal, MPI3DRealistic, MPI3DToy
from qlae.data.prepare import list_datasets
from qlae.errors import UserError

FINAL = tuple(Factor(f"f{position}", size) for position, size in enumerate((3, 2, 1, 1, 2)))
FIRST = tuple(Factor(f"f{position}", size) for position, size in enumerate((2, 2, 1, 1, 2)))
LENGTH, FIRST_LENGTH = 12, 8


def pixels(length: int = LENGTH) -> np.ndarray:
    return np.random.default_rng(length).integers(0, 256, (length, 64, 64, 3), dtype=np.uint8)


def write(folder: Path, *, compressed: bool = True, **arrays: np.ndarray) -> type[MPI3D]:
    """The file of the toy set, and a loader that takes it for the final edition."""
    path = folder / "mpi3d_toy.npz"
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    digest = f"md5:{hashlib.md5(path.read_bytes()).hexdigest()}"
    file = replace(MPI3DToy.files[0], digest=digest)
    return type("Small", (MPI3DToy,), {"factors": FINAL, "first_edition": FIRST, "files": (file,)})


@pytest.mark.parametrize("compressed", [True, False])
def test_images_are_those_of_the_file(tmp_path: Path, compressed: bool) -> None:
    dataset = write(tmp_path, compressed=compressed, images=pixels()).load(root=tmp_path)
    expected = pixels()[[11, 0, 7]].transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
    assert np.array_equal(dataset.images(torch.tensor([11, 0, 7])).numpy(), expected)
    assert (dataset.name, len(dataset), dataset.factors) == ("mpi3d_toy", LENGTH, FINAL)


def test_factors_follow_from_the_position(tmp_path: Path) -> None:
    dataset = write(tmp_path, images=pixels()).load(root=tmp_path)
    assert dataset.sources(torch.tensor([0, 1, 2, 4, 11])).tolist() == [
        [0, 0, 0, 0, 0],
        [0, 0, 0, 0, 1],
        [0, 1, 0, 0, 0],
        [1, 0, 0, 0, 0],
        [2, 1, 0, 0, 1],
    ]


def test_the_first_edition_is_told_by_its_length(tmp_path: Path) -> None:
    dataset = write(tmp_path, images=pixels(FIRST_LENGTH)).load(root=tmp_path)
    assert (len(dataset), dataset.factors) == (FIRST_LENGTH, FIRST)
    assert "first edition" in dataset.describe()
    expected = pixels(FIRST_LENGTH)[[7]].transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
    assert np.array_equal(dataset.images(torch.tensor([7])).numpy(), expected)


def test_the_editions_do_not_share_a_cache(tmp_path: Path) -> None:
    write(tmp_path, images=pixels(FIRST_LENGTH)).load(root=tmp_path)
    final = write(tmp_path, images=pixels())
    assert len(final.load(root=tmp_path)) == LENGTH
    assert final.state(tmp_path) == "converted"
    pair = [kind.cache(tmp_path).path.name for kind in (final, final.of_first_edition())]
    assert pair == ["mpi3d_toy-64.npy", "mpi3d_toy_first_edition-64.npy"]
    assert all((tmp_path / "cache" / name).is_file() for name in pair)


def test_the_list_shows_the_edition_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = write(tmp_path, images=pixels(FIRST_LENGTH))
    monkeypatch.setattr("qlae.data.prepare.DATASETS", {"mpi3d_toy": loader})
    line, factors = list_datasets(tmp_path).splitlines()[1:3]
    assert line.split()[:4] == ["mpi3d_toy", str(FIRST_LENGTH), "16/32/64", "downloaded"]
    assert "f0[2], f1[2]" in factors
    loader.load(root=tmp_path)
    assert list_datasets(tmp_path).splitlines()[1].split()[3] == "converted"


@pytest.mark.parametrize("kind", [MPI3DToy, MPI3DRealistic, MPI3DReal])
def test_the_published_sets_are_declared(kind: type[MPI3D]) -> None:
    assert [factor.size for factor in kind.factors] == [6, 6, 2, 3, 3, 40, 40]
    assert [factor.size for factor in kind.first_edition] == [4, 4, 2, 3, 3, 40, 40]
    assert kind.cache(Path()).shape == (1_036_800, 3, 64, 64)
    assert kind.files[0].path == f"{kind.name}.npz"


def test_the_complex_set_is_declared() -> None:
    assert [factor.size for factor in MPI3DComplex.factors] == [4, 4, 2, 3, 3, 40, 40]
    assert MPI3DComplex.cache(Path()).shape == (460_800, 3, 64, 64)


def test_a_missing_complex_set_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"1Tp8eTdHxgUMtsZv5uAoYAbJR1BOa_OQm.*real3d_complicated_shapes_ordered\.npz"):
        MPI3DComplex.load(root=tmp_path)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": pixels(11)}, r"uint8 \(11, 64, 64, 3\), wanted uint8 \(12, 64, 64, 3\)"),
        ({"images": pixels().astype(np.int16)}, "'images' is int16"),
        ({"images": pixels()[:, :32, :32]}, r"\(12, 32, 32, 3\)"),
        ({"images": pixels().transpose(0, 3, 1, 2)}, r"\(12, 3, 64, 64\)"),
        ({"images": np.asfortranarray(pixels())}, "column by column"),
        ({"pictures": pixels()}, "no array 'images'"),
    ],
)
def test_near_misses(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(UserError, match=message):
        write(tmp_path, **arrays).load(root=tmp_path)


def test_another_file_of_the_right_layout(tmp_path: Path) -> None:
    loader = write(tmp_path, images=pixels())
    write(tmp_path, images=pixels()[::-1])
    with pytest.raises(UserError, match="its md5 is"):
        loader.load(root=tmp_path)


@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.99])
def test_a_truncated_file(tmp_path: Path, kept: float) -> None:
    loader = write(tmp_path, images=pixels())
    path = tmp_path / "mpi3d_toy.npz"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if kept < 1 else int(kept)])
    with pytest.raises(UserError, match=r"mpi3d_toy\.npz cannot be read as an \.npz file"):
        loader.load(root=tmp_path)


@pytest.mark.parametrize("compressed", [True, False])
def test_a_flipped_bit_is_noticed_where_no_digest_is_known(tmp_path: Path, compressed: bool) -> None:
    loader = write(tmp_path, compressed=compressed, images=pixels(FIRST_LENGTH))
    path = tmp_path / "mpi3d_toy.npz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"cannot be read as an \.npz file"):
        loader.load(root=tmp_path)
    assert not list(tmp_path.rglob("*.npy")) + list(tmp_path.rglob("*.partial"))


def test_a_damaged_file_does_not_spoil_the_list_of_sets(tmp_path: Path) -> None:
    loader = write(tmp_path, images=pixels())
    (tmp_path / "mpi3d_toy.npz").write_bytes(b"not an archive")
    assert loader.state(tmp_path) == "damaged"
