"""Adam over the rows of a filter matrix that occurred in a step, in one pass.

    m = m + (1 - beta1) * (g - m)             v = v + (1 - beta2) * (g*g - v)
    alpha = alpha - lr * (m / c1) / (sqrt(v / c2) + eps)          c = 1 - beta ** (steps of the row)
    alpha = start + sign(alpha - start) * max(|alpha - start| - threshold, 0)      where it shrinks

As tensor operations that is a dozen passes over all rows; here rows that did not occur are not
read, and the others once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from wfnet.kernels.launch import Launch

_COLUMNS = 1024


@triton.jit
def row_adam_kernel(
    alpha,  # [K, C] fp32
    grad,  # [K, C] fp32
    exp_avg,  # [K, C] fp32
    exp_avg_sq,  # [K, C] fp32
    correction1,  # [K] fp32
    correction2,  # [K] fp32
    occurred,  # [K] bool
    lr,  # [] fp32
    start,  # [C] fp32, read with SHRINKS
    threshold,  # [] fp32, read with SHRINKS
    C,
    weight1,
    weight2,
    eps,
    BN: tl.constexpr,
    SHRINKS: tl.constexpr,
):
    tiles = tl.cdiv(C, BN)
    row = tl.program_id(0) // tiles
    if tl.load(occurred + row) != 0:
        cols = tl.program_id(0) % tiles * BN + tl.arange(0, BN)
        ok = cols < C
        at = row.to(tl.int64) * C + cols
        g = tl.load(grad + at, mask=ok, other=0.0)
        m = tl.load(exp_avg + at, mask=ok, other=0.0)
        v = tl.load(exp_avg_sq + at, mask=ok, other=0.0)
        m += weight1 * (g - m)
        v += weight2 * (g * g - v)
        tl.store(exp_avg + at, m, mask=ok)
        tl.store(exp_avg_sq + at, v, mask=ok)
        root = tl.sqrt(v / tl.load(correction2 + row)) + eps
        update = m / tl.load(correction1 + row) / root * tl.load(lr)
        value = tl.load(alpha + at, mask=ok, other=0.0) - update
        if SHRINKS:
            near = tl.load(start + cols, mask=ok, other=0.0)
            by = tl.load(threshold)
            distance = value - near
            moved = tl.where(distance > 0, value - by, value + by)
            value = tl.where(tl.abs(distance) <= by, near, moved)
        tl.store(alpha + at, value, mask=ok)


def row_adam(
    alpha: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    correction1: Tensor,
    correction2: Tensor,
    occurred: Tensor,
    lr: Tensor,
    betas: tuple[float, float],
    eps: float,
    start: Tensor | None = None,
    threshold: Tensor | None = None,
) -> None:
    """Moves filters and moments of the rows that occurred, in place.

    Args:
        alpha, grad, exp_avg, exp_avg_sq: ``[K, C]`` fp32, contiguous.
        correction1, correction2: ``[K]`` fp32, ``1 - beta ** steps`` with this step counted; those
            of other rows are not read.
        occurred: ``[K]`` bool.
        lr: fp32 scalar on the device: a captured CUDA graph reads it anew at every replay.
        start, threshold: ``[C]`` fp32 and an fp32 scalar on the device: entries then end nearer to
            ``start`` by the threshold, and exactly there if they are no farther from it.
    """
    rows, columns = alpha.shape
    if alpha.numel() == 0:
        return
    arguments = (
        {"alpha": alpha, "grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        | {"correction1": correction1, "correction2": correction2, "occurred": occurred, "lr": lr}
        | {"start": alpha if start is None else start}
        | {"threshold": lr if threshold is None else threshold, "SHRINKS": start is not None}
        | {"weight1": 1 - betas[0], "weight2": 1 - betas[1], "eps": eps}
        | {"C": columns, "BN": _COLUMNS}
    )
    grid = (rows * triton.cdiv(columns, _COLUMNS),)
    Launch(row_adam_kernel, grid, arguments, 4, 1).run()
