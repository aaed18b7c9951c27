"""Scales and shifts of durable layers: from statistics of their rows, or from moments of groups.

Gates lie behind BatchNorm (:mod:`wfnet.durable_layers`), so the epilogue of a convolution is, for a
sample b of row c (design: section 7)::

    A[b,o] = g * gamma / sqrt(var_c + eps)     C[b,o] = g * beta - mean_c * A[b,o]     g = g[c,o]

Outside untraining mean and variance are tables of the rows (:class:`RowTables`). In untraining they
are the moments of the product ``u`` over the samples of a group (:class:`GroupTables`), known once
the product is. Of the gradient ``g'`` behind the activation a layer's backward needs its column
sums, ``t1 = sum_p g' * A * u`` and ``t0 = sum_p g'``. With P and S their sums over a group of n
pixels, and A and C both proportional to the gate, nothing is divided::

    dL/dlog g = P + C * S
    du        = A * g' + on_u * u + constant
    on_u      = -(P - mean * A * S) / (n * (var + eps))
    constant  = -A * S / n - on_u * mean
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wfnet import gates
from wfnet.backends.eager import sample_moments
from wfnet.durable_layers import DurableBatchNorm2d, DurableLayer, hard_gate, soft_gate


@dataclass(frozen=True)
class DurableStep:
    """A convolution with durable gates behind it, or behind the BatchNorm that follows it."""

    layer: nn.Conv2d
    masked: DurableLayer

    @property
    def norm(self) -> DurableBatchNorm2d | None:
        return self.masked if isinstance(self.masked, DurableBatchNorm2d) else None

    def wide(self, t: Tensor) -> Tensor:
        """``t`` in the dtype of tables: fp32, or fp64 where filters or weights are."""
        dtype = torch.promote_types(self.masked.alpha_hard.dtype, self.layer.weight.dtype)
        return t.detach().to(torch.promote_types(dtype, torch.float32))

    @property
    def bias(self) -> Tensor | float:
        """Of the convolution, ``[O]``; 0 where it has none."""
        return 0.0 if self.layer.bias is None else self.wide(self.layer.bias)


def _room_for_sums(scales: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Column sums ``t1`` and ``t0`` for the backward pass; they start at 0."""
    return [torch.zeros_like(s) for s in scales], [torch.zeros_like(s) for s in scales]


def _side_by_side(gradients: list[Tensor], into: Tensor | None) -> list[Tensor]:
    if into is None:
        return gradients
    torch.cat(gradients, 1, out=into)
    return list(into.split([gradient.shape[1] for gradient in gradients], 1))


class RowTables:
    """Tables of one forward pass with the statistics of the rows.

    Args:
        steps: the layers.
        rows: forget labels ``[B, J]``.
        save: whether column sums are wanted.

    Attributes:
        scales, shifts: ``A`` and ``C`` ``[B, O]`` of every layer.
        t1, t0: as of :class:`wfnet.gate_tables.StepTables`.
    """

    def __init__(self, steps: Sequence[DurableStep], rows: Tensor, save: bool):
        self.steps, self.rows = steps, rows
        with torch.no_grad():
            tables = [self._tables_of(step) for step in steps]
        self.scales, self.shifts = (list(kind) for kind in zip(*tables, strict=True))
        self.t1, self.t0 = _room_for_sums(self.scales) if save else ([], [])

    def _tables_of(self, step: DurableStep) -> tuple[Tensor, Tensor]:
        norm = step.norm
        if norm is None:
            gate = step.wide(step.masked.row_gates(self.rows))
            return gate, gate * step.bias
        scale, shift = map(step.wide, norm.tables(self.rows))
        slope = step.wide(norm.weight) / torch.sqrt(step.wide(norm.running_var) + norm.eps)
        offset = step.wide(norm.bias) - (step.wide(norm.running_mean) - step.bias) * slope
        return scale * slope, torch.addcmul(shift, scale, offset)

    def gradients(self, into: Tensor | None = None) -> list[Tensor]:
        """Returns gradients ``[K, O]`` of all filters, layer by layer, hard gates before soft.

        Args:
            into: ``[K, total]``, written instead of fresh memory; the results are its columns.
        """
        found = []
        for step, t1, t0, shift in zip(self.steps, self.t1, self.t0, self.shifts, strict=True):
            soft = step.masked.alpha_soft
            total = torch.addcmul(t1, t0, shift)
            found.append(torch.zeros_like(step.masked.alpha_hard))  # 1[alpha > 0] has no slope
            found.append(gates.gate_rows_backward(total, soft.detach(), self.rows))
        return _side_by_side(found, into)


