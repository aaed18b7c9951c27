"""Filter matrices to tables, and gradients of tables to filter matrices.

    gate[l, o] = gate_scale * sigmoid(alpha[l, o])                     (exactly 1 within 4 ulp of 1)
    gate_row[b, o] = prod over the distinct labels l of forget[b, :] of gate[l, o]        -1: 1

For a layer followed by a frozen BatchNorm, with gamma' = gamma / sqrt(var + eps):

    A[b, o] = gamma'[o] * gate_row_weight[b, o]
    C[b, o] = gamma'[o] * gate_row_bias[b, o] * bias[o] + beta[o] - mean[o] * gamma'[o]

and back, from T1[b, o] = sum_p g * v and T0[b, o] = sum_p g:

    dalpha_weight[l, o] = (1 - sigmoid(alpha_weight[l, o]))
                          * sum over b with l in forget[b] of T1[b, o]
    dalpha_bias[l, o]   = (1 - sigmoid(alpha_bias[l, o])) * gamma'[o] * bias[o]
                          * sum over the same b of gate_row_bias[b, o] * T0[b, o]

The sums run over samples in a fixed order, without atomics. A label out of range gives NaN for its
sample, takes no gradient, and is never used as an index.

``gate_rows`` and ``gate_rows_bwd`` serve one matrix. :class:`GateTables` serves every layer of a
network in one launch each way: the kernel finds its layer in a table of addresses.
"""

# ruff: noqa: E741 (O is the number of output channels here, as in every equation)

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from wfnet.kernels.epilogue_bwd import by_source
from wfnet.kernels.launch import Launch

from wfnet.gate_tables import GatedLayer, check_layers

_SAMPLES = 16
_COLUMNS = 128
_NEAR_ONE = 4 * torch.finfo(torch.float32).eps

# Columns of the address table, one row per 128 channels of a layer; 0 is "none".
_FIELDS = (
    "alpha_weight",
    "alpha_bias",
    "bias",
    "gamma",
    "beta",
    "mean",
    "var",
    "dalpha_weight",  # first column in the gradient of all filter matrices
    "dalpha_bias",  # the same, -1 without a bias
    "column",  # first channel of this row
    "columns",  # channels of the layer
    "before",  # channels of all layers before
    "stride_weight",  # elements from one row of alpha_weight to the next
    "stride_bias",
)


@triton.jit
def gate_product(
    alpha,  # [K, O]
    forget,  # [B, J] int64
    gate_scale,
    samples,  # [BS]
    samples_ok,  # [BS]
    cols,  # [BN]
    col_ok,  # [BN]
    K,
    LD,  # stride between rows of alpha
    J: tl.constexpr,
    NEAR_ONE: tl.constexpr,
):
    """``[BS, BN]`` fp32: product of the gates of each sample's distinct labels."""
    product = tl.full((samples.shape[0], cols.shape[0]), 1.0, tl.float32)
    for j in tl.static_range(0, J):
        label = tl.load(forget + samples * J + j, mask=samples_ok, other=-1)
        skip = label == -1
        for i in tl.static_range(0, j):
            skip = skip | (tl.load(forget + samples * J + i, mask=samples_ok, other=-1) == label)
        inside = (label >= 0) & (label < K)
        row = tl.where(inside, label, 0)
        value = tl.load(
            alpha + (row[:, None] * LD + cols[None, :]),
            mask=(inside & ~skip)[:, None] & col_ok[None, :],
            other=0.0,
        ).to(tl.float32)
        gate = gate_scale * tl.sigmoid(value)
        gate = tl.where(tl.abs(gate - 1.0) <= NEAR_ONE, 1.0, gate)
        gate = tl.where(inside[:, None], gate, float("nan"))
        product *= tl.where(skip[:, None], 1.0, gate)
    return product


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
    samples = tl.program_id(0) * BS + tl.arange(0, BS)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    samples_ok = samples < B
    col_ok = cols < O
    product = gate_product(
        alpha, forget, gate_scale, samples, samples_ok, cols, col_ok, K, O, J, NEAR_ONE
    )
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


@triton.jit
def load_vector(address, cols, ok, other):
    """``[BN]`` fp32 values at an address held in an integer; ``other`` where the address is 0."""
    pointer = address.to(tl.pointer_type(tl.float32))
    return tl.load(pointer + cols, mask=ok & (address != 0), other=other)


