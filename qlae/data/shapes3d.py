"""Shapes3D from its HDF5 file.

The file's images are compressed in chunks of many, so reading single ones would decompress a chunk for each.
"""

from collections.abc import Iterator
from math import prod
from pathlib import Path

import h5py
import numpy as np

from qlae.data.base import Factor
from qlae.data.converted import BLOCK_IMAGES, SIZE, ConvertedDataset, grid_order, reading
from qlae.data.files import GET_AGAIN, SourceFile
from qlae.errors import UserError


class Shapes3D(ConvertedDataset):
    """Burgess and Kim, 2018: a room with one object, all 480,000 images."""

    name = "shapes3d"
    title = "Shapes3D"
    summary = "a room with one object, renderings"
    licence = "Apache-2.0"
    factors = (
        Factor("floor_hue", 10),
        Factor("wall_hue", 10),
        Factor("object_hue", 10),
        Factor("scale", 8),
        Factor("shape", 4),
        Factor("orientation", 15),
    )
    files = (
        SourceFile(
            "3dshapes.h5",
            "https://storage.googleapis.com/3d-shapes/3dshapes.h5",
            "sha256:0a0f6ed98baff276a50f3a081a7434d788da63cb135a98189b2a5b5769be1785",
        ),
    )

    @classmethod
    def check(cls, root: Path) -> None:
        path = root / cls.files[0].path
        length = prod(factor.size for factor in cls.factors)
        with reading(path, "HDF5"), h5py.File(path, "r") as file:
            check_array(path, file, "images", (length, SIZE, SIZE, 3), np.dtype(np.uint8))
            check_array(path, file, "labels", (length, len(cls.factors)), np.dtype(np.float64))

    @classmethod
    def blocks(cls, root: Path) -> Iterator[np.ndarray]:
        path = root / cls.files[0].path
        with reading(path, "HDF5"), h5py.File(path, "r") as file:
            order = grid_order(path, file["labels"][:], cls.factors)
            if not np.array_equal(order, np.arange(len(order))):
                raise UserError(f"{path} is not Shapes3D: its images are not in the published order; {GET_AGAIN}")
            images = file["images"]
            chunk = images.chunks[0] if images.chunks else 1
            step = chunk * max(1, BLOCK_IMAGES // chunk)
            for start in range(0, len(images), step):
                yield images[start : start + step].transpose(0, 3, 1, 2)


def check_array(path: Path, file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Raises UserError unless the file has a data set of that name, shape and dtype."""
    found = file.get(name)
    if not isinstance(found, h5py.Dataset):
        raise UserError(f"{path} has no array '{name}': it is not Shapes3D; {GET_AGAIN}")
    if (found.shape, found.dtype) != (shape, dtype):
        raise UserError(
            f"{path} is not Shapes3D: '{name}' is {found.dtype} {found.shape}, wanted {dtype} {shape}; {GET_AGAIN}"
        )
