"""One process's work on a grid: it takes the cells that nobody has, one after the other."""

import errno
import math
import shutil
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from qlae.checkpoint import has_checkpoint
from qlae.compare.cells import GridFolder, State, check_config, finished_summary, publish, state_of
from qlae.compare.claims import Owner, claim
from qlae.compare.grid import Cell
from qlae.errors import StorageError, UserError
from qlae.training import DivergedError, StopRequest, resume, stop_on_signals, train

# of the folder that all cells share; each would fail in turn
STORAGE_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})
# what may be in a run's folder that was not begun yet
BEFORE_CONFIG = frozenset({"config.yaml.new"})


def work(cells: Sequence[Cell], folder: GridFolder, *, deadline: float = math.inf) -> int | None:
    """Trains every cell that is neither finished nor failed and that no other process has.

    A cell that fails is recorded, and the next one is taken. After a signal or the deadline the cell at hand is saved
    and the rest is left.

    Args:
        deadline: a `time.monotonic()`.

    Returns:
        The number of the signal that asked to stop, if one did.

    Raises:
        StorageError: if the folder cannot be written; the cell at hand is then left as it is.
    """
    with stop_on_signals() as request:
        for cell in cells:
            if request.signal is not None or time.monotonic() >= deadline:
                break
            _take(cell, folder, deadline, request)
    return request.signal


def record_failure(folder: GridFolder, cell: Cell, reason: str, details: str = "") -> None:
    """Writes the cell's error file: the reason in its first line.

    Raises:
        StorageError: if it cannot be written.
    """
    who = f"{Owner.current()}, {time.strftime('%Y-%m-%d %H:%M:%S %z')}"
    file = folder.error(cell)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        publish(file, f"{' '.join(reason.split())}\n\n{who}\n{details}".encode())
    except OSError as error:
        raise StorageError(f"cannot write {file} ({error.strerror}): make room or mend the folder") from error


def _take(cell: Cell, folder: GridFolder, deadline: float, request: StopRequest) -> None:
    if state_of(folder, cell) is not State.OPEN:
        return
    with claim(folder.claim(cell)) as taken:
        # another process may have finished it, or failed, before this one had the claim
        if not taken or finished_summary(folder, cell) is not None or folder.error(cell).exists():
            return
        try:
            _run(cell, folder, (deadline - time.monotonic()) / 60.0, request)
        except StorageError:
            raise
        except (DivergedError, UserError) as error:
            record_failure(folder, cell, str(error))
        except Exception as error:
            if isinstance(error, OSError) and error.errno in STORAGE_ERRORS:
                raise StorageError(f"{error}: make room or mend the folder") from error
            record_failure(folder, cell, f"{type(error).__name__}: {error}", traceback.format_exc())


def _run(cell: Cell, folder: GridFolder, minutes: float, request: StopRequest) -> None:
    """Begins the cell, or goes on with it from its last checkpoint."""
    run = folder.run(cell)
    limit = None if math.isinf(minutes) else max(minutes, 1e-3)
    if not has_checkpoint(run.checkpoint):
        _clear(run.path, cell, folder)
        train(cell.config, run.path, time_limit=limit, progress=False, stop=request)
        return
    ours = {name: getattr(cell.config, name) for name in ("device", "root", "evaluation_every")}
    config = replace(check_config(run, cell), **ours)
    resume(config, run.path, time_limit=limit, progress=False, stop=request)


def _clear(path: Path, cell: Cell, folder: GridFolder) -> None:
    """Removes what a run that ended before its first checkpoint left."""
    if not path.exists():
        return
    if folder.run(cell).config_file.exists():
        check_config(folder.run(cell), cell)
    elif not {item.name for item in path.iterdir()} <= BEFORE_CONFIG:
        raise UserError(f"{path} is not a run folder, it has no config.yaml: move it away, or give another --output")
    shutil.rmtree(path)
