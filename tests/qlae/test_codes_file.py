import zipfile
from pathlib import Path

import numpy as np
import pytest

from qlae.errors import UserError
from qlae.metrics.codes_file import read_codes

LATENTS = np.arange(2000).reshape(500, 4)
SOURCES = LATENTS[:, :2] % 7


@pytest.fixture
def file(tmp_path: Path) -> Path:
    np.savez(tmp_path / "codes.npz", latents=LATENTS, sources=SOURCES, images=np.zeros(3))
    return tmp_path / "codes.npz"


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_come_back(tmp_path: Path, save: object) -> None:
    save(tmp_path / "codes.npz", latents=LATENTS, sources=SOURCES)
    latents, sources, values = read_codes(tmp_path / "codes.npz")
    assert values is None
    np.testing.assert_array_equal(latents, LATENTS)
    np.testing.assert_array_equal(sources, SOURCES)


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_codes(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_of_another_kind_are_named(tmp_path: Path) -> None:
    assert f"there is no file {tmp_path / 'none.npz'}" in refusal(tmp_path / "none.npz")
    assert "cannot read" in refusal(tmp_path)
    for content in (b"", b"not an archive", b"PK\x03\x04 nearly one", b"\x80\x04\x95 a pickle"):
        (tmp_path / "foreign.npz").write_bytes(content)
        assert "is not an .npz file: give a file that numpy.savez" in refusal(tmp_path / "foreign.npz")
    np.save(tmp_path / "single.npy", LATENTS)
    assert "holds a single array" in refusal(tmp_path / "single.npy")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "has no array latents, it has readme.txt" in refusal(tmp_path / "other.zip")
    with zipfile.ZipFile(tmp_path / "bytes.npz", "w") as archive:
        archive.writestr("latents", "hello")
    assert "holds latents in another format than NumPy's" in refusal(tmp_path / "bytes.npz")


def test_missing_arrays_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "codes.npz", latents=LATENTS, factors=SOURCES)
    assert "has no array sources, it has latents, factors" in refusal(tmp_path / "codes.npz")
    np.savez(tmp_path / "empty.npz")
    assert "has no array latents, it has nothing" in refusal(tmp_path / "empty.npz")


def test_python_objects_are_not_loaded(tmp_path: Path) -> None:
    np.savez(tmp_path / "codes.npz", latents=np.array([[{"a": 1}]], dtype=object), sources=SOURCES)
    assert "cannot give its array latents" in refusal(tmp_path / "codes.npz")


def test_damaged_files_are_named(file: Path) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert "is not an .npz file" in refusal(file)
    # Inside the first array, whose checksum then fails.
    file.write_bytes(whole[:1000] + bytes(8) + whole[1008:])
    assert "is damaged in its array latents: write it again" in refusal(file)


def with_header(path: Path, header: bytes) -> Path:
    """A file whose array `latents` begins with this header."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("latents.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    return path


def test_headers_that_make_no_sense_are_named(tmp_path: Path) -> None:
    path = tmp_path / "codes.npz"
    huge = b"{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000000, 12), }\n"
    broken = b"{'descr': '<i8', 'fortran_order': False, 'shape': (5, \n"
    for header in (huge, broken, b"\xff\xfe", b""):
        assert "codes.npz cannot give its array latents (" in refusal(with_header(path, header))


def test_archives_that_cannot_be_unpacked_are_named(file: Path) -> None:
    whole = file.read_bytes()
    entry = whole.rindex(b"PK\x01\x02", 0, whole.rindex(b"latents.npy"))
    for offset, value in ((8, 1), (10, 99)):
        changed = bytearray(whole)
        # the flag of an encrypted member, and a way of packing that nobody knows
        changed[entry + offset : entry + offset + 2] = value.to_bytes(2, "little")
        changed[offset - 2 : offset] = value.to_bytes(2, "little")
        file.write_bytes(changed)
        assert "codes.npz cannot give its array latents (" in refusal(file)


def test_a_single_array_with_a_broken_header_is_no_npz_file(tmp_path: Path) -> None:
    path = tmp_path / "codes.npz"
    header = b"{'descr': '<i8', 'fortran_order': False, 'shape': (5, \n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    assert "is not an .npz file" in refusal(path)