@triton.jit
def folded_norm(row, cols, col_ok, eps):
    """``gamma'`` and ``beta'`` of the BatchNorm behind a layer, or 1 and 0."""
    var = load_vector(tl.load(row + 6), cols, col_ok, 1.0)
    gamma = load_vector(tl.load(row + 3), cols, col_ok, 1.0)
    normalised = tl.load(row + 6) != 0
    gamma = tl.where(normalised, gamma * (1.0 / tl.sqrt(var + eps)), gamma)
    mean = load_vector(tl.load(row + 5), cols, col_ok, 0.0)
    beta = load_vector(tl.load(row + 4), cols, col_ok, 0.0)
    return gamma, beta - mean * gamma


@triton.jit(do_not_specialize=["K"])  # tables start at multiples of B
def gate_tables_kernel(
    addresses,  # [rows, FIELDS] int64
    numbers,  # [rows, 2] fp32: gate_scale, eps
    forget,  # [B, J] int64
    scale,  # flat fp32: [B, O] of every layer, one after the other
    shift,  # the same
    B,
    K,
    FIELDS: tl.constexpr,
    J: tl.constexpr,
    NEAR_ONE: tl.constexpr,
    BS: tl.constexpr,
    BN: tl.constexpr,
):
    row = addresses + tl.program_id(0) * FIELDS
    gate_scale = tl.load(numbers + tl.program_id(0) * 2)
    eps = tl.load(numbers + tl.program_id(0) * 2 + 1)
    O = tl.load(row + 10)
    cols = tl.load(row + 9) + tl.arange(0, BN)
    samples = tl.program_id(1) * BS + tl.arange(0, BS)
    samples_ok = samples < B
    col_ok = cols < O
    gamma, beta = folded_norm(row, cols, col_ok, eps)
    at = tl.load(row + 11) * B + samples[:, None] * O + cols[None, :]
    ok = samples_ok[:, None] & col_ok[None, :]
    weight = tl.load(row).to(tl.pointer_type(tl.float32))
    stride = tl.load(row + 12)
    gates = gate_product(
        weight, forget, gate_scale, samples, samples_ok, cols, col_ok, K, stride, J, NEAR_ONE
    )
    tl.store(scale + at, gates * gamma[None, :], mask=ok)
    offset = tl.zeros((BS, BN), dtype=tl.float32)
    if tl.load(row + 1) != 0:
        bias = load_vector(tl.load(row + 2), cols, col_ok, 0.0)
        filters = tl.load(row + 1).to(tl.pointer_type(tl.float32))
        stride = tl.load(row + 13)
        gates = gate_product(
            filters, forget, gate_scale, samples, samples_ok, cols, col_ok, K, stride, J, NEAR_ONE
        )
        offset = gates * (gamma * bias)[None, :]
    tl.store(shift + at, offset + beta[None, :], mask=ok)


@triton.jit(do_not_specialize=["K"])  # tables start at multiples of B
def gate_tables_bwd_kernel(
    addresses,  # [rows, FIELDS] int64
    numbers,  # [rows, 2] fp32: gate_scale, eps
    forget,  # [B, J] int64
    order,  # [B * J] int64, as in gate_rows_bwd_kernel
    first_of,  # [K + 1] int64
    t1,  # flat fp32, as scale
    t0,  # flat fp32, as shift
    dalpha,  # [K, LD] fp32: the gradients of all filter matrices side by side
    B,
    K,
    LD,
    FIELDS: tl.constexpr,
    J: tl.constexpr,
    NEAR_ONE: tl.constexpr,
    BN: tl.constexpr,
):
    row = addresses + tl.program_id(0) * FIELDS
    gate_scale = tl.load(numbers + tl.program_id(0) * 2)
    eps = tl.load(numbers + tl.program_id(0) * 2 + 1)
    label = tl.program_id(1)
    O = tl.load(row + 10)
    cols = tl.load(row + 9) + tl.arange(0, BN)
    col_ok = cols < O
    base = tl.load(row + 11) * B
    biased = tl.load(row + 1) != 0
    filters = tl.load(row + 1).to(tl.pointer_type(tl.float32))
    stride = tl.load(row + 13)
    weight_total = tl.zeros((BN,), dtype=tl.float32)
    bias_total = tl.zeros((BN,), dtype=tl.float32)
    one = tl.arange(0, 1)
    for position in range(tl.load(first_of + label), tl.load(first_of + label + 1)):
        sample = tl.load(order + position) // J
        at = base + sample * O + cols
        weight_total += tl.load(t1 + at, mask=col_ok, other=0.0)
        if biased:
            gates = gate_product(
                filters, forget, gate_scale, sample + one, one == 0, cols, col_ok, K, stride, J,
                NEAR_ONE,
            )  # fmt: skip
            bias_total += tl.sum(gates, axis=0) * tl.load(t0 + at, mask=col_ok, other=0.0)
    weight = tl.load(row).to(tl.pointer_type(tl.float32)) + label * tl.load(row + 12)
    slope = tl.sigmoid(-tl.load(weight + cols, mask=col_ok, other=0.0))
    dalpha += label.to(tl.int64) * LD
    tl.store(dalpha + tl.load(row + 7) + cols, slope * weight_total, mask=col_ok)
    if biased:
        gamma, _ = folded_norm(row, cols, col_ok, eps)
        bias = load_vector(tl.load(row + 2), cols, col_ok, 0.0)
        slope = tl.sigmoid(-tl.load(filters + label * stride + cols, mask=col_ok, other=0.0))
        slope *= gamma * bias
        tl.store(dalpha + tl.load(row + 8) + cols, slope * bias_total, mask=col_ok)


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


