"""The op `latent_quantize` beside plain PyTorch, torch.compile, other packages and floors, each checked first."""

from collections.abc import Iterator

import latent_quantize_memory
import pytest
import torch
from latent_quantize_agreement import check_agreement
from latent_quantize_cases import Case, Direction, make_inputs
from latent_quantize_peers import CONTENDERS, FLOORS, unavailable_reason
from measurement import Task, time_block
from pytest_benchmark.fixture import BenchmarkFixture

CPU = torch.device("cpu")
SMALL = Case(128, 12, 10)
LARGE = Case(1_048_576, 16, 10)
BOTH: Direction = "forward + backward"

WORK: list[tuple[Direction, Case]] = [
    *((BOTH, case) for case in (SMALL, Case(1024, 12, 10), Case(8192, 16, 10), Case(65_536, 16, 10), LARGE)),
    *((BOTH, Case(16_384, 16, levels)) for levels in (2, 64, 256)),
    *((BOTH, case) for case in (Case(128, 12, 10, torch.bfloat16), Case(1_048_576, 16, 10, torch.bfloat16))),
    (BOTH, Case(8192, 3, 8)),
    ("forward", SMALL),
    ("backward", SMALL),
    ("forward", LARGE),
    ("backward", LARGE),
]


def identify(direction: Direction, case: Case) -> str:
    return f"{direction.replace(' ', '')}-{case.batch}x{case.num_latents}x{case.levels}-{case.dtype_name}"


@pytest.fixture(autouse=True)
def fresh_compiler_caches() -> Iterator[None]:
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("name", [*CONTENDERS, *FLOORS])
@pytest.mark.parametrize(("direction", "case"), WORK, ids=[identify(*work) for work in WORK])
def test_latent_quantize(benchmark: BenchmarkFixture, direction: Direction, case: Case, name: str) -> None:
    benchmark.group = f"latent_quantize, {direction}, {case}, {case.dtype_name}"
    inputs = make_inputs(case)
    if name in FLOORS:
        run_benchmark(benchmark, FLOORS[name](inputs).task(direction))
        return
    reason = unavailable_reason(name, case, CPU)
    if reason is not None:
        # Without the fused op there is nothing to compare with.
        assert name != "fused", reason
        pytest.skip(f"{name}: {reason}")
    contender = CONTENDERS[name](inputs)
    check_agreement(name, contender.results(), contender.inputs)
    if contender.note is not None:
        benchmark.extra_info["note"] = contender.note
    if (direction, case) == (BOTH, LARGE) and latent_quantize_memory.unavailable_reason() is None:
        benchmark.extra_info["peak_bytes"] = latent_quantize_memory.peak_memory(name, case)
    run_benchmark(benchmark, contender.task(direction))
    if benchmark.enabled:
        add_rates(benchmark, direction, case)


def run_benchmark(benchmark: BenchmarkFixture, task: Task) -> None:
    """Time `task` for about half a second, at least three rounds."""
    time_block(task, 1, CPU)
    seconds = time_block(task, 1, CPU)
    if task.prepare is None:
        iterations = max(1, int(1e-3 / seconds))
        rounds = min(max(int(0.5 / (seconds * iterations)), 3), 200)
        benchmark.pedantic(task.run, rounds=rounds, iterations=iterations)
    else:
        rounds = min(max(int(0.5 / seconds), 3), 1000)
        benchmark.pedantic(task.run, setup=lambda: ((task.prepare(),), {}), rounds=rounds)


def add_rates(benchmark: BenchmarkFixture, direction: Direction, case: Case) -> None:
    """Keep the bytes that must move per second, and their percentage of what `copy_` of z moves, in the JSON."""
    rate = case.traffic(direction) / benchmark.stats.stats.median / 1e9
    copy = FLOORS["three copies"](make_inputs(case)).task(direction)
    seconds = min(time_block(copy, 3, CPU) for _ in range(3))
    copy_rate = 3 * 2 * case.size * case.dtype.itemsize / seconds / 1e9
    benchmark.extra_info["gigabytes_per_second"] = rate
    benchmark.extra_info["percent_of_copy"] = 100 * rate / copy_rate
