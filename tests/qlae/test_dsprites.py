"""dSprites' loader against small files in the true format."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from qlae.data.base import Factor
from qlae.data.dsprites import DSprites
from qlae.errors import UserError

SIZES = (1, 3, 2, 2)
LENGTH = 12
NAME = "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"


class Small(DSprites):
    factors = (Factor("shape", 3), Factor("scale", 2), Factor("orientation", 2))


def classes() -> np.ndarray:
    return np.array(list(itertools.product(*(range(size) for size in SIZES))), dtype=np.int64)


def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2, (LENGTH, 64, 64), dtype=np.uint8)


def write(root: Path, **change: np.ndarray | None) -> None:
    """All five arrays of the published file, the metadata pickled as there."""
    metadata = np.array({"title": "dSprites dataset"}, dtype=object)
    arrays = {
        "imgs": pixels(),
        "latents_classes": classes(),
        "latents_values": classes().astype(np.float64),
        "metadata": metadata,
    } | change
    np.savez_compressed(root / NAME, **{name: array for name, array in arrays.items() if array is not None})


def test_zero_and_one_become_black_and_white_in_three_channels(tmp_path: Path) -> None:
    write(tmp_path)
    dataset = Small.load(root=tmp_path)
    images = dataset.images(torch.tensor([11, 0]))
    assert images.shape == (2, 3, 64, 64) and images.dtype == torch.float32
    for channel in range(3):
        assert np.array_equal(images[:, channel].numpy(), pixels()[[11, 0]].astype(np.float32))
    # one channel is stored
    assert np.load(tmp_path / "cache" / "dsprites-64.npy", mmap_mode="r").shape == (LENGTH, 1, 64, 64)


def test_the_constant_factor_is_left_out(tmp_path: Path) -> None:
    write(tmp_path)
    assert np.array_equal(Small.load(root=tmp_path).sources(torch.arange(LENGTH)).numpy(), classes()[:, 1:])


def test_the_published_set_is_declared() -> None:
    assert [factor.size for factor in DSprites.factors] == [3, 6, 40, 32, 32]
    assert DSprites.cache(Path()).shape == (737_280, 1, 64, 64)
    assert DSprites.files[0].path == NAME


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"imgs": None}, "no array 'imgs'"),
        ({"latents_classes": None}, "no array 'latents_classes'"),
        ({"imgs": pixels()[:-1]}, r"'imgs' is uint8 \(11, 64, 64\), wanted uint8 \(12, 64, 64\)"),
        ({"imgs": pixels().astype(np.float32)}, "'imgs' is float32"),
        ({"imgs": pixels() * np.uint8(255)}, "a pixel of 255, wanted 0 and 1"),
        ({"latents_classes": classes().astype(np.int32)}, "'latents_classes' is int32"),
        ({"latents_classes": classes()[:, 1:]}, r"'latents_classes' is int64 \(12, 3\)"),
        ({"latents_classes": classes()[::-1]}, "not in the published order"),
        ({"latents_classes": np.ascontiguousarray(classes()[:, [0, 2, 1, 3]])}, "'shape' has 2 values, wanted 3"),
    ],
)
def test_near_misses(tmp_path: Path, change: dict[str, np.ndarray | None], message: str) -> None:
    write(tmp_path, **change)
    with pytest.raises(UserError, match=message):
        Small.load(root=tmp_path)
    assert not list(tmp_path.rglob("*.npy")) + list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("kept", [0, 500, 2000])
def test_a_truncated_file(tmp_path: Path, kept: int) -> None:
    write(tmp_path)
    path = tmp_path / NAME
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"cannot be read as an \.npz file"):
        Small.load(root=tmp_path)