def _check_layer(layer: GatedLayer, device: torch.device) -> None:
    """Raises ValueError unless tensors are fp32 with contiguous rows, on one device."""
    for name in _FIELDS[:7]:
        tensor = getattr(layer, name)
        if tensor is None:
            continue
        if tensor.dtype != torch.float32 or tensor.stride(-1) != 1:
            raise ValueError(f"{name} must be rows of contiguous float32, not {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, the filters are on {device}")


class GateTables:
    """Scale and shift tables of all masked layers of a network: one launch each way.

    The addresses of filters and frozen vectors are written to the device once, here; an in-place
    update (an optimiser step) is seen, a replaced tensor (``param.data = ...``) is noticed by
    :meth:`scale_and_shift`, which raises.

    Args:
        layers: in network order, all with the same number of classes.

    Raises:
        ValueError: for layers that do not fit each other.
    """

    def __init__(self, layers: Sequence[GatedLayer]):
        check_layers(layers)
        first = layers[0].alpha_weight
        self.layers = tuple(layers)
        self.classes = first.shape[0]
        self.device = first.device
        rows, numbers, before, gradient = [], [], 0, 0
        for layer in self.layers:
            _check_layer(layer, self.device)
            columns = layer.alpha_weight.shape[1]
            fixed = self._layer_addresses(layer)
            biased = layer.alpha_bias is not None
            offsets = [gradient, gradient + columns if biased else -1]
            strides = [layer.alpha_weight.stride(0), layer.alpha_bias.stride(0) if biased else 0]
            for column in range(0, columns, _COLUMNS):
                rows.append([*fixed, *offsets, column, columns, before, *strides])
                numbers.append([layer.gate_scale, layer.eps])
            before += columns
            gradient += columns * len(layer.filters)
        self._columns = before
        self._gradient_columns = gradient
        self._known = [self._layer_addresses(layer) for layer in self.layers]
        self._addresses = torch.tensor(rows, dtype=torch.int64, device=self.device)
        self._numbers = torch.tensor(numbers, dtype=torch.float32, device=self.device)

    @staticmethod
    def _layer_addresses(layer: GatedLayer) -> list[int]:
        tensors = (getattr(layer, name) for name in _FIELDS[:7])
        return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]

    def views(self, flat: Tensor, batch: int) -> list[Tensor]:
        """``[B, O]`` of every layer in a flat buffer, as :meth:`backward` takes them."""
        found, before = [], 0
        for layer in self.layers:
            columns = layer.alpha_weight.shape[1]
            size = batch * columns
            found.append(flat[before * batch : before * batch + size].view(batch, columns))
            before += columns
        return found

    def empty(self, batch: int) -> Tensor:
        """A flat fp32 buffer with room for ``[B, O]`` of every layer."""
        return torch.empty(self._columns * batch, dtype=torch.float32, device=self.device)

    def _plan(self, kernel, grid, forget: Tensor, **buffers: Tensor | int) -> Launch:
        arguments = dict(
            addresses=self._addresses,
            numbers=self._numbers,
            forget=forget,
            **buffers,
            B=forget.shape[0],
            K=self.classes,
            FIELDS=len(_FIELDS),
            J=forget.shape[1],
            NEAR_ONE=_NEAR_ONE,
            BN=_COLUMNS,
        )
        return Launch(kernel, grid, arguments, 4, 1)

    def scale_and_shift(self, forget: Tensor) -> list[tuple[Tensor, Tensor]]:
        """``A`` and ``C`` ``[B, O]`` fp32 of every layer, for labels ``forget`` ``[B, J]`` int64.

        Raises:
            ValueError: for labels of another shape or dtype.
            RuntimeError: if a filter matrix or a frozen vector now lies elsewhere in memory.
        """
        _check_labels(forget)
        for layer, known in zip(self.layers, self._known, strict=True):
            if self._layer_addresses(layer) != known:
                raise RuntimeError("a parameter moved since the tables were built; build new ones")
        batch = forget.shape[0]
        scale, shift = self.empty(batch), self.empty(batch)
        if batch:
            grid = (self._addresses.shape[0], triton.cdiv(batch, _SAMPLES))
            forget = forget.contiguous()
            buffers = {"scale": scale, "shift": shift, "BS": _SAMPLES}
            self._plan(gate_tables_kernel, grid, forget, **buffers).run()
        return list(zip(self.views(scale, batch), self.views(shift, batch), strict=True))

    def backward(
        self, forget: Tensor, t1: Tensor, t0: Tensor, into: Tensor | None = None
    ) -> list[Tensor]:
        """Gradients ``[K, O]`` fp32 of all filter matrices, layer by layer, weight before bias.

        Args:
            forget: the labels of the forward pass.
            t1, t0: flat buffers (:meth:`empty`, filled through :meth:`views`).
            into: ``[K, total]`` fp32 contiguous, written instead of fresh memory.
        """
        _check_labels(forget)
        shape = (self.classes, self._gradient_columns)
        if into is None:
            into = torch.empty(shape, dtype=torch.float32, device=self.device)
        fits = tuple(into.shape) == shape and into.dtype == torch.float32
        if not (fits and into.is_contiguous()):
            raise ValueError(f"into must be contiguous float32 {shape}, not {tuple(into.shape)}")
        grid = (self._addresses.shape[0], self.classes)
        forget = forget.contiguous()
        order, first_of = by_label(forget, self.classes)
        buffers = {"order": order, "first_of": first_of, "t1": t1, "t0": t0, "dalpha": into}
        self._plan(gate_tables_bwd_kernel, grid, forget, **buffers, LD=shape[1]).run()
        matrices = [matrix for layer in self.layers for matrix in layer.filters]
        return list(into.split([matrix.shape[1] for matrix in matrices], 1))


