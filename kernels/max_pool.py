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

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from wfnet.kernels.epilogue import backward_epilogue, load_tile, store_tile
from wfnet.kernels.epilogue_bwd import (
    NO_SUMS,
    Gradient,
    LayerBelow,
    Sums,
    add_column_sums,
    tile_of,
)
from wfnet.kernels.launch import Launch, check_tables_and_layout

_NOWHERE = 255  # taps are numbered below


class Window(NamedTuple):
    """Of a pooling without dilation, each as (height, width)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    def refuse(self) -> str | None:
        """Why the kernels do not take it, in one sentence; None if they do."""
        if self.kernel[0] * self.kernel[1] > _NOWHERE:
            return f"a window of {self.kernel[0]} x {self.kernel[1]} has more than 255 taps"
        return None


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
            value = load_tile(x, at, inside, col_ok, False, BM, BN).to(tl.float32)
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
            where = load_tile(positions, at, inside, col_ok, False, BM, BN).to(tl.int32)
            value = load_tile(dout, at, inside, col_ok, False, BM, BN).to(tl.float32)
            acc += tl.where(where == (r * KW + s)[:, None], value, 0.0)
    at = ((sample.to(tl.int64) * H * W + tile_m * BM) * C, tl.arange(0, BM) * C, cols)
    backward_epilogue(
        acc,
        skip,
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
        at,
        tile_m * B + sample,
        sample,
        rows,
        cols,
        row_ok,
        B,
        C,
        LD,
        RELU,
        False,
        1,
        True,
        BM,
        BN,
    )


def _taps(window: Window) -> dict[str, int]:
    (kh, kw), (sh, sw), (ph, pw) = window.kernel, window.stride, window.padding
    return {"KH": kh, "KW": kw, "SH": sh, "SW": sw, "PH": ph, "PW": pw}


def plan_max_pool_fwd(x: Tensor, out: Tensor, positions: Tensor | None, window: Window) -> Launch:
    """The launch of ``max_pool``."""
    batch, height, width, columns = x.shape
    pixels = out.shape[1] * out.shape[2]
    block_m, block_n = tile_of(pixels, columns)
    arguments = {
        "x": x,
        "out": out,
        "positions": positions,
        "H": height,
        "W": width,
        "P": out.shape[1],
        "Q": out.shape[2],
        "C": columns,
        **_taps(window),
        "NOWHERE": _NOWHERE,
        "BM": block_m,
        "BN": block_n,
    }
    grid = (batch * triton.cdiv(pixels, block_m) * triton.cdiv(columns, block_n),)
    return Launch(max_pool_fwd_kernel, grid, arguments, 4, 2)


def plan_max_pool_bwd(
    dout: Tensor,
    positions: Tensor,
    size: tuple[int, int],
    window: Window,
    below: LayerBelow,
    into: Gradient,
    partials: Sums,
) -> Launch:
    """The launch of ``max_pool_bwd``."""
    batch, _, _, columns = dout.shape
    pixels = size[0] * size[1]
    block_m, block_n = tile_of(pixels, columns)
    arguments = {
        "dout": dout,
        "positions": positions,
        "skip": below.skip,
        "branch": below.branch,
        "activation": below.activation,
        "scale": below.scale,
        "shift": below.shift,
        "grad": into.grad,
        "scaled_grad": into.scaled_grad,
        "partial0": partials[0],
        "partial1": partials[1],
        "partial2": partials[2],
        "shortcut_branch": below.shortcut_branch,
        "shortcut_scale": below.shortcut_scale,
        "shortcut_grad": into.shortcut_scaled_grad,
        "B": batch,
        "H": size[0],
        "W": size[1],
        "P": dout.shape[1],
        "Q": dout.shape[2],
        "C": columns,
        "LD": below.row_stride,
        "RELU": below.relu,
        **_taps(window),
        "BM": block_m,
        "BN": block_n,
    }
    grid = (batch * triton.cdiv(pixels, block_m) * triton.cdiv(columns, block_n),)
    return Launch(max_pool_bwd_kernel, grid, arguments, 4, 2)


def max_pool(
    x: Tensor, size: tuple[int, int], window: Window, save_positions: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Largest value of every window, and which of its taps that was.

    Equivalent: ``F.max_pool2d`` on the ``[B, C, H, W]`` view; the first of equal values counts, and
    NaN is above all.

    Args:
        x: ``[B, H, W, C]`` contiguous; fp16, bf16 or fp32.
        size: height and width of the result (``ceil_mode`` decides about the last windows).
        window: its taps are numbered row by row.

    Returns:
        ``[B, P, Q, C]`` in the dtype of ``x``, and uint8 of the same shape or None.

    Raises:
        ValueError: for a window or a layout that the kernels do not take.
    """
    reason = window.refuse()
    if reason is not None:
        raise ValueError(reason)
    check_tables_and_layout(x, x)
    out = x.new_empty((x.shape[0], *size, x.shape[3]))
    positions = torch.empty_like(out, dtype=torch.uint8) if save_positions else None
    if out.numel():
        plan_max_pool_fwd(x, out, positions, window).run()
    return out, positions


def max_pool_bwd(
    dout: Tensor,
    positions: Tensor,
    size: tuple[int, int],
    window: Window,
    below: LayerBelow,
    *,
    want: tuple[str, ...] = ("grad",),
    sums: Sums = NO_SUMS,
) -> Gradient:
    """From the gradient of the pooled tensor to what the layer below wants, in one pass.

    Equivalent to ``epilogue_bwd(dx, below)`` with ``dx`` the gradient by the pooling's input.

    Args:
        dout: ``[B, P, Q, C]`` contiguous; fp16, bf16 or fp32.
        positions: ``[B, P, Q, C]`` uint8, of :func:`max_pool`.
        size: height and width of the pooling's input.
        below: the layer that made it; pixel tensors are ``[B, H, W, C]``.
        want: any of ``epilogue_bwd.RESULTS``.
        sums: ``[B, C]`` fp32 to write the column sums to; fresh memory where None.

    Raises:
        ValueError: if a result lacks the tensor it is made from, or a layout does not fit.
    """
    below.check(want)
    check_tables_and_layout(dout, positions, below.scale, below.shift)
    batch, _, _, columns = dout.shape
    into = Gradient.empty(dout, (batch, *size, columns), want, sums)
    if into.size == 0:
        return into
    pixels = size[0] * size[1]
    slots = triton.cdiv(pixels, tile_of(pixels, columns)[0])
    partials = into.sums if slots == 1 else into.partials(slots * batch, dout)
    plan_max_pool_bwd(dout, positions, size, window, below, into, partials).run()
    add_column_sums(partials, into, batch, pixels, slots=slots)
    return into


def example_launches(meta: Callable[..., Tensor]) -> list[Launch]:
    """A launch of each kernel, on tensors without memory, to compile it: a ResNet's pooling."""
    window = Window((3, 3), (2, 2), (1, 1))
    x = meta(torch.bfloat16, 512, 112, 112, 64)
    out, positions = meta(torch.bfloat16, 512, 56, 56, 64), meta(torch.uint8, 512, 56, 56, 64)
    tables = {"scale": meta(torch.float32, 512, 64), "shift": meta(torch.float32, 512, 64)}
    below = LayerBelow(x, **tables, relu=True)
    partial = meta(torch.float32, 512 * 196, 64)
    into = Gradient(None, x, None, meta(torch.float32, 512, 64), x.numel())
    return [
        plan_max_pool_fwd(x, out, positions, window),
        plan_max_pool_bwd(out, positions, (112, 112), window, below, into, (None, partial, None)),
    ]
