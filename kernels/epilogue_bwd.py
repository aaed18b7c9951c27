"""The elementwise backward of a masked layer in one pass, where no GEMM epilogue covers it.

    g = (dout + skip) * act'(out)       ag = A * g       T0 = sum_p g       T1 = sum_p g * v

``epilogue_bwd_kernel`` reads ``dout`` and the branch ``v`` once and writes ``ag``, the input of the
layer's own input-gradient GEMM. Where several samples share a source image, their ``ag`` are summed
before that GEMM (it is linear), in a fixed order: the GEMM then runs over images, not over samples.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from wfnet.kernels.epilogue import backward_epilogue, load_tile, store_tile
from wfnet.kernels.epilogue_arguments import BackwardArguments, Binding, channels_last
from wfnet.kernels.launch import Launch, elementwise_launch, tile_of

from wfnet.backends.contract import LayerBelow, LayerGradient


@triton.jit(do_not_specialize=["B", "T"])
def epilogue_bwd_kernel(
    dout,  # [B, T, C]
    skip,  # [B, T, C] or None
    branch,  # [B, T, C] or None
    activation,  # [B, T, C] or None
    scale,  # [B, C] fp32 or None
    shift,  # [B, C] fp32 or None
    order,  # [B] int64: samples sorted by source, or None
    first_of,  # [N + 1] int64: where each source starts in order, or None
    grad,  # [B, T, C] or None
    scaled_grad,  # [B, T, C], summed over equal sources [N, T, C], or None
    partial0,  # [tiles, B, C] fp32 or None
    partial1,
    partial2,
    shortcut_branch,
    shortcut_scale,
    shortcut_grad,
    B,
    T,
    C,
    LD,  # stride between rows of the tables
    RELU: tl.constexpr,
    UNSCALED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    tile = tl.program_id(0)
    tiles_n = tl.cdiv(C, BN)
    tiles_t = tl.cdiv(T, BM)
    cols = tile % tiles_n * BN + tl.arange(0, BN)
    tile = tile // tiles_n
    tile_t = tile % tiles_t
    target = tile // tiles_t  # sample, or source image
    rows = tile_t * BM + tl.arange(0, BM)
    row_ok = rows < T
    col_ok = cols < C
    layer = (skip, branch, activation, scale, shift, grad, scaled_grad)
    sums = (partial0, partial1, partial2)
    other = (shortcut_branch, shortcut_scale, shortcut_grad)
    sizes = (B, C, LD)
    if order is None:
        at = ((target.to(tl.int64) * T + tile_t * BM) * C, tl.arange(0, BM) * C, cols)
        acc = load_tile(dout, at, row_ok, col_ok, False).to(tl.float32)
        slot = tile_t * B + target
        parts = (target, rows, row_ok)
        backward_epilogue(
            acc, layer, sums, other, at, slot, parts, cols, sizes, RELU, UNSCALED, False, 1, True
        )
    else:
        rest = (skip, branch, activation, scale, shift, grad, None)
        total = tl.zeros((BM, BN), dtype=tl.float32)
        for position in range(tl.load(first_of + target), tl.load(first_of + target + 1)):
            sample = tl.load(order + position).to(tl.int32)
            at = ((sample.to(tl.int64) * T + tile_t * BM) * C, tl.arange(0, BM) * C, cols)
            acc = load_tile(dout, at, row_ok, col_ok, False).to(tl.float32)
            slot = tile_t * B + sample
            parts = (sample, rows, row_ok)
            acc = backward_epilogue(
                acc, rest, sums, other, at, slot, parts, cols, sizes, RELU, UNSCALED, False, 1, True
            )
            if scaled_grad is not None:
                factor = tl.load(scale + (sample * LD + cols), mask=col_ok, other=0.0)
                total += acc * factor[None, :]
        if scaled_grad is not None:
            at = ((target.to(tl.int64) * T + tile_t * BM) * C, tl.arange(0, BM) * C, cols)
            store_tile(scaled_grad, at, total, row_ok, col_ok, False)


def by_source(source: Tensor, sources: int) -> tuple[Tensor, Tensor]:
    """Samples grouped by source: ``order`` ``[B]`` and ``first_of`` ``[sources + 1]``, int64.

    ``order[first_of[n]:first_of[n + 1]]`` are the samples of image n, in ascending order. No
    synchronisation, so it may be captured in a CUDA graph.
    """
    sorted_source, order = torch.sort(source, stable=True)
    bounds = torch.arange(sources + 1, device=source.device, dtype=source.dtype)
    return order, torch.searchsorted(sorted_source, bounds)


def epilogue_bwd(dout: Tensor, below: LayerBelow) -> LayerGradient:
    """Computes ``g``, ``A * g`` and the column sums T0 and T1 of ``dout`` in one pass.

    Equivalent to::

        g  = (dout + skip) * act'
        t0 = g.sum((2, 3));  t1 = (g * branch).sum((2, 3));  scaled_grad = scale * g
        scaled_grad = zeros[images].index_add(0, source, scaled_grad)       # where source is given

    Args:
        dout: ``[B, C, H, W]``; fp16, bf16 or fp32; copied unless channels-last.
        below: as in :meth:`wfnet.backends.contract.Backend.epilogue_backward`.

    Raises:
        ValueError: if a result lacks the tensor it is made from, or shapes do not fit.
    """
    pixels = channels_last(dout)
    backward = BackwardArguments.of(below, pixels, tuple(pixels.shape))
    batch, height, width, columns = pixels.shape
    tokens, (order, first_of), targets = height * width, (None, None), batch
    if below.source is not None and below.need_scaled_grad:
        targets = below.images
        order, first_of = by_source(below.source, targets)
        backward = backward.with_scaled_grad(pixels.new_empty((targets, height, width, columns)))

    def plan(bound: Binding) -> Launch:
        arguments = bound() | {"dout": pixels, "order": order, "first_of": first_of, "B": batch}
        return elementwise_launch(epilogue_bwd_kernel, (targets, tokens, columns), arguments)

    block_m, _ = tile_of(tokens, columns)
    return backward.run(plan, grouped=triton.cdiv(tokens, block_m))
