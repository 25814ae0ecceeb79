"""MPI3D: a robot arm holds an object; simple renderings, realistic ones, and photographs (Gondal et al. 2019).

The sets have no labels: an image's factors follow from its position. Two editions are about under the same file names
(of the photographs a first one is not confirmed). The first one, of the NeurIPS 2019 challenge, has 4 colours and 4
shapes (460,800 images), the final one 6 and 6 (1,036,800). The number of images tells them apart, and each is read as
what it is.
"""

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import ClassVar

import numpy as np

from qlae.data.base import Factor
from qlae.data.converted import BLOCK_IMAGES, SIZE, ConvertedDataset, reading
from qlae.data.files import SourceFile
from qlae.data.npz import array_layout, array_rows, check_array

PUBLISHED_BY = "https://huggingface.co/datasets/waleedgondal/mpi3d/resolve/main"


def factors_with(colours: int, shapes: int) -> tuple[Factor, ...]:
    """All editions differ in the first two factors only."""
    return (
        Factor("object_color", colours),
        Factor("object_shape", shapes),
        Factor("object_size", 2),
        Factor("camera_height", 3),
        Factor("background_color", 3),
        Factor("horizontal_axis", 40),
        Factor("vertical_axis", 40),
    )


class MPI3D(ConvertedDataset):
    """What the variants share: an .npz file whose array `images` is uint8 [N, 64, 64, 3] in row-major order.

    Attributes:
        first_edition: the factors of an earlier file of the same name; None if there is none.
    """

    licence = "CC BY 4.0"
    factors = factors_with(6, 6)
    first_edition: ClassVar[tuple[Factor, ...] | None] = factors_with(4, 4)

    @classmethod
    def edition(cls, root: Path) -> "type[MPI3D]":
        path = root / cls.files[0].path
        if cls.first_edition is None or not path.is_file():
            return cls
        with reading(path, "an .npz file"):
            shape, _ = array_layout(path, "images")
        if shape[:1] != (prod(factor.size for factor in cls.first_edition),):
            return cls
        return cls.of_first_edition()

    @classmethod
    def of_first_edition(cls) -> "type[MPI3D]":
        """The set with the first edition's factors and name; no digest of its file is known."""
        file = cls.files[0]
        attributes = {
            "name": f"{cls.name}_first_edition",
            "title": f"{cls.title} (first edition)",
            "factors": cls.first_edition,
            "first_edition": None,
            "files": (SourceFile(file.path, file.address),),
        }
        return type(cls.__name__, (cls,), attributes)

    @classmethod
    def check(cls, root: Path) -> None:
        path = root / cls.files[0].path
        length = prod(factor.size for factor in cls.factors)
        with reading(path, "an .npz file"):
            check_array(path, "images", (length, SIZE, SIZE, 3), np.uint8)

    @classmethod
    def blocks(cls, root: Path) -> Iterator[np.ndarray]:
        path = root / cls.files[0].path
        with reading(path, "an .npz file"):
            for block in array_rows(path, "images", BLOCK_IMAGES):
                yield block.transpose(0, 3, 1, 2)


class MPI3DToy(MPI3D):
    """Simple renderings."""

    name = "mpi3d_toy"
    title = "MPI3D toy"
    summary = "a robot arm holds an object, simple renderings"
    files = (SourceFile("mpi3d_toy.npz", f"{PUBLISHED_BY}/mpi3d_toy.npz", "md5:55889cb7c7dfc655d6e0277beee88868"),)


class MPI3DRealistic(MPI3D):
    """Realistic renderings."""

    name = "mpi3d_realistic"
    title = "MPI3D realistic"
    summary = "a robot arm holds an object, realistic renderings"
    files = (
        SourceFile(
            "mpi3d_realistic.npz", f"{PUBLISHED_BY}/mpi3d_realistic.npz", "md5:59a6225b88b635365f70c91b3e52f70f"
        ),
    )


class MPI3DReal(MPI3D):
    """Photographs."""

    name = "mpi3d_real"
    title = "MPI3D real"
    summary = "a robot arm holds an object, photographs"
    files = (SourceFile("mpi3d_real.npz", f"{PUBLISHED_BY}/mpi3d_real.npz", "md5:0f33f609918fb5c97996692f91129802"),)


class MPI3DComplex(MPI3D):
    """Photographs of everyday objects; the set that the QLAE paper calls MPI3D."""

    name = "mpi3d_complex"
    title = "MPI3D complex"
    summary = "a robot arm holds an everyday object, photographs"
    factors = factors_with(4, 4)
    first_edition = None
    files = (
        SourceFile(
            "real3d_complicated_shapes_ordered.npz",
            "https://drive.google.com/uc?id=1Tp8eTdHxgUMtsZv5uAoYAbJR1BOa_OQm",
            by_hand="download the file",
        ),
    )
