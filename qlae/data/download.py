"""Downloading a published file over HTTP: resumed where it stopped, verified, and there only when it is whole."""

import os
import shutil
import sys
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from tqdm import tqdm

from qlae.data.files import BLOCK_BYTES, SourceFile, check_digest, note_of
from qlae.errors import UserError

# seconds without a byte after which a connection counts as broken
TIMEOUT = 60.0
PARTIAL_CONTENT = 206
RANGE_NOT_SATISFIABLE = 416


class ConnectionBrokenError(Exception):
    """The server could not be reached or stopped before the end."""


def download(file: SourceFile, root: Path) -> Path:
    """Fetches `file` to its place below `root` and returns its path.

    What arrives is kept in `<path>.download` and a later call goes on from there, if the server can; a connection
    that breaks is made anew as long as each one brings something.

    Raises:
        UserError: the server cannot be reached or refuses, there is no room, or the file's digest is not the
            published one, in which case what was fetched is deleted.
    """
    target = root / file.path
    partial = target.with_name(target.name + ".download")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        fetch(file.address, partial)
        if file.digest is not None:
            verify(partial, file)
            # the file need not be checked again
            os.replace(note_of(partial), note_of(target))
        os.replace(partial, target)
    except OSError as error:
        raise UserError(
            f"cannot write {partial} ({error.strerror}): make room, then run this again to go on"
        ) from error
    return target


def fetch(address: str, partial: Path) -> None:
    """Appends to `partial` until it is whole."""
    while True:
        before = size_of(partial)
        try:
            transfer(address, partial)
            return
        except ConnectionBrokenError as error:
            if size_of(partial) <= before:
                raise UserError(
                    f"cannot download {address} ({error}): {before:,} bytes are kept in {partial}; "
                    "run this again to go on"
                ) from error
            print(f"{error}; going on after {size_of(partial):,} bytes", file=sys.stderr)


def transfer(address: str, partial: Path) -> None:
    """One connection: asks for what is missing and appends it.

    Raises:
        ConnectionBrokenError: it ended before the file did.
    """
    start = size_of(partial)
    try:
        response = connect(address, start)
    except HTTPError as error:
        if error.code == RANGE_NOT_SATISFIABLE and start > 0:
            if error.headers.get("Content-Range") == f"bytes */{start}":
                # all of it has arrived before
                return
            # the part is longer than the file, or the server does not say: only a new download can tell
            partial.unlink()
            response = connect_or_break(address)
        else:
            raise ConnectionBrokenError(f"the server answers {error.code} {error.reason}") from error
    except (OSError, HTTPException) as error:
        raise ConnectionBrokenError(str(error)) from error
    with response:
        append = response.status == PARTIAL_CONTENT
        if append:
            require_start(response, start)
        start = start if append else 0
        missing = response.headers.get("Content-Length")
        total = None if missing is None else start + int(missing)
        require_room(partial, total)
        with partial.open("ab" if append else "wb") as output:
            copy(response, output, start, total)
    if total is not None and size_of(partial) < total:
        raise ConnectionBrokenError(f"the connection ended after {size_of(partial):,} of {total:,} bytes")


def connect(address: str, start: int) -> HTTPResponse:
    """The open response, asked to begin at byte `start`; a server without ranges begins at 0, with status 200."""
    headers = {"Range": f"bytes={start}-"} if start > 0 else {}
    return urlopen(Request(address, headers=headers), timeout=TIMEOUT)


def connect_or_break(address: str) -> HTTPResponse:
    try:
        return connect(address, 0)
    except (OSError, HTTPException) as error:
        raise ConnectionBrokenError(str(error)) from error


def copy(response: HTTPResponse, output: BinaryIO, start: int, total: int | None) -> None:
    """Writes the response to `output`, with a progress bar on stderr where that is a terminal."""
    name = Path(output.name).stem
    with tqdm(
        total=total, initial=start, desc=f"downloading {name}", unit="B", unit_scale=True, disable=None
    ) as progress:
        while block := read(response):
            output.write(block)
            progress.update(len(block))


def read(response: HTTPResponse) -> bytes:
    try:
        return response.read(BLOCK_BYTES)
    except (OSError, HTTPException) as error:
        raise ConnectionBrokenError(str(error)) from error


def require_start(response: HTTPResponse, start: int) -> None:
    """Raises ConnectionBrokenError unless the part that a server sends begins at byte `start`."""
    content_range = response.headers.get("Content-Range", "nothing")
    if not content_range.startswith(f"bytes {start}-"):
        raise ConnectionBrokenError(f"asked for the bytes from {start:,} on, the server sends {content_range}")


def require_room(partial: Path, total: int | None) -> None:
    """Raises UserError unless the file fits; what `partial` takes is either kept or written over."""
    free, missing = shutil.disk_usage(partial.parent).free, (total or 0) - size_of(partial)
    if missing > free:
        raise UserError(f"no room in {partial.parent}: {missing / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")


def verify(partial: Path, file: SourceFile) -> None:
    """Deletes what was fetched if it is not the published file."""
    try:
        check_digest(partial, file.digest)
    except UserError as error:
        partial.unlink()
        raise UserError(f"what {file.address} gave was not the published file, and is deleted: {error}") from error


def size_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
