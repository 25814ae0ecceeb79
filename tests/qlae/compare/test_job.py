"""Jobs of real processes, on a folder of small pictures: without factors to score, a cell is a matter of moments."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from qlae.checkpoint import load_training_state
from qlae.compare.cells import GridFolder, State, check_configs, owner, state_of
from qlae.compare.grid import Choice, Grid, load_grid
from qlae.compare.job import completed
from qlae.errors import UserError
from qlae.run_folder import RunFolder

OPTIONS = {"steps": 12, "evaluation_every": 4, "batch_size": 8}


class Comparison:
    """`qlae compare` on a file and a folder, as a person types it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = GridFolder(path / "out")
        self.file = path / "grid.yaml"
        pictures = path / "pictures"
        pictures.mkdir()
        pixels = np.random.default_rng(0).integers(0, 256, size=(40, 8, 8), dtype=np.uint8)
        for number, picture in enumerate(pixels):
            Image.fromarray(picture).save(pictures / f"{number:02}.png")

    def write(self, rows: dict[str, object], seeds: list[int], **options: object) -> None:
        content = {"data": [str(self.path / "pictures")], "options": OPTIONS | options, "seeds": seeds, "rows": rows}
        self.file.write_text(yaml.safe_dump(content))

    @property
    def grid(self) -> Grid:
        return load_grid(str(self.file), Choice(device="cpu"))

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-P", "-m", "qlae", "compare", str(self.file), "--output", str(self.folder.path)]
        return subprocess.Popen(
            [*command, "--device", "cpu", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def states(self) -> list[State]:
        return [state_of(self.folder, cell) for cell in self.grid.cells]

    def begun(self) -> int:
        """How often a cell was begun or gone on with, all cells together."""
        return len(list(self.folder.path.glob("cells/*/*/*/tensorboard/events.*")))


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    return Comparison(tmp_path)


def wait_until(condition: Callable[[], object], seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def test_two_jobs_on_one_folder_do_no_cell_twice(comparison: Comparison) -> None:
    comparison.write({"QLAE": {}, "five": {"levels": 5}}, [0, 1])
    jobs = [comparison.start("--workers", workers) for workers in ("1", "2")]
    outputs = [job.communicate(timeout=600.0) for job in jobs]
    assert comparison.states() == [State.DONE] * 4
    assert comparison.begun() == 4
    # the one that ends first may leave what the other has at hand
    codes = [job.returncode for job in jobs]
    assert 0 in codes and set(codes) <= {0, 3}, outputs
    table = (comparison.folder.path / "table.md").read_text()
    assert "| QLAE | " in table and "(n/N)" not in table
    assert not list(comparison.folder.path.rglob("*.claim"))


def test_killed_in_the_middle_it_goes_on(comparison: Comparison) -> None:
    """kill -9 for the job: its worker notices, saves and ends. kill -9 for both: the claim is taken over."""
    comparison.write({"QLAE": {}}, [0], steps=1_000_000, evaluation_every=50)
    (cell,) = comparison.grid.cells
    checkpoint = comparison.folder.run(cell).checkpoint
    job = comparison.start("--workers", "1")
    wait_until(checkpoint.exists)
    worker = owner(comparison.folder, cell)
    job.kill()
    job.communicate(timeout=60.0)
    wait_until(lambda: not worker.may_live())
    step = load_training_state(checkpoint)["step"]
    assert step >= 50 and comparison.states() == [State.OPEN]
    assert not comparison.folder.claim(cell).exists()

    job = comparison.start("--workers", "1")
    wait_until(lambda: load_training_state(checkpoint)["step"] > step)
    worker = owner(comparison.folder, cell)
    job.send_signal(signal.SIGSTOP)
    os.kill(worker.pid, signal.SIGKILL)
    job.kill()
    job.communicate(timeout=60.0)
    assert comparison.folder.claim(cell).exists() and comparison.states() == [State.OPEN]
    step = load_training_state(checkpoint)["step"]

    # a signal to the job saves and ends with its number
    job = comparison.start("--workers", "1")
    wait_until(lambda: load_training_state(checkpoint)["step"] > step)
    job.send_signal(signal.SIGINT)
    output, errors = job.communicate(timeout=240.0)
    assert job.returncode == 130, errors
    assert "1 cell of 1 left; the same command goes on" in output
    assert comparison.states() == [State.OPEN] and not comparison.folder.claim(cell).exists()
    assert "Traceback" not in errors


def test_a_worker_that_crashes_is_replaced_and_its_cell_has_failed(comparison: Comparison) -> None:
    comparison.write({"long": {"steps": 1_000_000, "evaluation_every": 50}, "short": {}}, [0])
    job = comparison.start("--workers", "1")
    long, _ = comparison.grid.cells
    wait_until(comparison.folder.run(long).checkpoint.exists)
    os.kill(owner(comparison.folder, long).pid, signal.SIGKILL)
    output, errors = job.communicate(timeout=240.0)
    assert job.returncode == 1, errors
    assert comparison.states() == [State.FAILED, State.DONE]
    assert "failed   pictures/long/seed0: the worker process ended with SIGKILL (out of memory?)" in output
    assert "1 of 2 cells done, 0 running, 1 failed" in errors


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"bad": {"network": "paper"}}, r"row 'bad' on pictures: .*multiples of 16"),
        ({"bad": {"network": "huge"}}, "row 'bad' on pictures: unknown network 'huge'"),
        ({"bad": {"method": "vqqvae"}}, "row 'bad' on pictures: unknown method 'vqqvae'"),
    ],
)
def test_what_builds_no_model_is_refused_before_anything_is_trained(
    comparison: Comparison, rows: dict[str, object], message: str
) -> None:
    comparison.write(rows, [0])
    with pytest.raises(UserError, match=message):
        completed(comparison.grid)


def test_what_is_left_to_the_data_set_is_decided_before_anything_is_trained(grid: Grid, folder: GridFolder) -> None:
    whole = completed(grid)
    assert [cell.name for cell in whole.cells] == [cell.name for cell in grid.cells]
    assert [cell.config.seed for cell in whole.cells] == [0, 0, 1, 1]
    # twice the three factors; the images' own 4 pixels
    assert {(cell.config.num_latents, cell.config.resolution) for cell in whole.cells} == {(6, 4)}
    assert [cell.config.levels for cell in whole.cells] == [10, 5, 10, 5]
    # so that a cell which was begun with more latents is not taken for one of these
    cell = grid.cells[0]
    RunFolder.create(folder.run(cell).path, replace(whole.cells[0].config, num_latents=7))
    check_configs(folder, [cell])
    with pytest.raises(UserError, match=r"--num-latents 7.* has 6 now"):
        check_configs(folder, [whole.cells[0]])
