"""The registry, the split and the relation between index and factors."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from qlae.data import DATASETS, Factor, held_out_split, load_dataset
from qlae.data.base import factors_of_index, index_of_factors
from qlae.errors import UserError

FACTORS = (Factor("a", 2), Factor("b", 3), Factor("c", 4))


def test_index_is_row_major_in_the_factors() -> None:
    sources = factors_of_index(torch.tensor([0, 1, 4, 12, 23]), FACTORS)
    assert sources.tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0], [1, 2, 3]]


def test_factors_and_index_are_inverse() -> None:
    index = torch.arange(24)
    assert torch.equal(index_of_factors(factors_of_index(index, FACTORS), FACTORS), index)


@pytest.mark.parametrize(
    ("length", "evaluation"), [(2, 1), (9, 1), (25, 2), (1797, 179), (100_000, 10_000), (480_000, 10_000)]
)
def test_split_is_a_partition(length: int, evaluation: int) -> None:
    train, held_out = held_out_split(length)
    assert len(held_out) == evaluation
    assert torch.equal(torch.cat([train, held_out]).sort().values, torch.arange(length))


def test_split_does_not_depend_on_the_seed_in_force() -> None:
    torch.manual_seed(1)
    first = held_out_split(1000)[1]
    torch.manual_seed(2)
    assert torch.equal(held_out_split(1000)[1], first)


def test_split_leaves_the_random_state_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    held_out_split(1000)
    assert torch.equal(torch.get_rng_state(), before)


def test_split_spreads_over_the_set() -> None:
    # of 10,000 uniform draws, a tenth part holds 1,000 with a standard deviation of 30
    held_out = held_out_split(480_000)[1]
    counts = torch.bincount(held_out // 48_000, minlength=10)
    assert counts.min() > 1000 - 6 * 30
    assert counts.max() < 1000 + 6 * 30


@pytest.mark.parametrize("length", [0, 1])
def test_too_few_images_to_split(length: int) -> None:
    with pytest.raises(UserError, match="at least 2"):
        held_out_split(length)


def test_every_set_says_what_it_is() -> None:
    assert all(dataset.name == name and dataset.summary for name, dataset in DATASETS.items())


def test_name_is_loaded_at_the_wanted_resolution() -> None:
    assert load_dataset("rooms3d", resolution=16).image_shape == (3, 16, 16)


def test_folder_is_loaded_by_path(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    dataset = load_dataset(str(tmp_path))
    assert (dataset.name, len(dataset), dataset.image_shape) == (str(tmp_path), 1, (3, 8, 8))


def test_name_wins_over_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "rooms3d"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    assert len(load_dataset("rooms3d", resolution=16)) == 480_000
    assert len(load_dataset("./rooms3d")) == 1


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"'shapes4d'.*rooms3d, shapes3d"):
        load_dataset("shapes4d")


def test_root_defaults_to_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLAE_DATA", str(tmp_path))
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "3dshapes.h5"))):
        load_dataset("shapes3d")
    with pytest.raises(UserError, match=r"elsewhere/3dshapes\.h5"):
        load_dataset("shapes3d", root="elsewhere")
