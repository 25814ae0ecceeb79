"""The folder of a comparison, and in which state each cell is there."""

import json
import math
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from enum import Enum
from pathlib import Path

from qlae.compare.claims import Owner, owner_of
from qlae.compare.grid import Cell
from qlae.config import TrainConfig, differences, option
from qlae.errors import UserError
from qlae.run_folder import RunFolder

SCORES = ("infom", "infoe", "infoc", "psnr", "active", "seconds")
# what a score has to be reported with (docs/metrics.md)
CONDITIONS = ("num_latents", "infoe_converged", "evaluation_images")


class State(Enum):
    """What is known of a cell."""

    DONE = "done"
    RUNNING = "running"
    FAILED = "failed"
    # never begun, or begun and left
    OPEN = "open"


@dataclass(frozen=True)
class GridFolder:
    """Where everything of one comparison lies."""

    path: Path

    def run(self, cell: Cell) -> RunFolder:
        """The cell's run folder, as `qlae train` writes it."""
        return RunFolder(self.path / "cells" / cell.name)

    def claim(self, cell: Cell) -> Path:
        """The file that says who works on the cell."""
        return self._beside(cell, "claim")

    def error(self, cell: Cell) -> Path:
        """The file that says why the cell failed: the reason in the first line, then all there is to know."""
        return self._beside(cell, "error")

    @property
    def logs(self) -> Path:
        """Folder of what the workers print."""
        return self.path / "logs"

    def _beside(self, cell: Cell, suffix: str) -> Path:
        run = self.run(cell).path
        return run.with_name(f"{run.name}.{suffix}")


def state_of(folder: GridFolder, cell: Cell) -> State:
    """The cell's state at this moment.

    Raises:
        UserError: for a claim or a summary that cannot be read.
    """
    if finished_summary(folder, cell) is not None:
        return State.DONE
    if owner(folder, cell) is not None:
        return State.RUNNING
    return State.FAILED if folder.error(cell).exists() else State.OPEN


def owner(folder: GridFolder, cell: Cell) -> Owner | None:
    """The process that works on the cell."""
    return owner_of(folder.claim(cell))


def finished_summary(folder: GridFolder, cell: Cell) -> dict[str, object] | None:
    """The summary of a cell that has taken all its steps; None for another.

    Raises:
        UserError: for a file that is damaged.
    """
    file = folder.run(cell).summary_file
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
        return summary if summary["steps"] == cell.config.steps else None
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error!r}): restore it, or delete {file.parent}") from error


def scores_of(folder: GridFolder, cell: Cell) -> dict[str, float] | None:
    """The finished cell's `SCORES` and `CONDITIONS`; None if unfinished.

    NaN stands for what the cell has not (InfoMEC without known factors), 1 and 0 for a regression that has converged
    and one that has not.
    """
    summary = finished_summary(folder, cell)
    if summary is None:
        return None
    values = {name: summary.get(name) for name in (*SCORES, *CONDITIONS)}
    return {name: math.nan if value is None else float(value) for name, value in values.items()}


def check_configs(folder: GridFolder, cells: Sequence[Cell]) -> None:
    """Raises UserError if a cell was begun with another configuration than the grid has now.

    What a configuration leaves to the data set is not compared.
    """
    for cell in cells:
        run = folder.run(cell)
        if run.config_file.exists():
            check_config(run, cell)


def check_config(run: RunFolder, cell: Cell) -> TrainConfig:
    """The configuration that the cell was begun with.

    Raises:
        UserError: if it decides for another result than the grid's.
    """
    _, saved = RunFolder.open(run.path)
    wanted = _as_completed(cell.config, saved)
    # more steps change the curve of the learning rate, so for a comparison they are another run
    names = [*differences(saved, wanted), *(["steps"] if saved.steps != wanted.steps else [])]
    for name in names:
        raise UserError(
            f"{run.path} was begun with {option(name)} {getattr(saved, name)}, and {cell.row!r} on {cell.data} has "
            f"{getattr(wanted, name)} now: set the grid back, give another --output, or delete that folder"
        )
    return saved


def _as_completed(config: TrainConfig, saved: TrainConfig) -> TrainConfig:
    """`config` with what it leaves to the data set as the run has it."""
    left = [field.name for field in fields(TrainConfig) if getattr(config, field.name) is None]
    return replace(config, **{name: getattr(saved, name) for name in left})


def publish(path: Path, content: bytes) -> None:
    """Writes a whole file or nothing, also where other processes write the same file at the same time."""
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
