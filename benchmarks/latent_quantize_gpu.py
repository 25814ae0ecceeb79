"""Records how fast `latent_quantize` is on a GPU: `python benchmarks/latent_quantize_gpu.py --output FOLDER`.

Writes report.json, table.md and plot.png, the first two anew after every case. benchmarks/README.md says what is
measured and how.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import train_step_gpu
from gpu_measurement import (
    Block,
    capture,
    device_seconds,
    driver_version,
    host_seconds,
    launches,
    time_in_turn,
)
from latent_quantize_agreement import check_agreement_in_part
from latent_quantize_cases import Case, Direction, Inputs, Results, make_inputs
from latent_quantize_gpu_report import line_of, save_plot, table
from latent_quantize_peers import plain_latent_quantize
from measurement import describe_run, median_and_quartiles
from torch import Tensor
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config

from qlae_kernels import backends, latent_quantize

HERE = Path(__file__).parent
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward", "forward + backward")
BOTH: Direction = "forward + backward"
Function = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]

COMPILED = "torch.compile"
TUNED = "torch.compile, max-autotune"
COPY = "copy"
EMPTY = "empty kernel"
# From this many bytes of z on, calls are long enough for device events; below, a graph of calls is replayed.
BYTES_FOR_EVENTS = 128 << 20
CALLS_PER_GRAPH = 20
# Small sizes whose eager calls are timed by the clock, too.
MAX_ELEMENTS_BY_THE_CLOCK = 1024 * 12


@dataclass(frozen=True)
class Work:
    """A case in some directions, and which peers take part."""

    case: Case
    directions: tuple[Direction, ...] = DIRECTIONS
    compiled: bool = False
    tuned: bool = False


def all_work() -> list[Work]:
    """What a record holds, the most important first."""
    bfloat16 = torch.bfloat16
    largest = 4_194_304
    return [
        Work(Case(128, 12, 10), compiled=True, tuned=True),
        Work(Case(largest, 16, 10), compiled=True, tuned=True),
        Work(Case(1_048_576, 16, 10), compiled=True, tuned=True),
        Work(Case(largest, 16, 10, bfloat16), compiled=True),
        *(Work(Case(largest, 16, levels), compiled=True) for levels in (16, 4, 256)),
        Work(Case(1024, 12, 10), compiled=True),
        Work(Case(8192, 16, 10), compiled=True),
        Work(Case(65_536, 16, 10), compiled=True),
        Work(Case(1_048_576, 16, 10, bfloat16), compiled=True),
        *(Work(Case(largest, 16, levels), compiled=True) for levels in (2, 64, 1024, 4096)),
        *(Work(Case(largest, 16, levels, bfloat16)) for levels in (2, 4, 16, 64, 256, 1024, 4096)),
        Work(Case(128, 12, 10, bfloat16), compiled=True),
        *(Work(Case(*size, 10, bfloat16), (BOTH,)) for size in ((1024, 12), (8192, 16), (65_536, 16))),
    ]


def quick_work() -> list[Work]:
    """Tiny cases, to see that everything works; their figures mean nothing."""
    return [
        Work(Case(16, 3, 10), compiled=True),
        Work(Case(64, 3, 4), (BOTH,)),
        Work(Case(64, 3, 10), (BOTH,)),
        Work(Case(16, 3, 10, torch.bfloat16), ("forward",)),
    ]


# Contenders


def fused_names(device: torch.device) -> list[str]:
    """The backends with kernels of their own that serve the device, the one that `auto` takes first."""
    serving = (name for name in backends.available_backends() if device.type in backends.BACKENDS[name].DEVICE_TYPES)
    return [name for name in serving if name != "reference"]


def make_functions(work: Work, device: torch.device) -> tuple[dict[str, Function], dict[str, str]]:
    """The contenders of a case by name, and why others take no part."""
    # A compiled function keeps at most eight shapes; each case starts anew.
    torch.compiler.reset()
    functions: dict[str, Function] = {
        f"fused {name}": partial(latent_quantize, backend=name) for name in fused_names(device)
    }
    skipped = {}
    reason = eager_does_not_fit(work.case, device)
    if reason is None:
        functions["eager"] = plain_latent_quantize
    else:
        skipped["eager"] = reason
    if work.compiled:
        functions[COMPILED] = torch.compile(plain_latent_quantize, dynamic=False, fullgraph=True)
    if work.tuned:
        mode = "max-autotune-no-cudagraphs"
        functions[TUNED] = torch.compile(plain_latent_quantize, dynamic=False, fullgraph=True, mode=mode)
    return functions, skipped


def eager_does_not_fit(case: Case, device: torch.device) -> str | None:
    """Why plain PyTorch cannot hold its distances, in float32 and once more for their sizes; None if it can."""
    if device.type != "cuda":
        return None
    needed = case.size * (2 * case.levels + 16) * 4
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    if needed < free:
        return None
    return f"its distances take {needed / 1e9:,.0f} GB and {free / 1e9:,.0f} GB are free"


class Contender:
    """Calls of a function in one direction, on sets of inputs in turn.

    What a call returns is kept until its set's next turn, so that the next call writes to other memory.
    """

    def __init__(self, function: Function, sets: list[Inputs], direction: Direction) -> None:
        self.function = function
        self.sets = sets
        self.direction = direction
        self.grad_loss = torch.ones((), device=sets[0].z.device)
        self.kept: list[Any] = [None] * len(sets)
        self.outputs: list[tuple[Tensor, Tensor, Tensor]] = []

    def prepare(self) -> None:
        """The forward passes whose backward passes are timed."""
        if self.direction == "backward":
            self.outputs = [self.function(inputs.z, inputs.codebook) for inputs in self.sets]

    def call(self, number: int = 0) -> None:
        """One call, on the set whose turn it is."""
        turn = number % len(self.sets)
        inputs = self.sets[turn]
        if self.direction == "forward":
            with torch.no_grad():
                self.kept[turn] = self.function(inputs.z, inputs.codebook)
        elif self.direction == "backward":
            self.kept[turn] = self.gradients(self.outputs[turn], inputs)
        else:
            outputs = self.function(inputs.z, inputs.codebook)
            self.kept[turn] = (outputs, self.gradients(outputs, inputs))

    def gradients(self, outputs: tuple[Tensor, ...], inputs: Inputs) -> tuple[Tensor, ...]:
        quantized, _, loss = outputs
        return torch.autograd.grad(
            (quantized, loss),
            (inputs.z, inputs.codebook),
            (inputs.grad_quantized, self.grad_loss),
            retain_graph=self.direction == "backward",
        )

    def results(self) -> Results:
        """The results of one forward and backward pass."""
        inputs = self.sets[0]
        quantized, indices, loss = outputs = self.function(inputs.z, inputs.codebook)
        return Results(quantized.detach(), indices, loss.detach(), *self.gradients(outputs, inputs))


class Floor:
    """`copy_` of z, or a kernel that does nothing."""

    def __init__(self, name: str, sets: list[Inputs]) -> None:
        self.name = name
        self.sources = [inputs.z.detach() for inputs in sets]
        self.copies = [torch.empty_like(source) for source in self.sources] if name == COPY else []

    def prepare(self) -> None:
        """Nothing comes before a call."""

    def call(self, number: int = 0) -> None:
        """One call."""
        turn = number % len(self.sources)
        if self.name == COPY:
            self.copies[turn].copy_(self.sources[turn])
        elif self.sources[turn].is_cuda:
            torch.cuda._sleep(0)


def make_sets(inputs: Inputs, device: torch.device) -> list[Inputs]:
    """Copies of the inputs, in all more than twice what the GPU's cache holds if they are large, else one."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    size = inputs.z.nbytes + inputs.grad_quantized.nbytes
    count = 1 if size < cache / 2 else 1 + 2 * cache // size
    return [
        Inputs(inputs.z.clone().requires_grad_(), inputs.codebook.clone().requires_grad_(), inputs.grad_quantized)
        for _ in range(count)
    ]


