"""Running a plan with durable gates: rows with statistics of their own, or moments of groups.

With rows nothing but the tables is another than in :class:`wfnet.fusion.execution.PlanRun`. With
moments of groups (untraining) a convolution's tables are known after its product, and the gradient
runs through the moments: one pass more each way. The product takes the moments of samples where the
backend has kernels for it.

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

Where moments are corrected (``GateMode.from_base``), A and C have the corrected ones, and so has
``mean * A * S``; ``var + eps`` and the last ``mean`` are those of the product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wfnet import gates
from wfnet.backends.contract import LayerBelow, LayerGradient
from wfnet.durable_layers import group_gates
from wfnet.fusion.execution import PlanNetwork, PlanRun
from wfnet.fusion.plan import ConvStep
from wfnet.fusion.run import Run, in_columns, run_dtype


def _wide(step: ConvStep, t: Tensor) -> Tensor:
    """``t`` in the dtype of tables: fp32, or fp64 where filters or weights are."""
    dtype = torch.promote_types(step.masked.alpha_hard.dtype, step.layer.weight.dtype)
    return t.detach().to(torch.promote_types(dtype, torch.float32))


def _bias(step: ConvStep) -> Tensor | float:
    """Of the convolution, ``[O]``; 0 where it has none."""
    return 0.0 if step.layer.bias is None else _wide(step, step.layer.bias)


def _filters_of(steps: Sequence[ConvStep]) -> list[Tensor]:
    return [matrix for step in steps for matrix in step.masked.named_filters().values()]


class RowTables:
    """Tables of one forward pass with the statistics of the rows.

    Args:
        steps: convolutions with durable gates behind them, or behind their BatchNorm.
        rows: forget labels ``[B, J]``.
        save: whether column sums are wanted.

    Attributes:
        scales, shifts: ``A`` and ``C`` ``[B, O]`` of every layer.
        t1, t0: as of :class:`wfnet.gate_tables.StepTables`.
    """

    def __init__(self, steps: Sequence[ConvStep], rows: Tensor, save: bool):
        self.steps, self.rows = steps, rows
        with torch.no_grad():
            tables = [self._tables_of(step) for step in steps]
        self.scales, self.shifts = (list(kind) for kind in zip(*tables, strict=True))
        self.t1 = [torch.zeros_like(scale) for scale in self.scales if save]
        self.t0 = [torch.zeros_like(scale) for scale in self.scales if save]

    def _tables_of(self, step: ConvStep) -> tuple[Tensor, Tensor]:
        norm = step.norm
        if norm is None:
            gate = _wide(step, step.masked.row_gates(self.rows))
            return gate, gate * _bias(step)
        scale, shift = (_wide(step, t) for t in norm.tables(self.rows))
        slope = _wide(step, norm.weight) / torch.sqrt(_wide(step, norm.running_var) + norm.eps)
        offset = _wide(step, norm.bias) - (_wide(step, norm.running_mean) - _bias(step)) * slope
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
            of_soft = gates.gate_rows_backward(total, soft.detach(), self.rows)
            found += [None, of_soft]  # 1[alpha > 0] has no slope
        return in_columns(found, _filters_of(self.steps), into)


class GroupTables:
    """Tables of one forward pass with moments of groups, which are filled in layer by layer.

    Args:
        steps: as of :class:`RowTables`; their mode says which groups there are.
        save: whether column sums are wanted.

    Attributes:
        scales, shifts: ``A`` and ``C`` ``[B, O]`` of every layer; None before :meth:`measure`.
        t1, t0: as of :class:`wfnet.gate_tables.StepTables`; empty lists if nothing is saved.
    """

    def __init__(self, steps: Sequence[ConvStep], save: bool):
        self.steps, self.save = steps, save
        self.mode = steps[0].masked.mode
        self.groups = self.mode.groups
        with torch.set_grad_enabled(save):
            self.with_graph = group_gates([step.masked for step in steps])  # [G, total]
        found = self.with_graph.split([step.masked.alpha_hard.shape[1] for step in steps], 1)
        self.gates = [_wide(step, g) for step, g in zip(steps, found, strict=True)]  # [G, O]
        self.of_gates = [torch.zeros_like(gate) for gate in self.gates]
        numbers = torch.arange(len(self.mode.labels), device=self.groups.device)
        self.member = (self.groups[:, None] == numbers).to(self.gates[0].dtype)
        self.sizes = self.member.sum(0)  # [G]; member: [B, G]
        self.share = (self.member / self.sizes).T  # [G, B]
        self.scales: list[Tensor | None] = [None] * len(steps)
        self.shifts: list[Tensor | None] = [None] * len(steps)
        self.moments: list[tuple[Tensor, Tensor, Tensor, Tensor, int] | None] = [None] * len(steps)
        batch = len(self.groups)
        self.t1 = [g.new_zeros((batch, g.shape[1])) for g in self.gates if save]
        self.t0 = [g.new_zeros((batch, g.shape[1])) for g in self.gates if save]

    def fill(self, index: int) -> None:
        """Fills in the tables of a layer that has no norm."""
        gate = self.gates[index]
        self._gather(index, gate, gate * _bias(self.steps[index]))

    def measure(
        self, index: int, moments: tuple[Tensor, Tensor], pixels: int, source: Tensor | None
    ) -> None:
        """Takes the moments of a layer's product, and fills in its tables.

        Args:
            moments: mean and variance ``[N, O]`` over the ``pixels`` of an image, without bias.
            source: ``[B]``: sample b is image ``source[b]``; None: N is B.
        """
        step, gate = self.steps[index], self.gates[index]
        norm = step.norm
        own = self._of_groups(*moments, source)
        mean, var = self.mode.corrected(norm.layer_name, *own, norm.eps)
        slope = _wide(step, norm.weight) * torch.rsqrt(var + norm.eps)
        scale = gate * slope
        shift = gate * _wide(step, norm.bias) - mean * scale
        self.moments[index] = *own, mean, var, pixels
        if self.mode.moments is not None:
            self.mode.moments(norm.layer_name, mean + _bias(step), var)
        self._gather(index, scale, shift)

    def _gather(self, index: int, scale: Tensor, shift: Tensor) -> None:
        """Rows of samples from those of groups."""
        self.scales[index] = scale.index_select(0, self.groups)
        self.shifts[index] = shift.index_select(0, self.groups)

    def _of_groups(
        self, mean_b: Tensor, var_b: Tensor, source: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Mean and variance ``[G, O]`` over the samples of a group, merged from theirs."""
        mean_b, var_b = mean_b.to(self.member.dtype), var_b.to(self.member.dtype)
        if source is not None:
            var_b, mean_b = var_b.index_select(0, source), mean_b.index_select(0, source)
        mean = self.share @ mean_b
        apart = mean_b - mean.index_select(0, self.groups)
        return mean, self.share @ torch.addcmul(var_b, apart, apart)

    def backward(self, index: int) -> tuple[Tensor | None, Tensor | None]:
        """Reads the column sums of a layer: what its gates want, and ``on_u`` and ``constant``.

        Returns:
            ``[B, O]`` each; None for a layer whose tables do not depend on its product.
        """
        p, s = self.member.T @ self.t1[index], self.member.T @ self.t0[index]  # [G, O]
        gate, step = self.gates[index], self.steps[index]
        norm = step.norm
        if norm is None:
            shift = gate * _bias(step)
            self._write_gates(index, p + shift * s)
            return None, None
        own_mean, own_var, mean, var, pixels = self.moments[index]
        inverse = torch.rsqrt(var + norm.eps)
        scale = gate * _wide(step, norm.weight) * inverse
        centred = p - mean * scale * s
        self._write_gates(index, centred + gate * _wide(step, norm.bias) * s)
        count = (self.sizes * pixels).unsqueeze(1)
        on_u = -centred * torch.rsqrt(own_var + norm.eps).square() / count
        constant = -scale * s / count - on_u * own_mean
        return on_u.index_select(0, self.groups), constant.index_select(0, self.groups)

    def _write_gates(self, index: int, by_log: Tensor) -> None:
        """The gradient by the gates; a gate of 0 passes none on to its filters."""
        gate = self.gates[index]
        self.of_gates[index] = torch.where(gate == 0, 0.0, by_log / gate)

    def gradients(self, into: Tensor | None = None) -> list[Tensor]:
        """As :meth:`RowTables.gradients`."""
        filters = _filters_of(self.steps)
        learned = [f for f in dict.fromkeys(filters) if f.requires_grad]
        by_gates = torch.cat(self.of_gates, 1).to(self.with_graph.dtype)
        found = torch.autograd.grad(self.with_graph, learned, by_gates, allow_unused=True)
        of_filter = dict(zip(learned, found, strict=True))
        # That of a layer in two steps is the sum already.
        return in_columns([of_filter.pop(matrix, None) for matrix in filters], filters, into)


