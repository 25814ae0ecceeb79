"""A comparison as one job: worker processes on one grid, what is known of them, and a clean end however it comes."""

import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from threadpoolctl import threadpool_limits

from qlae.compare.cells import GridFolder
from qlae.compare.claims import Owner, is_held_by, release_of
from qlae.compare.grid import Cell, Grid
from qlae.compare.worker import record_failure, work
from qlae.data import Dataset, load_dataset
from qlae.errors import UserError
from qlae.loading import choose_device
from qlae.methods import build_method
from qlae.training import check_time_limit, complete, stop_on_signals

LOOK_SECONDS = 1.0
# what a worker ends with when no cell could go on
PROBLEM_EXIT = 2

_spawn = multiprocessing.get_context("spawn")


def completed(grid: Grid) -> Grid:
    """The grid with everything decided that its configurations left to the data sets.

    Each data set is prepared on the way, once and not by every worker, and a model is built for each row on it.

    Raises:
        UserError: for the first data set that is not there, and the first configuration that builds no model.
    """
    datasets: dict[tuple[str, int | None], Dataset] = {}
    cells: dict[str, Cell] = {}
    for name, row in product(grid.data, grid.rows):
        of_row = grid.of(name, row)
        config = of_row[0].config
        choose_device(config.device)
        key = (config.data, config.resolution)
        if key not in datasets:
            datasets[key] = load_dataset(config.data, resolution=config.resolution, root=config.root)
        dataset = datasets[key]
        try:
            config = complete(config, dataset)
            with torch.random.fork_rng(devices=[]):
                build_method(config, dataset.image_shape)
        except UserError as error:
            raise UserError(f"row {row!r} on {name}: {error}") from error
        cells |= {cell.name: replace(cell, config=replace(config, seed=cell.config.seed)) for cell in of_row}
    return replace(grid, cells=tuple(cells[cell.name] for cell in grid.cells))


def check_options(workers: int, time_limit: float | None) -> None:
    """Raises UserError for numbers that no job can have."""
    check_time_limit(time_limit)
    if workers < 1:
        raise UserError(f"--workers is {workers}, which should be at least 1")


def default_workers(device: str) -> int:
    """One for each GPU that torch may use, else one for each CPU core this process may use."""
    if choose_device(device).type == "cuda":
        return torch.cuda.device_count()
    return len(os.sched_getaffinity(0))


def run_job(
    grid: Grid,
    folder: GridFolder,
    *,
    workers: int,
    time_limit: float | None,
    look: Callable[[], None],
) -> int | None:
    """Works on the grid until every cell is finished, failed, or another process's.

    Args:
        workers: processes; on the CPU they share its cores.
        time_limit: minutes, after which what is at hand is saved.
        look: called about once a second and once at the end.

    Returns:
        The number of the signal that asked to stop, if one did.

    Raises:
        UserError: if the folder cannot be written, or workers die before they take a cell. This, and whatever `look`
            raises, is raised after the workers have saved what is at hand.
    """
    deadline = math.inf if time_limit is None else time.monotonic() + 60.0 * time_limit
    crew = _Crew(grid.cells, folder, deadline, _places(grid.cells[0].config.device, min(workers, len(grid.cells))))
    told = False
    with stop_on_signals() as request:
        try:
            crew.start()
            while crew.running:
                try:
                    crew.look_after(LOOK_SECONDS, replace_dead=request.signal is None)
                    look()
                except Exception as error:
                    # raised below, when the workers have saved
                    crew.problem = crew.problem or error
                if not told and (request.signal is not None or crew.problem is not None):
                    told = True
                    crew.ask_to_stop()
        finally:
            crew.kill()
    if crew.problem is not None:
        raise crew.problem
    return request.signal or crew.signal


@dataclass(frozen=True)
class _Place:
    """Where a worker computes: with how many CPU threads, and on which GPU (as CUDA_VISIBLE_DEVICES has it)."""

    threads: int
    gpu: str | None


