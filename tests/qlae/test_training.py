import csv
import json
import math
import os
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qlae import training
from qlae.checkpoint import WEIGHTS, load_training_state
from qlae.config import TrainConfig
from qlae.data import held_out_split
from qlae.errors import UserError
from qlae.methods.autoencoder import Autoencoder
from qlae.run_folder import RunFolder
from qlae.training import (
    BatchSampler,
    DivergedError,
    Outcome,
    RunningMeans,
    Trainer,
    learning_rate_factor,
    resume,
    stop_on_signals,
    train,
)


@pytest.fixture(autouse=True)
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Draws nothing; the folders that would have been drawn into are listed."""
    folders: list[Path] = []
    monkeypatch.setattr(training, "write_figures", lambda run, *_: folders.append(run.figures))
    return folders


def quiet(config: TrainConfig, path: Path, **options: Any) -> Outcome:
    return train(config, path, progress=False, **options)


def do_before_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[Trainer], None]) -> None:
    """Runs `action` when `step` steps have been taken."""
    original = Trainer._take_step

    def take_step(trainer: Trainer) -> None:
        if trainer.step == step:
            action(trainer)
        original(trainer)

    monkeypatch.setattr(Trainer, "_take_step", take_step)


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGINT) -> None:
    do_before_step(monkeypatch, step - 1, lambda _: signal.raise_signal(number))


def flatten(state: Any, name: str = "") -> dict[str, Any]:
    if isinstance(state, dict):
        items = state.items()
    elif isinstance(state, list | tuple):
        items = enumerate(state)
    else:
        return {name: state}
    return {key: leaf for part, value in items for key, leaf in flatten(value, f"{name}/{part}").items()}


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, training state and metrics are equal to the bit; only the time spent may differ."""
    assert (one / "metrics.csv").read_text() == (other / "metrics.csv").read_text()
    weights, others = (load_file(path / "checkpoint" / WEIGHTS) for path in (one, other))
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    states, other_states = (flatten(load_training_state(path / "checkpoint")) for path in (one, other))
    assert states.keys() == other_states.keys()
    for name, value in states.items():
        if name == "/seconds":
            continue
        expected = other_states[name]
        same = torch.equal(value, expected) if isinstance(value, torch.Tensor) else value == expected
        assert same, name


def test_a_run_writes_its_folder(tiny_config: TrainConfig, tmp_path: Path, figures: list[Path]) -> None:
    outcome = quiet(tiny_config, tmp_path / "run")
    assert (outcome.reason, outcome.step, outcome.signal) == ("finished", 20, None)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "config.yaml",
        "metrics.csv",
        "summary.json",
        "checkpoint",
        "tensorboard",
    }
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {"infom", "infoc", "infoe", "psnr", "active", "seconds", "steps"} <= summary.keys()
    assert summary["steps"] == 20 and summary["seconds"] > 0.0
    assert summary["psnr"] == outcome.evaluation.psnr
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    # of so short a run every step is recorded
    assert [row["step"] for row in rows] == [str(step) for step in range(1, 21)]
    assert [row["step"] for row in rows if row["psnr"]] == ["8", "16", "20"]
    for row in rows:
        empty = {name for name, value in row.items() if not value}
        assert empty == (set() if row["psnr"] else {"infom", "infoc", "infoe", "psnr", "active", "mean_perplexity"})
        assert all(math.isfinite(float(value)) for value in row.values() if value)
    assert float(rows[-1]["psnr"]) == outcome.evaluation.psnr
    assert figures == [tmp_path / "run" / "figures"]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("psnr")] == [8, 16, 20]
    assert [event.step for event in events.Scalars("train_loss")] == list(range(1, 21))


