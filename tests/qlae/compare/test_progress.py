import io
import json
from dataclasses import asdict

import pytest

from qlae.compare.cells import GridFolder, State
from qlae.compare.claims import Owner
from qlae.compare.grid import Cell, Grid
from qlae.compare.progress import Reporter, duration, measure


def finish(folder: GridFolder, cell: Cell, seconds: float) -> None:
    run = folder.run(cell)
    run.path.mkdir(parents=True)
    run.write_summary({"psnr": 1.0, "seconds": seconds, "steps": cell.config.steps})


def claim(folder: GridFolder, cell: Cell) -> None:
    folder.run(cell).path.mkdir(parents=True, exist_ok=True)
    folder.claim(cell).write_text(json.dumps(asdict(Owner.current())))


def test_counts_and_time_left(grid: Grid, folder: GridFolder) -> None:
    assert measure(folder, grid.cells).line() == "0 of 4 cells done, 0 running, 0 failed"
    claim(folder, grid.cells[2])
    # nothing is known of the time before a cell is finished
    assert measure(folder, grid.cells).line() == "0 of 4 cells done, 1 running, 0 failed"
    finish(folder, grid.cells[0], 1200.0)
    progress = measure(folder, grid.cells)
    assert progress.counts == {State.DONE: 1, State.RUNNING: 1, State.OPEN: 2}
    # three cells of 1,200 s one after the other
    assert progress.seconds_left == pytest.approx(3600.0)
    finish(folder, grid.cells[1], 600.0)
    # QLAE takes 1,200 s, five 600 s; half of the running cell's 20 steps are taken
    folder.run(grid.cells[2]).write_metrics([{"step": 8}, {"step": 10}])
    assert measure(folder, grid.cells).seconds_left == pytest.approx(600.0 + 600.0)
    # two at a time
    claim(folder, grid.cells[3])
    progress = measure(folder, grid.cells)
    assert progress.seconds_left == pytest.approx(600.0)
    assert progress.line() == "2 of 4 cells done, 2 running, 0 failed, about 10 min left"


@pytest.mark.parametrize(("seconds", "text"), [(3, "1 min"), (95, "2 min"), (35_000, "583 min"), (360_000, "100 h")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_a_line_when_a_cell_ends_and_a_terminal_one_line(grid: Grid, folder: GridFolder) -> None:
    changes: list[int] = []
    log, terminal = io.StringIO(), Terminal()
    reporters = [Reporter(folder, grid.cells, lambda: changes.append(1), stream) for stream in (log, terminal)]
    for position in (None, None, 0, None):
        if position is not None:
            finish(folder, grid.cells[position], 1.0)
        for reporter in reporters:
            reporter.look()
    assert log.getvalue().splitlines() == [f"{done} of 4 cells done, 0 running, 0 failed" for done in (0, 1)]
    assert terminal.getvalue().count("\r") == 4 and "\n" not in terminal.getvalue()
    # at the first look and at the end of a cell, for each of the two
    assert len(changes) == 4
