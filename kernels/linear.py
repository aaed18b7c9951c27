"""Masked linear map (qkv projections) and 1x1 convolution of stride 1, forward and input gradient.

    u[b, t, o] = sum_c x[b, t, c] * w[o, c],   out = act(A[b, o] * u + C[b, o] + residual)
    dx[b, t, c] = sum_o ag[b, t, o] * w[o, c],  then the layer below's elementwise backward

Rows (b, t) are flat, so that 197 tokens or 7 x 7 pixels waste no row of a tile; a tile meets
at most a few samples, whose table rows are selected per row (``epilogue.row_factors``).

Both kernels are persistent and all-descriptor: depth is short (192 to 2048), and the next tile's
operands are fetched while this tile's epilogue runs. The launchers are those of ``conv_fprop`` and
``conv_dgrad``, whose gather kernels take over where descriptors cannot be used.
"""

# ruff: noqa: E741 (O is the number of output channels here, as in every equation)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from wfnet.kernels.config import ConvShape, GemmConfig, device_of, span
from wfnet.kernels.epilogue import backward_epilogue, forward_epilogue
from wfnet.kernels.epilogue_arguments import Binding
from wfnet.kernels.launch import Launch, descriptor


@triton.jit(do_not_specialize=["M", "B", "T"])
def linear_fprop_kernel(
    x,  # [M, K] in boxes [BM, BK]
    w,  # [O, K] in boxes [BN, BK]
    scale,  # [B, O] fp32
    shift,  # [B, O] fp32 or None
    residual,  # [M, O] in boxes or None
    branch,  # [M, O] in boxes or None
    out,  # [M, O] in boxes
    sums,  # [tiles * SPAN, O] fp32 or None, as squares and counts: see forward_epilogue
    squares,
    counts,
    M,
    B,
    T,
    O,
    LD,  # stride between rows of the tables
    K: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    FLATTEN: tl.constexpr,
    SPAN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    tiles_n = tl.cdiv(O, BN)
    tiles = tl.cdiv(M, BM) * tiles_n
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        tile_m = tile // tiles_n
        m0 = tile_m * BM
        n0 = tile % tiles_n * BN
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for k0 in range(0, K, BK):
            acc = tl.dot(x.load([m0, k0]), w.load([n0, k0]).T, acc, input_precision=PRECISION)
        rows = m0 + tl.arange(0, BM)
        parts = (m0 // T, rows // T, rows < M)
        cols = n0 + tl.arange(0, BN)
        layer = (scale, shift, residual, branch, out)
        moments = (sums, squares, counts)
        at = (m0, n0)
        slot = tile_m * SPAN
        sizes = (B, O, LD)
        forward_epilogue(acc, layer, moments, at, slot, parts, cols, sizes, RELU, True, SPAN, False)


@triton.jit(do_not_specialize=["M", "B", "T"])
def linear_dgrad_kernel(
    ag,  # [M, O] in boxes [BM, BK]
    w,  # [O, C] in boxes [BK, BN]
    skip,  # [M, C] in boxes or None, like the four below
    branch,
    activation,
    scale,  # [B, C] fp32 or None: tables of the layer below
    shift,  # [B, C] fp32 or None
    grad,
    scaled_grad,
    partial0,  # [tiles, SPAN, C] fp32 or None
    partial1,
    partial2,
    shortcut_branch,
    shortcut_scale,
    shortcut_grad,
    M,
    B,
    T,
    C,
    LD,  # stride between rows of the tables
    K: tl.constexpr,
    RELU: tl.constexpr,
    UNSCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    FLATTEN: tl.constexpr,
    SPAN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    tiles_n = tl.cdiv(C, BN)
    tiles = tl.cdiv(M, BM) * tiles_n
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        tile_m = tile // tiles_n
        m0 = tile_m * BM
        n0 = tile % tiles_n * BN
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for k0 in range(0, K, BK):
            acc = tl.dot(ag.load([m0, k0]), w.load([k0, n0]), acc, input_precision=PRECISION)
        rows = m0 + tl.arange(0, BM)
        layer = (skip, branch, activation, scale, shift, grad, scaled_grad)
        sums = (partial0, partial1, partial2)
        other = (shortcut_branch, shortcut_scale, shortcut_grad)
        at = (m0, n0)
        slot = tile_m * SPAN
        parts = (m0 // T, rows // T, rows < M)
        cols = n0 + tl.arange(0, BN)
        sizes = (B, C, LD)
        backward_epilogue(
            acc, layer, sums, other, at, slot, parts, cols, sizes, RELU, UNSCALED, True, SPAN, False
        )


def flat_launch(
    kernel: object,
    rows: Tensor,
    weight: Tensor,
    epilogue: Binding,
    shape: ConvShape,
    config: GemmConfig,
    exact: bool,
) -> Launch:
    """The launch of one of the kernels above.

    Args:
        rows: ``x`` or ``ag``, ``[B, H, W, K]``.
        weight: ``[O, 1, 1, C]``.
    """
    forward = kernel is linear_fprop_kernel
    tokens = shape.size[0] * shape.size[1]
    count, depth = shape.batch * tokens, rows.shape[3]
    columns = shape.out_channels if forward else shape.in_channels
    tiles = triton.cdiv(count, config.block_m) * triton.cdiv(columns, config.block_n)
    processors = device_of(rows).processors

    def tile(tensor: Tensor):
        return descriptor(tensor, (count, columns), (config.block_m, config.block_n))

    block = (config.block_n, config.block_k) if forward else (config.block_k, config.block_n)
    a = descriptor(rows, (count, depth), (config.block_m, config.block_k), not exact)
    arguments = epilogue(tile) | shape.numbers | config.constants(exact)
    arguments |= {"M": count, "T": tokens, "K": depth, "FLATTEN": tiles > processors}
    arguments |= {"x" if forward else "ag": a, "SPAN": span(config.block_m, tokens)}
    filters = shape.out_channels, shape.in_channels
    arguments["w"] = descriptor(weight, filters, block, not exact)
    grid = (min(tiles, processors),)
    return Launch(kernel, grid, arguments, config.warps, config.stages)
