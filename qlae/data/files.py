"""Finding downloaded files and making sure, once, that they are what their publisher put there."""

import hashlib
import json
import os
from pathlib import Path

from tqdm import tqdm

from qlae.errors import UserError

ROOT_VARIABLE = "QLAE_DATA"
DEFAULT_ROOT = "data"
BLOCK_BYTES = 1 << 22


def data_root(root: str | Path | None) -> Path:
    """Where downloaded files lie: `root`, else the environment variable QLAE_DATA, else the folder `data`."""
    return Path(root or os.environ.get(ROOT_VARIABLE) or DEFAULT_ROOT)


def find_file(root: str | Path | None, file_name: str, address: str) -> Path:
    """The path of `file_name` in the data root.

    Raises:
        UserError: it is not there; the message says where to get it and where to put it.
    """
    folder = data_root(root)
    path = folder / file_name
    if not path.is_file():
        raise UserError(
            f"{path} is missing: download {address} into the folder {folder}, "
            f"or set {ROOT_VARIABLE} to the folder that holds {file_name}"
        )
    return path


def check_digest(path: Path, algorithm: str, expected: str) -> None:
    """Compare a file's digest with its published value, and remember a match beside it in `<file>.checked`.

    A later call trusts that note as long as the file has the same size and modification time.
    A folder that cannot be written to costs the note, not the check.

    Raises:
        UserError: the digest differs.
    """
    stat = path.stat()
    note = {"size": stat.st_size, "modified_ns": stat.st_mtime_ns, algorithm: expected}
    note_path = path.with_name(path.name + ".checked")
    if read_note(note_path) == note:
        return
    found = file_digest(path, algorithm)
    if found != expected:
        raise UserError(
            f"{path} is not the published file: its {algorithm} is {found}, wanted {expected}; "
            "delete it and download it again"
        )
    if os.access(path.parent, os.W_OK):
        note_path.write_text(json.dumps(note))


def read_note(path: Path) -> dict[str, int | str] | None:
    """The note of an earlier check, or None where there is none or it is not readable as one."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError:
        # a note cut short by a crash proves nothing, so the file is checked again
        return None


def file_digest(path: Path, algorithm: str) -> str:
    """The file's digest in hexadecimal, with a progress bar on stderr where that is a terminal."""
    digest = hashlib.new(algorithm)
    progress = tqdm(total=path.stat().st_size, desc=f"checking {path.name}", unit="B", unit_scale=True, disable=None)
    with path.open("rb") as file, progress:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            progress.update(len(block))
    return digest.hexdigest()