class GroupTables:
    """Tables of one forward pass with moments of groups, which are filled in layer by layer.

    Args:
        steps: the layers, whose mode says which groups there are.
        save: whether column sums are wanted.

    Attributes:
        scales, shifts: ``A`` and ``C`` ``[B, O]`` of every layer; None before :meth:`measure`.
        t1, t0: as of :class:`wfnet.gate_tables.StepTables`; empty lists if nothing is saved.
    """

    def __init__(self, steps: Sequence[DurableStep], save: bool):
        self.steps, self.save = steps, save
        self.mode = steps[0].masked.mode
        self.groups, self.labels = self.mode.groups, self.mode.labels
        self.filters = [step.masked for step in steps]
        self.widths = [m.alpha_hard.shape[1] for m in self.filters]
        self._read_gates()
        member = F.one_hot(self.groups, len(self.mode.labels)).to(self.gates[0].dtype)
        self.member = member  # [B, G]
        self.sizes = member.sum(0)  # [G]
        self.scales: list[Tensor | None] = [None] * len(steps)
        self.shifts: list[Tensor | None] = [None] * len(steps)
        self.moments: list[tuple[Tensor, Tensor, int] | None] = [None] * len(steps)
        self.t1: list[Tensor | None] = []
        self.t0: list[Tensor | None] = []
        if save:
            batch = len(self.groups)
            self.t1 = [self.gates[0].new_zeros((batch, width)) for width in self.widths]
            self.t0 = [torch.zeros_like(sums) for sums in self.t1]
        self.of_gates = torch.zeros_like(self.all_gates)

    def _read_gates(self) -> None:
        """Gates ``[G, O]`` of all layers at once, with the graph that leads to the filters."""
        mode, labels = self.mode, self.labels
        with torch.enable_grad():
            self.rows = [
                torch.cat([table.detach().index_select(0, labels) for table in tables], 1)
                for tables in (
                    [m.alpha_hard for m in self.filters],
                    [m.alpha_soft for m in self.filters],
                )
            ]
            hard, soft = (rows.requires_grad_(self.save) for rows in self.rows)
            noise = mode.noise
            uniform = None
            if noise is not None:
                uniform = torch.cat([noise[m.layer_name] for m in self.filters], 1)
            gate = hard_gate(hard, uniform)
            if mode.soft:
                gate = gate * soft_gate(soft)
            self.all_gates_with_graph = gate
        self.all_gates = self.steps[0].wide(gate)
        self.gates = self.all_gates.split(self.widths, 1)

    def measure(self, index: int, u: Tensor, source: Tensor | None) -> None:
        """Takes the moments of a layer's product, and fills in its tables.

        Args:
            u: ``[N, O, P, Q]``, without bias.
            source: ``[B]``: sample b is ``u[source[b]]``; None: N is B.
        """
        step, gate = self.steps[index], self.gates[index]
        norm = step.norm
        if norm is None:
            scale, shift = gate, gate * step.bias
        else:
            mean, var = self._moments(u, source)
            slope = step.wide(norm.weight) * torch.rsqrt(var + norm.eps)
            scale = gate * slope
            shift = gate * step.wide(norm.bias) - mean * scale
            self.moments[index] = mean, var, u.shape[2] * u.shape[3]
            if self.mode.moments is not None:
                self.mode.moments(norm.layer_name, mean + step.bias, var)
        self.scales[index] = scale.index_select(0, self.groups)
        self.shifts[index] = shift.index_select(0, self.groups)

    def _moments(self, u: Tensor, source: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and variance ``[G, O]`` over the samples of a group."""
        mean_b, var_b = (moment.to(self.member.dtype) for moment in sample_moments(u))
        if source is not None:
            var_b, mean_b = var_b.index_select(0, source), mean_b.index_select(0, source)
        share = (self.member / self.sizes).T  # [G, B]
        mean = share @ mean_b
        apart = mean_b - mean.index_select(0, self.groups)
        return mean, share @ torch.addcmul(var_b, apart, apart)

    def backward(self, index: int) -> tuple[Tensor | None, Tensor | None]:
        """Reads the column sums of a layer: what its gates want, and ``on_u`` and ``constant``.

        Returns:
            ``[B, O]`` each; None for a layer whose tables do not depend on its product.
        """
        p, s = self.member.T @ self.t1[index], self.member.T @ self.t0[index]  # [G, O]
        gate, step = self.gates[index], self.steps[index]
        norm = step.norm
        if norm is None:
            shift = gate * step.bias
            self._write_gates(index, p + shift * s)
            return None, None
        mean, var, pixels = self.moments[index]
        inverse = torch.rsqrt(var + norm.eps)
        scale = gate * step.wide(norm.weight) * inverse
        centred = p - mean * scale * s
        self._write_gates(index, centred + gate * step.wide(norm.bias) * s)
        count = (self.sizes * pixels).unsqueeze(1)
        on_u = -centred * inverse.square() / count
        constant = -scale * s / count - on_u * mean
        return on_u.index_select(0, self.groups), constant.index_select(0, self.groups)

    def _write_gates(self, index: int, by_log: Tensor) -> None:
        """The gradient by the gates; a gate of 0 passes none on to its filters."""
        gate = self.gates[index]
        found = torch.where(gate == 0, 0.0, by_log / gate)
        self.of_gates.split(self.widths, 1)[index].copy_(found)

    def gradients(self, into: Tensor | None = None) -> list[Tensor]:
        """As :meth:`RowTables.gradients`."""
        graph = self.all_gates_with_graph
        found = torch.autograd.grad(
            graph, self.rows, self.of_gates.to(graph.dtype), allow_unused=True
        )
        hard, soft = (
            [None] * len(self.widths) if gradient is None else gradient.split(self.widths, 1)
            for gradient in found
        )
        gradients = []
        for masked, *parts in zip(self.filters, hard, soft, strict=True):
            for matrix, part in zip((masked.alpha_hard, masked.alpha_soft), parts, strict=True):
                whole = torch.zeros_like(matrix)
                if part is not None:
                    whole.index_copy_(0, self.labels, part.to(matrix.dtype))
                gradients.append(whole)
        return _side_by_side(gradients, into)
