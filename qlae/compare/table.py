"""Tables of a comparison: means over seeds with 95 % intervals, in Markdown, CSV and LaTeX."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from qlae.compare.cells import CONDITIONS, SCORES, GridFolder, scores_of
from qlae.compare.grid import Grid
from qlae.evaluation import PROTOCOL

CONFIDENCE = 0.95

# marks an InfoE whose regressions did not all converge
UNCONVERGED = "*"

# heading and decimals of each score
COLUMNS = {
    "infom": ("InfoM", 2),
    "infoe": ("InfoE", 2),
    "infoc": ("InfoC", 2),
    "psnr": ("PSNR, dB", 1),
    "active": ("active", 1),
    "seconds": ("seconds", 0),
}


@dataclass(frozen=True)
class Entry:
    """One row on one data set.

    Attributes:
        seeds: of the grid.
        scores: of the finished seeds: for each, its values by the names in `SCORES` and `CONDITIONS`, NaN for one it
            has not.
        split: which images were trained on, as `TrainConfig` has it.
    """

    data: str
    row: str
    seeds: tuple[int, ...]
    scores: dict[int, dict[str, float]]
    split: str = "held-out"

    @property
    def complete(self) -> bool:
        """Whether every seed is finished."""
        return len(self.scores) == len(self.seeds)

    @property
    def converged(self) -> bool:
        """Whether InfoE's regressions converged for every finished seed that has them."""
        return all(scores["infoe_converged"] != 0.0 for scores in self.scores.values())

    def values(self, score: str) -> np.ndarray:
        """float64 [S], the finished seeds' values that are numbers."""
        values = np.array([scores[score] for scores in self.scores.values()], dtype=np.float64)
        return values[~np.isnan(values)]


def collect(grid: Grid, folder: GridFolder) -> list[Entry]:
    """All entries of the grid as far as they are finished, data set by data set."""
    entries = []
    for data in grid.data:
        for row in grid.rows:
            cells = grid.of(data, row)
            found = {cell.config.seed: scores_of(folder, cell) for cell in cells}
            scores = {seed: values for seed, values in found.items() if values is not None}
            entries.append(Entry(data, row, grid.seeds, scores, cells[0].config.split))
    return entries


def interval(values: np.ndarray) -> tuple[float, float]:
    """Mean of float64 [S] and the half-width of Student's 95 % interval for it, t(0.975, S - 1) * s / sqrt(S).

    s is the sample's standard deviation, with S - 1 in its denominator. NaN where S is too small: no mean for 0, no
    half-width for 1.
    """
    if len(values) == 0:
        return math.nan, math.nan
    if len(values) == 1:
        return float(values[0]), math.nan
    quantile = stats.t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1)
    return float(values.mean()), float(quantile * values.std(ddof=1) / math.sqrt(len(values)))


def caption(entries: Sequence[Entry]) -> str:
    """What the numbers are."""
    seeds = entries[0].seeds
    names = ", ".join(map(str, seeds))
    text = f"Means over {len(seeds)} seeds ({names})" if len(seeds) > 1 else f"Seed {names} alone, without an interval"
    if len(seeds) > 1:
        text += ", plus or minus half the width of Student's t 95 % interval over them"
    if not all(entry.complete for entry in entries):
        text += "; (n/m): only n of m seeds are finished and counted"
    text += f". InfoM, InfoE and InfoC by the protocol {PROTOCOL}, and PSNR, on {_images(entries)}; higher is better"
    text += ". active: mean number of latents that vary, of those there are"
    if not all(entry.converged for entry in entries):
        text += f". {UNCONVERGED}: for at least one seed a regression of InfoE did not converge"
    return f"{text}."


def markdown(entries: Sequence[Entry]) -> str:
    """A table for each data set, below each other, and the caption."""
    blocks = []
    for data, rows in _by_data(entries).items():
        lines = [f"| {data} | {' | '.join(heading for heading, _ in COLUMNS.values())} |"]
        lines.append(f"|---|{'---|' * len(COLUMNS)}")
        for entry in rows:
            label = entry.row.replace("|", "\\|") + _mark(entry)
            lines.append(f"| {label} | {' | '.join(_cells(entry, '±'))} |")
        blocks.append("\n".join(lines))
    return "\n\n".join([*blocks, caption(entries)]) + "\n"


