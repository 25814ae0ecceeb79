"""The figure of a comparison: every seed a dot, and the mean with its interval, a panel for each score.

The panels show the range of the dots. An interval of few seeds is often wider; it ends in an arrow there.
"""

import io
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.markers import CARETLEFT, CARETRIGHT
from matplotlib.ticker import MaxNLocator

from qlae.compare.table import Entry, interval
from qlae.figures import BLUE, GREY, LIGHT_GREY, VERMILLION

PANELS = {"infom": "InfoM", "infoe": "InfoE", "infoc": "InfoC", "psnr": "PSNR in dB"}

# of the scores that cannot be outside of it
BOUNDS = {"infom": (0.0, 1.0), "infoe": (0.0, 1.0), "infoc": (0.0, 1.0)}

# inches and points; at a width of 800 pixels the small text is 12 pixels high
WIDTH, ROW_HEIGHT, HEAD, DOTS_PER_INCH = 8.0, 0.34, 1.15, 200
TEXT, SMALL_TEXT = 10.0, 9.0
# in rows, from a row's middle: the dots lie around DOTS, SPREAD apart in all, above the mean and its interval
DOTS, SPREAD, MEAN = -0.12, 0.3, 0.24
DASHES = (0, (4, 3))
ARROW = "arrow"
# between the outermost dots and the panel's edge, and between them at least, as shares of the scores' sizes
MARGIN, LEAST = 0.08, 0.02


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
    figure.suptitle(_title(entries), fontsize=TEXT, x=0.01, ha="left")
    legend = {"fontsize": SMALL_TEXT, "frameon": False, "columnspacing": 1.4, "handletextpad": 0.5}
    clipped = any(line.get_gid() == ARROW for axes in panels for line in axes.get_lines())
    figure.legend(handles=_legend(entries, clipped), loc="outside lower center", ncols=2, **legend)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DOTS_PER_INCH, facecolor="white")
    return content.getvalue()


def _draw_panel(axes: Axes, entries: Sequence[Entry], score: str) -> None:
    low, high = _limits(entries, score)
    axes.set_title(PANELS[score], fontsize=TEXT)
    axes.set_xlim(low, high)
    axes.set_ylim(len(entries) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=SMALL_TEXT, length=0)
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axes.grid(axis="x", color=LIGHT_GREY, linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10], prune="both"))
    axes.set_axisbelow(True)
    for row in range(1, len(entries), 2):
        axes.axhspan(row - 0.5, row + 0.5, color="#F6F6F6", linewidth=0.0, zorder=0)
    first, _ = interval(entries[0].values(score))
    if not math.isnan(first):
        axes.axvline(first, color=GREY, linewidth=0.9, linestyle=DASHES, zorder=1)
    for row, entry in enumerate(entries):
        _draw_entry(axes, row, entry.values(score), low, high)


def _limits(entries: Sequence[Entry], score: str) -> tuple[float, float]:
    """What a panel shows: all dots with a margin, and of a bounded score nothing outside of its bounds."""
    dots = np.concatenate([entry.values(score) for entry in entries])
    if len(dots) == 0:
        return 0.0, 1.0
    low, high = float(dots.min()), float(dots.max())
    size = max(high - low, LEAST * max(abs(low), abs(high), 1.0))
    low, high = low - MARGIN * size, high + MARGIN * size
    least, most = BOUNDS.get(score, (-math.inf, math.inf))
    return max(low, least), min(high, most)


def _draw_entry(axes: Axes, row: int, values: np.ndarray, low: float, high: float) -> None:
    if len(values) == 0:
        return
    mean, half = interval(values)
    if not math.isnan(half):
        _draw_interval(axes, row + MEAN, mean - half, mean + half, low, high)
    axes.plot([mean], [row + MEAN], "|", color=VERMILLION, markersize=7.5, markeredgewidth=2.2, zorder=3)
    heights = row + DOTS + (np.linspace(-SPREAD / 2, SPREAD / 2, len(values)) if len(values) > 1 else np.zeros(1))
    # a dot at a bound is drawn whole
    dots = {"markersize": 4.6, "alpha": 0.85, "markeredgewidth": 0.0, "clip_on": False}
    axes.plot(values, heights, "o", color=BLUE, zorder=4, **dots)


def _draw_interval(axes: Axes, height: float, left: float, right: float, low: float, high: float) -> None:
    axes.plot([max(left, low), min(right, high)], [height] * 2, color=VERMILLION, linewidth=1.6, zorder=2)
    for beyond, edge, marker in ((left < low, low, CARETLEFT), (right > high, high, CARETRIGHT)):
        if beyond:
            axes.plot([edge], [height], marker=marker, color=VERMILLION, markersize=5.0, clip_on=False, gid=ARROW)


def _name_rows(axes: Axes, entries: Sequence[Entry]) -> None:
    labels = [_label(entry) for entry in entries]
    axes.set_yticks(range(len(entries)), labels, fontsize=TEXT)
    for text, entry in zip(axes.get_yticklabels(), entries, strict=True):
        text.set_color("black" if entry.scores else GREY)


def _label(entry: Entry) -> str:
    if entry.complete:
        return entry.row
    return f"{entry.row} ({len(entry.scores)}/{len(entry.seeds)} seeds)" if entry.scores else f"{entry.row} (none yet)"


def _title(entries: Sequence[Entry]) -> str:
    count = len(entries[0].seeds)
    return f"{entries[0].data}, {count} seed{'s' * (count > 1)}"


def _legend(entries: Sequence[Entry], clipped: bool) -> list[Line2D]:
    dot = Line2D([], [], color=BLUE, marker="o", linestyle="", markersize=5.0, label="one seed")
    first = Line2D([], [], color=GREY, linewidth=0.9, linestyle=DASHES, label=f"mean of {entries[0].row}")
    bar = {"color": VERMILLION, "linewidth": 1.6, "marker": "|", "markersize": 7.5, "markeredgewidth": 2.2}
    mean = Line2D([], [], label="mean and 95 % interval", **bar)
    arrow = Line2D(
        [], [], color=VERMILLION, marker=CARETRIGHT, linestyle="", label="the interval goes on", markersize=5.0
    )
    return [dot, first, mean, arrow] if clipped else [dot, first, mean]
