import csv
import io
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from qlae.compare.cells import GridFolder
from qlae.compare.grid import Grid
from qlae.compare.table import Entry, caption, collect, interval, latex, markdown, means_csv, seeds_csv
from qlae.run_folder import RunFolder

NAN = math.nan


def scores(infom: float, infoe: float = 0.9, infoc: float = 0.5, **others: float) -> dict[str, float]:
    values = {"infom": infom, "infoe": infoe, "infoc": infoc, "psnr": 30.0, "active": 12, "seconds": 100.0}
    return values | {"num_latents": 12, "infoe_converged": 1.0, "evaluation_images": 10_000} | others


@pytest.fixture
def entries() -> list[Entry]:
    seeds = (0, 1, 2)
    full = {
        0: scores(0.80, psnr=29.0, seconds=1000.0),
        1: scores(0.85, active=11),
        2: scores(0.90, psnr=31.0, seconds=1300.0, active=6),
    }
    return [
        Entry("rooms3d", "QLAE", seeds, full),
        Entry("rooms3d", "a|b & n_v", seeds, {1: scores(0.5, infoe_converged=0.0)}),
        Entry("rooms3d", "GAN", seeds, {}),
        Entry("pictures", "QLAE", seeds, {seed: scores(NAN, NAN, NAN, infoe_converged=NAN) for seed in seeds}),
    ]


def test_the_interval_is_students() -> None:
    # of a table of the t distribution: t(0.975, 2) = 4.302653, t(0.975, 6) = 2.446912
    mean, half = interval(np.array([0.80, 0.85, 0.90]))
    assert mean == pytest.approx(0.85)
    assert half == pytest.approx(4.302653 * 0.05 / math.sqrt(3), rel=1e-6)
    values = np.array([0.91, 0.94, 0.95, 0.93, 0.97, 0.9, 0.96])
    low, high = stats.t.interval(0.95, 6, loc=values.mean(), scale=stats.sem(values))
    mean, half = interval(values)
    assert (mean - half, mean + half) == pytest.approx((low, high), rel=1e-12)
    assert half == pytest.approx(2.446912 * np.sqrt(((values - mean) ** 2).sum() / 6 / 7), rel=1e-6)


def test_an_interval_needs_two_values() -> None:
    assert interval(np.array([0.4]))[0] == 0.4
    assert math.isnan(interval(np.array([0.4]))[1])
    assert all(math.isnan(value) for value in interval(np.array([])))


def test_markdown(entries: list[Entry]) -> None:
    lines = markdown(entries).splitlines()
    assert lines[:9] == [
        "| rooms3d | InfoM | InfoE | InfoC | PSNR, dB | active | seconds |",
        "|---|---|---|---|---|---|---|",
        "| QLAE | 0.85 ± 0.12 | 0.90 ± 0.00 | 0.50 ± 0.00 | 30.0 ± 2.5 | 9.7 / 12 | 800 ± 1,551 |",
        "| a\\|b & n_v (1/3) | 0.50 | 0.90* | 0.50 | 30.0 | 12.0 / 12 | 100 |",
        "| GAN (0/3) | - | - | - | - | - | - |",
        "",
        "| pictures | InfoM | InfoE | InfoC | PSNR, dB | active | seconds |",
        "|---|---|---|---|---|---|---|",
        "| QLAE | - | - | - | 30.0 ± 0.0 | 12.0 / 12 | 100 ± 0 |",
    ]
    assert lines[-1] == (
        "Means over 3 seeds (0, 1, 2), plus or minus half the width of Student's t 95 % interval over them; "
        "(n/m): only n of m seeds are finished and counted. InfoM, InfoE and InfoC by the protocol standalone, and "
        "PSNR, on N = 10,000 held-out images; higher is better. active: mean number of latents that vary, of those "
        "there are. *: for at least one seed a regression of InfoE did not converge."
    )


def test_the_caption_says_what_is_there(entries: list[Entry]) -> None:
    assert "n/m" not in caption(entries[:1]) and "converge" not in caption(entries[:1])
    one = Entry("rooms3d", "QLAE", (4,), {4: scores(0.5)})
    assert caption([one]).startswith("Seed 4 alone, without an interval. ")
    few = Entry("pictures", "QLAE", (4,), {4: scores(0.5, evaluation_images=50)}, "reference")
    assert "on N = 50 images that training sees too;" in caption([few])
    assert "on N = 10,000 (rooms3d) and N = 50 (pictures) images, held out or not as" in caption([one, few])
    assert "on held-out images;" in caption([replace(one, scores={})])


