"""The triton kernels of the op `latent_quantize`; imported on first use, since triton takes a while to import.

A tile is REPEAT pieces of [ROWS, BLOCK], rows times columns. What is loaded per column serves all pieces, and sums over
the pieces stay within threads. With inner == 1 memory is read as rows of `period` elements, a whole number of samples,
and a window is a range of BLOCK columns: column c belongs to latent c % D. With inner > 1 a window is one latent, and a
tile is a column of its samples. Each window is shared by `parts` programs, which take its tiles in turn.
"""
# Types of kernel arguments are triton's to infer, and what is known when a kernel is compiled has a name in capitals.
# ruff: noqa: ANN001, ANN201, ANN202, N803, F821, UP037, RUF005, SIM108

from __future__ import annotations

import triton
import triton.language as tl

# Sizes that change from call to call must not cost a compilation each.
SIZES = ("size_units", "num_latents", "spacing_units", "num_codes", "windows", "parts", "tiles", "group_size")
# A view of a tensor of losses may start anywhere.
SCALARS = ("loss_ptr", "grad_loss_ptr")


# Whether triton's interpreter runs the kernels, on the CPU.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _rounded(values, DTYPE: tl.constexpr):
    """Values rounded to the nearest of a dtype."""
    # The interpreter cuts off the bits that a GPU rounds.
    if _INTERPRETED and tl.bfloat16 == DTYPE:
        bits = values.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        values = tl.where(values == values, bits.to(tl.float32, bitcast=True), values)
        return (values.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return values.to(DTYPE)


@triton.jit
def _widened(values, DTYPE: tl.constexpr):
    """The same values in the compute dtype."""
    # The interpreter turns subnormal values to 0.
    if _INTERPRETED and values.dtype == tl.bfloat16:
        bits = values.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True)
    return values.to(DTYPE)


@triton.jit
def _columns(window, num_latents, spacing, RUNS: tl.constexpr, BLOCK: tl.constexpr):
    """The columns [1, BLOCK] of a window, their latents, and which of them exist."""
    columns = window * BLOCK + tl.arange(0, BLOCK)[None, :]
    if RUNS:
        return columns, columns, columns < num_latents
    return columns, columns % num_latents, columns < spacing


