"""Claims: which process is at work on a cell, so that no other process takes it.

A claim is a small file that names its owner. It appears whole and only if there is none yet, by a hard link, which
fails where the name exists; local file systems and NFS keep to that for all processes and machines. The claim of a
process that has died is taken over by processes of the same host alone, since only they can tell.
"""

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from qlae.errors import StorageError, UserError


@dataclass(frozen=True)
class Owner:
    """A process, told apart from all others.

    Attributes:
        host: the host's name and the process-number namespace, which containers on one host do not share.
        pid: the process's number.
        start: the boot it runs under and when after that it began, in clock ticks; tells apart processes that
            have the same number one after the other.
    """

    host: str
    pid: int
    start: str

    @classmethod
    def current(cls) -> Self:
        """This process."""
        return cls.of(os.getpid())

    @classmethod
    def of(cls, pid: int) -> Self:
        """The process of this host with that number.

        Raises:
            ProcessLookupError: if there is none.
        """
        start = _start(pid)
        if start is None:
            raise ProcessLookupError(f"no process {pid}")
        return cls(_host(), pid, start)

    def may_live(self) -> bool:
        """False for a process of this host that has ended. Of another host's nothing is known."""
        return self.host != _host() or _start(self.pid) == self.start

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host.split('/')[0]}"


@contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Holds the claim `path` for the length of a `with`; yields whether this process got it.

    Raises:
        StorageError: if it cannot be written.
        UserError: for a file there that is no claim.
    """
    owner = Owner.current()
    taken = _take(path, owner)
    try:
        yield taken
    finally:
        if taken:
            path.unlink(missing_ok=True)


def owner_of(path: Path) -> Owner | None:
    """Who holds the claim; None if it is free, or its owner has ended.

    Raises:
        UserError: for a file there that is no claim.
    """
    owner = _read(path)
    return owner if owner is not None and owner.may_live() else None


def is_held_by(path: Path, owner: Owner) -> bool:
    """Whether the claim names `owner`, living or not."""
    return _read(path) == owner


def release_of(path: Path, owner: Owner) -> None:
    """Removes the claim that `owner`, a process of this host that has ended, left; another's stays."""
    with _one_at_a_time(path):
        if is_held_by(path, owner):
            path.unlink()


def _take(path: Path, owner: Owner) -> bool:
    mine = path.with_name(f"{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mine.write_text(json.dumps(asdict(owner)), encoding="utf-8")
        return _link(mine, path) or _take_over(mine, path)
    except OSError as error:
        raise StorageError(
            f"cannot claim {path} ({error.strerror}): make room, or take a folder "
            "that can be written on a file system with hard links"
        ) from error
    finally:
        if mine.exists():
            mine.unlink()


def _link(mine: Path, path: Path) -> bool:
    try:
        os.link(mine, path)
    except FileExistsError:
        # an NFS server whose answer was lost is asked again and finds its own link
        return mine.stat().st_nlink == 2
    return True


def _take_over(mine: Path, path: Path) -> bool:
    """Replaces the claim of a process that has died.

    Only processes of its host do so, one at a time; after the lock is taken the claim may be another's already.
    """
    if owner_of(path) is not None:
        return False
    with _one_at_a_time(path):
        before = _read(path)
        if before is None or before.may_live():
            return False
        os.replace(mine, path)
        return True


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """A lock among the processes of this host; the file stays, for deleting it would part them."""
    with path.with_name(f".{path.name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _read(path: Path) -> Owner | None:
    try:
        return Owner(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is not a claim ({error}): if no process works on this cell, delete it") from error


def _host() -> str:
    return f"{socket.gethostname()}/{os.readlink('/proc/self/ns/pid')}"


def _start(pid: int) -> str | None:
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # the name in parentheses may hold anything; after it come the state, and as 20th the start
    fields = status.rpartition(")")[2].split()
    if fields[0] in "ZX":
        return None
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot}:{fields[19]}"
