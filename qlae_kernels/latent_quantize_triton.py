"""The op `latent_quantize` on GPUs of any vendor that triton serves: one launch forward, one backward."""

from __future__ import annotations

import math
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from qlae_kernels.gpu_counters import COUNTERS_PER_LAUNCH, counters
from qlae_kernels.problem import Backward, Forward, Problem

# Triton reads this variable when kernels are defined; its interpreter runs them on the CPU, one program at a time.
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")

DEVICE_TYPES: tuple[str, ...] = ("cuda", "cpu") if _INTERPRETED else ("cuda",)

NUM_WARPS = 4
# Columns of a window where consecutive elements belong to consecutive latents.
WINDOW = 64
# Up to this many codes the loops over them are unrolled and the backward sums are kept in registers.
MOST_UNROLLED_CODES = 16
# Launches of one program need no workspace; this many elements, with those that pad a tile, take few microseconds.
MOST_ELEMENTS_OF_ONE_PROGRAM = 8192
PROGRAMS_PER_PROCESSOR = 4
# More tiles than this per program would let rounding errors of its float32 sums grow.
MOST_TILES_PER_PROGRAM = 1024
# The sums of many codes are kept in memory, [programs, K, columns].
MOST_BYTES_OF_SUMS = 64 << 20


def unavailable_reason() -> str | None:
    """Why the triton kernels cannot serve, with the remedy; None if they can."""
    if find_spec("triton") is None:
        return "triton is not installed; run `pip install triton`, or use backend='reference' or 'auto'"
    if not _INTERPRETED and not torch.cuda.is_available():
        return "PyTorch finds no GPU here; use backend='reference' or 'auto'"
    return None


