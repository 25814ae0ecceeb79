"""The table and the plot of a record, made from the content of its results.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, FuncFormatter, NullFormatter

FLOORS = ("trivial op", "trivial pair", "three copies")
BOTH = "forward + backward"

# Okabe and Ito's colours, with a marker each, so that lines differ without colour too.
STYLES: dict[str, tuple[str, str]] = {
    "fused": ("#D55E00", "o"),
    "eager": ("#0072B2", "s"),
    "torch.compile": ("#009E73", "^"),
    "JAX": ("#CC79A7", "D"),
    "vector-quantize-pytorch": ("#56B4E9", "v"),
    "trivial op": ("#777777", ""),
    "three copies": ("#777777", ""),
}


def table(results: dict[str, Any]) -> str:
    """A record as Markdown: machine, the two main rows against their floors, times, speed-ups, traffic and memory."""
    rows = results["rows"]
    lines = [
        "# `latent_quantize`: times beside peers and floors",
        "",
        *describe(results),
        "",
        "## Against the floors (forward + backward, float32)",
        "",
        *markdown(*_floor_table(rows)),
        "",
        "## Times: median [quartiles] of a call",
        "",
        *markdown(*_time_table(rows)),
        *_notes(rows),
        "",
        "## How many times as long as the fused op the others take: median [quartiles] over rounds",
        "",
        *markdown(*_ratio_table(rows)),
        "",
        "## Bytes that must move, per second of the fused op, and three copies of z in the same run",
        "",
        *markdown(*_traffic_table(rows)),
        "",
        "## Peak memory of one forward and backward pass",
        "",
        *_memory_lines(results["memory"]),
    ]
    return "\n".join(lines) + "\n"


def describe(results: dict[str, Any]) -> list[str]:
    machine = results["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items() if number)
    lines = [
        f"{_threads(machine)} on {machine['cores']} cores, "
        f"{machine['instruction_set']} kernels, {machine['system']}; {results['date']}; {versions}; "
        f"commit {results['commit'] or 'unknown'}.",
    ]
    if results["quick"]:
        lines += ["", "A quick run on tiny sizes: its figures mean nothing."]
    return lines


def _threads(machine: dict[str, Any]) -> str:
    return f"{machine['device']}, {machine['threads']} thread{'' if machine['threads'] == 1 else 's'}"


def _floor_table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    header = ["N x D x K", "fused"]
    header += [text for floor in FLOORS for text in (floor, f"fused / {floor}")]
    body = []
    for row in rows[:2]:
        contenders = row["contenders"]
        cells = [_shape(row), readable_seconds(contenders["fused"]["seconds"])]
        for floor in FLOORS:
            cells += [readable_seconds(contenders[floor]["seconds"]), factor(contenders[floor]["fused_over_this"])]
        body.append(cells)
    return header, body


def _time_table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    names = _contender_names(rows)
    body = []
    for row in rows:
        cells = [_shape(row), row["case"]["dtype"], row["direction"]]
        for name in names:
            entry = row["contenders"].get(name)
            cells.append("-" if entry is None else _seconds_with_quartiles(entry) + ("†" if entry["note"] else ""))
        body.append(cells)
    return ["N x D x K", "dtype", "direction", *names], body


def _ratio_table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    names = [name for name in _contender_names(rows) if name != "fused"]
    body = []
    for row in rows:
        cells = [_shape(row), row["case"]["dtype"], row["direction"]]
        for name in names:
            entry = row["contenders"].get(name)
            cells.append("-" if entry is None else _inverse_with_quartiles(entry) + ("†" if entry["note"] else ""))
        body.append(cells)
    return ["N x D x K", "dtype", "direction", *names], body


def _traffic_table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    header = ["N x D x K", "dtype", "direction", "bytes", "fused, GB/s", "copies, GB/s", "percent of the copies"]
    body = [
        [
            _shape(row),
            row["case"]["dtype"],
            row["direction"],
            f"{row['bytes']:,}",
            f"{row['fused_gigabytes_per_second']:.3g}",
            f"{row['copy_gigabytes_per_second']:.3g}",
            f"{row['percent_of_copy']:.0f}",
        ]
        for row in rows
    ]
    return header, body


def _memory_lines(memory: dict[str, Any]) -> list[str]:
    if memory["skipped"] is not None:
        return [f"Not measured: {memory['skipped']}."]
    body = [
        [name, f"{peak / 1e6:,.0f} MB", f"{peak / memory['z_bytes']:.1f}"]
        for name, peak in memory["peak_bytes"].items()
    ]
    return [
        f"{_shape(memory)}, float32; z takes {memory['z_bytes'] / 1e6:,.1f} MB. The largest resident size of a process "
        "during a call, less its size before it; what is returned takes 3 times z's size (4 with int64 indices).",
        "",
        *markdown(["contender", "peak", "times z"], body),
    ]


def _notes(rows: list[dict[str, Any]]) -> list[str]:
    notes = {
        f"† {name}: {entry['note']}."
        for row in rows
        for name, entry in row["contenders"].items()
        if entry["note"] is not None
    }
    skipped = {f"\\- {name}: {reason}." for row in rows for name, reason in row["skipped"].items()}
    return [line for note in (*sorted(notes), *sorted(skipped)) for line in ("", note)]


def _contender_names(rows: list[dict[str, Any]]) -> list[str]:
    named = {name for row in rows for name in (*row["contenders"], *row["skipped"])}
    return [*(name for name in STYLES if name in named and name not in FLOORS), *FLOORS]


def markdown(header: list[str], body: list[list[str]]) -> list[str]:
    rule = ["---"] * len(header)
    return [f"| {' | '.join(cells)} |" for cells in (header, rule, *body)]


def _shape(row: dict[str, Any]) -> str:
    case = row["case"]
    return f"{case['batch']:,} x {case['num_latents']} x {case['levels']}"


def readable_seconds(seconds: float) -> str:
    scale, unit = next(
        (scale, unit) for scale, unit in ((1, "s"), (1e3, "ms"), (1e6, "us")) if seconds * scale >= 1 or unit == "us"
    )
    return f"{_three_digits(seconds * scale)} {unit}"


def _seconds_with_quartiles(entry: dict[str, Any]) -> str:
    first, third = entry["quartiles"]
    return f"{readable_seconds(entry['seconds'])} [{readable_seconds(first)}, {readable_seconds(third)}]"


def _inverse_with_quartiles(entry: dict[str, Any]) -> str:
    first, third = entry["fused_over_this_quartiles"]
    return f"{factor(1 / entry['fused_over_this'])} [{factor(1 / third)}, {factor(1 / first)}]"


def factor(value: float) -> str:
    return _three_digits(value)


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def save_plot(results: dict[str, Any], path: Path) -> None:
    """Time per element over the number of elements (left) and per code count (right), float32, forward + backward."""
    rows = [row for row in results["rows"] if row["direction"] == BOTH and row["case"]["dtype"] == "float32"]
    main = rows[0]["case"]["levels"]
    by_size = sorted((row for row in rows if row["case"]["levels"] == main), key=_elements)
    by_levels = _largest_group_of_one_shape(rows)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), width_ratios=(3, 2), layout="constrained")
    _plot_lines(left, by_size, _elements)
    left.set_xlabel(f"elements of z (N x D), {main} codes each")
    left.set_ylabel("time per element, ns")
    left.xaxis.set_major_formatter(EngFormatter(places=0, sep=" "))
    left.xaxis.set_minor_formatter(NullFormatter())
    _plot_lines(right, by_levels, lambda row: row["case"]["levels"])
    case = by_levels[0]["case"]
    right.set_xlabel(f"codes per latent (K), z of {case['batch']:,} x {case['num_latents']}")
    right.set_xticks([row["case"]["levels"] for row in by_levels])
    right.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    right.xaxis.set_minor_formatter(NullFormatter())
    machine = results["machine"]
    title = f"latent_quantize, forward + backward, float32: {_threads(machine)}, {results['date'][:10]}"
    figure.suptitle(title + (", quick run" if results["quick"] else ""), fontsize=12)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _plot_lines(axes: Axes, rows: list[dict[str, Any]], x_of: Any) -> None:
    for name, (color, marker) in STYLES.items():
        points = [(x_of(row), _nanoseconds_per_element(row, name)) for row in rows if name in row["contenders"]]
        if not points:
            continue
        dashes = {"trivial op": "--", "three copies": ":"}.get(name, "-")
        width = 2.4 if name == "fused" else 1.5
        label = _label(name, rows)
        axes.plot(
            *zip(*points, strict=True), color=color, marker=marker, linestyle=dashes, linewidth=width, label=label
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(True, which="major", color="#DDDDDD", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _label(name: str, rows: list[dict[str, Any]]) -> str:
    notes = [row["contenders"][name]["note"] for row in rows if name in row["contenders"]]
    note = next(filter(None, notes), None)
    return name if note is None else f"{name}\n({note.split(';')[0]})"


def _elements(row: dict[str, Any]) -> int:
    return row["case"]["batch"] * row["case"]["num_latents"]


def _nanoseconds_per_element(row: dict[str, Any], name: str) -> float:
    return 1e9 * row["contenders"][name]["seconds"] / _elements(row)


def _largest_group_of_one_shape(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    groups: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["case"]["batch"], row["case"]["num_latents"]), []).append(row)
    return sorted(max(groups.values(), key=len), key=lambda row: row["case"]["levels"])
