"""Sets of numbered PNG files of 128 x 128 pixels, with a row of labels for each in one NumPy file."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from qlae.data.converted import ConvertedDataset, grid_order, reading, resized
from qlae.data.files import GET_AGAIN, SourceFile
from qlae.data.image_folder import read_image
from qlae.errors import UserError

STORED_SIZE = 128
# decoded at a time; as float32, to be resized, each takes 197 KB
PICTURES = 512


class LabelledPNGs(ConvertedDataset):
    """Two `files`: the labels, float64 [N, n_s], and a folder of images `000000.png` and on.

    The folder's time tells that files came or went, not that one was overwritten.

    The images are put in the order of the factors by their labels, whatever their numbers are.
    """

    @classmethod
    def check(cls, root: Path) -> None:
        cls.labels(root)

    @classmethod
    def labels(cls, root: Path) -> np.ndarray:
        """The labels mapped into memory, float64 [N, n_s]."""
        path = root / cls.files[0].path
        length, _, _, _ = cls.cache(root).shape
        with reading(path, "a NumPy file"):
            labels = np.load(path, mmap_mode="r", allow_pickle=False)
        wanted = (length, len(cls.factors))
        if not isinstance(labels, np.ndarray) or (labels.shape, labels.dtype) != (wanted, np.dtype(np.float64)):
            found = f"{labels.dtype} {labels.shape}" if isinstance(labels, np.ndarray) else "an archive"
            raise UserError(f"{path} is not the published file: it is {found}, wanted float64 {wanted}; {GET_AGAIN}")
        return labels

    @classmethod
    def blocks(cls, root: Path) -> Iterator[np.ndarray]:
        path, folder = (root / file.path for file in cls.files)
        order = grid_order(path, cls.labels(root), cls.factors)
        for start in range(0, len(order), PICTURES):
            images = [read_png(folder / f"{number:06}.png") for number in order[start : start + PICTURES]]
            yield resized(np.stack(images).transpose(0, 3, 1, 2))


def unpacked(folder: str, labels: str, address: str) -> tuple[SourceFile, SourceFile]:
    """The two files of an archive that a person fetches: its labels and its folder of images."""
    by_hand = "download the archive and unpack it"
    return tuple(SourceFile(f"{folder}/{name}", address, by_hand=by_hand) for name in (labels, "images"))


def read_png(path: Path) -> np.ndarray:
    """One image, uint8 [128, 128, 3].

    Raises:
        UserError: it is missing, damaged or of another size.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: unpack the whole archive")
    image = read_image(path, None)
    if image.shape != (STORED_SIZE, STORED_SIZE, 3):
        raise UserError(
            f"{path} is {image.shape[1]} x {image.shape[0]} pixels, wanted {STORED_SIZE} x {STORED_SIZE}: "
            "unpack the archive again"
        )
    return image
