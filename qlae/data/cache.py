"""Images decoded once into an uncompressed NumPy file, which is then mapped into memory.

Beside the file `NAME.npy` lies the record `NAME.json`: what the images were made from, and the size, modification time
and CRC-32 of the file. A file that does not fit its record is not used.
"""

import fcntl
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from zlib import crc32

import numpy as np
from tqdm import tqdm

from qlae.data.files import BLOCK_BYTES, read_note
from qlae.errors import UserError

# raised when the same source files would give other pixels
FORMAT = 1

Origin = Mapping[str, object]


@dataclass(frozen=True)
class ImageCache:
    """The images of one data set in `path`, uint8 of `shape` [N, C, H, W]."""

    path: Path
    shape: tuple[int, int, int, int]

    @property
    def record_path(self) -> Path:
        return self.path.with_suffix(".json")

    def open(self, origin: Origin | None) -> np.ndarray | None:
        """The images mapped into memory, or None if there are none, or others than those of `origin`.

        Args:
            origin: what identifies the source files, as it was given to `write`; None trusts the record.
        """
        if self.fault(origin) is not None:
            return None
        # copy on write: torch takes the array without a warning, and the file cannot be changed through it
        return np.load(self.path, mmap_mode="c")

    def open_or_write(self, origin: Origin, blocks: Callable[[], Iterable[np.ndarray]]) -> np.ndarray:
        """The images mapped into memory, converted first where `open` finds none.

        A second process that wants the same images waits for the first one.

        Args:
            origin: what identifies the source files.
            blocks: makes the images, uint8 [n, C, H, W] each, in order; called only if they are needed.

        Raises:
            UserError: no room, a folder that cannot be written, or what `blocks` raises.
        """
        if (pixels := self.open(origin)) is not None:
            return pixels
        with self._locked():
            fault = self.fault(origin)
            if fault is not None:
                self._tell(fault)
                self._write(origin, blocks())
        return np.load(self.path, mmap_mode="c")

    def fault(self, origin: Origin | None) -> str | None:
        """Why the file cannot be used, None if it can."""
        if not self.path.is_file():
            return "not there"
        record = read_note(self.record_path)
        if record is None:
            return self._fault_without_record(origin)
        if (record.get("format"), record.get("shape")) != (FORMAT, list(self.shape)):
            return "of another version or shape"
        if origin is not None and record.get("origin") != origin:
            return "made from other files"
        stat = self.path.stat()
        if stat.st_size != record.get("size"):
            return "cut short"
        if stat.st_mtime_ns == record.get("modified_ns"):
            return None
        if file_crc32(self.path) != record.get("crc32"):
            return "damaged"
        self._write_record(record | {"modified_ns": stat.st_mtime_ns})
        return None

    def _fault_without_record(self, origin: Origin | None) -> str | None:
        """None if there is nothing else to take the images from: then a record is written for a file that is whole.

        The new record knows no origin, so that the images are made again when their source is there.
        """
        if origin is not None or not self._is_whole():
            return "without a record that can be read"
        print(f"{self.record_path} cannot be read and is written anew from {self.path.name}", file=sys.stderr)
        self._write_record(self._record({}, file_crc32(self.path)))
        return None

    def _is_whole(self) -> bool:
        """Whether the file is a NumPy file of this shape and no shorter or longer."""
        try:
            pixels = np.lib.format.open_memmap(self.path, mode="r")
        except (OSError, ValueError):
            return False
        found = pixels.shape, pixels.dtype, pixels.offset + pixels.nbytes
        return found == (self.shape, np.uint8, self.path.stat().st_size)

    def _tell(self, fault: str) -> None:
        if fault != "not there":
            print(f"{self.path} is {fault} and is made again", file=sys.stderr)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Only one process at a time converts; the lock ends with its process."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = self.path.with_suffix(".lock").open("w")
        except OSError as error:
            raise UserError(
                f"cannot write into {self.path.parent} ({error.strerror}): make the folder writable, or give --root"
            ) from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _write(self, origin: Origin, blocks: Iterable[np.ndarray]) -> None:
        """Writes all images in one pass; the file appears only when it is whole."""
        folder, partial = self.path.parent, self.path.with_suffix(".partial")
        # left by a process that was killed
        partial.unlink(missing_ok=True)
        wanted, free = prod(self.shape), shutil.disk_usage(folder).free
        if wanted > free:
            raise UserError(f"no room in {folder}: {wanted / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")
        try:
            checksum = self._write_blocks(partial, blocks)
            os.replace(partial, self.path)
        except OSError as error:
            raise UserError(f"cannot write {self.path} ({error.strerror}): make room in {folder}") from error
        finally:
            partial.unlink(missing_ok=True)
        self._write_record(self._record(origin, checksum))

    def _record(self, origin: Origin, checksum: int) -> dict[str, object]:
        stat = self.path.stat()
        return {
            "format": FORMAT,
            "shape": list(self.shape),
            "origin": dict(origin),
            "size": stat.st_size,
            "modified_ns": stat.st_mtime_ns,
            "crc32": checksum,
        }

    def _write_blocks(self, partial: Path, blocks: Iterable[np.ndarray]) -> int:
        """Writes a .npy file and returns its CRC-32.

        Not through a memory map: there a full disk kills the process.
        """
        progress = tqdm(total=self.shape[0], desc=f"converting to {self.path.name}", unit=" images", disable=None)
        with partial.open("wb+") as file, progress:
            header = {"descr": "|u1", "fortran_order": False, "shape": self.shape}
            np.lib.format.write_array_header_1_0(file, header)
            file.seek(0)
            checksum, written = crc32(file.read()), 0
            for block in blocks:
                pixels = np.ascontiguousarray(block, dtype=np.uint8)
                file.write(pixels)
                checksum = crc32(pixels, checksum)
                written += len(pixels)
                progress.update(len(pixels))
            file.flush()
            os.fsync(file.fileno())
        if written != self.shape[0]:
            raise ValueError(f"{written} images were made for {self.path}, wanted {self.shape[0]}")
        return checksum

    def _write_record(self, record: Mapping[str, object]) -> None:
        """Replaces the record as a whole; where it cannot be written, the next use checks the file again."""
        temporary = self.record_path.with_suffix(".new")
        if os.access(self.path.parent, os.W_OK):
            temporary.write_text(json.dumps(record))
            os.replace(temporary, self.record_path)


def file_crc32(path: Path) -> int:
    """CRC-32 of a file, with a progress bar on stderr where that is a terminal."""
    checksum = 0
    progress = tqdm(total=path.stat().st_size, desc=f"checking {path.name}", unit="B", unit_scale=True, disable=None)
    with path.open("rb") as file, progress:
        while block := file.read(BLOCK_BYTES):
            checksum = crc32(block, checksum)
            progress.update(len(block))
    return checksum
