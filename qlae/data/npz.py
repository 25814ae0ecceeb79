"""Arrays inside .npz files, read in blocks of rows rather than as a whole."""

import zipfile
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np

from qlae.data.files import GET_AGAIN
from qlae.errors import UserError


def check_array(path: Path, name: str, shape: tuple[int, ...], dtype: np.typing.DTypeLike) -> None:
    """Raises UserError unless the file has an array of that name, shape and dtype."""
    found_shape, found_dtype = array_layout(path, name)
    if (found_shape, found_dtype) != (shape, np.dtype(dtype)):
        raise UserError(
            f"{path} is not the published file: '{name}' is {found_dtype} {found_shape}, "
            f"wanted {np.dtype(dtype)} {shape}; {GET_AGAIN}"
        )


def array_layout(path: Path, name: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of an array, from its header alone.

    Raises:
        UserError: the file has no such array.
        zipfile.BadZipFile, ValueError, OSError: it is no such file.
    """
    with zipfile.ZipFile(path) as archive, member(path, archive, name) as file:
        return read_header(path, name, file)


def array_rows(path: Path, name: str, count: int) -> Iterator[np.ndarray]:
    """An array in blocks of at most `count` rows; the archive's checksum is verified at the end.

    Raises:
        zipfile.BadZipFile, zlib.error, EOFError: the file is damaged or cut short.
    """
    with zipfile.ZipFile(path) as archive, member(path, archive, name) as file:
        shape, dtype = read_header(path, name, file)
        row_bytes = dtype.itemsize * prod(shape[1:])
        for start in range(0, shape[0], count):
            rows = min(count, shape[0] - start)
            data = file.read(rows * row_bytes)
            if len(data) != rows * row_bytes:
                raise EOFError(f"'{name}' ends in row {start + len(data) // row_bytes} of {shape[0]}")
            yield np.frombuffer(data, dtype).reshape(rows, *shape[1:])


def member(path: Path, archive: zipfile.ZipFile, name: str) -> BinaryIO:
    """The open file of one array."""
    try:
        return archive.open(f"{name}.npy")
    except KeyError as error:
        raise UserError(f"{path} is not the published file: it has no array '{name}'; {GET_AGAIN}") from error


def read_header(path: Path, name: str, file: BinaryIO) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype; leaves `file` at the first row."""
    version = np.lib.format.read_magic(file)
    reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if reader is None:
        raise ValueError(f"'{name}' has version {version} of the .npy format, 1.0 and 2.0 are known")
    shape, fortran_order, dtype = reader(file)
    if fortran_order:
        raise UserError(
            f"{path} is not the published file: '{name}' is stored column by column, wanted row by row; {GET_AGAIN}"
        )
    return shape, dtype
