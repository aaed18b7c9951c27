"""Tables of all masked layers at once: filters to scale and shift, column sums to gradients.

With frozen BatchNorm folded, ``gamma' = gamma / sqrt(var + eps)`` (design: section 2)::

    A[b, o] = gamma'[o] * gate_weight[l, o]                                           l = forget[b]
    C[b, o] = gamma'[o] * gate_bias[l, o] * bias[o] + beta[o] - mean[o] * gamma'[o]

    dalpha_weight[l, o] = (1 - sigmoid(alpha_weight[l, o])) * sum over b with label l of T1[b, o]
    dalpha_bias[l, o]   = (1 - sigmoid(alpha_bias[l, o]))
                          * sum over the same b of gamma'[o] * gate_bias[b, o] * bias[o] * T0[b, o]

The filter matrices of all layers stand side by side in one ``[K, total]`` matrix, so that a step
gathers, squashes and reduces once for any number of layers. :func:`flatten_filters` makes the
parameters themselves views of such a matrix; then nothing is copied either.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from wfnet import gates

if TYPE_CHECKING:
    from wfnet.backends.contract import Backend


@dataclass(frozen=True)
class GatedLayer:
    """One masked layer of a network, as the tables see it. Vectors are ``[O]``."""

    alpha_weight: Tensor  # [K, O]
    alpha_bias: Tensor | None = None  # [K, O], with bias
    bias: Tensor | None = None
    gamma: Tensor | None = None  # BatchNorm weight
    beta: Tensor | None = None  # BatchNorm bias
    mean: Tensor | None = None  # running_mean
    var: Tensor | None = None  # running_var; None: no BatchNorm
    eps: float = 1e-5
    gate_scale: float = 1.0

    @property
    def filters(self) -> list[Tensor]:
        """``alpha_weight``, and ``alpha_bias`` where there is one."""
        return [a for a in (self.alpha_weight, self.alpha_bias) if a is not None]

    def folded(self) -> tuple[Tensor, Tensor]:
        """``gamma'`` and ``beta - mean * gamma'`` ``[O]``, fp32 or up; 1 and 0 without a norm."""
        dtype = torch.promote_types(self.alpha_weight.dtype, torch.float32)
        if self.var is not None:
            dtype = torch.promote_types(self.var.dtype, dtype)
        columns, device = self.alpha_weight.shape[1], self.alpha_weight.device
        ones = torch.ones(columns, dtype=dtype, device=device)
        gamma = ones if self.gamma is None else self.gamma.detach().to(dtype)
        beta = torch.zeros_like(ones) if self.beta is None else self.beta.detach().to(dtype)
        if self.var is None:
            return gamma, beta
        gamma = gamma / torch.sqrt(self.var.to(dtype) + self.eps)
        return gamma, beta - self.mean.to(dtype) * gamma


class GateTables:
    """Makes the tables of all layers of a network.

    Args:
        layers: in network order, all with the same number of classes and scale of gates.
        rows: who computes the gates of all layers, which stand side by side, and their gradients:
            :mod:`wfnet.gates`, or a backend.
    """

    def __init__(self, layers: Sequence[GatedLayer], rows: "Backend | ModuleType" = gates):
        self.rows = rows
        self.filters = [matrix.detach() for layer in layers for matrix in layer.filters]
        self.columns = list(_columns_of(self.filters))
        folded = [layer.folded() for layer in layers]
        self.beta = torch.cat([beta for _, beta in folded])
        self.of_weight, self.of_bias, self.of_layer = [], [], []
        factors, columns, start = [], iter(self.columns), 0
        for layer, (gamma, _) in zip(layers, folded, strict=True):
            self.of_weight.append(next(columns))
            self.of_bias.append(None if layer.alpha_bias is None else next(columns))
            self.of_layer.append(slice(start, start + len(gamma)))
            start += len(gamma)
            factors.append(gamma)
            if layer.alpha_bias is not None:
                factors.append(gamma * layer.bias.detach().to(gamma.dtype))
        self.factor = torch.cat(factors)  # [total]: gamma', or gamma' * bias
        self.gate_scale = layers[0].gate_scale

    def __call__(self, forget: Tensor, save: bool = False) -> "StepTables":
        """Returns tables for labels ``forget`` ``[B, J]``; ``save``: with room for column sums."""
        return StepTables(self, side_by_side(self.filters), forget, save)


class StepTables:
    """Tables of one forward pass, and the column sums that its backward pass writes.

    Args:
        tables: whose layers they are of.
        flat: ``[K, total]``, the present filters side by side.
        forget: labels ``[B, J]``.
        save: whether column sums are wanted.

    Attributes:
        scales, shifts: ``A`` and ``C`` ``[B, O]`` of every layer.
        t1, t0: ``[B, O]`` of every layer, to be written by the backward pass (``t0`` is None where
            the layer has no bias); empty lists if nothing is saved. They start at 0.
    """

    def __init__(self, tables: GateTables, flat: Tensor, forget: Tensor, save: bool):
        self.tables, self.flat, self.forget = tables, flat, forget
        rows = tables.rows.gate_rows(flat, forget, tables.gate_scale)
        products = rows * tables.factor  # [B, total]
        self.scales = [products[:, part] for part in tables.of_weight]
        self.products = products
        # Rows as far apart as those of the products: kernels take one stride for both tables.
        shift = torch.empty_like(products)[:, : tables.beta.shape[0]]
        shift.copy_(tables.beta)
        for bias, layer in zip(tables.of_bias, tables.of_layer, strict=True):
            if bias is not None:
                shift[:, layer] += products[:, bias]
        self.shifts = [shift[:, part] for part in tables.of_layer]
        self.t1, self.t0 = [], []
        if save:
            self.sums = torch.zeros_like(products)
            self.t1 = [self.sums[:, part] for part in tables.of_weight]
            self.t0 = [None if part is None else self.sums[:, part] for part in tables.of_bias]

    def gradients(self, into: Tensor | None = None) -> list[Tensor]:
        """Returns gradients ``[K, O]`` of all filters, layer by layer, weight before bias.

        Args:
            into: ``[K, total]``, written instead of fresh memory; the results are its columns.
        """
        total = self.sums
        for sums, bias in zip(self.t0, self.tables.of_bias, strict=True):
            if bias is not None:
                sums.mul_(self.products[:, bias])
        gradient = self.tables.rows.gate_rows_backward(total, self.flat, self.forget)
        if into is not None:
            gradient = into.copy_(gradient)
        return [gradient[:, part] for part in self.tables.columns]


def _columns_of(matrices: Sequence[Tensor]) -> Iterator[slice]:
    start = 0
    for matrix in matrices:
        yield slice(start, start + matrix.shape[1])
        start += matrix.shape[1]


# -- filter matrices as views of one matrix --------------------------------------------------------


def flat_matrix(matrices: Sequence[Tensor]) -> Tensor | None:
    """The ``[K, total]`` matrix whose columns ``matrices`` are, in order; None if they are not.

    Nothing is copied and no memory is read.
    """
    first = matrices[0].detach()
    total = sum(matrix.shape[1] for matrix in matrices)
    start = first.storage_offset()
    for matrix in matrices:
        same = (
            matrix.dtype == first.dtype
            and matrix.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
            and matrix.storage_offset() == start
            and matrix.stride() == (total, 1)
        )
        if not same:
            return None
        start += matrix.shape[1]
    return first.as_strided((first.shape[0], total), (total, 1))


def side_by_side(matrices: Sequence[Tensor]) -> Tensor:
    """``[K, total]``: the matrices' own memory where they lie side by side already, else a copy."""
    flat = flat_matrix(matrices)
    return torch.cat([matrix.detach() for matrix in matrices], 1) if flat is None else flat


@contextmanager
def flatten_filters(params: Sequence[nn.Parameter]) -> Iterator[Tensor]:
    """Inside, all ``params`` ``[K, O_i]`` are columns of one ``[K, total]`` matrix; yields it.

    Values, names, state-dict keys and the parameter objects stay; only their memory moves, so that
    tables, gradients and the optimiser work on one buffer. Afterwards every parameter has memory of
    its own again, with the values that it then has.
    """
    flat = torch.cat([parameter.detach() for parameter in params], 1)
    for parameter, part in zip(params, _columns_of(params), strict=True):
        parameter.data = flat[:, part]
    try:
        yield flat
    finally:
        for parameter in params:
            parameter.data = parameter.detach().clone(memory_format=torch.contiguous_format)
            if parameter.grad is not None:
                parameter.grad = None
