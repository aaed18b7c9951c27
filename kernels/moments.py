"""Means and variances of a product's samples, and the elementwise passes around them.

In untraining with durable gates the tables of a convolution depend on its own product ``u``
(:mod:`wfnet.fusion.durable_run`), so its epilogue is a pass of its own, both ways::

    out = act(A * u + C + residual)          du = A * g + on_u * u + constant
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from wfnet.kernels.config import span
from wfnet.kernels.epilogue import load_tile, store_tile
from wfnet.kernels.epilogue_arguments import (
    channels_first,
    channels_last,
    slot_of_tile,
    tiles_of_sample,
)
from wfnet.kernels.launch import Launch, elementwise_launch


@triton.jit(do_not_specialize=["B", "T", "SLOTS"])
def column_moments_kernel(
    sums,  # [slots, C] fp32
    squares,  # [slots, C] fp32
    counts,  # [slots] fp32
    mean,  # [B, C] fp32
    var,  # [B, C] fp32
    B,
    T,  # pixels of a sample
    C,
    SLOTS,  # as of column_sums_kernel
    SPAN: tl.constexpr,
    BM: tl.constexpr,
    BS: tl.constexpr,
    BN: tl.constexpr,
):
    sample = tl.program_id(0)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    col_ok = cols < C
    lane = tl.arange(0, BS)
    first, count = tiles_of_sample(sample, T, SLOTS, SPAN, BM)
    total = tl.zeros((BS, BN), dtype=tl.float32)
    for start in range(0, count, BS):
        slot = slot_of_tile(sample, first + start + lane, B, T, SPAN, BM)
        ok = (start + lane < count)[:, None] & col_ok[None, :]
        total += tl.load(sums + (slot[:, None] * C + cols[None, :]), mask=ok, other=0.0)
    pixels = T.to(tl.float32)
    middle = tl.sum(total, axis=0) / pixels
    apart = tl.zeros((BS, BN), dtype=tl.float32)
    for start in range(0, count, BS):
        slot = slot_of_tile(sample, first + start + lane, B, T, SPAN, BM)
        exists = start + lane < count
        ok = exists[:, None] & col_ok[None, :]
        place = slot[:, None] * C + cols[None, :]
        n = tl.load(counts + slot, mask=exists, other=0.0)[:, None]
        off = tl.load(sums + place, mask=ok, other=0.0) / tl.maximum(n, 1.0) - middle[None, :]
        apart += tl.load(squares + place, mask=ok, other=0.0) + n * off * off
    at = sample.to(tl.int64) * C + cols
    tl.store(mean + at, middle, mask=col_ok)
    tl.store(var + at, tl.sum(apart, axis=0) / pixels, mask=col_ok)


def take_moments(
    out: Tensor, product: Callable[..., Launch], *, grouped: int = 0, block_m: int = 0
) -> tuple[Tensor, Tensor]:
    """Runs a product, and returns mean and variance ``[B, O]`` fp32 of its samples.

    Args:
        out: ``[B, P, Q, O]``, which the product writes.
        product: makes its launch from workspaces for the moments of every tile; from nothing, one
            that takes none.
        grouped, block_m: as of :meth:`wfnet.kernels.epilogue_arguments.BackwardArguments.run`.
    """
    batch, height, width, columns = out.shape
    touched = span(block_m, height * width) if block_m else 0
    slots = touched * triton.cdiv(batch * height * width, block_m) if block_m else grouped * batch
    if not slots:  # no sample, or tiles that meet too many of a few pixels each
        if batch:
            product().run()
        var, mean = torch.var_mean(out.float(), (1, 2), correction=0)
        return mean, var
    sums, squares = out.new_empty((2, slots, columns), dtype=torch.float32)
    moments = {"sums": sums, "squares": squares, "counts": sums.new_empty(slots)}
    product(**moments).run()
    mean, var = sums.new_empty((2, batch, columns))
    arguments = moments | {"mean": mean, "var": var, "B": batch, "T": height * width, "C": columns}
    arguments |= {"SLOTS": grouped, "SPAN": touched, "BM": block_m, "BS": 8, "BN": 128}
    Launch(column_moments_kernel, (batch, triton.cdiv(columns, 128)), arguments).run()
    return mean, var


@triton.jit(do_not_specialize=["B", "T"])
def combine_kernel(
    x,  # [B, T, C]
    other,  # [B, T, C] or None
    scale,  # [B, C] fp32
    factor,  # [B, C] fp32: of other, or None: 1
    shift,  # [B, C] fp32 or None
    out,  # [B, T, C], may be x
    B,
    T,
    C,
    RELU: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    tile = tl.program_id(0)
    tiles_n = tl.cdiv(C, BN)
    tiles_t = tl.cdiv(T, BM)
    cols = tile % tiles_n * BN + tl.arange(0, BN)
    tile = tile // tiles_n
    tile_t = tile % tiles_t
    sample = (tile // tiles_t).to(tl.int64)
    row_ok = tile_t * BM + tl.arange(0, BM) < T
    col_ok = cols < C
    at = ((sample * T + tile_t * BM) * C, tl.arange(0, BM) * C, cols)
    row = sample * C + cols
    value = load_tile(x, at, row_ok, col_ok, False).to(tl.float32)
    value *= tl.load(scale + row, mask=col_ok, other=0.0)[None, :]
    if shift is not None:
        value += tl.load(shift + row, mask=col_ok, other=0.0)[None, :]
    if other is not None:
        added = load_tile(other, at, row_ok, col_ok, False).to(tl.float32)
        if factor is not None:
            added *= tl.load(factor + row, mask=col_ok, other=0.0)[None, :]
        value += added
    if RELU:
        value = tl.where(value < 0.0, 0.0, value)  # a NaN survives
    store_tile(out, at, value, row_ok, col_ok, False)


def combine(
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    other: Tensor | None = None,
    factor: Tensor | None = None,
    *,
    relu: bool = False,
    may_overwrite: bool = False,
) -> Tensor:
    """Computes ``act(scale * x + shift + factor * other)`` in one pass.

    Args:
        x: ``[B, C, H, W]``; fp16, bf16 or fp32; copied unless channels-last.
        scale: ``[B, C]`` fp32, as ``shift`` and ``factor``; without a factor it is 1.
        other: as ``x``.
        may_overwrite: ``x`` may become the result.
    """
    pixels, other = channels_last(x), channels_last(other)
    out = pixels if may_overwrite else torch.empty_like(pixels)
    batch, height, width, columns = pixels.shape
    if out.numel():
        tables = {"scale": scale, "factor": factor, "shift": shift}
        arguments = {n: None if t is None else t.contiguous() for n, t in tables.items()}
        arguments |= {"x": pixels, "other": other, "out": out, "RELU": relu, "B": batch}
        elementwise_launch(combine_kernel, (batch, height * width, columns), arguments).run()
    return channels_first(out)
