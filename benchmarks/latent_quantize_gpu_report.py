"""The table and the plot of a GPU record, made from the content of its report.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

BOTH = "forward + backward"
# Okabe and Ito's colours, with a marker each, so that lines differ without colour too.
STYLES: dict[str, tuple[str, str]] = {
    "fused cuda": ("#D55E00", "o"),
    "fused triton": ("#CC79A7", "D"),
    "fused cpu": ("#D55E00", "o"),
    "eager": ("#0072B2", "s"),
    "torch.compile": ("#009E73", "^"),
    "torch.compile, max-autotune": ("#56B4E9", "v"),
    "copy": ("#777777", ""),
    "empty kernel": ("#BBBBBB", ""),
}
METHODS = {
    "graph": "Device time, a CUDA graph of 20 calls",
    "events": "Device time, events around calls",
    "clock": "By the clock, 100 eager calls",
}


def table(results: dict[str, Any]) -> str:
    """A record as Markdown."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items() if number)
    lines = [
        "# `latent_quantize` on a GPU",
        "",
        f"{machine['device']}; {results['date']}; {versions}; commit {results['commit'] or 'unknown'}.",
        "",
        *(["A quick run on tiny sizes: its figures mean nothing.", ""] if results["quick"] else []),
        *([f"Incomplete: {results['stopped']}.", ""] if "stopped" in results else []),
        f"`auto` takes {results['auto']}; 'auto / this' is its time over the contender's. GB/s count the bytes that "
        "must move; the copy moves z once and counts its reads and writes.",
        "",
    ]
    for method, meaning in METHODS.items():
        rows = [row for row in results["rows"] if row["method"] == method]
        if rows:
            lines += [
                f"## {meaning[0].upper()}{meaning[1:]}",
                "",
                *markdown(HEADER, body_of(rows, results["auto"])),
                "",
            ]
    lines += [*skip_lines(results["rows"]), *train_step_lines(results["train_step"])]
    return "\n".join(lines) + "\n"


HEADER = [
    "direction",
    "N x D",
    "dtype",
    "K",
    "contender",
    "median, us",
    "IQR, us",
    "GB/s",
    "% of copy",
    "auto / this",
    "launches",
]


def body_of(rows: list[dict[str, Any]], auto: str) -> list[list[str]]:
    """The cells of the rows, one line per contender."""
    body = []
    for row in rows:
        case = row["case"]
        fused = row["contenders"].get(auto)
        for name, entry in row["contenders"].items():
            first, third = entry["quartiles"]
            body.append(
                [
                    row["direction"],
                    f"{case['batch']:,} x {case['num_latents']}",
                    case["dtype"],
                    str(case["levels"]),
                    name,
                    f"{entry['seconds'] * 1e6:#.4g}",
                    f"{(third - first) * 1e6:.2g}",
                    "" if name == "empty kernel" else f"{entry['gigabytes_per_second']:.4g}",
                    "" if name == "empty kernel" else f"{entry['percent_of_copy']:.0f}",
                    "" if fused is None else f"{fused['seconds'] / entry['seconds']:.3f}",
                    "" if entry["launches"] is None else str(entry["launches"]),
                ]
            )
    return body


def line_of(row: dict[str, Any]) -> str:
    """A row on one line of the terminal: microseconds, and percent of the copy's bandwidth where it says something."""
    case = row["case"]
    cells = []
    for name, entry in row["contenders"].items():
        percent = f" {entry['percent_of_copy']:.0f}%" if name.startswith("fused") and row["method"] != "clock" else ""
        cells.append(f"{name.removeprefix('fused ')} {entry['seconds'] * 1e6:.4g}{percent}")
    what = f"{case['batch']}x{case['num_latents']}x{case['levels']} {case['dtype']}"
    return f"  {row['direction'].replace('forward + backward', 'both')} {what} {row['method']}: {', '.join(cells)}"


def skip_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Who took no part, and why."""
    lines = {
        f"- {row['case']['batch']:,} x {row['case']['num_latents']} x {row['case']['levels']}, {row['case']['dtype']}, "
        f"{name}: {reason}"
        for row in rows
        for name, reason in row["skipped"].items()
    }
    return ["## Not measured", "", *sorted(lines), ""] if lines else []


def train_step_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Training steps as a table."""
    body = [
        [row["network"], row["quantizer"], row["mode"], f"{row['seconds'] * 1e6:#.4g}", f"{row['iqr'] * 1e6:.2g}"]
        for row in rows
    ]
    return ["## A training step", "", *markdown(["network", "quantizer", "mode", "median, us", "IQR, us"], body), ""]


def markdown(header: list[str], body: list[list[str]]) -> list[str]:
    """The lines of a table."""
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *body)]


def save_plot(results: dict[str, Any], path: Path) -> None:
    """Device time over the number of elements (left), and percent of the copy's bandwidth over K (right), float32."""
    rows = [
        row
        for row in results["rows"]
        if row["direction"] == BOTH and row["case"]["dtype"] == "float32" and row["method"] in ("graph", "events")
    ] or results["rows"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 4.6), layout="constrained")
    by_size = sorted((row for row in rows if row["case"]["levels"] == 10), key=elements)
    plot_lines(left, by_size, elements, "seconds", 1e6)
    left.set_xlabel("elements of z (N x D), 10 codes each")
    left.set_ylabel("time of forward + backward, us")
    left.set_yscale("log")
    largest = max(map(elements, rows))
    by_levels = sorted((row for row in rows if elements(row) == largest), key=lambda row: row["case"]["levels"])
    plot_lines(right, by_levels, lambda row: row["case"]["levels"], "percent_of_copy", 1.0)
    right.axhline(85, color="#BBBBBB", linewidth=0.8, linestyle="--")
    right.set_xlabel(f"codes per latent (K), {largest:,} elements")
    right.set_ylabel("percent of the copy's bandwidth")
    right.set_ylim(bottom=0)
    figure.suptitle(f"latent_quantize, forward + backward, float32: {results['machine']['device']}", fontsize=12)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def elements(row: dict[str, Any]) -> int:
    """The number of elements of z."""
    return row["case"]["batch"] * row["case"]["num_latents"]


def plot_lines(axes: Axes, rows: list[dict[str, Any]], x_of: Any, field: str, scale: float) -> None:
    """One line per contender over a logarithmic axis."""
    for name, (color, marker) in STYLES.items():
        points = [(x_of(row), scale * row["contenders"][name][field]) for row in rows if name in row["contenders"]]
        if points and not (name == "empty kernel" and field != "seconds"):
            axes.plot(*zip(*points, strict=True), color=color, marker=marker, label=name)
    axes.set_xscale("log", base=2)
    axes.grid(True, which="major", color="#DDDDDD", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
