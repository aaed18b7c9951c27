"""Rows of gates from filter matrices, and gradients of rows back to filter matrices.

    gate[l, o] = gate_scale * sigmoid(alpha[l, o])                     (exactly 1 within 4 ulp of 1)
    row[b, o]  = prod over the distinct labels l of forget[b, :] of gate[l, o]            -1: 1

    dalpha[l, o] = (1 - sigmoid(alpha[l, o])) * sum over b with l in forget[b] of t[b, o]

``t`` is the derivative by the log of a row (:mod:`wfnet.gates`). The sum runs over samples in a
fixed order, without atomics. A label out of range gives NaN for its sample, takes no gradient, and
is never used as an index. The filter matrices of a whole network stand side by side in one
(:mod:`wfnet.gate_tables`): one launch each way serves all layers.
"""

# ruff: noqa: E741 (O is the number of output channels here, as in every equation)

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from wfnet.kernels.epilogue_bwd import by_source
from wfnet.kernels.launch import Launch

_SAMPLES = 16
_COLUMNS = 128
_NEAR_ONE = 4 * torch.finfo(torch.float32).eps


@triton.jit(do_not_specialize=["B", "K"])
def gate_rows_kernel(
    alpha,  # [K, O]
    forget,  # [B, J] int64
    out,  # [B, O] fp32
    gate_scale,
    B,
    K,
    O,
    J: tl.constexpr,
    NEAR_ONE: tl.constexpr,
    BS: tl.constexpr,
    BN: tl.constexpr,
):
    samples = (tl.program_id(0) * BS + tl.arange(0, BS)).to(tl.int64)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    samples_ok = samples < B
    col_ok = cols < O
    product = tl.full((BS, BN), 1.0, tl.float32)
    for j in tl.static_range(0, J):
        label = tl.load(forget + samples * J + j, mask=samples_ok, other=-1)
        skip = label == -1
        for i in tl.static_range(0, j):  # a label counts once
            skip = skip | (tl.load(forget + samples * J + i, mask=samples_ok, other=-1) == label)
        inside = (label >= 0) & (label < K)
        row = tl.where(inside, label, 0)
        value = tl.load(
            alpha + (row[:, None] * O + cols[None, :]),
            mask=(inside & ~skip)[:, None] & col_ok[None, :],
            other=0.0,
        ).to(tl.float32)
        gate = gate_scale * tl.sigmoid(value)
        gate = tl.where(tl.abs(gate - 1.0) <= NEAR_ONE, 1.0, gate)
        gate = tl.where(inside[:, None], gate, float("nan"))
        product *= tl.where(skip[:, None], 1.0, gate)
    tl.store(
        out + (samples[:, None] * O + cols[None, :]),
        product,
        mask=samples_ok[:, None] & col_ok[None, :],
    )


@triton.jit
def gate_rows_bwd_kernel(
    t,  # [B, O] fp32
    alpha,  # [K, O]
    order,  # [B * J] int64: entries of the labels, sorted by label
    first_of,  # [K + 1] int64: where each label starts in order
    dalpha,  # [K, O]
    O,
    J: tl.constexpr,
    BN: tl.constexpr,
):
    label = tl.program_id(0)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    col_ok = cols < O
    total = tl.zeros((BN,), dtype=tl.float32)
    for position in range(tl.load(first_of + label), tl.load(first_of + label + 1)):
        sample = tl.load(order + position) // J
        total += tl.load(t + sample * O + cols, mask=col_ok, other=0.0)
    at = label.to(tl.int64) * O + cols
    slope = tl.sigmoid(-tl.load(alpha + at, mask=col_ok, other=0.0).to(tl.float32))
    tl.store(dalpha + at, (slope * total).to(dalpha.dtype.element_ty), mask=col_ok)


def _check_labels(forget: Tensor) -> None:
    if forget.dim() != 2 or forget.dtype != torch.int64:
        raise ValueError(f"forget must be [B, J] int64, not {tuple(forget.shape)} {forget.dtype}")
    if not 1 <= forget.shape[1] <= 16:
        raise ValueError(f"{forget.shape[1]} forget labels a sample; the kernels take 1 to 16")


