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

Tiles live behind a tensor descriptor (TMA) or a pointer; ``load_tile`` and ``store_tile`` hide it.
"""

import triton
import triton.language as tl


@triton.jit
def load_tile(src, at, row_ok, col_ok, TMA: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """``[BM, BN]`` of ``src``; ``at``: descriptor coordinates, or (base, row offsets, columns).

    The base is one 64-bit number; row offsets and columns within the tile are 32-bit.
    """
    if TMA:
        return src.load(at).reshape(BM, BN)
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
    table,  # [B, N] fp32, rows LD apart
    first,  # first sample of the tile
    row_sample,  # [BM] sample of each row
    cols,  # [BN]
    B,
    N,
    LD,
    SPAN: tl.constexpr,
    GROUPED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """The table entry of every tile element, broadcastable to ``[BM, BN]``."""
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
        rows = first + tl.arange(0, SPAN)
        factors = tl.load(
            table + (rows[:, None] * LD + cols[None, :]),
            mask=(rows < B)[:, None] & ok[None, :],
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
    first,
    row_sample,
    cols,
    B,
    N,
    SPAN: tl.constexpr,
    GROUPED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Column sums of each sample's rows; no atomics, ``column_sums_kernel`` adds the tiles."""
    ok = cols < N
    if SPAN == 1:
        tl.store(partial + (slot * N + cols), tl.sum(value, axis=0), mask=ok & (first < B))
    elif GROUPED:
        sums = tl.sum(value.reshape(SPAN, BM // SPAN, BN), axis=1)  # [SPAN, BN]
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
def forward_epilogue(
    acc,  # [BM, BN] fp32, u
    scale,  # [B, N] fp32, A
    shift,  # [B, N] fp32, C, or None
    residual,  # tile source, or None
    branch,  # tile destination for v, or None
    out,  # tile destination
    at,  # where the tile lies in residual, branch and out
    first,
    row_sample,
    cols,
    row_ok,
    B,
    N,
    LD,
    RELU: tl.constexpr,
    TMA: tl.constexpr,
    SPAN: tl.constexpr,
    GROUPED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """``v = A*u``; ``out = act(v + C + residual)``; stores ``out`` and, if asked for, ``v``."""
    col_ok = cols < N
    value = acc * row_factors(scale, first, row_sample, cols, B, N, LD, SPAN, GROUPED, BM, BN)
    if branch is not None:
        store_tile(branch, at, value, row_ok, col_ok, TMA)
        # Backward takes the ReLU mask from the stored branch: let forward see the same number.
        value = round_as(value, branch, TMA)
    if shift is not None:
        value += row_factors(shift, first, row_sample, cols, B, N, LD, SPAN, GROUPED, BM, BN)
    if residual is not None:
        value += load_tile(residual, at, row_ok, col_ok, TMA, BM, BN).to(tl.float32)
    if RELU:
        # Not maximum(): a NaN (a forget label out of range) must survive.
        value = tl.where(value < 0.0, 0.0, value)
    store_tile(out, at, value, row_ok, col_ok, TMA)


@triton.jit
def backward_epilogue(
    acc,  # [BM, BN] fp32, gradient that reaches the output of the layer
    skip,  # tile source: gradient that reaches the same tensor another way, or None
    branch,  # tile source for v, or None
    activation,  # tile source for out, or None
    scale,  # [B, N] fp32, A, or None
    shift,  # [B, N] fp32, C, or None
    grad,  # tile destination for g, or None
    scaled_grad,  # tile destination for ag = A * g, or None
    partial0,  # [slots, N] fp32 or None
    partial1,  # [slots, N] fp32 or None
    partial2,  # [slots, N] fp32 or None, like the three below for a projection shortcut
    shortcut_branch,  # tile source for its v, or None
    shortcut_scale,  # [B, N] fp32, its A, or None
    shortcut_grad,  # tile destination for its ag, or None
    at,
    slot,
    first,
    row_sample,
    cols,
    row_ok,
    B,
    N,
    LD,
    RELU: tl.constexpr,
    TMA: tl.constexpr,
    SPAN: tl.constexpr,
    GROUPED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """``g = (acc + skip) * act'``; stores what is asked for of ``g``, ``A*g`` and the column sums.

    Returns ``g`` ``[BM, BN]`` in fp32.

    A projection shortcut that was added to the branch receives the same ``g``: its own ``A * g``
    and ``sum_p g * v`` are written, too (its T0 is T0).

    With ``RELU`` the mask is ``activation > 0`` where an activation is given, else
    ``branch + shift > 0``: without a residual the output need not be kept.
    """
    col_ok = cols < N
    if skip is not None:
        acc += load_tile(skip, at, row_ok, col_ok, TMA, BM, BN).to(tl.float32)
    if RELU and activation is not None:
        alive = load_tile(activation, at, row_ok, col_ok, TMA, BM, BN).to(tl.float32)
        acc = tl.where(alive > 0.0, acc, 0.0)
    FROM_BRANCH: tl.constexpr = RELU and activation is None
    if FROM_BRANCH or partial1 is not None:
        v = load_tile(branch, at, row_ok, col_ok, TMA, BM, BN).to(tl.float32)
    if FROM_BRANCH:
        alive = v
        if shift is not None:
            alive += row_factors(shift, first, row_sample, cols, B, N, LD, SPAN, GROUPED, BM, BN)
        acc = tl.where(alive > 0.0, acc, 0.0)
    if grad is not None:
        store_tile(grad, at, acc, row_ok, col_ok, TMA)
    if (partial0 is not None) or (partial1 is not None) or (partial2 is not None):
        # Rows past the image hold taps that reach back into it: they are not pixels.
        acc = tl.where(row_ok[:, None], acc, 0.0)
    if partial0 is not None:
        store_column_sums(partial0, acc, slot, first, row_sample, cols, B, N, SPAN, GROUPED, BM, BN)
    if partial1 is not None:
        store_column_sums(
            partial1, acc * v, slot, first, row_sample, cols, B, N, SPAN, GROUPED, BM, BN
        )
    if scaled_grad is not None:
        factors = row_factors(scale, first, row_sample, cols, B, N, LD, SPAN, GROUPED, BM, BN)
        store_tile(scaled_grad, at, acc * factors, row_ok, col_ok, TMA)
    if partial2 is not None:
        v = load_tile(shortcut_branch, at, row_ok, col_ok, TMA, BM, BN).to(tl.float32)
        store_column_sums(
            partial2, acc * v, slot, first, row_sample, cols, B, N, SPAN, GROUPED, BM, BN
        )
    if shortcut_grad is not None:
        factors = row_factors(
            shortcut_scale, first, row_sample, cols, B, N, LD, SPAN, GROUPED, BM, BN
        )
        store_tile(shortcut_grad, at, acc * factors, row_ok, col_ok, TMA)
    return acc
