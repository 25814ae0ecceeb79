"""Records how `latent_quantize` fares for many codes and odd shapes: `python benchmarks/latent_quantize_scale.py`.

Writes scale.json and scale.md: every shape beside the plain PyTorch lines, and the search beside `torch.bucketize`.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from latent_quantize import default_folder
from latent_quantize_agreement import compare, expected_from, plain_indices
from latent_quantize_cases import Inputs, Results
from latent_quantize_peers import plain_latent_quantize
from latent_quantize_scale_report import table
from measurement import Plan, Task, Timing, describe_run, median_and_quartiles, time_interleaved
from torch import Tensor

from qlae_kernels import latent_quantize

HERE = Path(__file__).parent
CPU = torch.device("cpu")
ELEMENTS = 1 << 20
FEW_ELEMENTS = 1 << 12
LEVELS = (2, 4, 10, 16, 64, 256, 1024, 4096, 65_536)
# 4096 latents of 65,536 codes: 1 GiB. More are left out, for the memory that checking and comparing them takes.
MAX_CODES = 1 << 28
# Distances that the plain lines hold at a time: 256 MiB, and about as long a call as is worth waiting for.
MAX_DISTANCES = 1 << 26
PLAN = Plan(seconds=0.7, max_rounds=9)
Quantizer = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Shape:
    """z [batch, num_latents, *inner] with `levels` codes per latent."""

    batch: int
    num_latents: int
    levels: int
    inner: tuple[int, ...] = ()
    channels_last: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def size(self) -> int:
        return self.batch * self.num_latents * math.prod(self.inner)

    def resized(self, elements: int) -> Shape:
        """The same with about `elements` elements, one sample at least."""
        batch = max(1, elements // (self.num_latents * math.prod(self.inner)))
        return Shape(batch, self.num_latents, self.levels, self.inner, self.channels_last, self.dtype)

    def describe(self) -> dict[str, Any]:
        z = " x ".join(map(str, (self.num_latents, *self.inner)))
        layout = "channels_last" if self.channels_last else "contiguous"
        dtype = str(self.dtype).removeprefix("torch.")
        return {"latents": z, "layout": layout, "dtype": dtype, "levels": self.levels, "batch": self.batch}


def all_shapes() -> Iterator[Shape]:
    """Every number of codes with every number of latents, images of latents, and half precision."""
    for levels in LEVELS:
        for num_latents in (1, 3, 12, 100, 4096):
            yield Shape(1, num_latents, levels)
    for levels in (2, 10, 256, 4096):
        for num_latents, inner, channels_last in ((12, (7, 7), False), (12, (7, 7), True), (64, (32, 32), False)):
            yield Shape(1, num_latents, levels, inner, channels_last)
        yield Shape(1, 12, levels, dtype=torch.bfloat16)
        yield Shape(1, 4096, levels, dtype=torch.bfloat16)


def make_inputs(shape: Shape) -> Inputs:
    """z uniform in [-0.6, 0.6]; codes around an even grid over [-0.5, 0.5], in ascending order."""
    generator = torch.Generator().manual_seed(0)
    size = (shape.batch, shape.num_latents, *shape.inner)
    z, grad_quantized = (
        values.to(shape.dtype, memory_format=torch.channels_last if shape.channels_last else torch.contiguous_format)
        for values in (torch.rand(size, generator=generator) * 1.2 - 0.6, torch.randn(size, generator=generator))
    )
    shift = torch.rand(shape.num_latents, shape.levels, generator=generator) * 0.6 - 0.3
    codebook = torch.linspace(-0.5, 0.5, shape.levels) + shift / max(1, shape.levels - 1)
    return Inputs(z.requires_grad_(), codebook.requires_grad_(), grad_quantized)


def plain(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The plain lines for latents at dimension 1."""
    rows = as_rows(z, codebook.size(0))
    quantized, indices, loss = plain_latent_quantize(rows, codebook)
    moved = z.movedim(1, -1).shape
    return quantized.view(moved).movedim(-1, 1), indices.view(moved).movedim(-1, 1), loss