def _places(device: str, workers: int) -> list[_Place]:
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    if choose_device(device).type != "cuda":
        return [_Place(threads, None)] * workers
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]
    return [_Place(threads, gpus[number % len(gpus)].strip()) for number in range(workers)]


@dataclass
class _Worker:
    place: _Place
    process: BaseProcess
    messages: Connection
    # None if it has ended before it could be looked at
    owner: Owner | None


@dataclass
class _Crew:
    """The workers of this job."""

    cells: Sequence[Cell]
    folder: GridFolder
    deadline: float
    places: Sequence[_Place]
    running: list[_Worker] = field(default_factory=list)
    # the first one; it ends the job
    problem: Exception | None = None
    signal: int | None = None

    def start(self) -> None:
        self.running = [self._hire(place) for place in self.places]

    def look_after(self, seconds: float, *, replace_dead: bool) -> None:
        """Waits until a worker ends, `seconds` at most; one that crashed is replaced unless the job is to end."""
        ended = wait([worker.process.sentinel for worker in self.running], timeout=seconds)
        for worker in [worker for worker in self.running if worker.process.sentinel in ended]:
            self.running.remove(worker)
            worker.process.join()
            code = worker.process.exitcode
            if code == PROBLEM_EXIT and worker.messages.poll():
                self.problem = self.problem or UserError(worker.messages.recv())
            elif code is not None and code > 128:
                self.signal = code - 128
            elif code != 0 and replace_dead and self.problem is None:
                self._replace(worker, f"the worker process ended with {_ending(code)}")
            worker.messages.close()

    def ask_to_stop(self) -> None:
        for worker in self.running:
            worker.process.terminate()

    def kill(self) -> None:
        """Ends at once what still runs; checkpoints stay whole."""
        for worker in self.running:
            worker.process.kill()
            worker.process.join()

    def _hire(self, place: _Place) -> _Worker:
        receiver, sender = _spawn.Pipe(duplex=False)
        arguments = (self.cells, self.folder, self.deadline, place, sender)
        process = _spawn.Process(target=_worker_main, args=arguments)
        process.start()
        sender.close()
        try:
            owner = Owner.of(process.pid)
        except ProcessLookupError:
            owner = None
        return _Worker(place, process, receiver, owner)

    def _replace(self, worker: _Worker, reason: str) -> None:
        """The cell that a crashed worker had is recorded as failed, so that it is not begun without end."""
        had = [cell for cell in self.cells if worker.owner and is_held_by(self.folder.claim(cell), worker.owner)]
        logs = self.folder.logs
        if not had:
            self.problem = UserError(f"{reason} before it took a cell: {logs} holds what it printed")
            return
        for cell in had:
            record_failure(self.folder, cell, f"{reason}; {logs} holds what it printed")
            release_of(self.folder.claim(cell), worker.owner)
        self.running.append(self._hire(worker.place))


def _ending(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return f"{name} (out of memory?)" if name == "SIGKILL" else name


def _worker_main(
    cells: Sequence[Cell], folder: GridFolder, deadline: float, place: _Place, messages: Connection
) -> None:
    # a terminal's Ctrl-C is for the job, which passes it on once
    os.setsid()
    _print_to(folder.logs)
    if place.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = place.gpu
    torch.set_num_threads(place.threads)
    # scikit-learn and SciPy have thread pools of their own
    threadpool_limits(place.threads)
    threading.Thread(target=_stop_without_job, daemon=True).start()
    try:
        signal_number = work(cells, folder, deadline=deadline)
    except UserError as error:
        messages.send(str(error))
        sys.exit(PROBLEM_EXIT)
    sys.exit(0 if signal_number is None else 128 + signal_number)


def _print_to(logs: Path) -> None:
    """Lets all that the process prints go to a file, native code's words included."""
    owner = Owner.current()
    logs.mkdir(parents=True, exist_ok=True)
    file = logs / f"{owner.host.split('/')[0]}-{owner.pid}.log"
    with file.open("a", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)


def _stop_without_job() -> None:
    """Waits for the end of the job, however it ends, and then asks its worker to stop."""
    job = multiprocessing.parent_process()
    if job is not None:
        wait([job.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)