# Measuring


def measure_case(work: Work, device: torch.device, budget: float) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a case, and what was wrong with a fused contender."""
    inputs = make_inputs(work.case, device)
    sets = make_sets(inputs, device)
    functions, skipped = make_functions(work, device)
    failures = []
    for name in list(functions):
        try:
            check_agreement_in_part(name, Contender(functions[name], sets, BOTH).results(), inputs)
        except Exception as error:  # whatever a contender raises is said, and the others go on
            skipped[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            del functions[name]
            if name.startswith("fused"):
                failures.append(f"{work.case} {work.case.dtype_name}, {name}: {skipped[name]}")
    rows = []
    for direction in work.directions:
        contenders: dict[str, Contender | Floor] = {
            name: Contender(function, sets, direction) for name, function in functions.items()
        }
        contenders |= {name: Floor(name, sets) for name in (COPY, EMPTY)}
        for method in methods_of(work.case, direction, device):
            row = measure_row(work.case, direction, method, contenders, dict(skipped), budget)
            rows.append(row)
            failures += [
                f"{work.case} {work.case.dtype_name}, {name}: {reason}"
                for name, reason in row["skipped"].items()
                if name.startswith("fused") and name not in skipped
            ]
        del contenders
    return rows, failures


def methods_of(case: Case, direction: Direction, device: torch.device) -> list[str]:
    """How a case is timed: "graph" or "events" on the device, and "clock" for what a user without graphs sees."""
    if device.type != "cuda":
        return ["clock"]
    on_device = "events" if case.size * case.dtype.itemsize >= BYTES_FOR_EVENTS else "graph"
    return [on_device, "clock"] if case.size <= MAX_ELEMENTS_BY_THE_CLOCK else [on_device]


def make_block(contender: Contender | Floor, method: str) -> Block:
    """What is timed of a contender."""
    if method == "graph":
        return capture(contender.call, contender.prepare, CALLS_PER_GRAPH)
    contender.prepare()
    calls = 100 if method == "clock" and torch.cuda.is_available() else 2

    def run() -> None:
        for number in range(calls):
            contender.call(number)

    return Block(run, calls)


def measure_row(
    case: Case,
    direction: Direction,
    method: str,
    contenders: dict[str, Contender | Floor],
    skipped: dict[str, str],
    budget: float,
) -> dict[str, Any]:
    """A row as report.json holds it; seconds per call."""
    blocks, counts = {}, {}
    for name, contender in contenders.items():
        try:
            blocks[name] = make_block(contender, method)
            counts[name] = launches(contender.call)
        except RuntimeError as error:
            blocks.pop(name, None)
            skipped[name] = f"{method}: {str(error).strip().splitlines()[0][:200]}"
            torch.cuda.synchronize()
    timing = host_seconds if method == "clock" else device_seconds
    samples = time_in_turn(blocks, timing, budget, max_rounds=31)
    copy_rate = 2 * case.size * case.dtype.itemsize / median_and_quartiles(samples[COPY])[0]
    rows = {}
    for name, values in samples.items():
        median, first, third = median_and_quartiles(values)
        moved = {COPY: 2 * case.size * case.dtype.itemsize, EMPTY: 0}.get(name, case.traffic(direction))
        rows[name] = {
            "seconds": median,
            "quartiles": [first, third],
            "gigabytes_per_second": moved / median / 1e9,
            "percent_of_copy": 100 * moved / median / copy_rate,
            "launches": counts[name],
            "samples": values,
        }
    return {
        "case": {**asdict(case), "dtype": case.dtype_name},
        "direction": direction,
        "method": method,
        "input_sets": len(contenders[COPY].sources),
        "bytes": case.traffic(direction),
        "contenders": rows,
        "skipped": skipped,
    }


# Compiling ahead


def compile_case(case: Case, directions: tuple[Direction, ...], device: torch.device) -> None:
    """Compile for one case, so that the compiler's cache on disk holds it."""
    z = torch.zeros(case.batch, case.num_latents, dtype=case.dtype, device=device)
    codebook = torch.zeros(case.num_latents, case.levels, device=device)
    inputs = Inputs(z.requires_grad_(), codebook.requires_grad_(), torch.zeros_like(z))
    functorch_config.donated_buffer = False
    function = torch.compile(plain_latent_quantize, dynamic=False, fullgraph=True)
    for direction in {BOTH, *directions} - {"backward"}:
        Contender(
            function, [Inputs(z.requires_grad_(), inputs.codebook.requires_grad_(), z.detach())], direction
        ).call()