def test_latex(entries: list[Entry]) -> None:
    text = latex(entries)
    assert (
        r"QLAE & 0.85 $\pm$ 0.12 & 0.90 $\pm$ 0.00 & 0.50 $\pm$ 0.00 & 30.0 $\pm$ 2.5 & 9.7 / 12 & 800 $\pm$ 1,551 \\"
        in text
    )
    assert r"a|b \& n\_v (1/3) & 0.50 & 0.90* & 0.50 & 30.0 & 12.0 / 12 & 100 \\" in text
    assert r"95 \% interval" in text
    assert text.count(r"\begin{") == text.count(r"\end{") == 2
    # every line of the body has a cell for each of the seven columns
    body = [line for line in text.splitlines() if line.endswith(r" \\")]
    assert len(body) == 6
    assert {len(re.findall(r"(?<!\\)&", line)) for line in body} == {6}


def test_csv_has_full_precision_and_every_seed(entries: list[Entry]) -> None:
    means = list(csv.DictReader(io.StringIO(means_csv(entries))))
    assert [(line["data"], line["row"], line["finished"], line["seeds"]) for line in means] == [
        ("rooms3d", "QLAE", "3", "3"),
        ("rooms3d", "a|b & n_v", "1", "3"),
        ("rooms3d", "GAN", "0", "3"),
        ("pictures", "QLAE", "3", "3"),
    ]
    assert float(means[0]["infom"]) == pytest.approx(0.85, rel=1e-12)
    assert float(means[0]["infom_half_width_95"]) == pytest.approx(0.124206, rel=1e-5)
    assert (means[1]["infom"], means[1]["infom_half_width_95"]) == ("0.5", "")
    assert means[2]["psnr"] == means[3]["infom"] == ""
    seeds = list(csv.DictReader(io.StringIO(seeds_csv(entries))))
    assert len(seeds) == 7
    assert seeds[2] == {
        "data": "rooms3d",
        "row": "QLAE",
        "seed": "2",
        "infom": "0.9",
        "infoe": "0.9",
        "infoc": "0.5",
        "psnr": "31.0",
        "active": "6",
        "seconds": "1300.0",
        "num_latents": "12",
        "infoe_converged": "1.0",
        "evaluation_images": "10000",
        "split": "held-out",
    }
    assert (means[0]["num_latents"], means[0]["infoe_converged"], means[0]["evaluation_images"]) == (
        "12.0",
        "1.0",
        "10000.0",
    )
    assert means[1]["infoe_converged"] == "0.0" and means[3]["infoe_converged"] == ""


def test_only_finished_cells_count(grid: Grid, folder: GridFolder) -> None:
    for position, steps in enumerate([20, 20, 12]):
        run = folder.run(grid.cells[position])
        run.path.mkdir(parents=True)
        summary = {"infom": None, "infoe": 0.5, "infoc": 0.25, "psnr": 20.0 + position, "seconds": 3, "steps": steps}
        summary |= {"active": 4, "num_latents": 6, "infoe_converged": position == 0, "evaluation_images": 6}
        RunFolder(run.path).write_summary(summary)
    found = collect(grid, folder)
    assert [(entry.row, entry.seeds, sorted(entry.scores)) for entry in found] == [
        ("QLAE", (0, 1), [0]),
        ("five", (0, 1), [0]),
    ]
    assert found[1].values("psnr").tolist() == [21.0]
    assert found[0].values("infom").tolist() == []
    assert not found[0].complete
    assert [entry.converged for entry in found] == [True, False]
    assert found[0].scores[0] | {"infom": None} == {
        **{"infom": None, "infoe": 0.5, "infoc": 0.25, "psnr": 20.0, "active": 4.0, "seconds": 3.0},
        **{"num_latents": 6.0, "infoe_converged": 1.0, "evaluation_images": 6.0},
    }
    assert json.loads(folder.run(grid.cells[2]).summary_file.read_text())["steps"] == 12
