"""The tables of a record of many codes and odd shapes, made from the content of its scale.json."""

from __future__ import annotations

from typing import Any

from latent_quantize_report import describe, factor, markdown, readable_seconds

# The goals: not slower than the plain lines, and at most this many times the best shape's time per element.
MAX_OVER_BEST = 3.0


def table(results: dict[str, Any]) -> str:
    """A record as Markdown: shapes, small calls, and the search beside `torch.bucketize`."""
    lines = [
        "# `latent_quantize`: many codes and odd shapes",
        "",
        *describe(results),
        "",
        f"## Forward + backward, about {results['elements']:,} elements",
        "",
        "ns per element: the fused op at this number of elements. The plain PyTorch lines (eager) are compared at "
        "`compared batch`, as many samples as their distances leave room for, the fused op in turn with them. "
        "`over best`: ns per element over the least of any shape with as many codes and the same dtype. "
        "`codes per element`: codes in the codebook, which must all be read and their gradients written, over the "
        "elements.",
        "",
        *markdown(*_shape_table(results["shapes"])),
        "",
        *_verdict(results["shapes"]),
        "",
        f"## Forward + backward, about {results['few']:,} elements",
        "",
        *markdown(*_shape_table(results["small"])),
        "",
        "## The search beside `torch.bucketize`",
        "",
        "`torch.bucketize` (one latent) and `torch.searchsorted` (twelve) between midpoints computed beforehand, then "
        "gather and `index_add_` without autograd; they need sorted codes and leave ties and rounding out.",
        "",
        *markdown(*_search_table(results["search"])),
    ]
    return "\n".join(lines) + "\n"


def _over_best(rows: list[dict[str, Any]]) -> list[tuple[dict[str, Any], float]]:
    measured = [row for row in rows if "skipped" not in row]
    best: dict[tuple[int, str], float] = {}
    for row in measured:
        key = (row["levels"], row["dtype"])
        best[key] = min(best.get(key, float("inf")), row["nanoseconds_per_element"])
    return [(row, row["nanoseconds_per_element"] / best[row["levels"], row["dtype"]]) for row in measured]


def _shape_table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    header = ["K", "latents", "layout", "dtype", "batch", "codes per element", "ns per element", "over best"]
    header += ["compared batch", "fused", "eager", "eager / fused"]
    body = []
    for row, over in _over_best(rows):
        cells = [f"{row['levels']:,}", row["latents"], row["layout"], row["dtype"], f"{row['batch']:,}"]
        cells += [factor(row["codes"] / row["size"]), factor(row["nanoseconds_per_element"]), factor(over)]
        cells += [
            f"{row['compared_batch']:,}",
            readable_seconds(row["fused"]["seconds"]),
            readable_seconds(row["eager"]["seconds"]),
        ]
        body.append([*cells, factor(row["eager_over_fused"][0])])
    return header, body


def _verdict(rows: list[dict[str, Any]]) -> list[str]:
    slower = [row for row, _ in _over_best(rows) if row["eager_over_fused"][0] < 1]
    far = [row for row, over in _over_best(rows) if over > MAX_OVER_BEST]
    skipped = [
        f"K = {row['levels']:,}, {row['latents']} latents ({row['skipped']})" for row in rows if "skipped" in row
    ]
    names = [f"K = {row['levels']:,}, {row['latents']} latents" for row in far]
    return [
        f"Slower than eager: {len(slower)} of {len(rows) - len(skipped)} shapes.",
        f"More than {MAX_OVER_BEST:g} times the best of their K: {'; '.join(names) or 'none'}.",
        f"Not measured: {'; '.join(skipped) or 'none'}.",
    ]


def _search_table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    header = ["K", "D", "N", "direction", "fused", "bucketize", "bucketize / fused", "indices that differ"]
    body = [
        [
            f"{row['levels']:,}",
            f"{row['latents']}",
            f"{row['batch']:,}",
            row["direction"],
            readable_seconds(row["fused"]["seconds"]),
            readable_seconds(row["bucketize"]["seconds"]),
            factor(row["bucketize_over_fused"][0]),
            f"{row['differing']:.1e}",
        ]
        for row in rows
    ]
    return header, body
