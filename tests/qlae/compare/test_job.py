"""Jobs of real processes, on a folder of small pictures: without factors to score, a cell is a matter of moments."""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from qlae.checkpoint import load_training_state
from qlae.compare import job
from qlae.compare.cells import GridFolder, State, check_configs, owner, state_of
from qlae.compare.grid import Choice, Grid, load_grid
from qlae.compare.job import completed, run_job
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
    assert "| QLAE | " in table and "(n/m)" not in table
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


def test_what_a_look_meets_ends_the_job_after_the_workers_have_saved(comparison: Comparison) -> None:
    """The first checkpoint by the clock would come after a million steps."""
    comparison.write({"QLAE": {}}, [0], steps=1_000_000, evaluation_every=1_000_000)
    grid = completed(comparison.grid)
    (cell,) = grid.cells
    events = comparison.folder.run(cell).events

    def look() -> None:
        if events.exists():
            raise UserError("the disk is full")

    with pytest.raises(UserError, match="the disk is full"):
        run_job(grid, comparison.folder, workers=1, time_limit=None, look=look)
    assert load_training_state(comparison.folder.run(cell).checkpoint)["step"] >= 0
    assert comparison.states() == [State.OPEN]
    assert not comparison.folder.claim(cell).exists()


class EndedProcess:
    """A worker process that has ended, as the job sees it."""

    pid = 1

    def __init__(self, exitcode: int) -> None:
        self.exitcode = exitcode
        self.sentinel, other = Pipe()
        # the end of a connection is ready to be read
        other.close()

    def join(self) -> None:
        pass


def ended_worker(exitcode: int, message: str | None = None) -> job._Worker:
    receiver, sender = Pipe(duplex=False)
    if message is not None:
        sender.send(message)
    return job._Worker(job._Place(1, None), EndedProcess(exitcode), receiver, None)


def test_the_first_problem_is_kept_and_after_it_no_worker_is_replaced(
    grid: Grid, folder: GridFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that is told to stop while it still starts dies of the signal."""
    hired: list[object] = []
    monkeypatch.setattr(job._Crew, "_hire", lambda crew, place: hired.append(place))
    crew = job._Crew(grid.cells, folder, math.inf, [])
    crew.running = [ended_worker(job.PROBLEM_EXIT, "the disk is full"), ended_worker(-signal.SIGTERM)]
    crew.look_after(10.0, replace_dead=True)
    crew.running = [ended_worker(-signal.SIGTERM), ended_worker(job.PROBLEM_EXIT, "it is still full")]
    crew.look_after(10.0, replace_dead=True)
    assert str(crew.problem) == "the disk is full"
    assert not hired and not crew.running


def test_a_worker_that_dies_before_it_takes_a_cell_ends_the_job(grid: Grid, folder: GridFolder) -> None:
    crew = job._Crew(grid.cells, folder, math.inf, [])
    crew.running = [ended_worker(-signal.SIGSEGV)]
    crew.look_after(10.0, replace_dead=True)
    assert "ended with SIGSEGV before it took a cell" in str(crew.problem)


@pytest.mark.parametrize(
    ("visible", "workers", "expected"),
    [
        (None, 5, ["0", "1", "2", "0", "1"]),
        ("3, GPU-8a,5", 4, ["3", "GPU-8a", "5", "3"]),
        ("2", 2, ["2", "2"]),
    ],
)
def test_workers_share_the_gpus_in_turn(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, workers: int, expected: list[str]
) -> None:
    monkeypatch.setattr(job, "choose_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    places = job._places("auto", workers)
    assert [place.gpu for place in places] == expected
    assert {place.threads for place in places} == {12 // workers}


@pytest.mark.parametrize(("workers", "threads"), [(1, 4), (3, 1), (9, 1)])
def test_on_the_cpu_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch, workers: int, threads: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)))
    assert job._places("cpu", workers) == [job._Place(threads, None)] * workers


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
