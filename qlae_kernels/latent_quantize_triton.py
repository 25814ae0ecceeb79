"""The op `latent_quantize` on GPUs of any vendor that triton serves: one launch forward, one backward."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from qlae_kernels.gpu_tensors import COUNTERS_PER_LAUNCH, counters, levels_on
from qlae_kernels.problem import Backward, Forward, Problem
from qlae_kernels.torch_internals import current_raw_stream

# Triton reads this variable when kernels are defined; its interpreter runs them on the CPU, one program at a time.
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")

DEVICE_TYPES: tuple[str, ...] = ("cuda", "cpu") if _INTERPRETED else ("cuda",)

NUM_WARPS = 4
# A thread's part of a piece is one vector of 16 bytes of float32 or float64. The interpreter is slow per operation, not
# per element.
PIECE, PIECES = (8192, 1) if _INTERPRETED else (NUM_WARPS * 32 * 4, 4)
# Columns of a window where consecutive elements belong to consecutive latents.
WINDOW = 64
# Up to this many codes the loops over them are unrolled and the backward sums are kept in registers, of which float64
# takes two each.
MOST_UNROLLED_CODES = {torch.float32: 16, torch.float64: 12}
# Launches of one program need no workspace; this many elements, with those that pad a tile, take few microseconds.
MOST_ELEMENTS_OF_ONE_PROGRAM = 8192
# Whole waves where registers leave room for 1, 2, 3, 4 or 6 programs on a multiprocessor.
PROGRAMS_PER_PROCESSOR = 12
# More tiles than this per program would let rounding errors of its float32 sums grow.
MOST_TILES_PER_PROGRAM = 1024
# Sums of many codes are kept in memory, float64 [programs, K, lanes], a lane being the elements at one place of every
# piece. With those that are added up from them they take at most this, or a quarter of z if that is more, or where
# every latent needs more than that, two numbers per code.
LANES = 1024 if _INTERPRETED else NUM_WARPS * 32
MOST_BYTES_OF_SUMS = 24 << 20
# Codes that a sorting program takes at a time.
SORTED_AT_A_TIME = 1024


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
    Programs' sums have `columns` columns per window.
    """

    size: int
    num_latents: int
    runs: bool
    block: int
    rows: int
    repeat: int
    columns: int
    few: int
    spacing: int
    align: int
    windows: int
    parts: int
    tiles: int
    wide: bool

    def sizes(self, num_codes: int) -> tuple[int, ...]:
        """Arguments of both kernels: size_units, num_latents, spacing_units, num_codes, windows, parts, tiles."""
        units = (self.size // self.align, self.num_latents, self.spacing // self.align)
        return (*units, num_codes, self.windows, self.parts, self.tiles)

    def constants(self, ragged: bool) -> dict[str, int | bool]:
        """What both kernels are compiled for."""
        return {
            "BLOCK": self.block,
            "ROWS": self.rows // self.repeat,
            "REPEAT": self.repeat,
            "FEW": self.few,
            "ALIGN": self.align,
            "RUNS": self.runs,
            "WIDE": self.wide,
            "RAGGED": ragged,
        }

    @property
    def programs(self) -> int:
        """Programs per launch."""
        return self.windows * self.parts

    @property
    def lanes(self) -> int:
        """Elements of a piece."""
        return self.rows // self.repeat * self.block

    @property
    def folded(self) -> bool:
        """Whether a latent has more than one column of the programs' sums."""
        return not self.runs and self.columns == self.block and self.spacing > self.num_latents

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
    few = num_codes if num_codes <= MOST_UNROLLED_CODES[problem.compute_dtype] else 0
    in_lanes = summing_codes and not few
    target = processors * PROGRAMS_PER_PROCESSOR
    piece = PIECE // 2 if problem.value_dtype.itemsize == 8 else PIECE
    most_lanes = max(MOST_BYTES_OF_SUMS, size * problem.compute_dtype.itemsize // 4) // (2 * 8 * num_codes)
    runs = inner > 1
    if runs:
        block, spacing, windows, samples = 1, inner, num_latents, outer * inner
        piece = min(LANES, _power_of_two(min(most_lanes // windows, samples))) if in_lanes else piece
    elif in_lanes:
        piece = block = min(LANES, _power_of_two(min(most_lanes, size)))
        spacing = max(1, block // num_latents) * num_latents
    else:
        block, spacing = _window(outer, num_latents, target)
    if not runs:
        windows, samples = -(-spacing // block), -(-size // spacing)
    repeat = PIECES if samples * block > piece else 1
    rows = repeat * piece // block
    tiles = -(-samples // rows)
    most_parts, least_parts = target // windows, 1 if in_lanes else -(-tiles // MOST_TILES_PER_PROGRAM)
    most_parts = min(most_parts, most_lanes // (windows * piece)) if in_lanes else most_parts
    parts = max(most_parts, least_parts)
    # Of the counters every window needs one, and one for each of its groups.
    parts = min(parts, max(1, COUNTERS_PER_LAUNCH // windows - 1) ** 2 if windows < COUNTERS_PER_LAUNCH else 1)
    parts = 1 if windows * tiles * rows * block <= MOST_ELEMENTS_OF_ONE_PROGRAM and windows == 1 else min(parts, tiles)
    parts = max(1, parts)
    # The rows that fill the last tile reach beyond the last element.
    beyond = (rows + spacing) * num_latents if runs else rows * spacing
    largest = max(size + 2 * beyond, windows * block * num_codes)
    return Plan(
        size=size,
        num_latents=num_latents,
        runs=runs,
        block=block,
        rows=rows,
        repeat=repeat,
        columns=1 << (num_latents - 1).bit_length() if in_lanes and spacing > num_latents and not runs else block,
        few=few,
        spacing=spacing,
        align=4 if size % 4 == spacing % 4 == 0 else 1,
        windows=windows,
        parts=parts,
        tiles=tiles,
        wide=largest >= 2**31,
    )


def _power_of_two(most: int) -> int:
    """The largest power of 2 that is not above `most`, or 1."""
    return 1 << max(0, most.bit_length() - 1)


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


def _stream(device: torch.device) -> int:
    return current_raw_stream(device.index) if device.type == "cuda" else 0


def _are_aligned(*tensors: Tensor | None) -> bool:
    """Whether all start at a multiple of 16 bytes, as memory from PyTorch's allocator does; views may not."""
    return all(tensor is None or tensor.data_ptr() % 16 == 0 for tensor in tensors)


# Launches a kernel with its runtime arguments; `aligned` says whether the given tensors are.
Launch = Callable[[bool, int, tuple[Any, ...]], None]


def _launcher(kernel: Any, programs: int, constants: dict[str, int | bool]) -> Launch:
    """A launch that looks for the compiled kernel once: triton's own search takes longer than a small launch."""
    grid = (programs, 1, 1)
    values = tuple(constants[name] for name in kernel.arg_names if name in constants)
    found: Callable[..., None] | None = None

    def launch(aligned: bool, stream: int, arguments: tuple[Any, ...]) -> None:
        nonlocal found
        if aligned and found is not None:
            found(*arguments, *values, stream=stream)
            return
        compiled = kernel[grid](*arguments, **constants, num_warps=NUM_WARPS, enable_fp_fusion=False)
        # The interpreter compiles nothing.
        if aligned and compiled is not None:
            found = compiled[grid]

    return launch


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
    return levels_on(problem.device, problem.levels, torch.int32)


def _halves(number: float) -> tuple[int, int]:
    """The bits of a float64 as two int32, the high one first."""
    return struct.unpack(">ii", struct.pack(">d", number))


# Sorts a codebook for the search among many codes: codes, their indices, and the first NaN of every row.
Sort = Callable[[Tensor, int], tuple[Tensor | None, Tensor | None, Tensor | None]]


def _prepare_sort(cut: Plan, problem: Problem, levels: Tensor | None) -> Sort:
    """Nothing to do for few codes, which are compared one by one."""
    if cut.few:
        return lambda codebook, stream: (None, None, None)
    rows, num_codes, device = cut.num_latents, problem.stride, problem.device
    constants = {"RAGGED": levels is not None, "LANES": SORTED_AT_A_TIME}
    launch = _launcher(_kernels().sort_kernel, rows, constants)
    numbers = (rows, num_codes, (num_codes - 1).bit_length())

    def sort(codebook: Tensor, stream: int) -> tuple[Tensor, Tensor, Tensor]:
        codes = codebook.new_empty(2, rows, num_codes)
        order = torch.empty(2, rows, num_codes, dtype=torch.int32, device=device)
        first_nan = torch.empty(rows, dtype=torch.int32, device=device)
        launch(_are_aligned(codebook), stream, (codebook, levels, codes, order, first_nan, *numbers))
        return codes, order, first_nan

    return sort


def _prepare_forward(problem: Problem) -> Forward:
    cut = plan(problem, _processors(problem.device), summing_codes=False)
    levels, device = _levels(problem), problem.device
    index_dtype, return_indices = problem.index_dtype, problem.return_indices
    loss_scale = (problem.quantization_weight + problem.commitment_weight) / problem.size
    single = cut.programs == 1
    constants = cut.constants(levels is not None) | {"INDICES": return_indices, "SINGLE": single}
    launch = _launcher(_kernels().forward_kernel, cut.programs, constants)
    sort = _prepare_sort(cut, problem, levels)
    numbers = (*_halves(loss_scale), *cut.sizes(problem.stride))

    def forward(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        with _on(device):
            stream = _stream(device)
            quantized = torch.empty_like(z)
            indices = torch.empty_like(z, dtype=index_dtype) if return_indices else None
            loss = codebook.new_empty(())
            partials = tickets = None
            if not single:
                partials = torch.empty(cut.programs, dtype=torch.float64, device=device)
                tickets = counters(device, stream, 1)
            tensors = (z, codebook, levels, *sort(codebook, stream), quantized, indices, loss, partials, tickets)
            launch(_are_aligned(z, codebook), stream, tensors + numbers)
        return quantized, indices, loss

    return forward


def _prepare_backward(problem: Problem) -> Backward:
    cut = plan(problem, _processors(problem.device), summing_codes=True)
    levels, device, compute_dtype = _levels(problem), problem.device, problem.compute_dtype
    scales = (2 / problem.size * problem.commitment_weight, 2 / problem.size * problem.quantization_weight)
    numbers = (*_halves(scales[0]), *_halves(scales[1]), *cut.sizes(problem.stride), cut.group_size)
    groups = -(-cut.parts // cut.group_size)
    entries = cut.windows * cut.columns * problem.stride
    sum_dtype = compute_dtype if cut.few else torch.float64
    lanes_entries = 0 if cut.lanes == cut.columns else cut.programs * cut.lanes * problem.stride
    sort = _prepare_sort(cut, problem, levels)

    @cache
    def launcher(has_grad_quantized: bool, need_grad_z: bool, need_grad_codebook: bool) -> Launch:
        constants = cut.constants(levels is not None) | {
            "COLUMNS": cut.columns,
            "LANES": cut.lanes,
            "GRAD_QUANTIZED": has_grad_quantized,
            "GRAD_Z": need_grad_z,
            "GRAD_CODEBOOK": need_grad_codebook,
            "DIRECT": cut.direct,
            "FOLDED": cut.folded,
        }
        return _launcher(_kernels().backward_kernel, cut.programs, constants)

    def backward(
        z: Tensor,
        codebook: Tensor,
        grad_quantized: Tensor | None,
        grad_loss: Tensor,
        need_grad_z: bool,
        need_grad_codebook: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        with _on(device):
            stream = _stream(device)
            grad_z = torch.empty_like(z) if need_grad_z else None
            grad_codebook = lanes = partials = sums = tickets = None
            if need_grad_codebook:
                grad_codebook = torch.empty_like(codebook)
                if not (cut.direct and cut.few):
                    partials = torch.empty(cut.parts * entries, dtype=sum_dtype, device=device)
                if not cut.few:
                    lanes = torch.empty(lanes_entries, dtype=sum_dtype, device=device) if lanes_entries else partials
                if not cut.direct:
                    sums = torch.empty(groups * entries, dtype=torch.float64, device=device)
                    tickets = counters(device, stream, cut.windows * (groups + 1))
            tensors = (z, codebook, levels, *sort(codebook, stream), grad_quantized, grad_loss, grad_z, grad_codebook)
            tensors += (lanes, partials, sums, tickets)
            launch = launcher(grad_quantized is not None, need_grad_z, need_grad_codebook)
            launch(_are_aligned(z, codebook, grad_quantized), stream, tensors + numbers)
        return grad_z, grad_codebook

    return backward