@pytest.mark.parametrize(
    ("steps", "every", "expected"), [(20, 8, [5, 8, 10, 15, 16, 20]), (23, 23, [5, 10, 15, 20, 23]), (3, 2, [1, 2, 3])]
)
def test_losses_are_recorded_between_evaluations_as_means_since_the_last_row(
    tiny_config: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    steps: int,
    every: int,
    expected: list[int],
) -> None:
    losses: list[float] = []
    original = Autoencoder.training_step

    def training_step(method: Autoencoder, images: torch.Tensor) -> dict[str, torch.Tensor]:
        values = original(method, images)
        losses.append(values["loss"].item())
        return values

    monkeypatch.setattr(Autoencoder, "training_step", training_step)
    monkeypatch.setattr(training, "LOSS_ROWS", 4)
    quiet(replace(tiny_config, steps=steps, evaluation_every=every), tmp_path / "run")
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == expected
    for first, row in zip([0, *expected], rows, strict=False):
        part = losses[first : int(row["step"])]
        assert float(row["train_loss"]) == pytest.approx(sum(part) / len(part), rel=1e-12)


def test_the_progress_bar_shows_loss_psnr_and_rate(
    tiny_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "LOG_REFRESH_SECONDS", 0.0)
    monkeypatch.setattr(training, "LOOK_SECONDS", 0.0)
    train(tiny_config, tmp_path / "run")
    captured = capsys.readouterr()
    assert re.search(r"7/20 .*(steps/s|s/ steps), loss 0\.\d{4}, PSNR \d+\.\d dB", captured.err)
    assert re.search(r"step 8: InfoM .* PSNR", captured.out)


def test_the_written_configuration_is_complete(tiny_config: TrainConfig, tmp_path: Path) -> None:
    quiet(tiny_config, tmp_path / "run")
    _, config = RunFolder.open(tmp_path / "run")
    own = {"levels": 10, "codebook": "learned", "quantization_weight": 0.3, "commitment_weight": 0.3}
    assert config == replace(tiny_config, num_latents=6, resolution=4, **own)


def test_the_same_seed_gives_the_same_run(tiny_config: TrainConfig, tmp_path: Path) -> None:
    quiet(tiny_config, tmp_path / "one")
    torch.rand(5)
    quiet(tiny_config, tmp_path / "other")
    assert_same_run(tmp_path / "one", tmp_path / "other")


def test_another_seed_gives_another_run(tiny_config: TrainConfig, tmp_path: Path) -> None:
    quiet(tiny_config, tmp_path / "one")
    quiet(replace(tiny_config, seed=1), tmp_path / "other")
    assert (tmp_path / "one" / "metrics.csv").read_text() != (tmp_path / "other" / "metrics.csv").read_text()


