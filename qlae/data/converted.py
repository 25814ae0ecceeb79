"""What the downloaded sets have in common: files that are checked, converted once, and then read by index."""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from qlae.data.base import Dataset, Factor, factors_of_index, index_of_factors
from qlae.data.cache import ImageCache, Origin
from qlae.data.files import GET_AGAIN, SourceFile, check_digest, data_root, is_checked, missing_files, require_files
from qlae.errors import UserError

SIZE = 64
RESOLUTIONS = (16, 32, SIZE)
# images converted at a time
BLOCK_IMAGES = 4096
CACHE_FOLDER = "cache"
# of a GPU's free memory, what a resident set may take
RESIDENT_SHARE = 0.5


class ConvertedDataset(Dataset):
    """A full grid of factors, converted at the first use to 64 x 64 pixels in row-major order of the factors.

    A set is a subclass that declares the attributes below and reads its files. At 32 and 16 pixels images are means
    over blocks of those at 64.

    Attributes:
        title: the set's name as its publishers write it.
        files: what has to be below the data root.
        channels: 3, or 1 for grey images, which are stored once and returned as three equal channels.
    """

    title: ClassVar[str]
    files: ClassVar[tuple[SourceFile, ...]]
    channels: ClassVar[int] = 3
    resolutions = RESOLUTIONS

    def __init__(self, pixels: np.ndarray, resolution: int, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.image_shape = (3, resolution, resolution)
        self._pixels = resident(torch.from_numpy(pixels), self.device)

    @classmethod
    @abstractmethod
    def check(cls, root: Path) -> None:
        """Raises UserError unless the files below `root` are laid out as the set's are."""

    @classmethod
    @abstractmethod
    def blocks(cls, root: Path) -> Iterator[np.ndarray]:
        """All images in order of their index, uint8 [n, channels, 64, 64] a block."""

    @classmethod
    def edition(cls, root: Path) -> type[Self]:
        """The class for the files that are there; a set of which several editions are about looks into them."""
        return cls

    @classmethod
    def load(
        cls,
        *,
        resolution: int | None = None,
        root: str | Path | None = None,
        device: torch.device | str = "cpu",
    ) -> Self:
        """The set from its files below `root`, at 64 pixels unless `resolution` says otherwise.

        The first call checks and converts the files, which takes minutes; the files are not needed afterwards.

        Raises:
            UserError: files are missing, damaged or others than the published ones, there is no room to convert them,
                or the set has no such resolution.
        """
        resolution = SIZE if resolution is None else resolution
        if resolution not in RESOLUTIONS:
            raise UserError(f"{cls.name} has no resolution {resolution}: choose one of 16, 32 and 64 pixels")
        folder = data_root(root)
        chosen = cls.edition(folder)
        return chosen(chosen.open(folder), resolution, device)

    @classmethod
    def open(cls, root: Path) -> np.ndarray:
        """All images as a memory map, uint8 [N, channels, 64, 64], converted first where they are not yet."""
        cache = cls.cache(root)
        if missing_files(root, cls.files):
            pixels = cache.open(origin=None)
            if pixels is not None:
                return pixels
            require_files(root, cls.files)
        cls.check(root)
        for file in cls.files:
            if file.digest is not None:
                check_digest(root / file.path, file.digest)
        return cache.open_or_write(cls.origin(root), lambda: cls.blocks(root))

    @classmethod
    def cache(cls, root: Path) -> ImageCache:
        shape = (prod(factor.size for factor in cls.factors), cls.channels, SIZE, SIZE)
        return ImageCache(root / CACHE_FOLDER / f"{cls.name}-{SIZE}.npy", shape)

    @classmethod
    def origin(cls, root: Path) -> Origin:
        """What identifies each file: its published digest, or else the size and time of the one that is there."""
        return {file.path: file.digest or identity(root / file.path) for file in cls.files}

    @classmethod
    def state(cls, root: Path) -> str:
        try:
            chosen = cls.edition(root)
        except UserError:
            # a list of all sets is not the place for what loading this one says
            return "damaged"
        missing = len(missing_files(root, cls.files))
        if chosen.cache(root).fault(None if missing else chosen.origin(root)) is None:
            digests = {} if missing else {root / file.path: file.digest for file in chosen.files if file.digest}
            # a file that has changed since it was verified is verified again before the conversion is trusted
            return "converted" if all(is_checked(*each) for each in digests.items()) else "downloaded"
        if missing == 0:
            return "downloaded"
        return "missing" if missing == len(cls.files) else f"{missing} of {len(cls.files)} files missing"

    def __len__(self) -> int:
        return len(self._pixels)

    def images(self, index: Tensor) -> Tensor:
        pixels = self._pixels.index_select(0, index.to(self._pixels.device)).to(self.device)
        images = torch.div(pixels, 255.0)
        if self.image_shape[1] != SIZE:
            images = avg_pool2d(images, SIZE // self.image_shape[1])
        return images.expand(-1, 3, -1, -1).contiguous()

    def sources(self, index: Tensor) -> Tensor:
        return factors_of_index(index.to(self.device), self.factors)

    def describe(self) -> str:
        size = self.image_shape[1]
        return f"{self.name}: {self.title}, {len(self):,} images of {size} x {size} pixels"


def identity(path: Path) -> list[int]:
    """Size and modification time of a file or folder."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def resident(pixels: Tensor, device: torch.device) -> Tensor:
    """`pixels` on `device` if that is a GPU with room for them; else as they are, mapped into memory."""
    if device.type != "cuda":
        return pixels
    free, _ = torch.cuda.mem_get_info(device)
    if pixels.nbytes > RESIDENT_SHARE * free:
        return pixels
    copy = torch.empty(pixels.shape, dtype=pixels.dtype, device=device)
    for target, block in zip(copy.split(BLOCK_IMAGES), pixels.split(BLOCK_IMAGES), strict=True):
        target.copy_(block)
    return copy


def resized(images: np.ndarray) -> np.ndarray:
    """Images uint8 [n, C, H, W] at 64 x 64: bicubic (Keys, a = -0.5) with antialiasing, clipped, rounded to uint8."""
    if images.shape[2:] == (SIZE, SIZE):
        return images
    pixels = torch.from_numpy(images.astype(np.float32))
    smaller = interpolate(pixels, size=(SIZE, SIZE), mode="bicubic", antialias=True)
    return smaller.clamp_(0.0, 255.0).round_().to(torch.uint8).numpy()


def grid_order(path: Path, labels: np.ndarray, factors: tuple[Factor, ...]) -> np.ndarray:
    """Which row of `labels` has each index of the full grid, int64 [N].

    A factor's values are numbered in ascending order.

    Args:
        path: the file that the labels are from, to be named in errors.
        labels: numbers [N, n_s], one row an image.

    Raises:
        UserError: a label is not finite, a factor has another number of values, or the rows are not every combination
            once.
    """
    if not np.isfinite(labels).all():
        raise UserError(f"{path} is not the published file: it has labels that are not numbers; {GET_AGAIN}")
    columns = []
    for column, factor in zip(labels.T, factors, strict=True):
        values, positions = np.unique(column, return_inverse=True)
        if len(values) != factor.size:
            raise UserError(
                f"{path} is not the published file: '{factor.name}' has {len(values)} values, wanted {factor.size}; "
                f"{GET_AGAIN}"
            )
        columns.append(positions)
    index = index_of_factors(torch.from_numpy(np.stack(columns, axis=1)), factors).numpy()
    order = np.argsort(index, kind="stable")
    if not np.array_equal(index[order], np.arange(len(order))):
        raise UserError(f"{path} is not the published file: its labels do not name every image once; {GET_AGAIN}")
    return order


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Turns what readers raise on a damaged or foreign file into a UserError that names it."""
    try:
        yield
    except UserError:
        raise
    # on damaged input decoders raise almost anything: KeyError, RuntimeError, TokenError, struct.error, ...
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} cannot be read as {kind} ({reason}): {GET_AGAIN}") from error
