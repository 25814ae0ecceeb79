"""What a comparison leaves for its readers: files, and a last word with the exit code."""

from collections.abc import Sequence

from qlae.compare.cells import GridFolder, State, finished_summary, owner, publish, state_of
from qlae.compare.figure import draw
from qlae.compare.grid import Cell, Grid, slug
from qlae.compare.table import Entry, collect, latex, markdown, means_csv, seeds_csv
from qlae.errors import UserError

DONE_EXIT, FAILED_EXIT, UNFINISHED_EXIT = 0, 1, 3


def there_or_chosen(whole: Grid, chosen: Grid, folder: GridFolder) -> Grid:
    """What a comparison's files show: the rows, data sets and seeds of `whole` that are chosen or have a finished cell.

    So work on a part of a grid adds to the table of the rest and does not take its place.
    """
    finished = [cell for cell in whole.cells if finished_summary(folder, cell) is not None]
    data = {*chosen.data, *(cell.data for cell in finished)}
    rows = {*chosen.rows, *(cell.row for cell in finished)}
    seeds = {*chosen.seeds, *(cell.config.seed for cell in finished)}
    return Grid(
        tuple(each for each in whole.data if each in data),
        tuple(each for each in whole.rows if each in rows),
        tuple(each for each in whole.seeds if each in seeds),
        tuple(cell for cell in whole.cells if cell.data in data and cell.row in rows and cell.config.seed in seeds),
    )


def write_results(grid: Grid, folder: GridFolder) -> list[Entry]:
    """Writes tables and figures of all cells that are finished now, in place of older ones.

    Raises:
        UserError: if they cannot be written.
    """
    entries = collect(grid, folder)
    texts = {
        "table.md": markdown(entries),
        "table.tex": latex(entries),
        "table.csv": means_csv(entries),
        "seeds.csv": seeds_csv(entries),
    }
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            publish(folder.path / name, text.encode())
        for data in grid.data:
            picture = draw([entry for entry in entries if entry.data == data])
            publish(folder.path / f"figure-{slug(data)}.png", picture)
    except OSError as error:
        raise UserError(f"cannot write into {folder.path} ({error.strerror}): give another --output") from error
    return entries


def last_word(grid: Grid, folder: GridFolder) -> tuple[str, int]:
    """What is left to do, a line for each cell that needs attention, and the exit code.

    The code is 0 if every cell is finished, 1 if some have failed, 3 if some are left or another process's.
    """
    states = {cell: state_of(folder, cell) for cell in grid.cells}
    failed, running, left = (
        [cell for cell, state in states.items() if state is wanted]
        for wanted in (State.FAILED, State.RUNNING, State.OPEN)
    )
    lines = [f"failed   {cell.name}: {_first_line(folder, cell)}" for cell in failed]
    if failed:
        lines.append(f"--retry takes {_cells(failed)} up again; why each failed: {folder.path}/cells/*/*/*.error")
    for cell in running:
        lines.append(f"running  {cell.name}: {owner(folder, cell)}; if that has ended, delete {folder.claim(cell)}")
    if left:
        lines.append(f"{_cells(left)} of {len(grid.cells)} left; the same command goes on")
    code = FAILED_EXIT if failed else UNFINISHED_EXIT if running or left else DONE_EXIT
    return "\n".join(lines), code


def forget_failures(grid: Grid, folder: GridFolder) -> None:
    """Lets the cells that failed be taken up again."""
    for cell in grid.cells:
        if state_of(folder, cell) is State.FAILED:
            folder.error(cell).unlink(missing_ok=True)


def _first_line(folder: GridFolder, cell: Cell) -> str:
    return folder.error(cell).read_text(encoding="utf-8").split("\n", 1)[0]


def _cells(cells: Sequence[Cell]) -> str:
    return f"{len(cells)} cell{'s' * (len(cells) > 1)}"
