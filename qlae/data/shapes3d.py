"""Shapes3D from its HDF5 file (github.com/google-deepmind/3d-shapes, Apache-2.0).

The file's images are compressed in chunks of many, so reading single ones would decompress a chunk for each.
They are decoded once, in order, into an uncompressed NumPy file beside it, which is then mapped into memory.
"""

import os
import shutil
from dataclasses import dataclass
from math import prod
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d
from tqdm import tqdm

from qlae.data.base import Dataset, Factor, factors_of_index, index_of_factors
from qlae.data.files import check_digest, find_file
from qlae.errors import UserError

FILE_NAME = "3dshapes.h5"
ADDRESS = "https://storage.googleapis.com/3d-shapes/3dshapes.h5"
SIZE = 64
RESOLUTIONS = (16, 32, 64)
# images decoded at a time, rounded to whole chunks
DECODE_IMAGES = 4096


@dataclass(frozen=True)
class Release:
    """What the file has to hold: its sha256, and the full grid of its factors in stored order."""

    sha256: str
    factors: tuple[Factor, ...]

    @property
    def length(self) -> int:
        return prod(factor.size for factor in self.factors)


PUBLISHED = Release(
    sha256="0a0f6ed98baff276a50f3a081a7434d788da63cb135a98189b2a5b5769be1785",
    factors=(
        Factor("floor_hue", 10),
        Factor("wall_hue", 10),
        Factor("object_hue", 10),
        Factor("scale", 8),
        Factor("shape", 4),
        Factor("orientation", 15),
    ),
)


class Shapes3D(Dataset):
    """All 480,000 images at 64 pixels, or averaged over blocks to 32 or 16.

    The first use checks the file and decodes it, which takes minutes and about 6 GB beside it.
    """

    name = "shapes3d"
    summary = f"Shapes3D, six factors, 480,000 images; needs {FILE_NAME} ({ADDRESS})"

    def __init__(
        self,
        path: Path,
        resolution: int = SIZE,
        device: torch.device | str = "cpu",
        release: Release = PUBLISHED,
    ) -> None:
        if resolution not in RESOLUTIONS:
            raise UserError(f"shapes3d has no resolution {resolution}: choose one of 16, 32 and 64 pixels")
        self.device = torch.device(device)
        self.factors = release.factors
        self.image_shape = (3, resolution, resolution)
        self._pixels = np.load(decoded_images(path, release), mmap_mode="r")

    @classmethod
    def load(
        cls,
        *,
        resolution: int | None = None,
        root: str | Path | None = None,
        device: torch.device | str = "cpu",
    ) -> "Shapes3D":
        """The set from `3dshapes.h5` in `root`, at 64 pixels unless `resolution` says otherwise."""
        path = find_file(root, FILE_NAME, ADDRESS)
        return cls(path, SIZE if resolution is None else resolution, device)

    def __len__(self) -> int:
        return len(self._pixels)

    def images(self, index: Tensor) -> Tensor:
        pixels = torch.from_numpy(self._pixels[index.numpy(force=True)]).to(self.device)
        images = pixels.permute(0, 3, 1, 2).float().div_(255.0)
        return avg_pool2d(images, SIZE // self.image_shape[1]).contiguous()

    def sources(self, index: Tensor) -> Tensor:
        return factors_of_index(index.to(self.device), self.factors)

    def describe(self) -> str:
        size = self.image_shape[1]
        return f"shapes3d: Shapes3D, {len(self):,} images of {size} x {size} pixels"


def decoded_images(path: Path, release: Release) -> Path:
    """The uncompressed images of the checked file `path`, uint8 [N, 64, 64, 3] in a .npy file beside it.

    Raises:
        UserError: the file is cut short, holds something else, or there is no room to decode it.
    """
    try:
        with h5py.File(path, "r") as file:
            check_layout(path, file, release)
            check_digest(path, "sha256", release.sha256)
            decoded = path.with_name(f"{path.stem}-{release.sha256[:12]}.npy")
            if not decoded.exists():
                check_labels(path, file["labels"][:], release)
                decode(file["images"], decoded)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read as HDF5 ({error}): download {ADDRESS} again, or make its folder writable"
        ) from error
    return decoded


def check_layout(path: Path, file: h5py.File, release: Release) -> None:
    """Compare names, shapes and dtypes with what the release has."""
    wanted = {
        "images": ((release.length, SIZE, SIZE, 3), np.dtype(np.uint8)),
        "labels": ((release.length, len(release.factors)), np.dtype(np.float64)),
    }
    for name, (shape, dtype) in wanted.items():
        if not isinstance(file.get(name), h5py.Dataset):
            raise UserError(f"{path} has no array '{name}': it is not Shapes3D; download {ADDRESS}")
        found = file[name]
        if (found.shape, found.dtype) != (shape, dtype):
            raise UserError(
                f"{path} is not Shapes3D: '{name}' is {found.dtype} {found.shape}, wanted {dtype} {shape}; "
                f"download {ADDRESS}"
            )


def check_labels(path: Path, labels: np.ndarray, release: Release) -> None:
    """Make sure that the labels, float64 [N, n_s], are the full grid of factor values in row-major order."""
    columns = []
    for column, factor in zip(labels.T, release.factors, strict=True):
        values, positions = np.unique(column, return_inverse=True)
        if len(values) != factor.size:
            raise UserError(
                f"{path} is not Shapes3D: '{factor.name}' has {len(values)} values, wanted {factor.size}; "
                f"download {ADDRESS}"
            )
        columns.append(positions)
    index = index_of_factors(torch.from_numpy(np.stack(columns, axis=1)), release.factors)
    if not torch.equal(index, torch.arange(release.length)):
        raise UserError(f"{path} is not Shapes3D: its images are not in the published order; download {ADDRESS}")


def decode(images: h5py.Dataset, target: Path) -> None:
    """Write all images to `target` in one pass; `target` appears only when it is whole."""
    folder = target.parent
    wanted, free = images.size, shutil.disk_usage(folder).free
    if wanted > free:
        raise UserError(f"no room in {folder}: {wanted / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    chunk = images.chunks[0] if images.chunks else 1
    step = chunk * max(1, DECODE_IMAGES // chunk)
    try:
        decoded = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=images.shape)
        with tqdm(total=len(images), desc=f"decoding to {target.name}", unit=" images", disable=None) as progress:
            for start in range(0, len(images), step):
                block = images[start : start + step]
                decoded[start : start + len(block)] = block
                progress.update(len(block))
        decoded.flush()
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