def latex(entries: Sequence[Entry]) -> str:
    """A `table` environment that needs the package booktabs."""
    columns = "l" + "r" * len(COLUMNS)
    lines = [r"\begin{table}", r"\centering", rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
    headings = " & ".join(heading for heading, _ in COLUMNS.values())
    for position, (data, rows) in enumerate(_by_data(entries).items()):
        lines += [r"\midrule"] if position else []
        lines += [rf"{_escape(data)} & {headings} \\", r"\midrule"]
        for entry in rows:
            cells = " & ".join(_cells(entry, r"$\pm$"))
            lines.append(rf"{_escape(entry.row + _mark(entry))} & {cells} \\")
    lines += [r"\bottomrule", r"\end{tabular}", rf"\caption{{{_escape(caption(entries))}}}", r"\end{table}"]
    return "\n".join(lines) + "\n"


def means_csv(entries: Sequence[Entry]) -> str:
    """One line for each data set and row: seeds finished and wanted, mean and half-width of each score in full, and
    the means of the conditions (`infoe_converged` is the share of the seeds)."""
    names = [name for score in SCORES for name in (score, f"{score}_half_width_95")]
    lines = []
    for entry in entries:
        numbers = [number for score in SCORES for number in interval(entry.values(score))]
        numbers += [interval(entry.values(name))[0] for name in CONDITIONS]
        lines.append([entry.data, entry.row, len(entry.scores), len(entry.seeds), *map(_plain, numbers), entry.split])
    return _csv(["data", "row", "finished", "seeds", *names, *CONDITIONS, "split"], lines)


def seeds_csv(entries: Sequence[Entry]) -> str:
    """One line for each finished cell."""
    lines = [
        [entry.data, entry.row, seed, *(_plain(scores[name]) for name in (*SCORES, *CONDITIONS)), entry.split]
        for entry in entries
        for seed, scores in entry.scores.items()
    ]
    return _csv(["data", "row", "seed", *SCORES, *CONDITIONS, "split"], lines)


def _images(entries: Sequence[Entry]) -> str:
    """How many images the scores are of, and whether training saw them."""
    counts: dict[str, str] = {}
    for entry in entries:
        numbers = sorted({int(number) for number in entry.values("evaluation_images")})
        if numbers:
            counts[entry.data] = " or ".join(f"{number:,}" for number in numbers)
    if len(set(counts.values())) == 1:
        which = f"N = {next(iter(counts.values()))} "
    else:
        which = " and ".join(f"N = {number} ({data})" for data, number in counts.items())
        which += " " if counts else ""
    splits = {entry.split for entry in entries}
    if len(splits) > 1:
        return f"{which}images, held out or not as each run's `split` says"
    return f"{which}held-out images" if splits == {"held-out"} else f"{which}images that training sees too"


def _by_data(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.data, []).append(entry)
    return groups


def _cells(entry: Entry, plus_minus: str) -> list[str]:
    cells = []
    for score, (_, decimals) in COLUMNS.items():
        mean, half = interval(entry.values(score))
        text = "-" if math.isnan(mean) else f"{mean:,.{decimals}f}"
        if score == "active":
            text += _out_of(entry)
        elif not math.isnan(half):
            text += f" {plus_minus} {half:,.{decimals}f}"
        cells.append(text + (UNCONVERGED if score == "infoe" and not entry.converged else ""))
    return cells


def _out_of(entry: Entry) -> str:
    """What stands behind the mean of active latents: how many there are."""
    numbers = sorted({int(number) for number in entry.values("num_latents")})
    return f" / {' or '.join(map(str, numbers))}" if numbers else ""


def _mark(entry: Entry) -> str:
    return "" if entry.complete else f" ({len(entry.scores)}/{len(entry.seeds)})"


def _plain(number: float) -> str:
    return "" if math.isnan(number) else repr(number)


def _csv(header: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(lines)
    return text.getvalue()


def _escape(text: str) -> str:
    special = {character: f"\\{character}" for character in "&%$#_{}"}
    special |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(character, character) for character in text)
