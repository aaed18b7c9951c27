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


def gate_rows(alpha: Tensor, forget: Tensor, gate_scale: float) -> Tensor:
    """One scale per sample and channel; equals ``wfnet.gates.gate_rows``.

    Args:
        alpha: ``[K, O]`` filter matrix, fp32 or 16-bit.
        forget: ``[B, J]`` int64; -1 selects no row, a label out of range gives NaN.
        gate_scale: factor in front of the sigmoid.

    Returns:
        ``[B, O]`` fp32.
    """
    (batch, labels), (classes, columns) = forget.shape, alpha.shape
    out = torch.empty((batch, columns), dtype=torch.float32, device=alpha.device)
    if out.numel():
        arguments = (
            {"alpha": alpha.contiguous(), "forget": forget.contiguous(), "out": out}
            | {"gate_scale": float(gate_scale), "B": batch, "K": classes, "O": columns}
            | {"J": labels, "NEAR_ONE": _NEAR_ONE, "BS": _SAMPLES, "BN": _COLUMNS}
        )
        grid = (triton.cdiv(batch, _SAMPLES), triton.cdiv(columns, _COLUMNS))
        Launch(gate_rows_kernel, grid, arguments, 4, 1).run()
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


def gate_rows_bwd(t: Tensor, alpha: Tensor, forget: Tensor) -> Tensor:
    """``[K, O]`` gradient from log-derivatives ``t`` ``[B, O]`` fp32; see the module's equations.

    Equals ``wfnet.gates.gate_rows_backward``; bitwise reproducible.
    """
    alpha = alpha.contiguous()
    dalpha = torch.empty_like(alpha)
    if dalpha.numel():
        classes, columns = alpha.shape
        order, first_of = by_label(forget, classes)
        arguments = {"t": t.contiguous(), "alpha": alpha, "order": order, "first_of": first_of} | {
            "dalpha": dalpha,
            "O": columns,
            "J": forget.shape[1],
            "BN": _COLUMNS,
        }
        grid = (classes, triton.cdiv(columns, _COLUMNS))
        Launch(gate_rows_bwd_kernel, grid, arguments, 4, 1).run()
    return dalpha
