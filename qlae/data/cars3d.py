"""Cars3D: renderings of car models from all sides (Reed et al. 2015)."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
from scipy.io import loadmat

from qlae.data.base import Factor
from qlae.data.converted import BLOCK_IMAGES, SIZE, ConvertedDataset, reading, resized
from qlae.data.files import GET_AGAIN, SourceFile
from qlae.errors import UserError

FOLDER, SUFFIX = ("data", "cars"), "_mesh.mat"
STORED_SIZE = 128


class Cars3D(ConvertedDataset):
    """All 17,568 images. The archive has one MATLAB file a car; cars are numbered by the order of the files' names.

    Conversion holds the images at 64 pixels in memory, 216 MB.
    """

    name = "cars3d"
    title = "Cars3D"
    summary = "car models from all sides, renderings"
    licence = "none stated"
    factors = (Factor("elevation", 4), Factor("azimuth", 24), Factor("object_type", 183))
    # the digest is the one that github.com/nmichlo/disent records
    files = (
        SourceFile(
            "nips2015-analogy-data.tar.gz",
            "http://www.scottreed.info/files/nips2015-analogy-data.tar.gz",
            "md5:4e866a7919c1beedf53964e6f7a23686",
        ),
    )

    @classmethod
    def check(cls, root: Path) -> None:
        path = root / cls.files[0].path
        with reading(path, "a .tar.gz archive"):
            if not tarfile.is_tarfile(path):
                raise OSError("not an archive")

    @classmethod
    def blocks(cls, root: Path) -> Iterator[np.ndarray]:
        path = root / cls.files[0].path
        elevations, azimuths, objects = (factor.size for factor in cls.factors)
        views = (elevations, azimuths)
        with reading(path, "a .tar.gz archive"):
            cars = {name: car_images(path, name, file, views) for name, file in car_files(path)}
        if len(cars) != objects:
            raise UserError(f"{path} is not Cars3D: it has {len(cars)} cars, wanted {objects}; {GET_AGAIN}")
        # [views, cars, ...]: the object varies fastest
        images = np.stack([cars[name] for name in sorted(cars)], axis=1)
        images = images.reshape(-1, 3, SIZE, SIZE)
        for start in range(0, len(images), BLOCK_IMAGES):
            yield images[start : start + BLOCK_IMAGES]


def car_files(path: Path) -> Iterator[tuple[str, io.BytesIO]]:
    """Name and content of each car's file, in the order of the archive, which is read once from front to end."""
    with tarfile.open(path, "r|gz") as archive:
        for member in archive:
            if member.isfile() and is_car(PurePosixPath(member.name)):
                yield member.name, io.BytesIO(archive.extractfile(member).read())


def is_car(path: PurePosixPath) -> bool:
    """Whether a member is a car's file, and not what macOS puts beside it (`._NAME`)."""
    return path.parts[-3:-1] == FOLDER and path.name.endswith(SUFFIX) and not path.name.startswith(".")


def car_images(path: Path, name: str, file: io.BytesIO, views: tuple[int, int]) -> np.ndarray:
    """One car from all sides, uint8 [elevations * azimuths, 3, 64, 64].

    The file's array `im` is [128, 128, 3, azimuths, elevations].
    """
    try:
        image = loadmat(file).get("im")
    # on damaged input it raises almost anything
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: {name} cannot be read as a MATLAB file ({reason}); {GET_AGAIN}") from error
    elevations, azimuths = views
    wanted = (STORED_SIZE, STORED_SIZE, 3, azimuths, elevations)
    if image is None or (image.shape, image.dtype) != (wanted, np.dtype(np.uint8)):
        found = "missing" if image is None else f"{image.dtype} {image.shape}"
        raise UserError(f"{path} is not Cars3D: 'im' in {name} is {found}, wanted uint8 {wanted}")
    stacked = image.transpose(4, 3, 2, 0, 1).reshape(-1, 3, STORED_SIZE, STORED_SIZE)
    return resized(np.ascontiguousarray(stacked))
