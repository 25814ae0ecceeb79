"""The figure of a comparison: every seed a dot, and the mean with its interval, a panel for each score."""

import io
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from qlae.compare.table import Entry, interval
from qlae.figures import BLUE, DOTS_PER_INCH, GREY, LIGHT_GREY, TEXT, VERMILLION

PANELS = {"infom": "InfoM", "infoe": "InfoE", "infoc": "InfoC", "psnr": "PSNR in dB"}

# inches; the width is read well at 900 pixels
WIDTH, ROW_HEIGHT, HEAD = 10.0, 0.38, 1.1
# in rows, from a row's middle: the dots lie around DOTS, SPREAD apart in all, above the mean and its interval
DOTS, SPREAD, MEAN = -0.14, 0.3, 0.22


def draw(entries: Sequence[Entry]) -> bytes:
    """A PNG of the entries of one data set, in their order from the top.

    A dashed line through each panel marks the mean of the first row.
    """
    figure = Figure(figsize=(WIDTH, HEAD + ROW_HEIGHT * len(entries)), layout="constrained")
    FigureCanvasAgg(figure)
    shown = [score for score in PANELS if any(len(entry.values(score)) for entry in entries)] or ["infom"]
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, score in zip(panels, shown, strict=True):
        _draw_panel(axes, entries, score)
    _name_rows(panels[0], entries)
    figure.suptitle(_title(entries), fontsize=TEXT + 1, x=0.01, ha="left")
    figure.legend(handles=_legend(entries), loc="outside lower center", ncols=3, fontsize=TEXT, frameon=False)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DOTS_PER_INCH, facecolor="white")
    return content.getvalue()


def _draw_panel(axes: Axes, entries: Sequence[Entry], score: str) -> None:
    axes.set_title(PANELS[score], fontsize=TEXT + 1)
    axes.set_ylim(len(entries) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=TEXT)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", color=LIGHT_GREY, linewidth=0.8)
    axes.locator_params(axis="x", nbins=4)
    axes.set_axisbelow(True)
    for row in range(1, len(entries), 2):
        axes.axhspan(row - 0.5, row + 0.5, color="#F6F6F6", linewidth=0.0, zorder=0)
    first, _ = interval(entries[0].values(score))
    if not math.isnan(first):
        axes.axvline(first, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    for row, entry in enumerate(entries):
        _draw_entry(axes, row, entry, score)


def _draw_entry(axes: Axes, row: int, entry: Entry, score: str) -> None:
    values = entry.values(score)
    if len(values) == 0:
        return
    mean, half = interval(values)
    heights = row + DOTS + (np.linspace(-SPREAD / 2, SPREAD / 2, len(values)) if len(values) > 1 else np.zeros(1))
    if not math.isnan(half):
        axes.plot([mean - half, mean + half], [row + MEAN] * 2, color=VERMILLION, linewidth=1.8, zorder=2)
    axes.plot([mean], [row + MEAN], "|", color=VERMILLION, markersize=9.0, markeredgewidth=2.4, zorder=3)
    axes.plot(values, heights, "o", color=BLUE, markersize=4.2, alpha=0.8, markeredgewidth=0.0, zorder=4)


def _name_rows(axes: Axes, entries: Sequence[Entry]) -> None:
    labels = [_label(entry) for entry in entries]
    axes.set_yticks(range(len(entries)), labels, fontsize=TEXT + 1)
    for text, entry in zip(axes.get_yticklabels(), entries, strict=True):
        text.set_color("black" if entry.scores else GREY)


def _label(entry: Entry) -> str:
    if entry.complete:
        return entry.row
    return f"{entry.row} ({len(entry.scores)}/{len(entry.seeds)} seeds)" if entry.scores else f"{entry.row} (none yet)"


def _title(entries: Sequence[Entry]) -> str:
    count = len(entries[0].seeds)
    return f"{entries[0].data}, {count} seed{'s' * (count > 1)}"


def _legend(entries: Sequence[Entry]) -> list[Line2D]:
    dot = Line2D([], [], color=BLUE, marker="o", linestyle="", markersize=4.5, alpha=0.75, label="one seed")
    mean = Line2D(
        [], [], color=VERMILLION, marker="|", markersize=9.0, markeredgewidth=2.4, label="mean and 95 % interval"
    )
    first = Line2D([], [], color=GREY, linewidth=0.9, linestyle=(0, (4, 3)), label=f"mean of {entries[0].row}")
    return [dot, mean, first]