def example_launches(meta: Callable[..., Tensor]) -> list[Launch]:
    """A launch of each kernel of this file, on tensors without memory, to compile it."""
    forget = meta(torch.int64, 512, 1)
    alpha, rows = meta(torch.float32, 1000, 256), meta(torch.float32, 512, 256)
    shared = {
        "addresses": meta(torch.int64, 40, len(_FIELDS)),
        "numbers": meta(torch.float32, 40, 2),
        "forget": forget,
        "B": 512,
        "K": 1000,
        "FIELDS": len(_FIELDS),
        "J": 1,
        "NEAR_ONE": _NEAR_ONE,
        "BN": _COLUMNS,
    }
    groups = meta(torch.int64, 512), meta(torch.int64, 1001)
    flat = meta(torch.float32, 512 * 4800)
    tables = {"scale": flat, "shift": flat, "BS": _SAMPLES}
    sums = {"t1": flat, "t0": flat, "dalpha": meta(torch.float32, 1000, 4800), "LD": 4800}
    sums |= dict(zip(("order", "first_of"), groups, strict=True))
    return [
        plan_gate_rows(alpha, forget, rows, 1.0),
        plan_gate_rows_bwd(rows, alpha, *groups, alpha, 1),
        Launch(gate_tables_kernel, (40, 32), {**shared, **tables}, 4, 1),
        Launch(gate_tables_bwd_kernel, (40, 1000), {**shared, **sums}, 4, 1),
    ]
