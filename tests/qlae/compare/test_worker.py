import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from qlae import loading, training
from qlae.checkpoint import STATE, WEIGHTS, load_training_state
from qlae.compare import worker
from qlae.compare.cells import GridFolder, State, check_configs, state_of
from qlae.compare.claims import Owner
from qlae.compare.grid import Cell, Grid
from qlae.compare.worker import work
from qlae.errors import StorageError, UserError
from qlae.training import Trainer


@pytest.fixture(autouse=True)
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "write_figures", lambda *_: None)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[int, int]]:
    """How many steps were taken, by levels and seed."""
    taken: Counter[tuple[int, int]] = Counter()

    def count(trainer: Trainer) -> None:
        taken[trainer.config.levels, trainer.config.seed] += 1

    before_step(monkeypatch, count)
    return taken


def before_step(monkeypatch: pytest.MonkeyPatch, action: Callable[[Trainer], None]) -> None:
    original = Trainer._take_step

    def take_step(trainer: Trainer) -> None:
        action(trainer)
        original(trainer)

    monkeypatch.setattr(Trainer, "_take_step", take_step)


def fail_in(monkeypatch: pytest.MonkeyPatch, cell: Cell, step: int, error: BaseException) -> None:
    def action(trainer: Trainer) -> None:
        found = (trainer.config.levels, trainer.config.seed, trainer.step)
        if found == (cell.config.levels, cell.config.seed, step):
            raise error

    before_step(monkeypatch, action)


def states(grid: Grid, folder: GridFolder) -> list[State]:
    return [state_of(folder, cell) for cell in grid.cells]


