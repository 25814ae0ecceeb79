"""Times contenders in turn within one process, and describes the machine that they ran on."""

from __future__ import annotations

import gc
import math
import os
import platform
import random
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from qlae_kernels import __version__, latent_quantize_cpu

# Lets the waiting threads of the contender before fall asleep.
SETTLE_SECONDS = 0.003


class Task(NamedTuple):
    """One timed call: `run()`, or `run(prepare())` of which only `run` is timed."""

    run: Callable[..., Any]
    prepare: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Plan:
    """How long to measure: rounds until `seconds` are spent, within bounds, with blocks of `block_seconds`."""

    seconds: float
    min_rounds: int = 3
    max_rounds: int = 25
    block_seconds: float = 0.02


class Timing(NamedTuple):
    """Seconds per call, one value per round, each the mean over a block of `iterations` calls."""

    samples: list[float]
    iterations: int


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked of it; the CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_block(task: Task, iterations: int, device: torch.device) -> float:
    """Mean seconds per call over `iterations` calls."""
    if task.prepare is None:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(iterations):
            task.run()
        synchronize(device)
        return (time.perf_counter() - start) / iterations
    seconds = 0.0
    for _ in range(iterations):
        prepared = task.prepare()
        synchronize(device)
        start = time.perf_counter()
        task.run(prepared)
        synchronize(device)
        seconds += time.perf_counter() - start
    return seconds / iterations


def time_interleaved(tasks: dict[str, Task], plan: Plan, device: torch.device) -> dict[str, Timing]:
    """Time every task once per round, in a new order each round; tasks must have been called before."""
    gc.collect()
    gc.disable()
    try:
        return _time_interleaved(tasks, plan, device)
    finally:
        gc.enable()


def _time_interleaved(tasks: dict[str, Task], plan: Plan, device: torch.device) -> dict[str, Timing]:
    # The first call after the check of agreement can still be slow, the quickest of three seldom is.
    quickest = {name: _quickest_call(task, device) for name, task in tasks.items()}
    iterations = {name: max(1, math.ceil(plan.block_seconds / seconds)) for name, seconds in quickest.items()}
    cycle = sum(quickest[name] * iterations[name] + SETTLE_SECONDS for name in tasks)
    rounds = min(max(int(plan.seconds / cycle), plan.min_rounds), plan.max_rounds)
    samples: dict[str, list[float]] = {name: [] for name in tasks}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(tasks), len(tasks)):
            time.sleep(SETTLE_SECONDS)
            if iterations[name] > 1:
                # Brings code and data back into the caches that the contender before has filled.
                time_block(tasks[name], 1, device)
            samples[name].append(time_block(tasks[name], iterations[name], device))
    return {name: Timing(samples[name], iterations[name]) for name in tasks}


def _quickest_call(task: Task, device: torch.device, calls: int = 3, enough_seconds: float = 0.2) -> float:
    quickest = math.inf
    for _ in range(calls):
        quickest = min(quickest, time_block(task, 1, device))
        if quickest > enough_seconds:
            break
    return max(quickest, 1e-9)


def median_and_quartiles(values: list[float]) -> tuple[float, float, float]:
    """The median and the first and third quartile."""
    first, median, third = np.percentile(values, [25, 50, 75])
    return float(median), float(first), float(third)


def describe_run(device: torch.device, repository: Path) -> dict[str, Any]:
    """Machine, date, versions and commit, as a record keeps them."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "device": device_name(device),
            "cores": _usable_cores(),
            "threads": torch.get_num_threads(),
            "instruction_set": latent_quantize_cpu.active_instruction_set(),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "versions": {
            "qlae-kernels": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "jax": _version("jax"),
            "vector-quantize-pytorch": _version("vector-quantize-pytorch"),
        },
        "commit": _commit(repository),
    }


def device_name(device: torch.device) -> str:
    """The name of the processor or of the GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _commit(repository: Path) -> str | None:
    """The commit that is checked out, marked where files differ from it; None outside a repository."""
    commit = _git(repository, "rev-parse", "--short=12", "HEAD")
    if commit is None:
        return None
    return f"{commit} with changes" if _git(repository, "status", "--porcelain") else commit


def _git(repository: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(repository), *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
