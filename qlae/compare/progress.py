"""How far a comparison is: counts of cells by state, and an estimate of the time left."""

import csv
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TextIO

from qlae.compare.cells import GridFolder, State, finished_summary, state_of
from qlae.compare.grid import Cell

# seconds between lines where there is no terminal
LOG_SECONDS = 60.0


@dataclass(frozen=True)
class Progress:
    """A moment of a comparison.

    Attributes:
        counts: cells by state.
        seconds_left: an estimate; None before a cell is finished, or with none running.
    """

    counts: Counter[State]
    seconds_left: float | None

    def line(self) -> str:
        """One line for a person."""
        done, running, failed = (self.counts[state] for state in (State.DONE, State.RUNNING, State.FAILED))
        text = f"{done} of {self.counts.total()} cells done, {running} running, {failed} failed"
        return text if self.seconds_left is None else f"{text}, about {duration(self.seconds_left)} left"


def measure(folder: GridFolder, cells: Sequence[Cell]) -> Progress:
    """Reads the states of all cells.

    A step of an unfinished cell is taken to last as long as a step of the finished cells of its row and data set,
    or of all finished cells where there are none; the running cells share the work.
    """
    states = {cell: state_of(folder, cell) for cell in cells}
    counts = Counter(states.values())
    costs = _step_costs(folder, [cell for cell, state in states.items() if state is State.DONE])
    if not costs or not counts[State.RUNNING]:
        return Progress(counts, None)
    overall = sum(costs.values()) / len(costs)
    left = [cell for cell, state in states.items() if state in (State.RUNNING, State.OPEN)]
    seconds = sum(costs.get((cell.data, cell.row), overall) * _steps_left(folder, cell) for cell in left)
    return Progress(counts, seconds / counts[State.RUNNING])


def duration(seconds: float) -> str:
    """In minutes, from ten hours in hours."""
    minutes = max(1, round(seconds / 60.0))
    return f"{minutes} min" if minutes < 600 else f"{round(minutes / 60)} h"


@dataclass
class Reporter:
    """Shows the progress, on a terminal in place, elsewhere as a line now and then and whenever a cell ends.

    Attributes:
        on_change: called when the number of finished or failed cells has changed.
    """

    folder: GridFolder
    cells: Sequence[Cell]
    on_change: Callable[[], None]
    stream: TextIO = field(default_factory=lambda: sys.stderr)
    ended: int | None = None
    shown_at: float = float("-inf")

    def look(self) -> None:
        """Shows what has become of the cells."""
        progress = measure(self.folder, self.cells)
        ended = progress.counts[State.DONE] + progress.counts[State.FAILED]
        changed = ended != self.ended
        if changed:
            self.ended = ended
            self.on_change()
        if self.stream.isatty():
            self.stream.write(f"\r\x1b[K{progress.line()}")
        elif changed or time.monotonic() - self.shown_at > LOG_SECONDS:
            self.stream.write(f"{progress.line()}\n")
            self.shown_at = time.monotonic()
        self.stream.flush()

    def end(self) -> None:
        """Leaves the line as it is."""
        if self.stream.isatty():
            self.stream.write("\n")


def _step_costs(folder: GridFolder, done: Sequence[Cell]) -> dict[tuple[str, str], float]:
    """Mean seconds per step by data set and row."""
    seconds: dict[tuple[str, str], list[float]] = {}
    for cell in done:
        summary = finished_summary(folder, cell)
        if summary is not None:
            seconds.setdefault((cell.data, cell.row), []).append(summary["seconds"] / summary["steps"])
    return {key: sum(values) / len(values) for key, values in seconds.items()}


def _steps_left(folder: GridFolder, cell: Cell) -> int:
    file = folder.run(cell).metrics_file
    if not file.exists():
        return cell.config.steps
    with file.open(encoding="utf-8") as rows:
        steps = [int(row["step"]) for row in csv.DictReader(rows)]
    return cell.config.steps - (steps[-1] if steps else 0)