class DurableNetwork(PlanNetwork):
    """Executes a plan whose convolutions have durable gates behind them."""

    @property
    def grouped(self) -> bool:
        """Whether moments are those of groups."""
        return self.convs[0].masked.mode.groups is not None

    def start(self, images: Tensor, rows: Tensor, source: Tensor | None, save: bool = True) -> Run:
        return (GroupRun if self.grouped else PlanRun)(self, images, rows, source, save)

    def tables(self, rows: Tensor, save: bool) -> RowTables | GroupTables:
        if self.grouped:
            return GroupTables(self.convs, save)
        return RowTables(self.convs, rows, save)

    def first_products(self, images: Tensor) -> dict[ConvStep, Product]:
        """What convolutions that read the images themselves make of ``images [N, C, H, W]``."""
        dtype, image = run_dtype(images), self.plan.image
        first = [step for step in self.convs if step.input is image and step.norm is not None]
        about = ((step, self.weight(step.layer, dtype), step.geometry) for step in first)
        return {s: self.backend.product_moments(images.to(dtype), *how) for s, *how in about}


# Of a convolution: u [N, O, P, Q], mean and variance [N, O].
Product = tuple[Tensor, Tensor, Tensor]


@dataclass
class KeptProducts:
    """What the first convolutions make of every image of a run: it is the same in every step.

    Attributes:
        network: which computed it.
        found: of all images, by convolution.
    """

    network: DurableNetwork
    found: dict[ConvStep, Product]