def test_every_cell_is_trained_once(grid: Grid, folder: GridFolder, steps: Counter[tuple[int, int]]) -> None:
    assert states(grid, folder) == [State.OPEN] * 4
    assert work(grid.cells, folder) is None
    assert steps == {(levels, seed): 20 for levels in (10, 5) for seed in (0, 1)}
    assert states(grid, folder) == [State.DONE] * 4
    before = {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")}
    assert work(grid.cells, folder) is None
    assert {path: path.stat().st_mtime_ns for path in folder.path.rglob("*") if path.is_file()} == {
        path: time for path, time in before.items() if path.is_file()
    }
    assert not [path for path in before if path.suffix in (".claim", ".error")]


def test_a_cell_is_what_train_writes(grid: Grid, folder: GridFolder, tmp_path: Path) -> None:
    work(grid.cells[:1], folder)
    training.train(grid.cells[0].config, tmp_path / "run", progress=False)
    run = folder.run(grid.cells[0]).path
    assert run == folder.path / "cells" / "tiny" / "qlae" / "seed0"
    for name in ("config.yaml", "metrics.csv"):
        assert (run / name).read_text() == (tmp_path / "run" / name).read_text()


def test_two_workers_share_the_cells(grid: Grid, folder: GridFolder, steps: Counter[tuple[int, int]]) -> None:
    barrier = threading.Barrier(2, timeout=60.0)

    def run() -> None:
        barrier.wait()
        work(grid.cells, folder)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert steps == {(levels, seed): 20 for levels in (10, 5) for seed in (0, 1)}
    assert states(grid, folder) == [State.DONE] * 4


def test_a_signal_saves_and_the_next_work_goes_on_to_the_bit(
    grid: Grid, folder: GridFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:
        before_step(patch, lambda trainer: trainer.step == 10 and signal.raise_signal(signal.SIGTERM))
        assert work(grid.cells, folder) == signal.SIGTERM
    assert states(grid, folder) == [State.OPEN] * 4
    run = folder.run(grid.cells[0])
    assert load_training_state(run.checkpoint)["step"] == 11
    assert not folder.run(grid.cells[1]).path.exists()

    assert work(grid.cells, folder) is None
    assert states(grid, folder) == [State.DONE] * 4
    training.train(grid.cells[0].config, tmp_path / "whole", progress=False)
    weights, others = (load_file(path / "checkpoint" / WEIGHTS) for path in (run.path, tmp_path / "whole"))
    assert all(weights[name].equal(others[name]) for name in weights)


def raise_signal_from_another_thread(number: int) -> None:
    """As a worker asks itself to stop when its job has died."""
    thread = threading.Thread(target=os.kill, args=(os.getpid(), number))
    thread.start()
    thread.join()


@pytest.mark.parametrize(
    ("number", "send"),
    [
        (signal.SIGTERM, signal.raise_signal),
        (signal.SIGINT, signal.raise_signal),
        (signal.SIGTERM, raise_signal_from_another_thread),
    ],
)
@pytest.mark.parametrize("begun", [False, True])
def test_a_signal_before_the_first_step_is_not_lost(
    grid: Grid,
    folder: GridFolder,
    steps: Counter[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    send: Callable[[int], None],
    begun: bool,
) -> None:
    if begun:
        with monkeypatch.context() as patch:
            before_step(patch, lambda trainer: trainer.step == 10 and signal.raise_signal(signal.SIGTERM))
            work(grid.cells, folder)
        steps.clear()
    with monkeypatch.context() as patch:
        for module in (training, loading):
            original = module.load_dataset
            patch.setattr(module, "load_dataset", lambda *a, o=original, **k: (send(number), o(*a, **k))[1])
        assert work(grid.cells, folder) == number
    assert steps.total() <= 1
    assert states(grid, folder) == [State.OPEN] * 4
    assert load_training_state(folder.run(grid.cells[0]).checkpoint)["step"] == (11 if begun else 0) + steps.total()


def test_a_cell_without_its_figures_is_not_finished(
    grid: Grid, folder: GridFolder, monkeypatch: pytest.MonkeyPatch, steps: Counter[tuple[int, int]]
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no font")

    with monkeypatch.context() as patch:
        patch.setattr(training, "write_figures", fail)
        work(grid.cells[:1], folder)
    assert state_of(folder, grid.cells[0]) is State.FAILED
    assert folder.error(grid.cells[0]).read_text().startswith("RuntimeError: no font")
    folder.error(grid.cells[0]).unlink()
    steps.clear()
    work(grid.cells[:1], folder)
    # it was trained already; it is scored and drawn again
    assert not steps
    assert state_of(folder, grid.cells[0]) is State.DONE


def test_a_failing_cell_is_recorded_and_the_rest_is_trained(
    grid: Grid, folder: GridFolder, monkeypatch: pytest.MonkeyPatch, steps: Counter[tuple[int, int]]
) -> None:
    bad = grid.cells[1]
    with monkeypatch.context() as patch:
        fail_in(patch, bad, 10, RuntimeError("no such\nkernel"))
        work(grid.cells, folder)
    assert states(grid, folder) == [State.DONE, State.FAILED, State.DONE, State.DONE]
    lines = folder.error(bad).read_text().splitlines()
    assert lines[0] == "RuntimeError: no such kernel"
    assert f"process {os.getpid()} on" in lines[2]
    assert "Traceback" in lines[3]
    # it is left alone until someone wants it again, and then goes on from its checkpoint of step 8
    work(grid.cells, folder)
    assert state_of(folder, bad) is State.FAILED
    folder.error(bad).unlink()
    steps.clear()
    work(grid.cells, folder)
    assert state_of(folder, bad) is State.DONE
    assert steps == {(5, 0): 12}


def test_divergence_is_a_failure_of_the_cell(grid: Grid, folder: GridFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def poison(trainer: Trainer) -> None:
        if trainer.config.levels == 10 and trainer.config.seed == 0 and trainer.step == 4:
            next(trainer.method.decoder.parameters()).data.fill_(float("nan"))

    before_step(monkeypatch, poison)
    work(grid.cells[:2], folder)
    assert folder.error(grid.cells[0]).read_text().startswith("the loss became nan in step 5")
    assert states(grid, folder)[:2] == [State.FAILED, State.DONE]


@pytest.mark.parametrize("where", ["step", "checkpoint"])
def test_a_full_disk_ends_the_work_and_blames_no_cell(
    grid: Grid, folder: GridFolder, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "metrics.csv")
    with monkeypatch.context() as patch:
        if where == "step":
            fail_in(patch, grid.cells[1], 10, full)
        else:

            def save(*arguments: object, **options: object) -> None:
                raise full

            patch.setattr("qlae.checkpoint.save_file", save)
        with pytest.raises(StorageError, match=r"No space left on device.*make room"):
            work(grid.cells, folder)
    assert State.FAILED not in states(grid, folder)
    assert work(grid.cells, folder) is None
    assert states(grid, folder) == [State.DONE] * 4


def test_a_failure_that_cannot_be_recorded_ends_the_work(
    grid: Grid, folder: GridFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def publish(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(worker, "publish", publish)
    fail_in(monkeypatch, grid.cells[0], 10, RuntimeError("bad"))
    with pytest.raises(StorageError, match=r"cannot write .*seed0\.error"):
        work(grid.cells, folder)


def test_the_deadline_leaves_the_rest(grid: Grid, folder: GridFolder) -> None:
    assert work(grid.cells, folder, deadline=time.monotonic()) is None
    assert states(grid, folder) == [State.OPEN] * 4


def test_a_cell_out_of_time_has_scores_but_is_not_finished(
    grid: Grid, folder: GridFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        before_step(patch, lambda _: time.sleep(0.2))
        work(grid.cells[:1], folder, deadline=time.monotonic() + 2.0)
    assert 0 < json.loads(folder.run(grid.cells[0]).summary_file.read_text())["steps"] < 20
    assert state_of(folder, grid.cells[0]) is State.OPEN
    work(grid.cells[:1], folder)
    assert state_of(folder, grid.cells[0]) is State.DONE


def test_a_run_that_ended_before_its_first_checkpoint_begins_again(
    grid: Grid, folder: GridFolder, steps: Counter[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fail_in(patch, grid.cells[0], 5, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            work(grid.cells[:1], folder)
    assert state_of(folder, grid.cells[0]) is State.OPEN
    second = folder.run(grid.cells[1])
    second.path.mkdir(parents=True)
    (second.path / "config.yaml.new").write_text("meth")
    steps.clear()
    work(grid.cells[:2], folder)
    assert steps == {(10, 0): 20, (5, 0): 20}


def test_a_folder_that_is_no_run_is_not_removed(grid: Grid, folder: GridFolder) -> None:
    run = folder.run(grid.cells[0]).path
    run.mkdir(parents=True)
    (run / "notes.txt").write_text("mine")
    work(grid.cells[:1], folder)
    assert "not a run folder" in folder.error(grid.cells[0]).read_text()
    assert (run / "notes.txt").read_text() == "mine"


def test_the_cell_of_a_process_that_was_killed_goes_on(
    grid: Grid, folder: GridFolder, steps: Counter[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What kill -9 leaves: a claim, a checkpoint, and no summary."""
    cell = grid.cells[0]
    with monkeypatch.context() as patch:
        fail_in(patch, cell, 10, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            work([cell], folder)
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    dead = Owner.of(process.pid)
    folder.claim(cell).write_text(json.dumps(asdict(dead)))
    assert state_of(folder, cell) is State.RUNNING
    steps.clear()
    work([cell], folder)
    assert not steps
    process.kill()
    process.communicate()
    assert state_of(folder, cell) is State.OPEN
    work([cell], folder)
    assert steps == {(10, 0): 12}
    assert state_of(folder, cell) is State.DONE


def test_another_configuration_is_refused(grid: Grid, folder: GridFolder) -> None:
    cell = grid.cells[0]
    work([cell], folder)
    check_configs(folder, grid.cells)
    for change, message in [({"levels": 9}, "--levels 10.* has 9 now"), ({"steps": 30}, "--steps 20.* has 30 now")]:
        changed = replace(cell, config=replace(cell.config, **change))
        with pytest.raises(UserError, match=f"{folder.run(cell).path} was begun with {message}"):
            check_configs(folder, [changed])
    # where it is computed and how often it is looked at decide nothing
    check_configs(folder, [replace(cell, config=replace(cell.config, device="auto", evaluation_every=3))])
    # the run has what the grid left to the data set
    assert "num_latents: 6" in folder.run(cell).config_file.read_text()
    changed = replace(cell, config=replace(cell.config, num_latents=7))
    with pytest.raises(UserError, match=r"--num-latents 6.* has 7 now"):
        check_configs(folder, [changed])


def test_a_damaged_checkpoint_is_a_failure_of_the_cell(
    grid: Grid, folder: GridFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        before_step(patch, lambda trainer: trainer.step == 10 and signal.raise_signal(signal.SIGTERM))
        work(grid.cells[:1], folder)
    file = folder.run(grid.cells[0]).checkpoint / STATE
    file.write_bytes(file.read_bytes()[:100])
    work(grid.cells[:2], folder)
    assert states(grid, folder)[:2] == [State.FAILED, State.DONE]
    assert "truncated or damaged" in folder.error(grid.cells[0]).read_text()


def test_a_damaged_summary_is_named(grid: Grid, folder: GridFolder) -> None:
    work(grid.cells[:1], folder)
    file = folder.run(grid.cells[0]).summary_file
    file.write_text("{")
    with pytest.raises(UserError, match=r"summary\.json is damaged"):
        state_of(folder, grid.cells[0])