def test_a_run_resumed_between_two_rows_equals_one_that_never_stopped(
    tiny_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of losses come every 5 steps; the run stops in step 13."""
    monkeypatch.setattr(training, "LOSS_ROWS", 4)
    quiet(tiny_config, tmp_path / "straight")
    with monkeypatch.context() as patch:
        stop_after(patch, 13)
        quiet(tiny_config, tmp_path / "stopped")
    _, saved = RunFolder.open(tmp_path / "stopped")
    resume(saved, tmp_path / "stopped", progress=False)
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


@pytest.mark.parametrize(
    ("schedule", "step", "number"),
    [
        ("constant", 10, signal.SIGINT),
        ("cosine", 3, signal.SIGTERM),
        ("cosine", 8, signal.SIGINT),
        ("cosine", 20, signal.SIGTERM),
    ],
)
def test_a_resumed_run_equals_one_that_never_stopped(
    tiny_config: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    schedule: str,
    step: int,
    number: int,
) -> None:
    config = replace(tiny_config, schedule=schedule, warmup_steps=5)
    quiet(config, tmp_path / "straight")
    with monkeypatch.context() as patch:
        stop_after(patch, step, number)
        outcome = quiet(config, tmp_path / "stopped")
    if step < 20:
        assert (outcome.reason, outcome.step, outcome.signal) == ("interrupted", step, number)
        assert not (tmp_path / "stopped" / "summary.json").exists()
    _, saved = RunFolder.open(tmp_path / "stopped")
    torch.rand(7)
    assert resume(saved, tmp_path / "stopped", progress=False).reason == "finished"
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")
    assert (tmp_path / "stopped" / "summary.json").exists()


@pytest.mark.parametrize("method", ["qlinfowgan-gp", "infowgan-gp"])
@pytest.mark.parametrize("step", [3, 10, 12])
def test_a_gan_resumed_within_a_critic_cycle_equals_one_that_never_stopped(
    tiny_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, step: int
) -> None:
    """The generator learns in steps 5, 10, 15 and 20, wherever the run stops."""
    config = replace(tiny_config, method=method)
    quiet(config, tmp_path / "straight")
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        assert quiet(config, tmp_path / "stopped").step == step
    _, saved = RunFolder.open(tmp_path / "stopped")
    torch.rand(7)
    resume(saved, tmp_path / "stopped", progress=False)
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")
    assert load_training_state(tmp_path / "stopped" / "checkpoint")["method"]["critic_steps_taken"] == 20


def test_a_value_that_comes_every_few_steps_is_averaged_over_those(
    tiny_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an evaluation every 4 steps the first row has no generator's loss."""
    monkeypatch.setattr(training, "LOSS_ROWS", 1)
    quiet(replace(tiny_config, method="infowgan-gp", evaluation_every=4, steps=12), tmp_path / "run")
    with (tmp_path / "run" / "metrics.csv").open() as file:
        losses = [row["train_generator_loss"] for row in csv.DictReader(file)]
    assert losses[0] == "" and all(math.isfinite(float(loss)) for loss in losses[1:])


def test_a_run_that_broke_off_goes_on_from_its_last_checkpoint(
    tiny_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash after step 18 leaves the checkpoint and the two metrics rows of step 16."""

    def crash(_: Trainer) -> None:
        raise RuntimeError("power cut")

    quiet(tiny_config, tmp_path / "straight")
    with monkeypatch.context() as patch:
        do_before_step(patch, 18, crash)
        with pytest.raises(RuntimeError, match="power cut"):
            quiet(tiny_config, tmp_path / "broken")
    # a row that was written after the last checkpoint is dropped
    with (tmp_path / "broken" / "metrics.csv").open("a") as file:
        file.write("17" + ",0" * 11 + "\n")
    _, saved = RunFolder.open(tmp_path / "broken")
    resume(saved, tmp_path / "broken", progress=False)
    assert_same_run(tmp_path / "straight", tmp_path / "broken")


def test_a_finished_run_can_take_more_steps(tiny_config: TrainConfig, tmp_path: Path) -> None:
    quiet(replace(tiny_config, steps=24), tmp_path / "straight")
    quiet(replace(tiny_config, steps=16), tmp_path / "extended")
    _, saved = RunFolder.open(tmp_path / "extended")
    resume(replace(saved, steps=24), tmp_path / "extended", progress=False)
    assert_same_run(tmp_path / "straight", tmp_path / "extended")
    assert RunFolder.open(tmp_path / "extended")[1].steps == 24
    with pytest.raises(UserError, match=r"--steps 5: .* has taken 24 steps"):
        resume(replace(saved, steps=5), tmp_path / "extended", progress=False)


def test_the_time_limit_ends_with_scores_and_the_run_goes_on_as_if_it_had_not(
    tiny_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet(tiny_config, tmp_path / "straight")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_out_of_time", lambda trainer, limit: trainer.step == 11)
        outcome = quiet(tiny_config, tmp_path / "limited", time_limit=1.0)
    assert (outcome.reason, outcome.step) == ("time limit", 11)
    assert json.loads((tmp_path / "limited" / "summary.json").read_text())["steps"] == 11
    rows = (tmp_path / "limited" / "metrics.csv").read_text().splitlines()
    assert rows[-1].startswith("11,")
    _, saved = RunFolder.open(tmp_path / "limited")
    resume(saved, tmp_path / "limited", progress=False)
    assert_same_run(tmp_path / "straight", tmp_path / "limited")


@pytest.mark.parametrize(
    ("minutes", "elapsed", "evaluation", "is_over"),
    [
        (10.0, 500.0, 10.0, False),
        (10.0, 570.0, 10.0, False),
        (10.0, 580.0, 10.0, True),
        (10.0, 500.0, 90.0, True),
        (0.1, 2.9, 10.0, False),
        (0.1, 3.1, 10.0, True),
        (math.inf, 1e9, 10.0, False),
    ],
)
def test_time_is_kept_for_the_end(
    tiny_config: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    minutes: float,
    elapsed: float,
    evaluation: float,
    is_over: bool,
) -> None:
    trainer = Trainer.__new__(Trainer)
    trainer.started, trainer.evaluation_seconds = 1000.0, evaluation
    monkeypatch.setattr(training.time, "monotonic", lambda: 1000.0 + elapsed)
    assert trainer._out_of_time(60.0 * minutes) == is_over


def test_a_time_limit_that_leaves_no_step_still_ends_cleanly(tiny_config: TrainConfig, tmp_path: Path) -> None:
    outcome = quiet(tiny_config, tmp_path / "run", time_limit=1e-9)
    assert (outcome.reason, outcome.step) == ("time limit", 0)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 0


@pytest.mark.parametrize("minutes", [0.0, -1.0, math.nan])
def test_an_impossible_time_limit_is_refused(tiny_config: TrainConfig, tmp_path: Path, minutes: float) -> None:
    with pytest.raises(UserError, match="--time-limit"):
        quiet(tiny_config, tmp_path / "run", time_limit=minutes)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_diverges_stops_with_its_step_and_the_last_good_checkpoint(
    tiny_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    def poison(trainer: Trainer) -> None:
        trainer.method.decoder.bias.data.fill_(value)

    do_before_step(monkeypatch, 12, poison)
    with pytest.raises(DivergedError, match=rf"in step 13; the last good checkpoint is .*{tmp_path}.*of step 8"):
        quiet(tiny_config, tmp_path / "run")
    assert load_training_state(tmp_path / "run" / "checkpoint")["step"] == 8
    weights = load_file(tmp_path / "run" / "checkpoint" / WEIGHTS)
    assert all(weight.isfinite().all() for weight in weights.values())
    # of so short a run every step's loss is recorded, the last one that was finite too
    assert (tmp_path / "run" / "metrics.csv").read_text().splitlines()[-1].startswith("12,")


def test_a_gan_that_diverges_names_the_loss(
    tiny_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The generator's parameters break after its first step, so the critic sees them in the next."""
    do_before_step(monkeypatch, 5, lambda trainer: trainer.method.decoder.bias.data.fill_(math.nan))
    with pytest.raises(DivergedError, match="the critic loss became nan in step 6"):
        quiet(replace(tiny_config, method="infowgan-gp"), tmp_path / "run")


def test_an_interrupted_run_that_has_diverged_is_not_saved(
    tiny_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poison_and_interrupt(trainer: Trainer) -> None:
        trainer.method.decoder.bias.data.fill_(math.nan)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(training, "LOOK_SECONDS", math.inf)
    do_before_step(monkeypatch, 12, poison_and_interrupt)
    with pytest.raises(DivergedError, match="in step 13"):
        quiet(tiny_config, tmp_path / "run")
    assert load_training_state(tmp_path / "run" / "checkpoint")["step"] == 8


def test_weights_that_are_not_finite_are_never_saved(
    tiny_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of step 8 is still finite; its update is not."""
    original = Autoencoder.training_step
    steps = iter(range(1, 100))

    def training_step(method: Autoencoder, images: torch.Tensor) -> dict[str, torch.Tensor]:
        values = original(method, images)
        if next(steps) == 8:
            method.encoder.dense[0].weight.data[0, 0] = math.nan
        return values

    monkeypatch.setattr(Autoencoder, "training_step", training_step)
    with pytest.raises(DivergedError, match=r"after step 8 the weights encoder\.dense\.0\.weight .*no checkpoint"):
        quiet(tiny_config, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_an_existing_run_is_untouched(tiny_config: TrainConfig, tmp_path: Path) -> None:
    quiet(tiny_config, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with pytest.raises(UserError, match="is there already"):
        quiet(tiny_config, tmp_path / "run")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "nothing"}, "nothing"),
        ({"network": "huge"}, "huge"),
        ({"network": "paper"}, "multiples of 16"),
        ({"method": "gae"}, "gae"),
        ({"method": "ae", "beta": 1.0}, "--beta 1.0"),
        ({"device": "tpu"}, "--device"),
        ({"levels": 0}, "--levels"),
    ],
)
def test_what_cannot_be_trained_leaves_no_folder(
    tiny_config: TrainConfig, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        quiet(replace(tiny_config, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_cuda_without_a_gpu_is_an_error(tiny_config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no GPU"):
        quiet(replace(tiny_config, device="cuda"), tmp_path / "run")


def test_held_out_images_are_never_trained_on(
    tiny_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[int] = set()
    original = BatchSampler.next

    def spy(sampler: BatchSampler) -> torch.Tensor:
        indices = original(sampler)
        seen.update(indices.tolist())
        return indices

    monkeypatch.setattr(BatchSampler, "next", spy)
    quiet(tiny_config, tmp_path / "run")
    train_index, evaluation_index = held_out_split(64)
    assert seen == set(train_index.tolist())
    assert not seen & set(evaluation_index.tolist())


def test_the_reference_split_trains_on_all_images_and_scores_the_same(
    tiny_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[int] = set()
    scored: list[torch.Tensor] = []
    original, original_evaluate = BatchSampler.next, training.evaluate

    def spy(sampler: BatchSampler) -> torch.Tensor:
        indices = original(sampler)
        seen.update(indices.tolist())
        return indices

    def spy_evaluate(method: object, dataset: object, index: torch.Tensor, **options: object) -> object:
        scored.append(index)
        return original_evaluate(method, dataset, index, **options)

    monkeypatch.setattr(BatchSampler, "next", spy)
    monkeypatch.setattr(training, "evaluate", spy_evaluate)
    quiet(replace(tiny_config, split="reference"), tmp_path / "run")
    assert seen == set(range(64))
    assert all(torch.equal(index, held_out_split(64)[1]) for index in scored) and scored


@pytest.mark.parametrize("batch_size", [1, 3, 10, 25])
def test_the_sampler_takes_every_image_once_a_pass(batch_size: int) -> None:
    sampler = BatchSampler(torch.arange(100, 110), batch_size, seed=0)
    drawn = torch.cat([sampler.next() for _ in range(30)])
    assert all(len(sampler.next()) == batch_size for _ in range(3))
    for one_pass in drawn[: len(drawn) // 10 * 10].view(-1, 10):
        assert sorted(one_pass.tolist()) == list(range(100, 110))
    assert len({tuple(one_pass.tolist()) for one_pass in drawn[: len(drawn) // 10 * 10].view(-1, 10)}) > 1


@pytest.mark.parametrize("taken", [0, 1, 4, 7])
def test_the_sampler_goes_on_where_it_was(taken: int) -> None:
    sampler, other = (BatchSampler(torch.arange(10), 5, seed) for seed in (0, 1))
    for _ in range(taken):
        sampler.next()
    other.load_state(sampler.state())
    for _ in range(6):
        assert torch.equal(sampler.next(), other.next())


def test_constant_schedule_with_warm_up() -> None:
    config = TrainConfig(steps=100, schedule="constant", warmup_steps=4)
    assert [learning_rate_factor(config, step) for step in (0, 1, 3, 4, 99)] == [0.25, 0.5, 1.0, 1.0, 1.0]


def test_cosine_schedule() -> None:
    config = TrainConfig(steps=100, schedule="cosine")
    factors = [learning_rate_factor(config, step) for step in range(100)]
    assert factors[0] == 1.0 and factors[50] == pytest.approx(0.5)
    assert factors == sorted(factors, reverse=True)
    assert 0.0 < factors[-1] < 0.001
    warm = replace(config, warmup_steps=20)
    assert learning_rate_factor(warm, 0) == 1 / 20
    assert learning_rate_factor(warm, 60) == pytest.approx(0.5)


def test_means_do_not_depend_on_when_they_are_taken() -> None:
    values = [0.1 * step for step in range(9)]
    at_once, in_parts = RunningMeans(), RunningMeans()
    at_once.add("loss", values)
    for start, end in ((0, 1), (1, 6), (6, 9)):
        in_parts.add("loss", values[start:end])
    assert at_once == in_parts
    assert at_once.means()["loss"] == pytest.approx(0.4)


def test_a_second_signal_acts_as_usual() -> None:
    with pytest.raises(KeyboardInterrupt), stop_on_signals() as request:
        os.kill(os.getpid(), signal.SIGINT)
        assert request.signal == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)


def test_signal_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with stop_on_signals():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
