import csv
import errno
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from PIL import Image

from qlae.compare.cells import GridFolder, State, state_of
from qlae.compare.claims import Owner
from qlae.compare.grid import Grid
from qlae.compare.results import forget_failures, last_word, there_or_chosen, write_results
from qlae.compare.worker import record_failure
from qlae.errors import UserError


def finish(folder: GridFolder, grid: Grid, positions: list[int]) -> None:
    for position in positions:
        run = folder.run(grid.cells[position])
        run.path.mkdir(parents=True)
        summary = {"infom": 0.5, "infoe": 0.5, "infoc": 0.5, "psnr": 20.0, "seconds": 3.0, "steps": 20}
        run.write_summary(summary)


def test_tables_and_figures_at_any_time(grid: Grid, folder: GridFolder) -> None:
    names = {"table.md", "table.csv", "table.tex", "seeds.csv", "figure-tiny.png"}
    for finished in ([], [0, 1], [2, 3]):
        finish(folder, grid, finished)
        write_results(grid, folder)
        assert {path.name for path in folder.path.iterdir()} - {"cells"} == names
    assert "| QLAE | 0.50 ± 0.00 |" in (folder.path / "table.md").read_text()
    with (folder.path / "seeds.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 4
    with Image.open(folder.path / "figure-tiny.png") as picture:
        assert picture.format == "PNG"


def test_a_result_that_cannot_be_written_leaves_the_former(
    grid: Grid, folder: GridFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_results(grid, folder)
    before = (folder.path / "table.md").read_text()
    finish(folder, grid, [0])

    def write_bytes(path: Path, content: bytes) -> int:
        path.open("wb").close()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(UserError, match=r"cannot write into .*No space left on device"):
        write_results(grid, folder)
    assert (folder.path / "table.md").read_text() == before
    assert not [path for path in folder.path.iterdir() if path.name.startswith(".")]


def part(grid: Grid, row: str, seed: int) -> Grid:
    cells = tuple(cell for cell in grid.of("tiny", row) if cell.config.seed == seed)
    return Grid(("tiny",), (row,), (seed,), cells)


def test_what_is_chosen_or_finished_is_shown(grid: Grid, folder: GridFolder) -> None:
    chosen = part(grid, "five", 1)
    assert there_or_chosen(grid, grid, folder) == grid
    assert there_or_chosen(grid, chosen, folder) == chosen
    # QLAE with seed 0
    finish(folder, grid, [0])
    assert there_or_chosen(grid, chosen, folder) == grid
    assert there_or_chosen(grid, part(grid, "QLAE", 0), folder) == part(grid, "QLAE", 0)


def test_the_last_word_names_what_needs_attention(grid: Grid, folder: GridFolder) -> None:
    text, code = last_word(grid, folder)
    assert (text, code) == ("4 cells of 4 left; the same command goes on", 3)
    finish(folder, grid, [0, 1])
    other = replace(Owner.current(), host="elsewhere/pid:[1]", pid=77)
    claim = folder.claim(grid.cells[2])
    claim.write_text(json.dumps(asdict(other)))
    text, code = last_word(grid, folder)
    assert code == 3
    assert text.splitlines() == [
        f"running  tiny/qlae/seed1: process 77 on elsewhere; if that has ended, delete {claim}",
        "1 cell of 4 left; the same command goes on",
    ]
    claim.unlink()
    finish(folder, grid, [2])
    record_failure(folder, grid.cells[3], "the loss\nbecame nan")
    text, code = last_word(grid, folder)
    assert code == 1
    assert text.splitlines()[0] == "failed   tiny/five/seed1: the loss became nan"
    assert text.splitlines()[1].startswith("--retry takes 1 cell up again")
    forget_failures(grid, folder)
    assert state_of(folder, grid.cells[3]) is State.OPEN
    finish(folder, grid, [3])
    assert last_word(grid, folder) == ("", 0)