class GroupRun(PlanRun):
    """A run whose tables come from the moments of groups of samples, layer by layer."""

    network: DurableNetwork
    known: dict[ConvStep, Product] | None = None
    positions: Tensor | None = None  # of the samples' images among those that these are of

    def take(self, kept: KeptProducts, positions: Tensor) -> None:
        """Goes on from products that are known; ``positions [B]`` of the samples' images."""
        self.known, self.positions = kept.found, positions

    def _source_of(self, step: ConvStep) -> Tensor | None:
        return self.positions if step in (self.known or ()) else super()._source_of(step)

    def _convolve(self, step: ConvStep) -> None:
        x = self._cast(self.values[step.input])
        weight = self.network.weight(step.layer, self.dtype)
        product = x, weight, step.geometry
        if step.norm is None:
            u = self.backend.product(*product)
            self.tables.fill(step.index)
        else:
            kept = (self.known or {}).get(step)
            u, *moments = kept or self.backend.product_moments(*product)
            self.tables.measure(step.index, moments, u.shape[2:].numel(), self._source_of(step))
        self._keep(step, x, self.backend.epilogue(u, self._epilogue(step)))

    def _layer_below(self, step: ConvStep | None, skip: Tensor | None = None) -> LayerBelow:
        """The layer with its column sums alone: its gradient is scaled once these are known."""
        if step is None:
            return super()._layer_below(step, skip)
        shortcut = step.shortcut
        on_product = not step.at_source or (shortcut is not None and not shortcut.at_source)
        below = super()._layer_below(step, skip)
        need_grad = below.need_grad or on_product
        return replace(below, need_grad=need_grad, need_scaled_grad=False, unscaled=True)

    def _take(self, step: ConvStep, found: LayerGradient, own: bool) -> None:
        g = found.grad
        mine = [done for done in (step, step.shortcut) if done is not None]
        if step.shortcut is None and step.residual_learns:
            self._add(step.residual, g, own=False)
            own = False
        for number, done in enumerate(mine):
            on_u, constant = self.tables.backward(done.index)
            if done.at_source:
                self.scaled[done] = None
            else:
                last = own and number == len(mine) - 1
                scale = self.tables.scales[done.index]
                branch = self.kept[done].branch
                self.scaled[done] = self.backend.moments_backward(
                    g, scale, branch, on_u, constant, may_overwrite=last
                )
            self.kept[done].branch = self.kept[done].mask = None
