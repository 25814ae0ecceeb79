"""Records how fast `latent_quantize` is: `python benchmarks/latent_quantize.py` writes results, a table and a plot."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import latent_quantize_memory
import torch
import tyro
from latent_quantize_agreement import check_agreement
from latent_quantize_cases import Case, Direction, make_inputs
from latent_quantize_peers import CONTENDERS, FLOORS, unavailable_reason
from latent_quantize_report import save_plot, table
from measurement import (
    Plan,
    Task,
    Timing,
    describe_run,
    device_name,
    median_and_quartiles,
    time_block,
    time_interleaved,
)

HERE = Path(__file__).parent
BOTH: Direction = "forward + backward"
SMALL = Case(128, 12, 10)
LARGE = Case(1_048_576, 16, 10)


@dataclass(frozen=True)
class Row:
    """One case in one direction, and how long to measure it."""

    case: Case
    direction: Direction
    plan: Plan


def record_rows() -> list[Row]:
    """All rows of a record; the two that matter most come first."""
    brief = Plan(seconds=3.0, max_rounds=9)
    long = Plan(seconds=25.0, min_rounds=5)
    over_sizes = [Case(1024, 12, 10), Case(8192, 16, 10), Case(65_536, 16, 10)]
    over_levels = [Case(16_384, 16, levels) for levels in (2, 10, 64, 256)]
    in_bfloat16 = [Case(128, 12, 10, torch.bfloat16), Case(1_048_576, 16, 10, torch.bfloat16)]
    one_way: list[Direction] = ["forward", "backward"]
    return [
        Row(SMALL, BOTH, long),
        Row(LARGE, BOTH, long),
        *(Row(case, BOTH, brief) for case in (*over_sizes, *over_levels, *in_bfloat16, Case(8192, 3, 8))),
        *(Row(case, direction, brief) for case in (SMALL, LARGE) for direction in one_way),
    ]


def quick_rows() -> list[Row]:
    """A few tiny rows, to see that everything works; their figures mean nothing."""
    plan = Plan(seconds=0.0, min_rounds=2, block_seconds=0.001)
    tiny = Case(16, 3, 10)
    return [
        Row(tiny, BOTH, plan),
        Row(Case(64, 3, 10), BOTH, plan),
        Row(Case(64, 3, 4), BOTH, plan),
        Row(Case(16, 3, 10, torch.bfloat16), BOTH, plan),
        Row(tiny, "forward", plan),
        Row(tiny, "backward", plan),
    ]


@dataclass(frozen=True)
class Options:
    """Measure the fused latent quantizer beside its peers, and write results.json, table.md and plot.png."""

    output: Path | None = None
    """Folder to write, which must not exist; by default benchmarks/results/<device>-<date>."""
    quick: bool = False
    """Tiny sizes and two rounds: shows that everything works, and its figures mean nothing."""
    contenders: tuple[str, ...] = tuple(CONTENDERS)
    """Which contenders to measure; the floors are always measured."""


def measure_row(row: Row, names: tuple[str, ...], device: torch.device) -> dict[str, Any]:
    """Check the contenders of a row against each other, then time them in turn."""
    inputs = make_inputs(row.case, device)
    tasks: dict[str, Task] = {}
    notes: dict[str, str] = {}
    skipped: dict[str, str] = {}
    for name in names:
        reason = unavailable_reason(name, row.case, device)
        if reason is not None:
            skipped[name] = reason
            continue
        contender = CONTENDERS[name](inputs)
        check_agreement(name, contender.results(), contender.inputs)
        tasks[name] = contender.task(row.direction)
        if row.direction != BOTH:
            # The check has compiled and warmed the pass in both directions only.
            time_block(tasks[name], 1, device)
        if contender.note is not None:
            notes[name] = contender.note
    tasks |= {name: make(inputs).task(row.direction) for name, make in FLOORS.items()}
    return row_results(row, time_interleaved(tasks, row.plan, device), notes, skipped)


def row_results(row: Row, timings: dict[str, Timing], notes: dict[str, str], skipped: dict[str, str]) -> dict[str, Any]:
    """A row as results.json holds it; seconds per call, and ratios of the fused op's time to the other's."""
    case, direction = row.case, row.direction
    fused = timings["fused"].samples
    contenders = {}
    for name, timing in timings.items():
        median, first, third = median_and_quartiles(timing.samples)
        # Rounds pair the two measurements that lie closest in time.
        ratio = median_and_quartiles([a / b for a, b in zip(fused, timing.samples, strict=True)])
        contenders[name] = {
            "seconds": median,
            "quartiles": [first, third],
            "fused_over_this": ratio[0],
            "fused_over_this_quartiles": ratio[1:],
            "calls_per_round": timing.iterations,
            "samples": timing.samples,
            "note": notes.get(name),
        }
    copied = 3 * 2 * case.size * case.dtype.itemsize
    copy_rate = copied / contenders["three copies"]["seconds"] / 1e9
    fused_rate = case.traffic(direction) / contenders["fused"]["seconds"] / 1e9
    return {
        "case": {**asdict(case), "dtype": case.dtype_name},
        "direction": direction,
        "bytes": case.traffic(direction),
        "fused_gigabytes_per_second": fused_rate,
        "copy_gigabytes_per_second": copy_rate,
        "percent_of_copy": 100 * fused_rate / copy_rate,
        "contenders": contenders,
        "skipped": skipped,
    }


def measure_memory(case: Case, names: tuple[str, ...], device: torch.device) -> dict[str, Any]:
    """Peak bytes of a forward and backward pass per contender."""
    reason = "measured on the CPU only" if device.type != "cpu" else latent_quantize_memory.unavailable_reason()
    peak_bytes = {}
    for name in names:
        if reason is None and unavailable_reason(name, case, device) is None:
            peak_bytes[name] = latent_quantize_memory.peak_memory(name, case)
    return {
        "case": {**asdict(case), "dtype": case.dtype_name},
        "z_bytes": case.size * case.dtype.itemsize,
        "peak_bytes": peak_bytes,
        "skipped": reason,
    }


def run(options: Options) -> Path:
    """Measure all rows and write the record; returns its folder."""
    device = torch.device("cpu")
    unknown = set(options.contenders) - set(CONTENDERS)
    if unknown or "fused" not in options.contenders:
        fail(f"--contenders must be of {', '.join(CONTENDERS)}, fused among them; got {' '.join(options.contenders)}")
    reason = unavailable_reason("fused", SMALL, device)
    if reason is not None:
        fail(reason)
    description = describe_run(device, HERE)
    folder = options.output or default_folder(device)
    if folder.exists():
        fail(f"{folder} exists and is not overwritten; name another folder with --output")
    rows = quick_rows() if options.quick else record_rows()
    measured = []
    for number, row in enumerate(rows, 1):
        print(f"[{number}/{len(rows)}] {row.case} {row.case.dtype_name}, {row.direction}", flush=True)
        measured.append(measure_row(row, options.contenders, device))
    print("peak memory", flush=True)
    memory = measure_memory(rows[0].case if options.quick else LARGE, options.contenders, device)
    results = {**description, "quick": options.quick, "rows": measured, "memory": memory}
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "table.md").write_text(table(results))
    save_plot(results, folder / "plot.png")
    return folder


def default_folder(device: torch.device) -> Path:
    """benchmarks/results/<device>-<date>."""
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return HERE / "results" / f"{slug}-{datetime.now(UTC).date().isoformat()}"


def fail(message: str) -> None:
    """End with one line and exit code 2."""
    print(f"latent_quantize.py: error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    written = run(tyro.cli(Options, prog="benchmarks/latent_quantize.py"))
    print((written / "table.md").read_text())
    print(f"written to {written}")
