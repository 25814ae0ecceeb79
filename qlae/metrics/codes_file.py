"""The file that `qlae metrics` scores: latents and sources as NumPy's arrays."""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from qlae.errors import UserError

_WANTED = "give a file that numpy.savez(FILE, latents=..., sources=...) wrote"


def read_codes(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """The arrays `latents`, `sources` and, where there is one, `values` of an .npz file; others are left alone.

    Raises:
        UserError: if there is no such file, it cannot be read, it is no .npz file or a damaged one, or one of the
            arrays is missing or holds Python objects.
    """
    try:
        archive = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}: {_WANTED}") from error
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror or error}): {_WANTED}") from error
    # on a damaged or foreign file NumPy raises almost anything: BadZipFile, TokenError, MemoryError, ...
    except Exception as error:
        raise UserError(f"{path} is not an .npz file: {_WANTED}") from error
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise UserError(f"{path} holds a single array: {_WANTED}")
    with archive:
        values = _array(archive, "values", path) if "values" in archive else None
        return _array(archive, "latents", path), _array(archive, "sources", path), values


def _array(archive: np.lib.npyio.NpzFile, name: str, path: Path) -> np.ndarray:
    if name not in archive:
        found = ", ".join(archive.files) or "nothing"
        raise UserError(f"{path} has no array {name}, it has {found}: {_WANTED}")
    try:
        array = archive[name]
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is damaged in its array {name}: write it again") from error
    # encrypted, packed in a way that zipfile does not know, a header that asks for more than all memory, ...
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} cannot give its array {name} ({reason}): {_WANTED}") from error
    # An entry that is not in NumPy's format comes as bytes.
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path} holds {name} in another format than NumPy's: {_WANTED}")
    return array
