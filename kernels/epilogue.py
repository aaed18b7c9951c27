"""What every GEMM of wfnet does with its accumulator, written once.

Forward, for a tile of ``u`` (a convolution or a linear map, no bias):

    v   = A * u                       the branch, rounded to its stored dtype where it is stored
    out = act(v + C + residual)       act in {identity, ReLU}

Backward, for a tile of ``dout`` (the gradient that reaches a layer's output):

    g  = (dout + skip) * act'(out)    act'(out) read from the branch (v + C > 0) or from out > 0
    ag = A * g                        input of the layer's own input-gradient GEMM
    T0 = sum_p g,  T1 = sum_p g * v   per sample and channel, p over pixels or tokens

``A`` and ``C`` are ``[B, N]`` tables: one row per sample. A tile has ``BM`` rows (pixels) and
``BN`` columns (channels), and its rows belong to few samples, so that a table costs a few ``[BN]``
vectors, not a gathered ``[BM, BN]`` block (255 registers when that was tried). Two tilings:

- grouped: ``SPAN`` consecutive samples with ``BM // SPAN`` rows each (boxes of pixels);
- flat: rows are ``m = sample * T + p`` in memory order, so that no row is wasted on padding; a
  tile crosses at most ``SPAN - 1`` sample boundaries. ``SPAN == 0`` stands for "too many": one
  table row is then gathered for each tile row (only linear maps with few tokens get there).

``rows`` are (first sample of the tile, sample of each row ``[BM]``, which of these rows exist),
``sizes`` are (B, N, stride between rows of the tables). Tiles live behind a tensor descriptor (TMA)
or a pointer; ``load_tile`` and ``store_tile`` hide it.
"""

import triton
import triton.language as tl


@triton.jit
def load_tile(src, at, row_ok, col_ok, TMA: tl.constexpr):
    """``[BM, BN]`` of ``src``; ``at``: descriptor coordinates, or (base, row offsets, columns).

    The base is one 64-bit number; row offsets and columns within the tile are 32-bit.
    """
    if TMA:
        return src.load(at).reshape(row_ok.shape[0], col_ok.shape[0])
    else:
        mask = row_ok[:, None] & col_ok[None, :]
        return tl.load(src + at[0] + (at[1][:, None] + at[2][None, :]), mask=mask, other=0.0)


@triton.jit
def store_tile(dst, at, value, row_ok, col_ok, TMA: tl.constexpr):
    """Stores ``value`` ``[BM, BN]`` in the dtype of ``dst``; what is out of bounds is dropped."""
    if TMA:
        dst.store(at, value.to(dst.dtype).reshape(dst.block_shape))
    else:
        mask = row_ok[:, None] & col_ok[None, :]
        tl.store(
            dst + at[0] + (at[1][:, None] + at[2][None, :]),
            value.to(dst.dtype.element_ty),
            mask=mask,
        )


@triton.jit
def round_as(value, dst, TMA: tl.constexpr):
    """``value`` rounded to the dtype of ``dst``, in fp32."""
    if TMA:
        return value.to(dst.dtype).to(tl.float32)
    else:
        return value.to(dst.dtype.element_ty).to(tl.float32)


