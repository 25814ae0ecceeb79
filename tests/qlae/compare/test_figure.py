import io
from itertools import pairwise

import numpy as np
import pytest
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
    # t(0.975, 2) / sqrt(3) = 2.484138
    intervals = [line.get_xdata() for line in lines if line.get_linewidth() == 1.8 and len(line.get_xdata()) == 2]
    np.testing.assert_allclose(intervals[0], [0.85 - 2.484138 * 0.05, 0.85 + 2.484138 * 0.05], rtol=1e-6)
    np.testing.assert_allclose(intervals[1], [0.5 - 2.484138 * 0.1, 0.5 + 2.484138 * 0.1], rtol=1e-6)
    # the first row is on top
    bottom, top = drawn.axes[0].get_ylim()
    assert top < 0 < 1 < bottom


def test_unfinished_rows_say_so(figures: list[figure.Figure]) -> None:
    draw([entry("QLAE", [0.8, 0.9, 0.7]), entry("VAE", [0.4]), entry("AE", [])])
    assert texts(figures[0]) == ["QLAE", "VAE (1/3 seeds)", "AE (none yet)"]


@pytest.mark.parametrize("rows", [[[]], [[0.5]], [[], [0.4]], [[float("nan")] * 3]])
def test_a_figure_of_little_is_a_picture(rows: list[list[float]]) -> None:
    content = draw([entry(f"row {number}", values) for number, values in enumerate(rows)])
    with Image.open(io.BytesIO(content)) as picture:
        assert picture.format == "PNG" and picture.width == 1500


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
