"""Reading arrays of .npz files by rows."""

import zipfile
from pathlib import Path

import numpy as np
import pytest

from qlae.data.npz import array_layout, array_rows, check_array
from qlae.errors import UserError


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32, ">i2"])
@pytest.mark.parametrize("count", [1, 3, 7, 100])
def test_rows_are_those_of_numpy(tmp_path: Path, dtype: str, count: int) -> None:
    array = np.arange(7 * 2 * 3).reshape(7, 2, 3).astype(dtype)
    np.savez_compressed(tmp_path / "a.npz", a=array, b=np.zeros(3))
    blocks = list(array_rows(tmp_path / "a.npz", "a", count))
    assert [len(block) for block in blocks[:-1]] == [count] * (len(blocks) - 1)
    assert np.array_equal(np.concatenate(blocks), array)
    assert array_layout(tmp_path / "a.npz", "a") == ((7, 2, 3), np.dtype(dtype))


def test_a_header_of_version_2_is_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive, archive.open("a.npy", "w") as file:
        np.lib.format.write_array(file, np.arange(4), version=(2, 0))
    assert np.concatenate(list(array_rows(tmp_path / "a.npz", "a", 3))).tolist() == [0, 1, 2, 3]


def test_pickled_arrays_are_not_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", a=np.array([{}], dtype=object))
    with pytest.raises(UserError, match="'a' is object"):
        check_array(tmp_path / "a.npz", "a", (1,), np.uint8)


def test_a_missing_array_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", a=np.zeros(1))
    with pytest.raises(UserError, match="no array 'b'"):
        array_layout(tmp_path / "a.npz", "b")