@triton.jit
def row_factors(
    table,  # [B, N] fp32
    rows,
    cols,  # [BN]
    sizes,
    SPAN: tl.constexpr,
    GROUPED: tl.constexpr,
):
    """The table entry of every tile element, broadcastable to ``[BM, BN]``."""
    first, row_sample, _ = rows
    B, N, LD = sizes
    BM: tl.constexpr = row_sample.shape[0]
    BN: tl.constexpr = cols.shape[0]
    ok = cols < N
    if SPAN == 0:
        rows_ok = row_sample < B
        return tl.load(
            table + (row_sample[:, None] * LD + cols[None, :]),
            mask=rows_ok[:, None] & ok[None, :],
            other=0.0,
        )
    elif SPAN == 1:
        return tl.load(table + (first * LD + cols), mask=ok & (first < B), other=0.0)[None, :]
    elif GROUPED:
        samples = first + tl.arange(0, SPAN)
        factors = tl.load(
            table + (samples[:, None] * LD + cols[None, :]),
            mask=(samples < B)[:, None] & ok[None, :],
            other=0.0,
        )  # [SPAN, BN]
        return tl.broadcast_to(factors[:, None, :], (SPAN, BM // SPAN, BN)).reshape(BM, BN)
    else:
        factors = tl.load(table + (first * LD + cols), mask=ok & (first < B), other=0.0)[None, :]
        for j in tl.static_range(1, SPAN):
            later = tl.load(table + ((first + j) * LD + cols), mask=ok & (first + j < B), other=0.0)
            factors = tl.where((row_sample >= first + j)[:, None], later[None, :], factors)
        return factors


@triton.jit
def store_column_sums(
    partial,  # [slots, N] fp32: grouped, slot = tile_in_sample * B + sample; flat, tile * SPAN + j
    value,  # [BM, BN] fp32, 0 in rows that do not exist
    slot,  # first slot of the tile
    rows,
    cols,
    sizes,
    SPAN: tl.constexpr,
    GROUPED: tl.constexpr,
):
    """Column sums of each sample's rows; no atomics, ``column_sums_kernel`` adds the tiles."""
    first, row_sample, _ = rows
    B, N, _ = sizes
    ok = cols < N
    if SPAN == 1:
        tl.store(partial + (slot * N + cols), tl.sum(value, axis=0), mask=ok & (first < B))
    elif GROUPED:
        sums = tl.sum(value.reshape(SPAN, value.shape[0] // SPAN, value.shape[1]), axis=1)
        j = tl.arange(0, SPAN)
        tl.store(
            partial + ((slot + j)[:, None] * N + cols[None, :]),
            sums,
            mask=(first + j < B)[:, None] & ok[None, :],
        )
    else:
        for j in tl.static_range(0, SPAN):
            mine = tl.where((row_sample == first + j)[:, None], value, 0.0)
            tl.store(partial + ((slot + j) * N + cols), tl.sum(mine, axis=0), mask=ok)


@triton.jit
def store_column_moments(
    moments,  # ([slots, N] fp32 sums, and squared distances from the slot's mean; [slots] counts)
    value,  # [BM, BN] fp32
    slot,  # as of store_column_sums
    rows,
    cols,
    sizes,
    SPAN: tl.constexpr,
    GROUPED: tl.constexpr,
):
    """Sums of each sample's rows, and their squared distances from these rows' own mean.

    ``column_moments_kernel`` merges the tiles of a sample. Squares are never summed as they are:
    that of a mean of 100 would leave three digits of a variance of 1.
    """
    sums, squares, counts = moments
    first, row_sample, row_ok = rows
    B, N, _ = sizes
    ok = cols < N
    if GROUPED:
        BM: tl.constexpr = value.shape[0]
        j = tl.arange(0, SPAN)
        inside = row_ok.reshape(SPAN, BM // SPAN, 1)
        count = tl.sum(row_ok.to(tl.float32).reshape(SPAN, BM // SPAN), axis=1)
        value = tl.where(inside, value.reshape(SPAN, BM // SPAN, cols.shape[0]), 0.0)
        total = tl.sum(value, axis=1)
        apart = tl.where(inside, value - (total / tl.maximum(count, 1.0)[:, None])[:, None, :], 0.0)
        place = (slot + j)[:, None] * N + cols[None, :]
        exists = first + j < B
        tl.store(sums + place, total, mask=exists[:, None] & ok[None, :])
        tl.store(squares + place, tl.sum(apart * apart, axis=1), mask=exists[:, None] & ok[None, :])
        tl.store(counts + slot + j, count, mask=exists)
    else:
        for j in tl.static_range(0, SPAN):
            mine = row_ok & (row_sample == first + j)
            count = tl.sum(mine.to(tl.float32), axis=0)
            total = tl.sum(tl.where(mine[:, None], value, 0.0), axis=0)
            mean = total / tl.maximum(count, 1.0)
            apart = tl.where(mine[:, None], value - mean[None, :], 0.0)
            place = (slot + j) * N + cols
            tl.store(sums + place, total, mask=ok)
            tl.store(squares + place, tl.sum(apart * apart, axis=0), mask=ok)
            tl.store(counts + slot + j, count)


@triton.jit
def forward_epilogue(
    acc,  # [BM, BN] fp32, u
    layer,  # (A [B, N] fp32, C or None; tiles: residual or None, destinations of v or None and out)
    moments,  # of store_column_moments; Nones where A is given
    at,  # where the tile lies in residual, v and out
    slot,
    rows,
    cols,
    sizes,
    RELU: tl.constexpr,
    TMA: tl.constexpr,
    SPAN: tl.constexpr,
    GROUPED: tl.constexpr,
):
    """``v = A*u``; ``out = act(v + C + residual)``; stores ``out`` and, if asked for, ``v``.

    Without ``A``, ``out`` is ``u``, and the moments are those of ``u`` as it is stored.
    """
    scale, shift, residual, branch, out = layer
    row_ok, col_ok = rows[2], cols < sizes[1]
    value = acc
    if scale is not None:
        value *= row_factors(scale, rows, cols, sizes, SPAN, GROUPED)
    if moments[0] is not None:
        stored = round_as(value, out, TMA)
        store_column_moments(moments, stored, slot, rows, cols, sizes, SPAN, GROUPED)
    if branch is not None:
        store_tile(branch, at, value, row_ok, col_ok, TMA)
        # Backward takes the ReLU mask from the stored branch: let forward see the same number.
        value = round_as(value, branch, TMA)
    if shift is not None:
        value += row_factors(shift, rows, cols, sizes, SPAN, GROUPED)
    if residual is not None:
        value += load_tile(residual, at, row_ok, col_ok, TMA).to(tl.float32)
    if RELU:
        # Not maximum(): a NaN (a forget label out of range) must survive.
        value = tl.where(value < 0.0, 0.0, value)
    store_tile(out, at, value, row_ok, col_ok, TMA)


@triton.jit
def backward_epilogue(
    acc,  # [BM, BN] fp32, gradient that reaches the output of the layer
    layer,  # tiles: skip, v, out; tables A, C [B, N] fp32; destinations of g and A * g
    sums,  # [slots, N] fp32: partial sums of g, of g * v, of g * v of the shortcut
    shortcut,  # v (a tile), A and the destination of A * g of a projection shortcut
    at,
    slot,
    rows,
    cols,
    sizes,
    RELU: tl.constexpr,
    UNSCALED: tl.constexpr,
    TMA: tl.constexpr,
    SPAN: tl.constexpr,
    GROUPED: tl.constexpr,
):
    """``g = (acc + skip) * act'``; stores what is asked for of ``g``, ``A*g`` and the column sums.

    Whatever of ``layer``, ``sums`` and ``shortcut`` is None is not read, or not wanted. Returns
    ``g`` ``[BM, BN]`` in fp32.

    A projection shortcut that was added to the branch receives the same ``g``: its own ``A * g``
    and ``sum_p g * v`` are written, too (its T0 is T0).

    With ``RELU`` the mask is ``out > 0`` where that is given, else ``v + C > 0``: without a
    residual the output need not be kept. ``UNSCALED``: branches are ``u``, and ``v`` is ``A * u``.
    """
    skip, branch, activation, scale, shift, grad, scaled_grad = layer
    partial0, partial1, partial2 = sums
    row_ok, col_ok = rows[2], cols < sizes[1]
    if skip is not None:
        acc += load_tile(skip, at, row_ok, col_ok, TMA).to(tl.float32)
    if RELU and activation is not None:
        alive = load_tile(activation, at, row_ok, col_ok, TMA).to(tl.float32)
        acc = tl.where(alive > 0.0, acc, 0.0)
    FROM_BRANCH: tl.constexpr = RELU and activation is None
    if FROM_BRANCH or partial1 is not None:
        v = load_tile(branch, at, row_ok, col_ok, TMA).to(tl.float32)
        if UNSCALED:
            v *= row_factors(scale, rows, cols, sizes, SPAN, GROUPED)
    if FROM_BRANCH:
        alive = v
        if shift is not None:
            alive += row_factors(shift, rows, cols, sizes, SPAN, GROUPED)
        acc = tl.where(alive > 0.0, acc, 0.0)
    if grad is not None:
        store_tile(grad, at, acc, row_ok, col_ok, TMA)
    if (partial0 is not None) or (partial1 is not None) or (partial2 is not None):
        # Rows past the image hold taps that reach back into it: they are not pixels.
        acc = tl.where(row_ok[:, None], acc, 0.0)
    if partial0 is not None:
        store_column_sums(partial0, acc, slot, rows, cols, sizes, SPAN, GROUPED)
    if partial1 is not None:
        store_column_sums(partial1, acc * v, slot, rows, cols, sizes, SPAN, GROUPED)
    if scaled_grad is not None:
        factors = row_factors(scale, rows, cols, sizes, SPAN, GROUPED)
        store_tile(scaled_grad, at, acc * factors, row_ok, col_ok, TMA)
    if partial2 is not None:
        v = load_tile(shortcut[0], at, row_ok, col_ok, TMA).to(tl.float32)
        if UNSCALED:
            v *= row_factors(shortcut[1], rows, cols, sizes, SPAN, GROUPED)
        store_column_sums(partial2, acc * v, slot, rows, cols, sizes, SPAN, GROUPED)
    if shortcut[2] is not None:
        factors = row_factors(shortcut[1], rows, cols, sizes, SPAN, GROUPED)
        store_tile(shortcut[2], at, acc * factors, row_ok, col_ok, TMA)
    return acc
