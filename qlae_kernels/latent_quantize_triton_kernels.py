"""The triton kernels of the op `latent_quantize`; imported on first use, since triton takes a while to import.

A tile is REPEAT pieces of [ROWS, BLOCK], rows times columns. What is loaded per column serves all pieces, and sums over
the pieces stay within threads. With inner == 1 memory is read as rows of `period` elements, a whole number of samples,
and a window is a range of BLOCK columns: column c belongs to latent c % D. With inner > 1 a window is one latent, and a
tile is a column of its samples. Each window is shared by `parts` programs, which take its tiles in turn.

FEW codes are compared one by one in registers. Where there are more (FEW == 0), a first launch sorts every row of the
codebook, and each element searches its row.
"""
# Types of kernel arguments are triton's to infer, and what is known when a kernel is compiled has a name in capitals.
# ruff: noqa: ANN001, ANN201, ANN202, N803, RUF005, SIM108

from __future__ import annotations

import triton
import triton.language as tl

# Sizes that change from call to call must not cost a compilation each.
SIZES = ("size_units", "num_latents", "spacing_units", "num_codes", "windows", "parts", "tiles", "group_size", "passes")
# The halves of float64 numbers: some versions of triton round a float argument to float32.
HALVES = tuple(
    f"{name}_{half}" for name in ("loss_scale", "commitment_scale", "quantization_scale") for half in ("high", "low")
)
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
def _joined(high, low):
    """The float64 whose bits are the two int32."""
    bits = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
    return bits.to(tl.float64, bitcast=True)


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
def _first_nan(codebook_ptr, row_starts, counts, FEW: tl.constexpr, RAGGED: tl.constexpr):
    """The first code of every column that is NaN, or -1: to argmin a NaN distance is the smallest."""
    found = tl.full(row_starts.shape, -1, tl.int32)
    for step in tl.static_range(FEW):
        code = _load_code(codebook_ptr, row_starts, FEW - 1 - step, counts, RAGGED)
        found = tl.where((code != code) & (FEW - 1 - step < counts), FEW - 1 - step, found)
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
def _nearest_of_few(z, codebook_ptr, row_starts, counts, FEW: tl.constexpr, RAGGED: tl.constexpr):
    """Indices (int32), codes and residuals z - code of every piece, from one code after the other."""
    first = _load_code(codebook_ptr, row_starts, 0, counts, RAGGED)
    residuals = ()
    codes = ()
    indices = ()
    for piece in tl.static_range(len(z)):
        residuals = residuals + (z[piece] - first,)
        codes = codes + (tl.broadcast_to(first, z[piece].shape),)
        indices = indices + (tl.zeros(z[piece].shape, tl.int32),)
    for k in tl.static_range(1, FEW):
        candidate = _load_code(codebook_ptr, row_starts, k, counts, RAGGED)
        residuals, codes, indices = _compare(z, residuals, codes, indices, candidate, k)
    return indices, codes, residuals


@triton.jit
def _last_not_above(z, sorted_ptr, row_starts, num_codes):
    """Ranks of the last codes that are not above z, or 0: log2(num_codes) steps for all pieces together."""
    ranks = ()
    for piece in tl.static_range(len(z)):
        ranks = ranks + (tl.zeros(z[piece].shape, tl.int32),)
    left = num_codes
    while left > 1:
        half = left // 2
        moved = ()
        for piece in tl.static_range(len(z)):
            code = tl.load(sorted_ptr + row_starts + ranks[piece] + half)
            moved = moved + (tl.where(code <= z[piece], ranks[piece] + half, ranks[piece]),)
        ranks = moved
        left -= half
    return ranks


