"""SmallNORB: photographs of toys under changing light (LeCun, Huang and Bottou 2004).

The files are binary matrices of their own format, described at cs.nyu.edu/~ylclab/data/norb-v1.0-small: a magic
number for the element type, the number of dimensions, at least three dimensions, then the elements, little-endian.
"""

import gzip
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np

from qlae.data.base import Factor
from qlae.data.converted import BLOCK_IMAGES, ConvertedDataset, grid_order, reading, resized
from qlae.data.files import GET_AGAIN, SourceFile
from qlae.errors import UserError

FOLDER = "smallnorb"
ADDRESS = "https://cs.nyu.edu/~ylclab/data/norb-v1.0-small"
ELEMENT_TYPES = {0x1E3D4C55: np.dtype("u1"), 0x1E3D4C54: np.dtype("<i4")}
STORED_SIZE = 96
CAMERAS = 2


def source_file(part: str, kind: str, digest: str) -> SourceFile:
    name = f"smallnorb-{part}-{kind}.mat.gz"
    return SourceFile(f"{FOLDER}/{name}", f"{ADDRESS}/{name}", digest)


TRAINING, TESTING = "5x46789x9x18x6x2x96x96-training", "5x01235x9x18x6x2x96x96-testing"


class SmallNORB(ConvertedDataset):
    """Both published parts together, 48,600 images of the first of the two cameras, in the order of their labels.

    `instance` numbers the ten toys of a category: toys of one number in two categories have nothing in common.
    Conversion holds the images at 64 pixels in memory, 199 MB.
    """

    name = "smallnorb"
    title = "SmallNORB"
    summary = "toys under changing light, photographs"
    licence = "for research, not to be sold"
    channels = 1
    factors = (
        Factor("category", 5),
        Factor("instance", 10),
        Factor("elevation", 9),
        Factor("azimuth", 18),
        Factor("lighting", 6),
    )
    # images, categories and other labels of each part; the digests are those that github.com/nmichlo/disent records
    files = (
        source_file(TRAINING, "dat", "md5:66054832f9accfe74a0f4c36a75bc0a2"),
        source_file(TRAINING, "cat", "md5:23c8b86101fbf0904a000b43d3ed2fd9"),
        source_file(TRAINING, "info", "md5:51dee1210a742582ff607dfd94e332e3"),
        source_file(TESTING, "dat", "md5:e4ad715691ed5a3a5f138751a4ceb071"),
        source_file(TESTING, "cat", "md5:5aa791cd7e6016cf957ce9bdb93b8603"),
        source_file(TESTING, "info", "md5:a9454f3864d7fd4bb3ea7fc3eb84924e"),
    )

    @classmethod
    def check(cls, root: Path) -> None:
        half = prod(factor.size for factor in cls.factors) // 2
        layouts = (
            ((half, CAMERAS, STORED_SIZE, STORED_SIZE), np.dtype("u1")),
            ((half,), np.dtype("<i4")),
            ((half, len(cls.factors) - 1), np.dtype("<i4")),
        )
        for file, (shape, dtype) in zip(cls.files, layouts * 2, strict=True):
            path = root / file.path
            with reading(path, "a gzipped binary matrix"), gzip.open(path) as matrix:
                found = read_header(matrix)
            if found != (shape, dtype):
                raise UserError(
                    f"{path} is not the published file: it is {found[1]} {found[0]}, wanted {dtype} {shape}; "
                    f"{GET_AGAIN}"
                )

    @classmethod
    def blocks(cls, root: Path) -> Iterator[np.ndarray]:
        labels, images = [], []
        for dat, cat, info in (cls.files[:3], cls.files[3:]):
            images += [resized(block) for block in first_camera(root, dat)]
            labels.append(np.column_stack([whole_matrix(root, cat), whole_matrix(root, info)]))
        order = grid_order(root / FOLDER, np.concatenate(labels), cls.factors)
        stored = np.concatenate(images)
        for start in range(0, len(order), BLOCK_IMAGES):
            yield stored[order[start : start + BLOCK_IMAGES]]


def first_camera(root: Path, file: SourceFile) -> Iterator[np.ndarray]:
    """The first camera's images, uint8 [n, 1, 96, 96] a block."""
    path = root / file.path
    with reading(path, "a gzipped binary matrix"), gzip.open(path) as matrix:
        (length, *row), dtype = read_header(matrix)
        for start in range(0, length, BLOCK_IMAGES):
            yield read_rows(matrix, min(BLOCK_IMAGES, length - start), row, dtype)[:, :1]
        require_end(matrix)


def whole_matrix(root: Path, file: SourceFile) -> np.ndarray:
    path = root / file.path
    with reading(path, "a gzipped binary matrix"), gzip.open(path) as matrix:
        (length, *row), dtype = read_header(matrix)
        rows = read_rows(matrix, length, row, dtype)
        require_end(matrix)
        return rows


def read_header(matrix: BinaryIO) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and element type; leaves `matrix` at the first element.

    Raises:
        ValueError, EOFError: this is no such matrix.
    """
    magic, dimensions = read_integers(matrix, 2)
    if magic not in ELEMENT_TYPES or not 1 <= dimensions <= 4:
        raise ValueError(f"it begins with {magic:#x} and {dimensions} dimensions")
    # a header has at least three entries, those that are too many being 1
    sizes = read_integers(matrix, max(3, dimensions))
    return tuple(sizes[:dimensions]), ELEMENT_TYPES[magic]


def read_integers(matrix: BinaryIO, count: int) -> list[int]:
    return read_rows(matrix, count, [], np.dtype("<i4")).tolist()


def read_rows(matrix: BinaryIO, count: int, row: list[int], dtype: np.dtype) -> np.ndarray:
    """The next `count` rows of shape `row`."""
    wanted = count * prod(row) * dtype.itemsize
    data = matrix.read(wanted)
    if len(data) != wanted:
        raise EOFError("it ends too early")
    return np.frombuffer(data, dtype).reshape(count, *row)


def require_end(matrix: BinaryIO) -> None:
    """Reads past the last element, which also verifies gzip's checksum."""
    if matrix.read(1):
        raise ValueError("it goes on after its last element")
