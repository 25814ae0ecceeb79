"""Times work on a GPU in turn: graphs that are replayed, device events around calls, and what one call launches."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType

# What one timed block lasts at least, so that the events' own cost does not count.
BLOCK_SECONDS = 0.002


@dataclass(frozen=True)
class Block:
    """Something to time: `run()` does `calls` calls; `seconds_per_block` is measured by `estimate`."""

    run: Callable[[], object]
    calls: int


def capture(call: Callable[[int], object], prepare: Callable[[], object], calls: int) -> Block:
    """A CUDA graph of call(0), ..., call(calls - 1), which `prepare` has made ready on the same stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        prepare()
        for number in range(3):
            call(number)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for number in range(calls):
            call(number)
    torch.cuda.synchronize()
    return Block(graph.replay, calls)


def device_seconds(block: Block, repeats: int) -> float:
    """Seconds per call between two events on the current stream, around `repeats` blocks."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        block.run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / (repeats * block.calls)


def host_seconds(block: Block, repeats: int) -> float:
    """Seconds per call by the clock, from an idle device to an idle device."""
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        block.run()
    synchronize()
    return (time.perf_counter() - start) / (repeats * block.calls)


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_in_turn(
    blocks: dict[str, Block], seconds: Callable[[Block, int], float], budget: float, max_rounds: int
) -> dict[str, list[float]]:
    """Seconds per call of every block, one value per round, in a new order each round.

    Rounds go on until `budget` seconds are spent; a block that takes long takes part in fewer, two at least.
    """
    spent: dict[str, float] = {}
    repeats: dict[str, int] = {}
    for name, block in blocks.items():
        seconds(block, 1)
        once = seconds(block, 1) * block.calls
        repeats[name] = max(1, round(BLOCK_SECONDS / once))
        spent[name] = once * (repeats[name] + 1)
    rounds = min(max(int(budget / sum(spent.values())), 5), max_rounds)
    samples: dict[str, list[float]] = {name: [] for name in blocks}
    order = random.Random(0)
    for number in range(rounds):
        for name in order.sample(list(blocks), len(blocks)):
            if number >= 2 and spent[name] * number > budget:
                continue
            # Brings its code back, and its data where these fit into the cache.
            seconds(blocks[name], 1)
            samples[name].append(seconds(blocks[name], repeats[name]))
    return samples


def launches(call: Callable[[], object]) -> int | None:
    """How many kernels, copies and fills a call gives the GPU; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    call()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type is DeviceType.CUDA for event in profile.events())


def driver_version() -> str | None:
    """The NVIDIA driver's version; None where there is none."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else None