def compile_in_this_process() -> None:
    """Let a process of `compile_ahead` start none of its own."""
    inductor_config.compile_threads = 1


def compile_ahead(works: list[Work], device: torch.device, processes: int) -> None:
    """Compile for all cases in several processes; one after the other it would take minutes."""
    with ProcessPoolExecutor(processes, get_context("spawn"), compile_in_this_process) as pool:
        pending = [pool.submit(compile_case, work.case, work.directions, device) for work in works if work.compiled]
        for future in pending:
            if future.exception() is not None:
                print(f"compiling ahead: {future.exception()}", flush=True)


# The command


def describe(device: torch.device, quick: bool) -> dict[str, Any]:
    """Machine, versions and settings of the record."""
    description = describe_run(device, HERE)
    description["versions"] |= {
        "triton": version("triton") if device.type == "cuda" else None,
        "CUDA": torch.version.cuda,
        "driver": driver_version(),
    }
    names = fused_names(device)
    return {**description, "quick": quick, "auto": f"fused {names[0]}" if names else None, "rows": []}


def write(results: dict[str, Any], folder: Path) -> None:
    """report.json and table.md as they are so far."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "table.md").write_text(table(results))


def run(arguments: argparse.Namespace) -> int:
    """Measure everything that there is time for; returns the exit code."""
    began = time.monotonic()
    device = torch.device(arguments.device)
    if not fused_names(device):
        print(f"latent_quantize_gpu.py: error: no fused backend serves {device.type} here", file=sys.stderr)
        return 2
    # A backward pass is timed again and again, which compiled functions allow with this setting.
    functorch_config.donated_buffer = False
    works = quick_work() if arguments.quick else all_work()
    budget = 0.0 if arguments.quick else arguments.row_seconds
    results = describe(device, arguments.quick)
    failures: list[str] = []
    if not arguments.quick:
        compile_ahead(works, device, arguments.processes)
        print(f"compiled ahead after {time.monotonic() - began:.0f} s", flush=True)
    results["train_step"] = train_step_gpu.measure(device, arguments.quick)
    write(results, arguments.output)
    for number, work in enumerate(works, 1):
        if time.monotonic() - began > arguments.seconds:
            results["stopped"] = f"{len(works) - number + 1} of {len(works)} cases were left out for lack of time"
            print(results["stopped"], flush=True)
            break
        print(
            f"[{number}/{len(works)}] {work.case} {work.case.dtype_name}, {time.monotonic() - began:.0f} s", flush=True
        )
        rows, wrong = measure_case(work, device, budget)
        results["rows"] += rows
        for row in rows:
            print(line_of(row), flush=True)
        failures += wrong
        write(results, arguments.output)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    save_plot(results, arguments.output / "plot.png")
    for failure in failures:
        print(f"WRONG: {failure}", flush=True)
    return 1 if failures else 0


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description="Measure the fused latent quantizer beside its peers on a GPU.")
    parser.add_argument("--output", type=Path, required=True, help="folder for report.json, table.md and plot.png")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a smoke test with --quick")
    parser.add_argument("--quick", action="store_true", help="tiny cases, whose figures mean nothing")
    parser.add_argument("--seconds", type=float, default=240, help="start no further case after this time")
    parser.add_argument("--row-seconds", type=float, default=0.5, help="how long to time the contenders of a row")
    parser.add_argument("--processes", type=int, default=8, help="how many compile at a time before the measurement")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(run(parse_arguments()))
