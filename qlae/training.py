"""The training loop: batches, progress, evaluation, checkpoints, and a clean end however it comes."""

import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from operator import itemgetter
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from qlae.checkpoint import load_training_state, save_checkpoint
from qlae.config import DEFAULT_NUM_LATENTS, TrainConfig, check
from qlae.data import SPLITS, Dataset, load_dataset
from qlae.errors import UserError
from qlae.evaluation import Evaluation, evaluate
from qlae.figures import write_figures
from qlae.loading import choose_device, load_model
from qlae.methods import Method, build_method, with_method_options
from qlae.run_folder import Number, RunFolder, refuse_existing

# seconds between updates of the progress bar on a terminal and in a log
REFRESH_SECONDS = 0.25
LOG_REFRESH_SECONDS = 30.0
# the loss is looked at this often, not in each step, because a look waits for the GPU
LOOK_SECONDS = 0.25
LOOK_STEPS = 500
# the values of a step that the progress bar shows, as far as the method has them
PROGRESS = {
    "loss": "loss {:.4f}",
    "psnr": "PSNR {:.1f} dB",
    "critic_gap": "critic's gap {:.3f}",
}
# how often a run's losses are recorded, evaluations apart
LOSS_ROWS = 100
# what a time limit leaves for the figures and, before the first one was timed, for an evaluation
FIGURE_SECONDS = 15.0
EVALUATION_SECONDS = 15.0


class DivergedError(Exception):
    """A loss or a weight is no longer a finite number."""


@dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended.

    Attributes:
        reason: `finished`, `time limit` or `interrupted`.
        step: steps taken since the run began.
        evaluation: on the evaluation images; None if interrupted.
        signal: the number of the signal that interrupted; None otherwise.
    """

    reason: Literal["finished", "time limit", "interrupted"]
    step: int
    evaluation: Evaluation | None = None
    signal: int | None = None


@dataclass
class StopRequest:
    """The number of the signal that asked training to stop, if one did."""

    signal: int | None = None


def train(
    config: TrainConfig,
    path: Path,
    *,
    time_limit: float | None = None,
    progress: bool = True,
    stop: StopRequest | None = None,
) -> Outcome:
    """Trains a new run and writes its folder.

    Args:
        path: the run's folder, which must not exist or be empty.
        time_limit: minutes after which training ends, evaluation and figures included.
        progress: whether to show a progress bar and a line per evaluation.
        stop: the request of a caller that catches signals itself; without it they are caught while training steps
            are taken.

    Raises:
        UserError: for a configuration that cannot be, missing or wrong data, and a folder that exists.
        DivergedError: when a loss or a weight is not finite; the last checkpoint before that is kept.
    """
    started = time.monotonic()
    check(config)
    check_time_limit(time_limit)
    refuse_existing(path)
    device = choose_device(config.device)
    dataset = load_dataset(config.data, resolution=config.resolution, root=config.root, device=device)
    config = complete(config, dataset)
    torch.manual_seed(config.seed)
    method = build_method(config, dataset.image_shape).to(device)
    run = RunFolder.create(path, config)
    trainer = Trainer(config, dataset, method, run, progress=progress)
    return trainer.run(started, time_limit, stop)


def resume(
    config: TrainConfig,
    path: Path,
    *,
    time_limit: float | None = None,
    progress: bool = True,
    stop: StopRequest | None = None,
) -> Outcome:
    """Goes on with a run from its last checkpoint, to the bit as if it had never stopped.

    On another device or with another number of threads the result is not the same to the bit.

    Args:
        config: the run's own configuration; only what `RESUMABLE_CHANGES` names may differ.
        path: the run's folder.
        time_limit: minutes for this call, as for `train`.
        progress: as for `train`.
        stop: as for `train`.

    Raises:
        UserError: for a missing or damaged checkpoint, or one of another configuration.
        DivergedError: as for `train`.
    """
    started = time.monotonic()
    check(config)
    check_time_limit(time_limit)
    run = RunFolder(path)
    device = choose_device(config.device)
    dataset, method = load_model(run, config, device)
    trainer = Trainer(config, dataset, method, run, progress=progress)
    trainer.load_state(load_training_state(run.checkpoint))
    if trainer.step > config.steps:
        raise UserError(f"--steps {config.steps}: the run in {path} has taken {trainer.step:,} steps, give more")
    run.write_config(config)
    return trainer.run(started, time_limit, stop)


def check_time_limit(minutes: float | None) -> None:
    """Raises UserError for a limit that no run can keep."""
    if minutes is not None and not minutes > 0.0:
        raise UserError(f"--time-limit is {minutes}, which should be a positive number of minutes")


def complete(config: TrainConfig, dataset: Dataset) -> TrainConfig:
    """The configuration with everything decided that was left to the data set and to the method.

    Raises:
        UserError: as for `with_method_options`.
    """
    config = with_method_options(config)
    num_latents = config.num_latents or 2 * len(dataset.factors) or DEFAULT_NUM_LATENTS
    data, root = config.data, config.root
    if not dataset.factors and Path(data).is_dir():
        data = str(Path(data).resolve())
    return replace(
        config,
        data=data,
        root=root.resolve() if root is not None else None,
        # A folder keeps its images' own shape, which one number cannot tell.
        resolution=dataset.image_shape[1] if dataset.factors else config.resolution,
        num_latents=num_latents,
    )


def learning_rate_factor(config: TrainConfig, step: int) -> float:
    """What the learning rate of update number `step`, from 0, is multiplied by."""
    rise = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "constant":
        return rise
    progress = max(0, step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return rise * 0.5 * (1.0 + math.cos(math.pi * progress))


class BatchSampler:
    """Endless batches of indices: every image once in random order, then again in another order.

    A batch may reach from one pass over the images into the next.
    """

    def __init__(self, indices: Tensor, batch_size: int, seed: int) -> None:
        self.indices = indices
        self.batch_size = batch_size
        self.generator = torch.Generator().manual_seed(seed)
        self._shuffle()

    def next(self) -> Tensor:
        """int64 [batch_size] on the CPU."""
        parts: list[Tensor] = []
        wanted = self.batch_size
        while wanted:
            if self.position == len(self.order):
                self._shuffle()
            part = self.order[self.position : self.position + wanted]
            self.position += len(part)
            wanted -= len(part)
            parts.append(part)
        return self.indices[torch.cat(parts)]

    def state(self) -> dict[str, Any]:
        return {"before_shuffle": self.before_shuffle, "position": self.position}

    def load_state(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["before_shuffle"])
        self._shuffle()
        self.position = state["position"]

    def _shuffle(self) -> None:
        self.before_shuffle = self.generator.get_state()
        self.order = torch.randperm(len(self.indices), generator=self.generator)
        self.position = 0


@dataclass
class RunningMeans:
    """Means of the steps' values since the last row of metrics.csv, each over the steps that had it.

    They are added one after the other in float64, so that the sums do not depend on when they were looked at.
    """

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, values: list[float]) -> None:
        for value in values:
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.counts[name] = self.counts.get(name, 0) + len(values)

    def means(self) -> dict[str, float]:
        return {name: total / self.counts[name] for name, total in self.sums.items()}


def _by_name(steps: list[dict[str, Tensor]], first: int) -> dict[str, tuple[list[int], list[float]]]:
    """The values of steps numbered from `first`, by name: the steps that have a value of that name, and the values."""
    columns: dict[str, tuple[list[int], list[Tensor]]] = {}
    for number, values in enumerate(steps, first):
        for name, value in values.items():
            numbers, tensors = columns.setdefault(name, ([], []))
            numbers.append(number)
            tensors.append(value)
    return {name: (numbers, torch.stack(tensors).tolist()) for name, (numbers, tensors) in columns.items()}


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turns the first SIGINT or SIGTERM into a request; a second one acts as it would without this.

    Signals reach the main thread only, so elsewhere nothing is asked for.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: FrameType | None) -> None:
        request.signal = number
        restore()
        # print could have been interrupted in the middle of a line, and cannot be entered twice
        os.write(2, b"\nfinishing this step and saving; once more to stop at once\n")

    def restore() -> None:
        for number, handler in former.items():
            signal.signal(number, handler)

    for number in former:
        signal.signal(number, ask)
    try:
        yield request
    finally:
        restore()


def repeatable() -> AbstractContextManager[None]:
    """Keeps cuDNN to algorithms that give the same bits each time."""
    return torch.backends.cudnn.flags(
        enabled=torch.backends.cudnn.enabled,
        benchmark=False,
        deterministic=True,
        allow_tf32=torch.backends.cudnn.allow_tf32,
    )


class Trainer:
    """One run in progress. All that decides how it goes on is in `state` and the weights."""

    def __init__(
        self, config: TrainConfig, dataset: Dataset, method: Method, run: RunFolder, *, progress: bool
    ) -> None:
        self.config = config
        self.dataset = dataset
        self.method = method
        self.run_folder = run
        self.progress = progress
        train_index, self.evaluation_index = SPLITS[config.split](len(dataset))
        self.sampler = BatchSampler(train_index, config.batch_size, config.seed)
        self.step = 0
        self.means = RunningMeans()
        self.rows: list[dict[str, Number]] = []
        # steps whose values were not looked at yet
        self.pending: list[dict[str, Tensor]] = []
        self.saved_step: int | None = None
        self.seconds_before = 0.0
        self.evaluation_seconds = EVALUATION_SECONDS

    def run(self, started: float, time_limit: float | None, stop: StopRequest | None = None) -> Outcome:
        """Trains until the last step, the time limit or a signal; `started` is a `time.monotonic()`."""
        self.started = started
        if self.progress:
            print(self._introduction())
        limit = math.inf if time_limit is None else 60.0 * time_limit
        self.run_folder.write_metrics(self.rows)
        evaluation = None
        with (
            SummaryWriter(str(self.run_folder.events), purge_step=self.step + 1) as self.events,
            self._bar() as self.bar,
            stop_on_signals() if stop is None else nullcontext(stop) as request,
            repeatable(),
        ):
            while self.step < self.config.steps:
                if request.signal is not None:
                    self._save()
                    return Outcome("interrupted", self.step, signal=request.signal)
                if self._out_of_time(limit):
                    evaluation = evaluation or self._save_and_evaluate()
                    break
                self._take_step()
                evaluation = self._record_when_due()
        return self._finish(evaluation)

    def state(self) -> dict[str, Any]:
        """What, with the weights, decides how the run goes on."""
        return {
            "step": self.step,
            "data": self.dataset.fingerprint(),
            "seconds": self._seconds(),
            "rows": self.rows,
            "sums": self.means.sums,
            "counts": self.means.counts,
            "sampler": self.sampler.state(),
            "method": self.method.training_state(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state() if self.dataset.device.type == "cuda" else None,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes back what `state` gave."""
        self.step = self.saved_step = state["step"]
        self.seconds_before = state["seconds"]
        self.rows = state["rows"]
        self.means = RunningMeans(state["sums"], state["counts"])
        self.sampler.load_state(state["sampler"])
        self.method.load_training_state(state["method"])
        torch.set_rng_state(state["random"])
        if state["random_cuda"] is not None and self.dataset.device.type == "cuda":
            torch.cuda.set_rng_state(state["random_cuda"])

    def _take_step(self) -> None:
        self.method.set_learning_rate_factor(learning_rate_factor(self.config, self.step))
        images = self.dataset.images(self.sampler.next())
        self.pending.append(self.method.training_step(images))
        self.step += 1

    def _record_when_due(self) -> Evaluation | None:
        """Evaluates, or records the losses alone, or looks at them, or does nothing; returns the evaluation."""
        self.bar.update(self.step - self.bar.n)
        if self.step % self.config.evaluation_every and self.step != self.config.steps:
            if self.step % max(1, self.config.steps // LOSS_ROWS) == 0:
                self._look()
                self._record()
            elif time.monotonic() > self.next_look or len(self.pending) >= LOOK_STEPS:
                self._look()
            return None
        begun = time.monotonic()
        self._require_finite()
        evaluation = self._evaluate()
        self._record(evaluation)
        self._save()
        self.evaluation_seconds = 1.2 * (time.monotonic() - begun)
        return evaluation

    def _save_and_evaluate(self) -> Evaluation:
        """For an evaluation that is not due: the checkpoint is written before it and knows nothing of it."""
        self._save()
        evaluation = self._evaluate()
        self._record(evaluation)
        return evaluation

    def _out_of_time(self, limit: float) -> bool:
        # at least half of a short limit goes to training
        reserve = min(self.evaluation_seconds + FIGURE_SECONDS, 0.5 * limit)
        return time.monotonic() - self.started + reserve > limit

    def _look(self) -> None:
        """Fetches the values of the pending steps: stops on one that is not finite, shows the latest."""
        self.next_look = time.monotonic() + LOOK_SECONDS
        if not self.pending:
            return
        columns = _by_name(self.pending, self.step - len(self.pending) + 1)
        bad = [
            (step, name, value)
            for name, (steps, values) in columns.items()
            for step, value in zip(steps, values, strict=True)
            if not math.isfinite(value)
        ]
        if bad:
            step, name, value = min(bad, key=itemgetter(0))
            raise self._diverged(f"the {name.replace('_', ' ')} became {value} in step {step:,}")
        for name, (_, values) in columns.items():
            self.means.add(name, values)
        shown = [text.format(columns[name][1][-1]) for name, text in PROGRESS.items() if name in columns]
        self.bar.set_postfix_str(", ".join(shown), refresh=False)
        self.pending.clear()

    def _record(self, evaluation: Evaluation | None = None) -> None:
        """Adds a row: means of the losses since the last one, and the evaluation's scores, if there is one."""
        row = {
            "step": self.step,
            "learning_rate": self.config.learning_rate * learning_rate_factor(self.config, self.step - 1),
            **{f"train_{name}": value for name, value in self.means.means().items()},
            **({} if evaluation is None else evaluation.row()),
        }
        self.rows.append(row)
        self.means = RunningMeans()
        self.run_folder.write_metrics(self.rows)
        for name, value in row.items():
            if name != "step":
                self.events.add_scalar(name, value, self.step)
        self.events.flush()
        if self.progress and evaluation is not None:
            self.bar.write(f"step {self.step:,}: {evaluation.line()}")

    def _require_finite(self) -> None:
        self._look()
        for name, parameter in self.method.named_parameters():
            if not parameter.isfinite().all():
                raise self._diverged(f"after step {self.step:,} the weights {name} are not finite")

    def _save(self) -> None:
        self._require_finite()
        save_checkpoint(self.run_folder.checkpoint, self.method, self.config, self.state())
        self.saved_step = self.step

    def _evaluate(self) -> Evaluation:
        return evaluate(self.method, self.dataset, self.evaluation_index)

    def _finish(self, evaluation: Evaluation | None) -> Outcome:
        evaluation = evaluation or self._evaluate()
        write_figures(self.run_folder, self.method, self.dataset, evaluation)
        # last, for it says that all is there
        cost = {"seconds": round(self._seconds(), 1), "steps": self.step}
        self.run_folder.write_summary(evaluation.summary() | cost)
        reason = "finished" if self.step == self.config.steps else "time limit"
        return Outcome(reason, self.step, evaluation)

    def _diverged(self, what: str) -> DivergedError:
        if self.saved_step is None:
            kept = "no checkpoint was written before it"
        else:
            kept = f"the last good checkpoint is {self.run_folder.checkpoint}, of step {self.saved_step:,}"
        return DivergedError(f"{what}; {kept}. A smaller --learning-rate may help")

    def _seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    def _introduction(self) -> str:
        config, device = self.config, self.dataset.device
        threads = torch.get_num_threads()
        place = f"CPU, {threads} thread{'s' * (threads > 1)}"
        if device.type == "cuda":
            place = torch.cuda.get_device_name(device)
        weights = sum(parameter.numel() for parameter in self.method.parameters())
        return (
            f"data     {self.dataset.describe()}\n"
            f"split    {config.split}: {len(self.sampler.indices):,} images to train on, "
            f"{len(self.evaluation_index):,} to score\n"
            f"model    {config.method}, network {config.network}, {weights:,} parameters, "
            f"{self.method.latent.describe()}\n"
            f"device   {place}\n"
            f"run      {self.run_folder.path}, steps {self.step:,} to {config.steps:,}"
        )

    def _bar(self) -> tqdm:
        refresh = REFRESH_SECONDS if sys.stderr.isatty() else LOG_REFRESH_SECONDS
        size = shutil.get_terminal_size()
        self.next_look = 0.0
        return tqdm(
            total=self.config.steps,
            initial=self.step,
            unit=" steps",
            # by itself tqdm shows nothing on a terminal that does not tell its size
            ncols=size.columns,
            nrows=size.lines,
            mininterval=refresh,
            maxinterval=max(10.0, refresh),
            disable=not self.progress,
        )