def as_rows(tensor: Tensor, num_latents: int) -> Tensor:
    """[B, D, ...] as [N, D]."""
    return tensor.movedim(1, -1).reshape(-1, num_latents)


def step(quantize: Quantizer, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Forward and backward, as a training step does them."""
    inputs.z.grad = inputs.codebook.grad = None
    quantized, indices, loss = quantize(inputs.z, inputs.codebook)
    torch.autograd.backward((quantized, loss), (inputs.grad_quantized, None))
    return quantized, indices, loss


def check(name: str, quantize: Quantizer, inputs: Inputs) -> None:
    """Compare the first rows' indices with the definition's, and the rest with what follows from the indices."""
    quantized, indices, loss = step(quantize, inputs)
    num_latents = inputs.codebook.size(0)
    z, grad_quantized, quantized, indices, grad_z = (
        as_rows(tensor.detach(), num_latents)
        for tensor in (inputs.z, inputs.grad_quantized, quantized, indices, inputs.z.grad)
    )
    codebook = inputs.codebook.detach()
    rows = max(1, MAX_DISTANCES // 4 // codebook.numel())
    assert torch.equal(indices[:rows], plain_indices(z[:rows], codebook).to(indices.dtype)), f"{name}: indices are off"
    results = Results(quantized, indices, loss.detach(), grad_z, inputs.codebook.grad)
    compare(name, results, expected_from(indices.long(), Inputs(z, codebook, grad_quantized)))


def summary(timing: Timing) -> dict[str, Any]:
    median, first, third = median_and_quartiles(timing.samples)
    return {"seconds": median, "quartiles": [first, third]}


def measure_shape(shape: Shape, elements: int, plan: Plan) -> dict[str, Any]:
    """The op at `elements` elements, and beside the plain lines at as many samples as those can hold."""
    full = shape.resized(elements)
    row = full.describe() | {"size": full.size, "codes": shape.num_latents * shape.levels}
    if row["codes"] > MAX_CODES:
        return row | {"skipped": f"more than {MAX_CODES:,} codes"}
    beside = shape.resized(min(elements, MAX_DISTANCES // shape.levels))
    small = make_inputs(beside)
    for name, quantize in (("fused", latent_quantize), ("eager", plain)):
        check(name, quantize, small)
    timings = time_interleaved(
        {"fused": Task(lambda: step(latent_quantize, small)), "eager": Task(lambda: step(plain, small))}, plan, CPU
    )
    ratios = [b / a for a, b in zip(timings["fused"].samples, timings["eager"].samples, strict=True)]
    row |= {"compared_batch": beside.batch, "eager_over_fused": median_and_quartiles(ratios)}
    row |= {name: summary(timing) for name, timing in timings.items()}
    whole = row["fused"]
    if full != beside:
        large = make_inputs(full)
        check("fused", latent_quantize, large)
        whole = summary(time_interleaved({"fused": Task(lambda: step(latent_quantize, large))}, plan, CPU)["fused"])
    return row | {"nanoseconds_per_element": whole["seconds"] / full.size * 1e9}


class Bucketize:
    """`torch.bucketize` (one latent) or `torch.searchsorted` (a row each) between midpoints that are there already.

    It solves less: codes must be sorted, and neither ties nor rounding are those of the definition.
    """

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.midpoints = ((inputs.codebook[:, 1:] + inputs.codebook[:, :-1]) / 2).detach()
        self.first = torch.arange(inputs.codebook.size(0)) * inputs.codebook.size(1)

    @torch.no_grad()
    def encode(self) -> Tensor:
        z = self.inputs.z
        if len(self.midpoints) == 1:
            return torch.bucketize(z, self.midpoints[0], out_int32=True)
        return torch.searchsorted(self.midpoints, z.T.contiguous(), out_int32=True).T

    @torch.no_grad()
    def step(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Codes and loss, and the gradients of z and of the codebook by `index_add_`."""
        z, codebook = self.inputs.z, self.inputs.codebook
        position = (self.encode() + self.first).flatten()
        quantized = codebook.flatten()[position].view_as(z)
        residual = z - quantized
        loss = 0.02 * residual.square().mean()
        scaled = residual * (0.02 / z.numel())
        sums = torch.zeros(codebook.numel()).index_add_(0, position, scaled.flatten(), alpha=-1)
        return quantized, loss, self.inputs.grad_quantized + scaled, sums.view_as(codebook)


@torch.no_grad()
def encode(inputs: Inputs) -> Tensor:
    return latent_quantize(inputs.z, inputs.codebook)[1]


def measure_search(num_latents: int, levels: int, plan: Plan, elements: int) -> list[dict[str, Any]]:
    """The op and bucketize: the forward pass that gives indices, then forward and backward."""
    shape = Shape(1, num_latents, levels).resized(elements)
    inputs = make_inputs(shape)
    check("fused", latent_quantize, inputs)
    other = Bucketize(inputs)
    differing = (other.encode() != encode(inputs)).float().mean().item()
    # Rounded midpoints decide otherwise for few elements only.
    assert differing < 1e-2, f"bucketize differs in {differing:.2%} of the indices"
    rows = []
    for direction, tasks in {
        "forward": {"fused": Task(lambda: encode(inputs)), "bucketize": Task(other.encode)},
        "forward + backward": {"fused": Task(lambda: step(latent_quantize, inputs)), "bucketize": Task(other.step)},
    }.items():
        timings = time_interleaved(tasks, plan, CPU)
        ratios = [b / a for a, b in zip(timings["fused"].samples, timings["bucketize"].samples, strict=True)]
        row = {"direction": direction, "latents": num_latents, "levels": levels, "batch": shape.batch}
        row |= {name: summary(timing) for name, timing in timings.items()}
        rows.append(row | {"differing": differing, "bucketize_over_fused": median_and_quartiles(ratios)})
    return rows


@dataclass(frozen=True)
class Options:
    """Measure the fused latent quantizer for many codes and odd shapes, and write scale.json and scale.md."""

    output: Path | None = None
    """Folder to write, which must not exist; by default benchmarks/results/<device>-<date>-scale."""
    quick: bool = False
    """Few tiny shapes: shows that everything works, and its figures mean nothing."""


def run(options: Options) -> Path:
    """Measure all shapes and write the record; returns its folder."""
    folder = options.output or default_folder(CPU).with_name(default_folder(CPU).name + "-scale")
    if folder.exists():
        print(f"{folder} exists and is not overwritten; name another folder with --output", file=sys.stderr)
        sys.exit(2)
    folder.mkdir(parents=True)
    plan = Plan(seconds=0.0, min_rounds=2, block_seconds=0.001) if options.quick else PLAN
    elements, few = (FEW_ELEMENTS, 256) if options.quick else (ELEMENTS, FEW_ELEMENTS)
    shapes = list(all_shapes())
    if options.quick:
        shapes = [shape for shape in shapes if shape.levels <= 10 and shape.num_latents <= 100]
    results: dict[str, Any] = describe_run(CPU, HERE) | {"quick": options.quick, "elements": elements, "few": few}
    results["shapes"], results["small"], results["search"] = [], [], []
    for number, shape in enumerate(shapes, 1):
        print(f"[{number}/{len(shapes)}] {shape.describe()}", flush=True)
        results["shapes"].append(measure_shape(shape, elements, plan))
    for levels in (10,) if options.quick else LEVELS:
        for num_latents in (1, 12, 100):
            print(f"small: {num_latents} x {levels}", flush=True)
            results["small"].append(measure_shape(Shape(1, num_latents, levels), few, plan))
    for levels in (256,) if options.quick else (256, 4096, 65_536):
        for num_latents in (1, 12):
            print(f"search: {num_latents} x {levels}", flush=True)
            results["search"] += measure_search(num_latents, levels, plan, elements)
    (folder / "scale.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "scale.md").write_text(table(results))
    return folder


if __name__ == "__main__":
    written = run(tyro.cli(Options, prog="benchmarks/latent_quantize_scale.py"))
    print((written / "scale.md").read_text())
    print(f"written to {written}")
