"""Downloaded files: where they lie, where they come from, and whether they are what their publisher put there."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from qlae.errors import UserError

ROOT_VARIABLE = "QLAE_DATA"
DEFAULT_ROOT = "data"
BLOCK_BYTES = 1 << 22
# what to do about a file that is not the published one
GET_AGAIN = "delete it and run `qlae data prepare NAME` with the set's name"


@dataclass(frozen=True)
class SourceFile:
    """One file of a data set, or folder of its files, as its publisher offers it.

    Attributes:
        path: where it belongs, relative to the data root.
        address: where to get it.
        digest: `ALGORITHM:HEXADECIMAL`; None where none is known.
        by_hand: what a person has to do at the address; empty if the address is that of the file itself.
    """

    path: str
    address: str
    digest: str | None = None
    by_hand: str = ""

    def instruction(self, root: Path) -> str:
        """What to fetch, from where, and where to put it."""
        place = root / self.path
        if self.by_hand:
            return f"open {self.address} in a browser, {self.by_hand}, so that {place} is there"
        return f"download {self.address} into the folder {place.parent}"


def data_root(root: str | Path | None) -> Path:
    """Where downloaded files lie: `root`, else the environment variable QLAE_DATA, else the folder `data`."""
    return Path(root or os.environ.get(ROOT_VARIABLE) or DEFAULT_ROOT)


def missing_files(root: Path, files: Sequence[SourceFile]) -> list[SourceFile]:
    """Those of `files` that are not below `root`."""
    return [file for file in files if not is_there(root / file.path)]


def is_there(path: Path) -> bool:
    """Whether there is such a file, or a folder with something in it."""
    return any(path.iterdir()) if path.is_dir() else path.is_file()


def require_files(root: Path, files: Sequence[SourceFile]) -> None:
    """Raises UserError that says where to get the first missing file and where to put it."""
    for file in missing_files(root, files):
        raise UserError(
            f"{root / file.path} is missing: {file.instruction(root)}, "
            f"or set {ROOT_VARIABLE} to the folder that holds {file.path}"
        )


def check_digest(path: Path, digest: str) -> None:
    """Compare a file with its published digest, and remember a match beside it in `<file>.checked`.

    A later call trusts that note as long as the file has the same size and modification time.
    A folder that cannot be written to costs the note, not the check.

    Args:
        digest: `ALGORITHM:HEXADECIMAL`, the algorithm one of hashlib's.

    Raises:
        UserError: the digest differs.
    """
    if is_checked(path, digest):
        return
    algorithm, _, expected = digest.partition(":")
    note = note_about(path, algorithm, expected)
    found = file_digest(path, algorithm)
    if found != expected:
        raise UserError(f"{path} is not the published file: its {algorithm} is {found}, wanted {expected}; {GET_AGAIN}")
    if os.access(path.parent, os.W_OK):
        note_of(path).write_text(json.dumps(note))


def is_checked(path: Path, digest: str) -> bool:
    """Whether `check_digest` has found the file as it is to have this digest."""
    algorithm, _, expected = digest.partition(":")
    return read_note(note_of(path)) == note_about(path, algorithm, expected)


def note_about(path: Path, algorithm: str, digest: str) -> dict[str, object]:
    stat = path.stat()
    return {"size": stat.st_size, "modified_ns": stat.st_mtime_ns, algorithm: digest}


def note_of(path: Path) -> Path:
    """Where `check_digest` remembers that a file was checked."""
    return path.with_name(path.name + ".checked")


def read_note(path: Path) -> dict[str, object] | None:
    """A note about a file, or None where there is none or it is not readable as one."""
    if not path.is_file():
        return None
    try:
        note = json.loads(path.read_text())
    except ValueError:
        # a note cut short by a crash proves nothing, so what it is about is checked again
        return None
    return note if isinstance(note, dict) else None


def file_digest(path: Path, algorithm: str) -> str:
    """The file's digest in hexadecimal, with a progress bar on stderr where that is a terminal."""
    digest = hashlib.new(algorithm)
    progress = tqdm(total=path.stat().st_size, desc=f"checking {path.name}", unit="B", unit_scale=True, disable=None)
    with path.open("rb") as file, progress:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            progress.update(len(block))
    return digest.hexdigest()