@triton.jit
def _first_as_near(z, ranks, distances, indices, unsettled, sorted_ptr, order_ptr, row_starts, num_codes):
    """The smallest index among the codes, neighbours by rank, whose rounded distances are equal to the given ones."""
    below = unsettled
    above = unsettled
    reach = 1
    while tl.max(tl.max((below | above).to(tl.int32), 1), 0) > 0:
        below = below & (ranks >= reach)
        above = above & (ranks + reach < num_codes)
        lower = tl.load(sorted_ptr + row_starts + ranks - reach, mask=below, other=0.0)
        upper = tl.load(sorted_ptr + row_starts + ranks + reach, mask=above, other=0.0)
        below = below & (tl.abs(z - lower) == distances)
        above = above & (tl.abs(z - upper) == distances)
        lower_index = tl.load(order_ptr + row_starts + ranks - reach, mask=below, other=0x7FFFFFFF)
        upper_index = tl.load(order_ptr + row_starts + ranks + reach, mask=above, other=0x7FFFFFFF)
        indices = tl.minimum(indices, tl.minimum(lower_index, upper_index))
        reach += 1
    return indices


@triton.jit
def _nearest_of_many(z, exists, codebook_ptr, sorted_ptr, order_ptr, row_starts, num_codes):
    """Indices (int32), codes and residuals z - code of every piece, by binary search among sorted codes.

    The rounded distance of a code does not fall as codes go away from z, so the nearest is one of z's two neighbours,
    and codes that are as near lie next to it. Where one does, the smallest index is looked for.
    """
    ranks = _last_not_above(z, sorted_ptr, row_starts, num_codes)
    residuals = ()
    codes = ()
    indices = ()
    for piece in tl.static_range(len(z)):
        rank = ranks[piece]
        lower = tl.load(sorted_ptr + row_starts + rank)
        upper = tl.load(sorted_ptr + row_starts + rank + 1, mask=rank + 1 < num_codes, other=float("inf"))
        lower_distance = tl.abs(z[piece] - lower)
        upper_distance = tl.abs(z[piece] - upper)
        is_upper = upper_distance < lower_distance
        rank = tl.where(is_upper, rank + 1, rank)
        code = tl.where(is_upper, upper, lower)
        distance = tl.where(is_upper, upper_distance, lower_distance)
        index = tl.load(order_ptr + row_starts + rank)
        # The other neighbour of the nearest code; one of them was compared.
        beyond = tl.where(is_upper, rank + 1, rank - 1)
        is_code = (beyond >= 0) & (beyond < num_codes)
        next_code = tl.load(sorted_ptr + row_starts + beyond, mask=is_code, other=float("nan"))
        unsettled = (upper_distance == lower_distance) | (tl.abs(z[piece] - next_code) == distance)
        unsettled = unsettled & (tl.abs(z[piece]) < float("inf")) & exists[piece]
        if tl.max(tl.max(unsettled.to(tl.int32), 1), 0) > 0:
            index = _first_as_near(
                z[piece], rank, distance, index, unsettled, sorted_ptr, order_ptr, row_starts, num_codes
            )
            code = tl.load(codebook_ptr + row_starts + index)
        residuals = residuals + (z[piece] - code,)
        codes = codes + (code,)
        indices = indices + (index,)
    return indices, codes, residuals


