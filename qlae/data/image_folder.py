"""Any folder of a person's own images; their factors are not known."""

from pathlib import Path
from zlib import crc32

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from qlae.data.base import Dataset
from qlae.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
# Pillow clips these pixel formats to 8 bits instead of scaling them
WIDE_MODES = ("I", "F")


class ImageFolder(Dataset):
    """The images below a folder, in the order of their paths, held in memory as bytes.

    Files and folders whose name starts with a dot are passed over. Grey images become RGB, transparency is
    dropped, and the camera's note on which side is up is followed.
    """

    summary = "a folder of images (png, jpg, bmp, webp) of one size, without factor labels"

    def __init__(self, folder: Path, pixels: Tensor, device: torch.device | str = "cpu") -> None:
        self.name = str(folder)
        self.device = torch.device(device)
        self.image_shape = (3, pixels.shape[2], pixels.shape[3])
        self._pixels = pixels.to(self.device)

    @classmethod
    def load(
        cls, folder: str | Path, *, resolution: int | None = None, device: torch.device | str = "cpu"
    ) -> "ImageFolder":
        """The images below `folder`; with `resolution`, each one's central square at that many pixels.

        Raises:
            UserError: no images, one that cannot be read, or several sizes and no `resolution`.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"no folder {folder}: give a folder of images")
        if resolution is not None and resolution < 1:
            raise UserError(f"resolution {resolution} is not a size: give a positive number of pixels")
        return cls(folder, read_images(folder, image_paths(folder), resolution), device)

    def __len__(self) -> int:
        return len(self._pixels)

    def images(self, index: Tensor) -> Tensor:
        return self._pixels[index.to(self.device)].float().div_(255.0)

    def sources(self, index: Tensor) -> Tensor:
        return torch.empty(len(index), 0, dtype=torch.int64, device=self.device)

    def fingerprint(self) -> str:
        """The number of images and a checksum of their pixels; the folder may be another."""
        return f"{len(self)} images, {crc32(self._pixels.cpu().numpy()):08x}"

    def describe(self) -> str:
        _, height, width = self.image_shape
        return f"{self.name}: {len(self):,} images of {width} x {height} pixels, without factor labels"


def image_paths(folder: Path) -> list[Path]:
    """The images below `folder`, at least one, sorted by path.

    Raises:
        UserError: there is none.
    """
    paths = [
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not paths:
        raise UserError(f"no images in {folder}: it has no file that ends in {', '.join(SUFFIXES)}")
    return sorted(paths)


def read_images(folder: Path, paths: list[Path], resolution: int | None) -> Tensor:
    """Images of one size as uint8 [N, 3, H, W]."""
    first = read_image(paths[0], resolution)
    pixels = torch.empty(len(paths), 3, *first.shape[:2], dtype=torch.uint8)
    for position, path in enumerate(tqdm(paths, desc=f"reading {folder}", unit=" images", disable=None)):
        image = read_image(path, resolution)
        if image.shape != first.shape:
            raise UserError(
                f"{path} is {image.shape[1]} x {image.shape[0]} pixels, but {paths[0]} is "
                f"{first.shape[1]} x {first.shape[0]}: make them one size, or give --resolution"
            )
        pixels[position] = torch.from_numpy(image).permute(2, 0, 1)
    return pixels


def read_image(path: Path, resolution: int | None) -> np.ndarray:
    """One image as uint8 [H, W, 3].

    Raises:
        UserError: the file is damaged, or has more than 8 bits a channel.
    """
    try:
        with Image.open(path) as file:
            if file.mode.startswith(WIDE_MODES):
                raise UserError(f"{path} has more than 8 bits a channel (mode {file.mode}): save it with 8")
            image = ImageOps.exif_transpose(file).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as an image ({error}): repair or remove it") from error
    if resolution is not None:
        image = ImageOps.fit(image, (resolution, resolution), method=Image.Resampling.BICUBIC)
    return np.array(image)
