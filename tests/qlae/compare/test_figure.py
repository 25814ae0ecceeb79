import io
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.markers import CARETLEFT, CARETRIGHT
from PIL import Image

from qlae.compare import figure
from qlae.compare.figure import draw
from qlae.compare.table import Entry


def entry(row: str, values: list[float], *, seeds: int = 3) -> Entry:
    scores = {
        seed: {"infom": value, "infoe": value, "infoc": value, "psnr": 30.0 + value, "seconds": 1.0}
        for seed, value in enumerate(values)
    }
    return Entry("rooms3d", row, tuple(range(seeds)), scores)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[figure.Figure]:
    made: list[figure.Figure] = []

    class Recorded(figure.Figure):
        def __init__(self, **options: object) -> None:
            super().__init__(**options)
            made.append(self)

    monkeypatch.setattr(figure, "Figure", Recorded)
    return made


def texts(drawn: figure.Figure) -> list[str]:
    return [text.get_text() for text in drawn.axes[0].get_yticklabels()]


def test_every_seed_is_a_dot_and_the_mean_has_its_interval(figures: list[figure.Figure]) -> None:
    draw([entry("QLAE", [0.80, 0.85, 0.90]), entry("VAE", [0.4, 0.5, 0.6])])
    (drawn,) = figures
    assert [axes.get_title() for axes in drawn.axes] == ["InfoM", "InfoE", "InfoC", "PSNR in dB"]
    lines = drawn.axes[0].get_lines()
    dots = [line for line in lines if line.get_marker() == "o"]
    assert [line.get_xdata().tolist() for line in dots] == [[0.80, 0.85, 0.90], [0.4, 0.5, 0.6]]
    # dots of equal value do not hide each other
    assert all(len(set(line.get_ydata())) == 3 for line in dots)
    means = [line.get_xdata()[0] for line in lines if line.get_marker() == "|"]
    np.testing.assert_allclose(means, [0.85, 0.5])
    # the panel shows the dots with a margin of 0.08 of their range
    np.testing.assert_allclose(drawn.axes[0].get_xlim(), [0.36, 0.94])
    # t(0.975, 2) / sqrt(3) = 2.484138; what reaches beyond the panel ends there with an arrow
    intervals = bars(drawn.axes[0])
    np.testing.assert_allclose(intervals[0], [0.85 - 2.484138 * 0.05, 0.94], rtol=1e-6)
    np.testing.assert_allclose(intervals[1], [0.36, 0.5 + 2.484138 * 0.1], rtol=1e-6)
    assert arrows(drawn.axes[0]) == [(pytest.approx(0.94), CARETRIGHT), (pytest.approx(0.36), CARETLEFT)]
    assert "the interval goes on" in legend(drawn)
    # the first row is on top
    bottom, top = drawn.axes[0].get_ylim()
    assert top < 0 < 1 < bottom


def bars(axes: Axes) -> list[np.ndarray]:
    """Both ends of each interval's line."""
    horizontal = [line for line in axes.get_lines() if len(set(line.get_ydata())) == 1]
    return [line.get_xdata() for line in horizontal if len(line.get_xdata()) == 2]


def arrows(axes: Axes) -> list[tuple[float, int]]:
    lines = [line for line in axes.get_lines() if line.get_marker() in (CARETLEFT, CARETRIGHT)]
    return [(line.get_xdata()[0], line.get_marker()) for line in lines]


def legend(drawn: figure.Figure) -> set[str]:
    return {text.get_text() for text in drawn.legends[0].get_texts()}


def test_an_interval_within_the_panel_is_drawn_whole_and_needs_no_arrow(figures: list[figure.Figure]) -> None:
    draw([entry("QLAE", [0.50, 0.51, 0.52]), entry("VAE", [0.2]), entry("AE", [0.9])])
    axes = figures[0].axes[0]
    np.testing.assert_allclose(bars(axes), [[0.51 - 2.484138 * 0.01, 0.51 + 2.484138 * 0.01]], rtol=1e-6)
    assert not any(arrows(axes) for axes in figures[0].axes)
    assert legend(figures[0]) == {"one seed", "mean and 95 % interval", "mean of QLAE"}


def test_a_bounded_score_is_shown_within_its_bounds(figures: list[figure.Figure]) -> None:
    """And with equal dots a panel has a width all the same."""
    draw([entry("QLAE", [0.0, 0.5, 1.0])])
    draw([entry("QLAE", [1.0, 1.0, 1.0])])
    wide, narrow = figures
    assert wide.axes[0].get_xlim() == (0.0, 1.0)
    np.testing.assert_allclose(wide.axes[3].get_xlim(), [29.92, 31.08])
    assert narrow.axes[0].get_xlim()[0] < narrow.axes[0].get_xlim()[1] == 1.0
    low, high = narrow.axes[3].get_xlim()
    assert low < 31.0 < high


def test_text_is_readable_in_a_page_of_800_pixels(figures: list[figure.Figure]) -> None:
    draw([entry("QLAE", [0.8, 0.9, 0.7])])
    axes = figures[0].axes[0]
    shown = [axes.title, *axes.get_xticklabels(), *axes.get_yticklabels(), *figures[0].legends[0].get_texts()]
    scale = 800 / (72 * figures[0].get_size_inches()[0])
    assert min(text.get_fontsize() * scale for text in shown) >= 12


def test_unfinished_rows_say_so(figures: list[figure.Figure]) -> None:
    draw([entry("QLAE", [0.8, 0.9, 0.7]), entry("VAE", [0.4]), entry("AE", [])])
    assert texts(figures[0]) == ["QLAE", "VAE (1/3 seeds)", "AE (none yet)"]


@pytest.mark.parametrize("rows", [[[]], [[0.5]], [[], [0.4]], [[float("nan")] * 3]])
def test_a_figure_of_little_is_a_picture(rows: list[list[float]]) -> None:
    content = draw([entry(f"row {number}", values) for number, values in enumerate(rows)])
    with Image.open(io.BytesIO(content)) as picture:
        assert picture.format == "PNG" and picture.width == 1600


def test_a_score_that_no_row_has_gets_no_panel(figures: list[figure.Figure]) -> None:
    scores = {0: dict.fromkeys(("infom", "infoe", "infoc"), float("nan")) | {"psnr": 30.0, "seconds": 1.0}}
    draw([Entry("pictures", "QLAE", (0,), scores)])
    assert [axes.get_title() for axes in figures[0].axes] == ["PSNR in dB"]


def test_long_and_many_labels_stay_inside(figures: list[figure.Figure]) -> None:
    rows = [entry(f"a method with a rather long name, number {number}", [0.5, 0.6]) for number in range(16)]
    draw(rows)
    (drawn,) = figures
    drawn.canvas.draw()
    boxes = [text.get_window_extent() for text in drawn.axes[0].get_yticklabels()]
    assert all(box.x0 >= 0 for box in boxes)
    assert all(upper.y0 >= lower.y1 for upper, lower in pairwise(boxes))