def plan_gate_rows(alpha: Tensor, forget: Tensor, out: Tensor, gate_scale: float) -> Launch:
    """The launch of ``gate_rows``."""
    batch, columns = out.shape
    arguments = {
        "alpha": alpha,
        "forget": forget,
        "out": out,
        "gate_scale": float(gate_scale),
        "B": batch,
        "K": alpha.shape[0],
        "O": columns,
        "J": forget.shape[1],
        "NEAR_ONE": _NEAR_ONE,
        "BS": _SAMPLES,
        "BN": _COLUMNS,
    }
    grid = (triton.cdiv(batch, _SAMPLES), triton.cdiv(columns, _COLUMNS))
    return Launch(gate_rows_kernel, grid, arguments, 4, 1)


def gate_rows(alpha: Tensor, forget: Tensor, gate_scale: float) -> Tensor:
    """One scale per sample and channel; equals ``wfnet.gates.gate_rows``.

    Args:
        alpha: ``[K, O]`` filter matrix, fp32 or 16-bit.
        forget: ``[B, J]`` int64; -1 selects no row, a label out of range gives NaN.
        gate_scale: factor in front of the sigmoid.

    Returns:
        ``[B, O]`` fp32.

    Raises:
        ValueError: if ``forget`` is not ``[B, J]`` int64 with ``J`` in 1 .. 16.
    """
    _check_labels(forget)
    out = torch.empty((forget.shape[0], alpha.shape[1]), dtype=torch.float32, device=alpha.device)
    if out.numel():
        plan_gate_rows(alpha.contiguous(), forget.contiguous(), out, gate_scale).run()
    return out


def by_label(forget: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Entries of ``forget`` ``[B, J]`` grouped by label: ``order`` and ``first_of``, int64.

    ``order[first_of[l]:first_of[l + 1]]`` are the entries (``sample * J + j``) of label l, samples
    in ascending order, each once: most labels occur in few samples or none, and nobody has to
    look for them. Labels out of range are in no group. No synchronisation, as :func:`by_source`.
    """
    if forget.shape[1] > 1:  # a label counts once in a row
        same = forget[:, :, None] == forget[:, None, :]
        forget = torch.where(same.tril(-1).any(2), -1, forget)
    return by_source(forget.flatten(), classes)


def plan_gate_rows_bwd(
    t: Tensor, alpha: Tensor, order: Tensor, first_of: Tensor, dalpha: Tensor, labels: int
) -> Launch:
    """The launch of ``gate_rows_bwd``, for ``labels`` in a row of ``forget``."""
    arguments = {
        "t": t,
        "alpha": alpha,
        "order": order,
        "first_of": first_of,
        "dalpha": dalpha,
        "O": t.shape[1],
        "J": labels,
        "BN": _COLUMNS,
    }
    grid = (alpha.shape[0], triton.cdiv(alpha.shape[1], _COLUMNS))
    return Launch(gate_rows_bwd_kernel, grid, arguments, 4, 1)


def gate_rows_bwd(t: Tensor, alpha: Tensor, forget: Tensor) -> Tensor:
    """``[K, O]`` gradient from log-derivatives ``t`` ``[B, O]`` fp32; see the module's equations.

    Equals ``wfnet.gates.gate_rows_backward``; bitwise reproducible.
    """
    _check_labels(forget)
    alpha = alpha.contiguous()
    dalpha = torch.empty_like(alpha)
    if dalpha.numel():
        groups = by_label(forget, alpha.shape[0])
        plan_gate_rows_bwd(t.contiguous(), alpha, *groups, dalpha, forget.shape[1]).run()
    return dalpha


def example_launches(meta: Callable[..., Tensor]) -> list[Launch]:
    """A launch of each kernel of this file, on tensors without memory, to compile it."""
    forget = meta(torch.int64, 512, 1)
    alpha, rows = meta(torch.float32, 1000, 4800), meta(torch.float32, 512, 4800)
    groups = meta(torch.int64, 512), meta(torch.int64, 1001)
    return [
        plan_gate_rows(alpha, forget, rows, 1.0),
        plan_gate_rows_bwd(rows, alpha, *groups, alpha, 1),
    ]