@triton.jit
def _places(
    piece, columns, exist, size, num_latents, spacing, ROWS: tl.constexpr, RUNS: tl.constexpr, WIDE: tl.constexpr
):
    """Offsets [ROWS, BLOCK] of a piece and which of them exist; `spacing` is the inner size, or else the period."""
    if WIDE:
        piece = tl.zeros([1, 1], tl.int64) + piece
    rows = piece * ROWS + tl.arange(0, ROWS)[:, None]
    if RUNS:
        offsets = (rows // spacing * num_latents + columns) * spacing + rows % spacing
    else:
        offsets = rows * spacing + columns
    return offsets, (offsets < size) & exist


@triton.jit
def _load_tile(
    z_ptr,
    tile,
    columns,
    exist,
    size,
    num_latents,
    spacing,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    REPEAT: tl.constexpr,
    RUNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The pieces of a tile, 0 where there is none, their offsets, and which elements exist."""
    z = ()
    places = ()
    exists = ()
    for piece in tl.static_range(REPEAT):
        offsets, valid = _places(tile * REPEAT + piece, columns, exist, size, num_latents, spacing, ROWS, RUNS, WIDE)
        z = z + (_widened(tl.load(z_ptr + offsets, mask=valid, other=0.0), DTYPE),)
        places = places + (offsets,)
        exists = exists + (valid,)
    return z, places, exists


@triton.jit
def _load_code(codebook_ptr, row_starts, k, counts, RAGGED: tl.constexpr):
    """Code k of every column; NaN, which is never nearer than another, beyond the last one."""
    if RAGGED:
        return tl.load(codebook_ptr + row_starts + k, mask=k < counts, other=float("nan"))
    return tl.load(codebook_ptr + row_starts + k)


@triton.jit
def _first_nan(codebook_ptr, row_starts, counts, num_codes, FEW: tl.constexpr, RAGGED: tl.constexpr):
    """The first code of every column that is NaN, or -1: to argmin a NaN distance is the smallest."""
    found = tl.full(row_starts.shape, -1, tl.int32)
    if FEW > 0:
        for step in tl.static_range(FEW):
            code = _load_code(codebook_ptr, row_starts, FEW - 1 - step, counts, RAGGED)
            found = tl.where((code != code) & (FEW - 1 - step < counts), FEW - 1 - step, found)
    else:
        for step in range(num_codes):
            k = num_codes - 1 - step
            code = _load_code(codebook_ptr, row_starts, k, counts, RAGGED)
            found = tl.where((code != code) & (k < counts), k, found)
    return found


@triton.jit
def _compare(z, residuals, codes, indices, candidate, k):
    """What is nearest after code k of every column, `candidate`, too."""
    new_residuals = ()
    new_codes = ()
    new_indices = ()
    for piece in tl.static_range(len(z)):
        difference = z[piece] - candidate
        closer = tl.abs(difference) < tl.abs(residuals[piece])
        new_residuals = new_residuals + (tl.where(closer, difference, residuals[piece]),)
        new_codes = new_codes + (tl.where(closer, candidate, codes[piece]),)
        new_indices = new_indices + (tl.where(closer, k, indices[piece]),)
    return new_residuals, new_codes, new_indices


@triton.jit
def _nearest(z, codebook_ptr, row_starts, counts, first_nan, num_codes, FEW: tl.constexpr, RAGGED: tl.constexpr):
    """Indices (int32), codes and residuals z - code of every piece; NaN is the code of what is not finite."""
    first = _load_code(codebook_ptr, row_starts, 0, counts, RAGGED)
    residuals = ()
    codes = ()
    indices = ()
    for piece in tl.static_range(len(z)):
        residuals = residuals + (z[piece] - first,)
        codes = codes + (tl.broadcast_to(first, z[piece].shape),)
        indices = indices + (tl.zeros(z[piece].shape, tl.int32),)
    if FEW > 0:
        for k in tl.static_range(1, FEW):
            candidate = _load_code(codebook_ptr, row_starts, k, counts, RAGGED)
            residuals, codes, indices = _compare(z, residuals, codes, indices, candidate, k)
    else:
        for k in range(1, num_codes):
            candidate = _load_code(codebook_ptr, row_starts, k, counts, RAGGED)
            residuals, codes, indices = _compare(z, residuals, codes, indices, candidate, k)
    known_residuals = ()
    known_codes = ()
    known_indices = ()
    for piece in tl.static_range(len(z)):
        finite = tl.abs(z[piece]) < float("inf")
        known = finite & (first_nan < 0)
        known_residuals = known_residuals + (tl.where(known, residuals[piece], float("nan")),)
        known_codes = known_codes + (tl.where(known, codes[piece], float("nan")),)
        known_indices = known_indices + (tl.where(finite, tl.where(first_nan >= 0, first_nan, indices[piece]), 0),)
    return known_indices, known_codes, known_residuals


@triton.jit
def _zeros(COUNT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(COUNT):
        zeros = zeros + (tl.zeros([ROWS, BLOCK], DTYPE),)
    return zeros


@triton.jit
def _sum_of_code(k, indices, residuals, exists):
    """Sum [ROWS, BLOCK] over the pieces of the residuals that belong to code k."""
    total = tl.where((indices[0] == k) & exists[0], residuals[0], 0.0)
    for piece in tl.static_range(1, len(indices)):
        total += tl.where((indices[piece] == k) & exists[piece], residuals[piece], 0.0)
    return total


@triton.jit
def _is_last(counter_ptr, arrivals):
    """True in the last of `arrivals` programs to get here; what the others stored before is then visible to it."""
    # The atomic is one thread's: the barrier puts the stores of all others before it.
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == arrivals - 1
    if last:
        tl.store(counter_ptr, 0)
    tl.debug_barrier()
    return last


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SCALARS)
def forward_kernel(
    z_ptr,
    codebook_ptr,
    levels_ptr,
    quantized_ptr,
    indices_ptr,
    loss_ptr,
    partials_ptr,
    counters_ptr,
    loss_scale: "fp64",
    size_units,
    num_latents,
    spacing_units,
    num_codes,
    windows,
    parts,
    tiles,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    REPEAT: tl.constexpr,
    FEW: tl.constexpr,
    ALIGN: tl.constexpr,
    RUNS: tl.constexpr,
    WIDE: tl.constexpr,
    RAGGED: tl.constexpr,
    INDICES: tl.constexpr,
    SINGLE: tl.constexpr,
):
    """Quantized values, indices and the loss; one launch of windows * parts programs."""
    program = tl.program_id(0)
    window = program % windows
    part = program // windows
    # Multiples of ALIGN, as the compiler must see to load and store several elements at once.
    size, spacing = size_units * ALIGN, spacing_units * ALIGN
    compute = codebook_ptr.dtype.element_ty
    if WIDE:
        window = window.to(tl.int64)
    columns, latents, exist = _columns(window, num_latents, spacing, RUNS, BLOCK)
    row_starts = latents * num_codes
    counts = tl.load(levels_ptr + latents) if RAGGED else tl.full([1, BLOCK], num_codes, tl.int32)
    first_nan = _first_nan(codebook_ptr, row_starts, counts, num_codes, FEW, RAGGED)

    squares = tl.zeros([ROWS, BLOCK], compute)
    for tile in range(part, tiles, parts):
        z, places, exists = _load_tile(
            z_ptr, tile, columns, exist, size, num_latents, spacing, compute, ROWS, REPEAT, RUNS, WIDE
        )
        indices, codes, residuals = _nearest(z, codebook_ptr, row_starts, counts, first_nan, num_codes, FEW, RAGGED)
        for piece in tl.static_range(REPEAT):
            offsets, valid = places[piece], exists[piece]
            tl.store(quantized_ptr + offsets, _rounded(codes[piece], quantized_ptr.dtype.element_ty), mask=valid)
            if INDICES:
                tl.store(indices_ptr + offsets, indices[piece].to(indices_ptr.dtype.element_ty), mask=valid)
            squares += tl.where(valid, residuals[piece] * residuals[piece], 0.0)
    total = tl.sum(tl.sum(squares.to(tl.float64), 1), 0)

    if SINGLE:
        tl.store(loss_ptr, (loss_scale * total).to(compute))
    else:
        programs = windows * parts
        tl.store(partials_ptr + program, total)
        if _is_last(counters_ptr, programs):
            sums = tl.zeros([1024], tl.float64)
            for start in range(0, programs, 1024):
                places = start + tl.arange(0, 1024)
                # Past the first-level cache, which may hold what was there before.
                sums += tl.load(partials_ptr + places, mask=places < programs, other=0.0, cache_modifier=".cg")
            tl.store(loss_ptr, (loss_scale * tl.sum(sums, 0)).to(compute))


@triton.jit
def _sum_parts(source_ptr, stride, count, places, valid):
    """Sums [n] in float64 over `count` arrays `stride` apart, at `places` [n] of each, in one fixed order."""
    sums = tl.zeros(places.shape, tl.float64)
    for start in range(0, count, 16):
        members = start + tl.arange(0, 16)[:, None]
        mask = (members < count) & valid[None, :]
        # Past the first-level cache, which may hold what was there before.
        values = tl.load(source_ptr + members * stride + places[None, :], mask=mask, other=0.0, cache_modifier=".cg")
        sums += tl.sum(values.to(tl.float64), 0)
    return sums


@triton.jit
def _sum_columns(
    sums_ptr, groups, windows, num_latents, spacing, num_codes, latents, codes, valid, BLOCK: tl.constexpr
):
    """Sums [n] in float64 over groups and over all columns of a latent, in one fixed order."""
    repeats = spacing // num_latents
    group_size = windows * num_codes * BLOCK
    sums = tl.zeros(latents.shape, tl.float64)
    for start in range(0, groups * repeats, 16):
        members = start + tl.arange(0, 16)[:, None]
        columns = members % repeats * num_latents + latents[None, :]
        places = (columns // BLOCK * num_codes + codes[None, :]) * BLOCK + columns % BLOCK
        mask = (members < groups * repeats) & valid[None, :]
        source_ptr = sums_ptr + (members // repeats).to(tl.int64) * group_size + places
        sums += tl.sum(tl.load(source_ptr, mask=mask, other=0.0, cache_modifier=".cg"), 0)
    return sums


@triton.jit
def _combine(
    partials_ptr,
    sums_ptr,
    grad_codebook_ptr,
    counters_ptr,
    scale,
    window,
    part,
    num_latents,
    spacing,
    num_codes,
    windows,
    parts,
    group_size,
    BLOCK: tl.constexpr,
    FOLDED: tl.constexpr,
):
    """Add up the programs' sums [parts, windows, K, BLOCK]: first groups of parts, then the groups."""
    groups = (parts + group_size - 1) // group_size
    group = part // group_size
    first = group * group_size
    members = tl.minimum(group_size, parts - first)
    entries = num_codes * BLOCK
    stride = (windows * entries).to(tl.int64)
    window_start = (window * entries).to(tl.int64)
    lanes = tl.arange(0, 128)
    if _is_last(counters_ptr + windows + window * groups + group, members):
        for start in range(0, entries, 128):
            places = start + lanes
            sums = _sum_parts(partials_ptr + first * stride + window_start, stride, members, places, places < entries)
            tl.store(sums_ptr + group * stride + window_start + places, sums, mask=places < entries)
        # Where latents have columns in several windows, one program waits for all windows.
        arrivals = groups * windows if FOLDED else groups
        if _is_last(counters_ptr + (0 if FOLDED else window), arrivals):
            element = grad_codebook_ptr.dtype.element_ty
            if FOLDED:
                for start in range(0, num_latents * num_codes, 128):
                    places = start + lanes
                    valid = places < num_latents * num_codes
                    sums = _sum_columns(
                        sums_ptr,
                        groups,
                        windows,
                        num_latents,
                        spacing,
                        num_codes,
                        places // num_codes,
                        places % num_codes,
                        valid,
                        BLOCK,
                    )
                    tl.store(grad_codebook_ptr + places, (scale * sums).to(element), mask=valid)
            else:
                for start in range(0, entries, 128):
                    places = start + lanes
                    latents = window * BLOCK + places % BLOCK
                    valid = (places < entries) & (latents < num_latents)
                    sums = _sum_parts(sums_ptr + window_start, stride, groups, places, places < entries)
                    target_ptr = grad_codebook_ptr + latents * num_codes + places // BLOCK
                    tl.store(target_ptr, (scale * sums).to(element), mask=valid)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SCALARS)
def backward_kernel(
    z_ptr,
    codebook_ptr,
    levels_ptr,
    grad_quantized_ptr,
    grad_loss_ptr,
    grad_z_ptr,
    grad_codebook_ptr,
    partials_ptr,
    sums_ptr,
    counters_ptr,
    commitment_scale: "fp64",
    quantization_scale: "fp64",
    size_units,
    num_latents,
    spacing_units,
    num_codes,
    windows,
    parts,
    tiles,
    group_size,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    REPEAT: tl.constexpr,
    FEW: tl.constexpr,
    ALIGN: tl.constexpr,
    RUNS: tl.constexpr,
    WIDE: tl.constexpr,
    RAGGED: tl.constexpr,
    GRAD_QUANTIZED: tl.constexpr,
    GRAD_Z: tl.constexpr,
    GRAD_CODEBOOK: tl.constexpr,
    DIRECT: tl.constexpr,
    FOLDED: tl.constexpr,
):
    """Gradients of z and of the codebook; one launch of windows * parts programs.

    DIRECT: every latent is one program's, which writes its gradient. Otherwise the programs' sums are combined.
    """
    program = tl.program_id(0)
    window = program % windows
    part = program // windows
    # Multiples of ALIGN, as the compiler must see to load and store several elements at once.
    size, spacing = size_units * ALIGN, spacing_units * ALIGN
    compute = codebook_ptr.dtype.element_ty
    if WIDE:
        window = window.to(tl.int64)
    columns, latents, exist = _columns(window, num_latents, spacing, RUNS, BLOCK)
    row_starts = latents * num_codes
    counts = tl.load(levels_ptr + latents) if RAGGED else tl.full([1, BLOCK], num_codes, tl.int32)
    first_nan = _first_nan(codebook_ptr, row_starts, counts, num_codes, FEW, RAGGED)
    grad_loss = tl.load(grad_loss_ptr).to(tl.float64)
    residual_scale = (commitment_scale * grad_loss).to(compute)
    code_scale = -quantization_scale * grad_loss

    if GRAD_CODEBOOK and not (DIRECT and FEW > 0):
        # This program's own sums, [K, BLOCK].
        own_ptr = partials_ptr + (part * windows + window).to(tl.int64) * num_codes * BLOCK + tl.arange(0, BLOCK)
    sums = _zeros(FEW, ROWS, BLOCK, compute)
    for tile in range(part, tiles, parts):
        z, places, exists = _load_tile(
            z_ptr, tile, columns, exist, size, num_latents, spacing, compute, ROWS, REPEAT, RUNS, WIDE
        )
        indices, _, residuals = _nearest(z, codebook_ptr, row_starts, counts, first_nan, num_codes, FEW, RAGGED)
        if GRAD_Z:
            for piece in tl.static_range(REPEAT):
                gradient = residual_scale * residuals[piece]
                offsets, valid = places[piece], exists[piece]
                if GRAD_QUANTIZED:
                    gradient += _widened(tl.load(grad_quantized_ptr + offsets, mask=valid, other=0.0), compute)
                tl.store(grad_z_ptr + offsets, _rounded(gradient, grad_z_ptr.dtype.element_ty), mask=valid)
        if GRAD_CODEBOOK:
            if FEW > 0:
                added = ()
                for k in tl.static_range(FEW):
                    added = added + (sums[k] + _sum_of_code(k, indices, residuals, exists),)
                sums = added
            else:
                for k in range(num_codes):
                    so_far = tl.load(own_ptr + k * BLOCK, mask=tl.full([BLOCK], tile != part, tl.int1), other=0.0)
                    tl.store(own_ptr + k * BLOCK, so_far + tl.sum(_sum_of_code(k, indices, residuals, exists), 0))
                # Threads read in the next tile what others stored in this one.
                tl.debug_barrier()

    if GRAD_CODEBOOK:
        if DIRECT:
            own_latents = window * BLOCK + tl.arange(0, BLOCK)
            target_ptr = grad_codebook_ptr + own_latents * num_codes
            mask = own_latents < num_latents
            element = grad_codebook_ptr.dtype.element_ty
            if FEW > 0:
                for k in tl.static_range(FEW):
                    total = tl.sum(sums[k].to(tl.float64), 0)
                    tl.store(target_ptr + k, (code_scale * total).to(element), mask=mask)
            else:
                for k in range(num_codes):
                    total = tl.load(own_ptr + k * BLOCK).to(tl.float64)
                    tl.store(target_ptr + k, (code_scale * total).to(element), mask=mask)
        else:
            if FEW > 0:
                for k in tl.static_range(FEW):
                    tl.store(own_ptr + k * BLOCK, tl.sum(sums[k], 0))
            _combine(
                partials_ptr,
                sums_ptr,
                grad_codebook_ptr,
                counters_ptr,
                code_scale,
                window,
                part,
                num_latents,
                spacing,
                num_codes,
                windows,
                parts,
                group_size,
                BLOCK,
                FOLDED,
            )