@dataclass(frozen=True, slots=True)
class Plan:
    """How a problem is cut into programs; see `latent_quantize_triton_kernels` for windows, parts and tiles.

    `spacing` is the inner size where `runs`, or else the period, in elements. It and `size` are multiples of `align`.
    """

    size: int
    num_latents: int
    runs: bool
    block: int
    rows: int
    repeat: int
    few: int
    spacing: int
    align: int
    windows: int
    parts: int
    tiles: int
    wide: bool

    def sizes(self, num_codes: int) -> tuple[int, ...]:
        """Arguments of both kernels."""
        units = (self.size // self.align, self.num_latents, self.spacing // self.align)
        return (*units, num_codes, self.windows, self.parts, self.tiles)

    @property
    def programs(self) -> int:
        """Programs per launch."""
        return self.windows * self.parts

    @property
    def folded(self) -> bool:
        """Whether a latent has more than one column."""
        return not self.runs and self.spacing > self.num_latents

    @property
    def direct(self) -> bool:
        """Whether every latent is the business of one program."""
        return self.parts == 1 and not self.folded

    @property
    def group_size(self) -> int:
        """Parts whose sums the first of two levels adds up: about as many as there are groups."""
        return math.isqrt(self.parts - 1) + 1


def plan(problem: Problem, processors: int, summing_codes: bool) -> Plan:
    """Cut a problem that is not empty for a device with so many multiprocessors.

    `summing_codes` says that every program keeps sums per code, as the gradient of the codebook needs them.
    """
    outer, num_latents, inner = problem.outer, problem.num_latents, problem.inner
    if problem.rows == 1:
        outer, num_latents, inner = problem.size, 1, 1
    size, num_codes = problem.size, problem.stride
    few = num_codes if num_codes <= MOST_UNROLLED_CODES else 0
    target = processors * PROGRAMS_PER_PROCESSOR
    # What the threads of one program load at once, each a vector.
    at_once = NUM_WARPS * 32 * (2 if problem.value_dtype.itemsize == 8 else 4)
    runs = inner > 1
    if runs:
        block, spacing, windows, samples = 1, inner, num_latents, outer * inner
    else:
        block, spacing = _window(outer, num_latents, target)
        windows, samples = -(-spacing // block), -(-size // spacing)
    # Of a small problem one load is enough.
    repeat = 4 if samples * block > at_once else 1
    rows = repeat * at_once // block
    tiles = -(-samples // rows)
    parts = target // windows
    if summing_codes and not few:
        parts = min(parts, MOST_BYTES_OF_SUMS // (windows * block * num_codes * problem.compute_dtype.itemsize))
    parts = max(parts, -(-tiles // MOST_TILES_PER_PROGRAM))
    # Of the counters every window needs one, and one for each of its groups.
    parts = min(parts, max(1, COUNTERS_PER_LAUNCH // windows - 1) ** 2 if windows < COUNTERS_PER_LAUNCH else 1)
    parts = 1 if windows * tiles * rows * block <= MOST_ELEMENTS_OF_ONE_PROGRAM and windows == 1 else min(parts, tiles)
    parts = max(1, parts)
    largest = max(size + 2 * rows * spacing, windows * block * num_codes)
    return Plan(
        size=size,
        num_latents=num_latents,
        runs=runs,
        block=block,
        rows=rows,
        repeat=repeat,
        few=few,
        spacing=spacing,
        align=4 if size % 4 == spacing % 4 == 0 else 1,
        windows=windows,
        parts=parts,
        tiles=tiles,
        wide=largest >= 2**31,
    )


def _window(samples: int, num_latents: int, target: int) -> tuple[int, int]:
    """Columns per window and the period in elements, for latents that are neighbours in memory."""
    narrow = max(16, 1 << (num_latents - 1).bit_length())
    if narrow <= WINDOW and samples * narrow <= MOST_ELEMENTS_OF_ONE_PROGRAM:
        return narrow, num_latents
    # Few columns stand idle, and every row of a window starts at a multiple of 4 elements.
    if num_latents >= 10 * WINDOW:
        return WINDOW, num_latents
    periods = (repeats * num_latents for repeats in range(1, WINDOW + 1))
    return WINDOW, next(p for p in periods if p % 4 == 0 and p >= 0.9 * WINDOW * -(-p // WINDOW))


@cache
def _kernels() -> ModuleType:
    from qlae_kernels import latent_quantize_triton_kernels

    return latent_quantize_triton_kernels


@cache
def _processors(device: torch.device) -> int:
    # The interpreter runs programs one by one; two show what several do.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes the device current, as triton wants it to be; nothing where it is, which saves time."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _counters(device: torch.device) -> Tensor:
    return counters(device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0)


def prepare(problem: Problem) -> tuple[Forward, Backward]:
    """See `qlae_kernels.problem.Backend.prepare`."""
    if problem.size == 0:
        return _prepare_empty(problem)
    return _prepare_forward(problem), _prepare_backward(problem)


def _prepare_empty(problem: Problem) -> tuple[Forward, Backward]:
    def forward(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        indices = torch.empty_like(z, dtype=problem.index_dtype) if problem.return_indices else None
        return torch.empty_like(z), indices, torch.zeros((), dtype=problem.compute_dtype, device=z.device)

    def backward(
        z: Tensor,
        codebook: Tensor,
        grad_quantized: Tensor | None,
        grad_loss: Tensor,
        need_grad_z: bool,
        need_grad_codebook: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        grad_z = torch.empty_like(z) if need_grad_z else None
        return grad_z, torch.zeros_like(codebook) if need_grad_codebook else None

    return forward, backward


def _levels(problem: Problem) -> Tensor | None:
    return None if problem.levels is None else problem.levels.to(device=problem.device, dtype=torch.int32)


def _prepare_forward(problem: Problem) -> Forward:
    kernel = _kernels().forward_kernel
    cut = plan(problem, _processors(problem.device), summing_codes=False)
    levels, device = _levels(problem), problem.device
    index_dtype, return_indices = problem.index_dtype, problem.return_indices
    loss_scale = (problem.quantization_weight + problem.commitment_weight) / problem.size
    single = cut.programs == 1
    sizes = cut.sizes(problem.stride)
    constants = {
        "BLOCK": cut.block,
        "ROWS": cut.rows // cut.repeat,
        "REPEAT": cut.repeat,
        "FEW": cut.few,
        "ALIGN": cut.align,
        "RUNS": cut.runs,
        "WIDE": cut.wide,
        "RAGGED": levels is not None,
        "INDICES": return_indices,
        "SINGLE": single,
        "num_warps": NUM_WARPS,
        "enable_fp_fusion": False,
    }
    grid = (cut.programs, 1, 1)

    def forward(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        quantized = torch.empty_like(z)
        indices = torch.empty_like(z, dtype=index_dtype) if return_indices else None
        loss = codebook.new_empty(())
        partials = None if single else torch.empty(cut.programs, dtype=torch.float64, device=device)
        tensors = (z, codebook, levels, quantized, indices, loss, partials, None if single else _counters(device))
        with _on(device):
            kernel[grid](*tensors, loss_scale, *sizes, **constants)
        return quantized, indices, loss

    return forward


def _prepare_backward(problem: Problem) -> Backward:
    kernel = _kernels().backward_kernel
    cut = plan(problem, _processors(problem.device), summing_codes=True)
    levels, device, compute_dtype = _levels(problem), problem.device, problem.compute_dtype
    scales = (2 / problem.size * problem.commitment_weight, 2 / problem.size * problem.quantization_weight)
    sizes = cut.sizes(problem.stride)
    constants = {
        "BLOCK": cut.block,
        "ROWS": cut.rows // cut.repeat,
        "REPEAT": cut.repeat,
        "FEW": cut.few,
        "ALIGN": cut.align,
        "RUNS": cut.runs,
        "WIDE": cut.wide,
        "RAGGED": levels is not None,
        "DIRECT": cut.direct,
        "FOLDED": cut.folded,
        "num_warps": NUM_WARPS,
        "enable_fp_fusion": False,
    }
    grid = (cut.programs, 1, 1)
    groups = -(-cut.parts // cut.group_size)
    entries = cut.windows * cut.block * problem.stride

    def backward(
        z: Tensor,
        codebook: Tensor,
        grad_quantized: Tensor | None,
        grad_loss: Tensor,
        need_grad_z: bool,
        need_grad_codebook: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        grad_z = torch.empty_like(z) if need_grad_z else None
        grad_codebook = partials = sums = tickets = None
        if need_grad_codebook:
            grad_codebook = torch.empty_like(codebook)
            if not (cut.direct and cut.few):
                partials = torch.empty(cut.parts * entries, dtype=compute_dtype, device=device)
            if not cut.direct:
                sums = torch.empty(groups * entries, dtype=torch.float64, device=device)
                tickets = _counters(device)
        tensors = (z, codebook, levels, grad_quantized, grad_loss, grad_z, grad_codebook, partials, sums, tickets)
        with _on(device):
            kernel[grid](
                *tensors,
                *scales,
                *sizes,
                cut.group_size,
                GRAD_QUANTIZED=grad_quantized is not None,
                GRAD_Z=need_grad_z,
                GRAD_CODEBOOK=need_grad_codebook,
                **constants,
            )
        return grad_z, grad_codebook

    return backward
