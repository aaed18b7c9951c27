"""Maximum pooling, and its backward together with the elementwise backward of the layer below.

    out = max of x over a window, positions = which of its taps that was (one byte)

    dx  = sum of dout over the windows whose maximum a pixel is
    g   = (dx + skip) * act'(out of the layer below)        and on as in epilogue_bwd

PyTorch keeps positions in eight bytes, and writes ``dx``, which the layer's elementwise backward
then reads again. Here backward reads ``dout``, positions and the branch, and writes what is asked
for. A pixel gathers from the few windows that it lies in, always in the same order: equal bits on
every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from wfnet.kernels.epilogue import backward_epilogue, load_tile, store_tile
from wfnet.kernels.epilogue_arguments import (
    BackwardArguments,
    Binding,
    channels_first,
    channels_last,
)
from wfnet.kernels.launch import Launch, elementwise_launch, tile_of

from wfnet.backends.contract import NO_LAYER, LayerBelow, LayerGradient, PoolGeometry

_NOWHERE = 255  # taps are numbered below


@triton.jit(do_not_specialize=["H", "W", "P", "Q"])
def max_pool_fwd_kernel(
    x,  # [B, H, W, C]
    out,  # [B, P, Q, C]
    positions,  # [B, P, Q, C] uint8 or None
    H,
    W,
    P,
    Q,
    C,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    NOWHERE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    tile = tl.program_id(0)
    tiles_n = tl.cdiv(C, BN)
    tiles_m = tl.cdiv(P * Q, BM)
    cols = tile % tiles_n * BN + tl.arange(0, BN)
    tile = tile // tiles_n
    sample = (tile // tiles_m).to(tl.int64)
    rows = tile % tiles_m * BM + tl.arange(0, BM)
    row_ok = rows < P * Q
    col_ok = cols < C
    h = rows // Q * SH - PH
    w = rows % Q * SW - PW
    best = tl.full((BM, BN), float("-inf"), dtype=tl.float32)
    where = tl.full((BM, BN), NOWHERE, dtype=tl.int32)
    for r in tl.static_range(KH):
        for s in tl.static_range(KW):
            inside = row_ok & (h + r >= 0) & (h + r < H) & (w + s >= 0) & (w + s < W)
            at = (sample * H * W * C, ((h + r) * W + w + s) * C, cols)
            value = load_tile(x, at, inside, col_ok, False).to(tl.float32)
            # The first of equal ones, and a NaN above all, as PyTorch has it.
            better = (value > best) | (value != value) | (where == NOWHERE)
            better = better & inside[:, None]
            best = tl.where(better, value, best)
            where = tl.where(better, r * KW + s, where)
    at = (sample * P * Q * C, rows * C, cols)
    store_tile(out, at, best, row_ok, col_ok, False)
    if positions is not None:
        store_tile(positions, at, where, row_ok, col_ok, False)


@triton.jit(do_not_specialize=["B", "H", "W", "P", "Q"])
def max_pool_bwd_kernel(
    dout,  # [B, P, Q, C]
    positions,  # [B, P, Q, C] uint8
    skip,  # the rest as in epilogue_bwd_kernel, [B, H, W, C]
    branch,
    activation,
    scale,
    shift,
    grad,
    scaled_grad,
    partial0,
    partial1,
    partial2,
    shortcut_branch,
    shortcut_scale,
    shortcut_grad,
    B,
    H,
    W,
    P,
    Q,
    C,
    LD,
    RELU: tl.constexpr,
    UNSCALED: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    tile = tl.program_id(0)
    tiles_n = tl.cdiv(C, BN)
    tiles_m = tl.cdiv(H * W, BM)
    cols = tile % tiles_n * BN + tl.arange(0, BN)
    tile = tile // tiles_n
    tile_m = tile % tiles_m
    sample = tile // tiles_m
    rows = tile_m * BM + tl.arange(0, BM)
    row_ok = rows < H * W
    col_ok = cols < C
    h = rows // W + PH
    w = rows % W + PW
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    # The windows of a pixel: the last one that begins at or before it, and those before that.
    for i in tl.static_range((KH + SH - 1) // SH):
        for j in tl.static_range((KW + SW - 1) // SW):
            p = h // SH - i
            q = w // SW - j
            r = h - p * SH
            s = w - q * SW
            inside = row_ok & (p >= 0) & (p < P) & (q >= 0) & (q < Q) & (r < KH) & (s < KW)
            at = (sample.to(tl.int64) * P * Q * C, (p * Q + q) * C, cols)
            # Read as int32 only where there is a window: elsewhere 0, which may be a tap.
            where = load_tile(positions, at, inside, col_ok, False).to(tl.int32)
            value = load_tile(dout, at, inside, col_ok, False).to(tl.float32)
            acc += tl.where(where == (r * KW + s)[:, None], value, 0.0)
    layer = (skip, branch, activation, scale, shift, grad, scaled_grad)
    sums = (partial0, partial1, partial2)
    shortcut = (shortcut_branch, shortcut_scale, shortcut_grad)
    at = ((sample.to(tl.int64) * H * W + tile_m * BM) * C, tl.arange(0, BM) * C, cols)
    slot = tile_m * B + sample
    parts = (sample, rows, row_ok)
    sizes = (B, C, LD)
    backward_epilogue(
        acc, layer, sums, shortcut, at, slot, parts, cols, sizes, RELU, UNSCALED, False, 1, True
    )


def _numbers(
    window: PoolGeometry, size: tuple[int, int], pooled: tuple[int, int]
) -> dict[str, int]:
    (kh, kw), (sh, sw), (ph, pw) = window.kernel, window.stride, window.padding
    taps = {"KH": kh, "KW": kw, "SH": sh, "SW": sw, "PH": ph, "PW": pw}
    return taps | {"H": size[0], "W": size[1], "P": pooled[0], "Q": pooled[1]}


def max_pool(x: Tensor, window: PoolGeometry, save: bool = True) -> tuple[Tensor, Tensor | None]:
    """Computes the largest value of every window, and which of its taps that was.

    Equivalent: ``F.max_pool2d``; the first of equal values counts, and NaN is above all.

    Args:
        x: ``[B, C, H, W]``; fp16, bf16 or fp32; copied unless channels-last.
        window: one that ``takes_bytes``; its taps are numbered row by row.
        save: whether positions are wanted.

    Returns:
        ``[B, C, P, Q]`` in the dtype of ``x``, and uint8 of the same shape or None.
    """
    pixels = channels_last(x)
    batch, height, width, columns = pixels.shape
    p, q = window.output_size(height, width)
    out = pixels.new_empty((batch, p, q, columns))
    positions = torch.empty_like(out, dtype=torch.uint8) if save else None
    if out.numel():
        arguments = {"x": pixels, "out": out, "positions": positions, "NOWHERE": _NOWHERE}
        arguments |= _numbers(window, (height, width), (p, q))
        elementwise_launch(max_pool_fwd_kernel, (batch, p * q, columns), arguments).run()
    return channels_first(out), channels_first(positions)


def max_pool_bwd(
    dout: Tensor,
    positions: Tensor,
    size: tuple[int, int],
    window: PoolGeometry,
    below: LayerBelow = NO_LAYER,
) -> LayerGradient:
    """Computes what the layer below wants from the gradient of the pooled tensor, in one pass.

    Equivalent to ``epilogue_bwd(dx, below)`` with ``dx`` the gradient by the pooling's input.

    Args:
        dout: ``[B, C, P, Q]``; fp16, bf16 or fp32; copied unless channels-last.
        positions: ``[B, C, P, Q]`` uint8, of :func:`max_pool`.
        size: height and width of the pooling's input.
        below: as in :meth:`wfnet.backends.contract.Backend.conv2d_dgrad`.

    Raises:
        ValueError: if a result lacks the tensor it is made from, or shapes do not fit.
    """
    pooled, positions = channels_last(dout), channels_last(positions)
    (batch, p, q, columns), (height, width) = pooled.shape, size
    backward = BackwardArguments.of(below, pooled, (batch, *size, columns))

    def plan(bound: Binding) -> Launch:
        arguments = bound() | {"dout": pooled, "positions": positions, "B": batch}
        arguments |= _numbers(window, size, (p, q))
        return elementwise_launch(max_pool_bwd_kernel, (batch, height * width, columns), arguments)

    block_m, _ = tile_of(height * width, columns)
    return backward.run(plan, grouped=triton.cdiv(height * width, block_m))
