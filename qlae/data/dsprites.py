"""dSprites: one white shape on black (Matthey et al. 2017)."""

from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy as np

from qlae.data.base import Factor
from qlae.data.converted import BLOCK_IMAGES, SIZE, ConvertedDataset, grid_order, reading
from qlae.data.files import GET_AGAIN, SourceFile
from qlae.data.npz import array_rows, check_array
from qlae.errors import UserError

FILE_NAME = "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"


class DSprites(ConvertedDataset):
    """All 737,280 images. The file's pixels are 0 and 1, and become black and white.

    The file's first factor, color, has one value; it is left out.
    """

    name = "dsprites"
    title = "dSprites"
    summary = "one white shape on black"
    licence = "Apache-2.0"
    channels = 1
    factors = (
        Factor("shape", 3),
        Factor("scale", 6),
        Factor("orientation", 40),
        Factor("position_x", 32),
        Factor("position_y", 32),
    )
    files = (SourceFile(FILE_NAME, f"https://github.com/google-deepmind/dsprites-dataset/raw/master/{FILE_NAME}"),)

    @classmethod
    def check(cls, root: Path) -> None:
        path = root / cls.files[0].path
        length = prod(factor.size for factor in cls.factors)
        with reading(path, "an .npz file"):
            check_array(path, "imgs", (length, SIZE, SIZE), np.uint8)
            check_array(path, "latents_classes", (length, 1 + len(cls.factors)), np.int64)

    @classmethod
    def blocks(cls, root: Path) -> Iterator[np.ndarray]:
        path = root / cls.files[0].path
        with reading(path, "an .npz file"):
            labels = np.concatenate(list(array_rows(path, "latents_classes", BLOCK_IMAGES)))
            order = grid_order(path, labels, (Factor("color", 1), *cls.factors))
            if not np.array_equal(order, np.arange(len(order))):
                raise UserError(f"{path} is not dSprites: its images are not in the published order; {GET_AGAIN}")
            for block in array_rows(path, "imgs", BLOCK_IMAGES):
                if block.max() > 1:
                    raise UserError(f"{path} is not dSprites: it has a pixel of {block.max()}, wanted 0 and 1")
                yield block[:, None] * np.uint8(255)