@triton.jit
def _nearest(
    z,
    exists,
    codebook_ptr,
    sorted_ptr,
    order_ptr,
    row_starts,
    counts,
    first_nan,
    num_codes,
    FEW: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """Indices (int32), codes and residuals z - code of every piece; NaN is the code of what is not finite."""
    if FEW > 0:
        indices, codes, residuals = _nearest_of_few(z, codebook_ptr, row_starts, counts, FEW, RAGGED)
    else:
        indices, codes, residuals = _nearest_of_many(
            z, exists, codebook_ptr, sorted_ptr, order_ptr, row_starts, num_codes
        )
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
def _clear(pointer, count):
    """Set `count` numbers to 0, for all threads to see."""
    for start in range(0, count, 1024):
        places = start + tl.arange(0, 1024)
        tl.store(pointer + places, tl.zeros([1024], pointer.dtype.element_ty), mask=places < count)
    tl.debug_barrier()


@triton.jit
def _fold_lanes(lanes_ptr, own_ptr, repeats, stride, num_codes, LANES: tl.constexpr, COLUMNS: tl.constexpr):
    """Add up the lanes [K, LANES] of one latent, `stride` apart, in their order: sums [K, COLUMNS]."""
    for start in range(0, num_codes * COLUMNS, 128):
        places = start + tl.arange(0, 128)
        valid = (places < num_codes * COLUMNS) & (places % COLUMNS < stride)
        first = places // COLUMNS * LANES + places % COLUMNS
        total = tl.zeros([128], tl.float64)
        for repeat in range(repeats):
            total += tl.load(lanes_ptr + first + repeat * stride, mask=valid, other=0.0)
        tl.store(own_ptr + places, total, mask=places < num_codes * COLUMNS)


@triton.jit
def _store_gradient(grad_codebook_ptr, latents, codes, values, num_latents, num_codes):
    """Write the gradient of codes; of latents that do not exist, and beyond the last code, nothing."""
    target_ptr = grad_codebook_ptr + latents * num_codes + codes
    rounded = values.to(grad_codebook_ptr.dtype.element_ty)
    tl.store(target_ptr, rounded, mask=(latents < num_latents) & (codes < num_codes))


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


@triton.jit
def _merge(codes_ptr, order_ptr, merged_codes_ptr, merged_order_ptr, level, num_codes, LANES: tl.constexpr):
    """Merge pairs of sorted runs of 2**level codes: a code moves up by the codes of the other run that precede it."""
    width = 1 << level
    for start in range(0, num_codes, LANES):
        ranks = start + tl.arange(0, LANES)
        valid = ranks < num_codes
        codes = tl.load(codes_ptr + ranks, mask=valid, other=0.0)
        run = ranks >> level
        is_first = run % 2 == 0
        other_start = (run ^ 1) << level
        low = tl.zeros([LANES], tl.int32)
        high = tl.minimum(tl.maximum(num_codes - other_start, 0), width)
        for _ in range(level + 1):
            middle = (low + high) // 2
            open_ = valid & (low < high)
            others = tl.load(codes_ptr + other_start + middle, mask=open_, other=0.0)
            # Of equal codes the first run's come first, so that their order is kept.
            precedes = (others < codes) | ((others == codes) & (run % 2 == 1))
            low = tl.where(open_ & precedes, middle + 1, low)
            high = tl.where(open_ & (precedes == 0), middle, high)
        places = tl.where(is_first, ranks, ranks - width) + low
        tl.store(merged_codes_ptr + places, codes, mask=valid)
        tl.store(merged_order_ptr + places, tl.load(order_ptr + ranks, mask=valid, other=0), mask=valid)


@triton.jit(do_not_specialize=SIZES)
def sort_kernel(
    codebook_ptr,
    levels_ptr,
    sorted_ptr,
    order_ptr,
    first_nan_ptr,
    num_latents,
    num_codes,
    passes,
    RAGGED: tl.constexpr,
    LANES: tl.constexpr,
):
    """Sort one row of the codebook per program: codes and indices [2, D, K], of which the first half is the result.

    What is NaN or lies beyond a row's codes is infinity there; `first_nan` [D] is the index of the first NaN, or -1.
    """
    latent = tl.program_id(0).to(tl.int64)
    row_start = latent * num_codes
    count = num_codes
    if RAGGED:
        count = tl.load(levels_ptr + latent)
    first_nan = num_codes
    falls = 0
    for start in range(0, num_codes, LANES):
        ranks = start + tl.arange(0, LANES)
        codes = tl.load(codebook_ptr + row_start + ranks, mask=ranks < count, other=float("inf"))
        before = tl.load(codebook_ptr + row_start + ranks - 1, mask=(ranks > 0) & (ranks < count), other=-float("inf"))
        first_nan = tl.minimum(first_nan, tl.min(tl.where(codes != codes, ranks, num_codes), 0))
        falls += tl.sum((before > codes).to(tl.int32), 0)
    tl.store(first_nan_ptr + latent, tl.where(first_nan < num_codes, first_nan, -1))

    # Rows that are sorted, as they are at first, need no pass.
    if (falls == 0) & (first_nan == num_codes):
        passes = 0
    half = num_latents.to(tl.int64) * num_codes
    into = row_start + passes % 2 * half
    for start in range(0, num_codes, LANES):
        ranks = start + tl.arange(0, LANES)
        codes = tl.load(codebook_ptr + row_start + ranks, mask=ranks < count, other=float("inf"))
        codes = tl.where(codes == codes, codes, float("inf"))
        tl.store(sorted_ptr + into + ranks, codes, mask=ranks < num_codes)
        tl.store(order_ptr + into + ranks, ranks, mask=ranks < num_codes)
    for level in range(passes):
        source = row_start + (passes - level) % 2 * half
        target = row_start + (passes - level - 1) % 2 * half
        # Threads read what others stored.
        tl.debug_barrier()
        _merge(
            sorted_ptr + source, order_ptr + source, sorted_ptr + target, order_ptr + target, level, num_codes, LANES
        )


@triton.jit(do_not_specialize=SIZES + HALVES, do_not_specialize_on_alignment=SCALARS)
def forward_kernel(
    z_ptr,
    codebook_ptr,
    levels_ptr,
    sorted_ptr,
    order_ptr,
    first_nan_ptr,
    quantized_ptr,
    indices_ptr,
    loss_ptr,
    partials_ptr,
    counters_ptr,
    loss_scale_high,
    loss_scale_low,
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
    if WIDE:
        size_units, spacing_units = size_units.to(tl.int64), spacing_units.to(tl.int64)
    size, spacing = size_units * ALIGN, spacing_units * ALIGN
    compute = codebook_ptr.dtype.element_ty
    if WIDE:
        window = window.to(tl.int64)
    columns, latents, exist = _columns(window, num_latents, spacing, RUNS, BLOCK)
    row_starts = latents * num_codes
    counts = tl.load(levels_ptr + latents) if RAGGED else tl.full([1, BLOCK], num_codes, tl.int32)
    if FEW > 0:
        first_nan = _first_nan(codebook_ptr, row_starts, counts, FEW, RAGGED)
    else:
        first_nan = tl.load(first_nan_ptr + latents)

    squares = tl.zeros([ROWS, BLOCK], compute)
    for tile in range(part, tiles, parts):
        z, places, exists = _load_tile(
            z_ptr, tile, columns, exist, size, num_latents, spacing, compute, ROWS, REPEAT, RUNS, WIDE
        )
        indices, codes, residuals = _nearest(
            z, exists, codebook_ptr, sorted_ptr, order_ptr, row_starts, counts, first_nan, num_codes, FEW, RAGGED
        )
        for piece in tl.static_range(REPEAT):
            offsets, valid = places[piece], exists[piece]
            tl.store(quantized_ptr + offsets, _rounded(codes[piece], quantized_ptr.dtype.element_ty), mask=valid)
            if INDICES:
                tl.store(indices_ptr + offsets, indices[piece].to(indices_ptr.dtype.element_ty), mask=valid)
            squares += tl.where(valid, residuals[piece] * residuals[piece], 0.0)
    total = tl.sum(tl.sum(squares.to(tl.float64), 1), 0)
    loss_scale = _joined(loss_scale_high, loss_scale_low)

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
    stride = windows.to(tl.int64) * entries
    window_start = window.to(tl.int64) * entries
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


@triton.jit(do_not_specialize=SIZES + HALVES, do_not_specialize_on_alignment=SCALARS)
def backward_kernel(
    z_ptr,
    codebook_ptr,
    levels_ptr,
    sorted_ptr,
    order_ptr,
    first_nan_ptr,
    grad_quantized_ptr,
    grad_loss_ptr,
    grad_z_ptr,
    grad_codebook_ptr,
    lanes_ptr,
    partials_ptr,
    sums_ptr,
    counters_ptr,
    commitment_scale_high,
    commitment_scale_low,
    quantization_scale_high,
    quantization_scale_low,
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
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
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
    if WIDE:
        size_units, spacing_units = size_units.to(tl.int64), spacing_units.to(tl.int64)
    size, spacing = size_units * ALIGN, spacing_units * ALIGN
    compute = codebook_ptr.dtype.element_ty
    if WIDE:
        window = window.to(tl.int64)
    columns, latents, exist = _columns(window, num_latents, spacing, RUNS, BLOCK)
    row_starts = latents * num_codes
    counts = tl.load(levels_ptr + latents) if RAGGED else tl.full([1, BLOCK], num_codes, tl.int32)
    if FEW > 0:
        first_nan = _first_nan(codebook_ptr, row_starts, counts, FEW, RAGGED)
    else:
        first_nan = tl.load(first_nan_ptr + latents)
    grad_loss = tl.load(grad_loss_ptr).to(tl.float64)
    residual_scale = (_joined(commitment_scale_high, commitment_scale_low) * grad_loss).to(compute)
    code_scale = -_joined(quantization_scale_high, quantization_scale_low) * grad_loss

    if GRAD_CODEBOOK and not (DIRECT and FEW > 0):
        # This program's own sums, [K, COLUMNS].
        own_ptr = partials_ptr + (part * windows + window).to(tl.int64) * num_codes * COLUMNS
    if GRAD_CODEBOOK and FEW == 0:
        # Sums of each lane, [K, LANES]: no two elements of a piece meet in one. They may be the program's own sums.
        lanes_ptr += (part * windows + window).to(tl.int64) * num_codes * LANES
        lanes = tl.arange(0, ROWS)[:, None] + tl.arange(0, BLOCK)[None, :]
        _clear(lanes_ptr, num_codes * LANES)
    sums = _zeros(FEW, ROWS, BLOCK, compute)
    for tile in range(part, tiles, parts):
        z, places, exists = _load_tile(
            z_ptr, tile, columns, exist, size, num_latents, spacing, compute, ROWS, REPEAT, RUNS, WIDE
        )
        indices, _, residuals = _nearest(
            z, exists, codebook_ptr, sorted_ptr, order_ptr, row_starts, counts, first_nan, num_codes, FEW, RAGGED
        )
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
                for piece in tl.static_range(REPEAT):
                    own = lanes_ptr + indices[piece] * LANES + lanes
                    so_far = tl.load(own, mask=exists[piece], other=0.0)
                    tl.store(own, so_far + residuals[piece].to(tl.float64), mask=exists[piece])
                    # The next piece adds to what other threads may have stored.
                    tl.debug_barrier()

    if GRAD_CODEBOOK:
        if FEW == 0 and COLUMNS != LANES:
            repeats = LANES if RUNS else spacing // num_latents
            _fold_lanes(lanes_ptr, own_ptr, repeats, 1 if RUNS else num_latents, num_codes, LANES, COLUMNS)
            tl.debug_barrier()
        if DIRECT:
            if FEW > 0:
                own_latents = window * BLOCK + tl.arange(0, BLOCK)
                for k in tl.static_range(FEW):
                    total = tl.sum(sums[k].to(tl.float64), 0)
                    _store_gradient(grad_codebook_ptr, own_latents, k, code_scale * total, num_latents, num_codes)
            else:
                for start in range(0, num_codes * COLUMNS, 128):
                    places = start + tl.arange(0, 128)
                    total = tl.load(own_ptr + places, mask=places < num_codes * COLUMNS, other=0.0)
                    own_latents = window * COLUMNS + places % COLUMNS
                    code = places // COLUMNS
                    _store_gradient(grad_codebook_ptr, own_latents, code, code_scale * total, num_latents, num_codes)
        else:
            if FEW > 0:
                for k in tl.static_range(FEW):
                    tl.store(own_ptr + k * COLUMNS + tl.arange(0, COLUMNS), tl.sum(sums[k], 0))
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
                COLUMNS,
                FOLDED,
            )
