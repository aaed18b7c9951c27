"""Masked layers of recipe ``durable``: gates behind a layer, with statistics of their own per row.

A gate in front of BatchNorm that is not exactly 0 is divided out when statistics are estimated
anew. These layers put it behind (design section 7)::

    y[b,o] = g * (gamma * (u - mean_c) / sqrt(var_c + eps) + beta)        c = forget[b]
    g      = h(alpha_hard) * sigmoid(alpha_soft) / sigmoid(soft_init)

``h`` is the hard concrete gate (Louizos et al., "Learning Sparse Neural Networks through L0
Regularization", ICLR 2018): random in untraining, exactly 0 or 1 elsewhere. ``mean_c`` and
``var_c`` are what a network that never knew class c would have measured. Layers without BatchNorm
are multiplied by ``g`` behind their bias.

Soft gates start at 3: they attenuate, and range up to 1.05.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wfnet.backends.eager import sample_moments
from wfnet.gates import distinct_labels
from wfnet.labels import active_selection
from wfnet.layers import MaskedLayer, Registry, register_maskable, registered

SOFT_INIT = 3.0
# Shape of the hard concrete distribution: stretched to (LOW, HIGH), then clipped to [0, 1].
LOW, HIGH, TEMPERATURE = -0.1, 1.1, 0.66
# Of the shifts of means under several rows that were not measured (docs/durable.md, "Several
# classes at once").
SHARED_SHIFT = 0.2
_STATISTICS = ("row_mean", "row_var", "row_pair_mean", "row_pair_place")

DURABLE: Registry = {}


@dataclass
class GateMode:
    """How the durable layers of one network compute; shared by all of them.

    Attributes:
        groups: positions of the samples' rows among ``labels``, ``[B]`` int64: moments are taken
            over the samples of a group. None: the tables of the rows.
        labels: ``[G]`` int64, the row of each group; ``[G, J]`` for several, padded with -1.
        noise: ``[G, O]`` uniform in (0, 1) by the name of a layer, or ``[G, J, O]``; None: gates
            without noise.
        soft: whether soft gates take part.
        moments: called with a layer's name and the moments ``[G, O]`` of its groups, if given.
        from_base: by the name of a layer, shift of mean and factor of variance ``[O]`` that make
            moments of the images of a run those of the images that the base was trained on.
    """

    groups: Tensor | None = None
    labels: Tensor | None = None
    noise: dict[str, Tensor] | None = None
    soft: bool = True
    moments: Callable[[str, Tensor, Tensor], None] | None = None
    from_base: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def corrected(self, name: str, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Moments ``[G, O]`` by which layer ``name`` normalises groups that have these."""
        if name not in self.from_base:
            return mean, var
        shift, factor = self.from_base[name]
        return mean + shift, (var + eps) * factor - eps

    @contextmanager
    def grouped(
        self,
        rows: Tensor | None,
        noise: dict[str, Tensor] | None = None,
        soft: bool = True,
        moments: Callable[[str, Tensor, Tensor], None] | None = None,
    ) -> Iterator[Tensor | None]:
        """Moments of the samples that share a row, inside; yields the rows of the groups, sorted.

        Args:
            rows: ``[B]`` int64, the row of every sample, none of them -1; or ``[B, J]``, several,
                padded with -1; None: the tables of the rows, as outside of untraining.
            noise, soft, moments: see the attributes.
        """
        labels = groups = None
        if rows is not None:
            labels, groups = rows.unique(return_inverse=True, dim=0)
        before = dict(vars(self))
        vars(self).update(vars(GateMode(groups, labels, noise, soft, moments, self.from_base)))
        try:
            yield labels
        finally:
            vars(self).update(before)


def hard_gate(alpha: Tensor, uniform: Tensor | None = None) -> Tensor:
    """Hard concrete gate: ``clamp(1.2 * sigmoid((alpha + logit(u)) / 0.66) - 0.1, 0, 1)``.

    Args:
        alpha: any shape.
        uniform: u in (0, 1), the same shape; None: ``1[alpha > 0]``, without gradient.
    """
    if uniform is None:
        return (alpha > 0).to(alpha.dtype)
    noisy = torch.sigmoid((alpha + torch.logit(uniform)) / TEMPERATURE)
    return (noisy * (HIGH - LOW) + LOW).clamp(0, 1)


def soft_gate(alpha: Tensor, start: float = SOFT_INIT) -> Tensor:
    """``sigmoid(alpha) / sigmoid(start)``: exactly 1 at the start."""
    least = torch.sigmoid(torch.full((), start, dtype=alpha.dtype, device=alpha.device))
    return torch.sigmoid(alpha) / least


def durable_type(layer: nn.Module) -> type[DurableLayer] | None:
    """The durable class for exactly the type of ``layer``; None if there is none."""
    return registered(type(layer), DURABLE)


class DurableLayer(MaskedLayer):
    """What durable layers share: two filter matrices, and gates behind the layer.

    Attributes:
        alpha_hard: ``[num_classes, O]``, which channels are closed.
        alpha_soft: ``[num_classes, O]``, how far the open ones are attenuated.
        soft_init: first value of ``alpha_soft``.
        mode: see :class:`GateMode`; of the network that the layer belongs to.
    """

    soft_init: float
    mode: GateMode

    def _add_filters(self, *options: object, soft_init: float = SOFT_INIT, **more) -> None:
        self.soft_init = float(soft_init)
        self.mode = GateMode()
        super()._add_filters(*options, **more)

    def _check_start(self, filter_dtype: torch.dtype) -> None:
        self.normalize_gate = True
        if self.alpha_init <= 0:
            raise ValueError(
                f"alpha_init={self.alpha_init} must be above 0 for durable gates: a fresh gate is "
                "open"
            )

    def filter_starts(self) -> dict[str, float]:
        return {"alpha_hard": self.alpha_init, "alpha_soft": self.soft_init}

    def named_statistics(self) -> dict[str, Tensor]:
        """Tables ``[num_classes, O]`` that are measured, not learned, by name."""
        return {}

    def gates(self, kind: str = "weight") -> Tensor:
        """Gates ``[num_classes, O]`` as they are outside untraining."""
        return hard_gate(self.alpha_hard) * soft_gate(self.alpha_soft, self.soft_init)

    def close_below(self, threshold: float, forget: Sequence[int]) -> None:
        self._close(self.alpha_hard, "weight", threshold, forget)

    def _gate_of(self, kind: str, labels: Tensor) -> Tensor:
        return self.row_gates(labels)[0]

    def group_gates(self) -> Tensor:
        """Gates ``[G, O]`` of the groups, with the noise and the parts that the mode says."""
        return group_gates([self])

    def row_gates(self, rows: Tensor) -> Tensor:
        """``[B, O]``: the product of the gates of ``rows [B, J]``."""
        return _rows_of(self.gates(), rows, 1.0).prod(1)


def group_gates(layers: Sequence[DurableLayer]) -> Tensor:
    """:meth:`DurableLayer.group_gates` of layers of one network, side by side: ``[G, sum O]``."""
    mode = layers[0].mode
    labels, noise = mode.labels, mode.noise

    def of_labels(tables: list[Tensor]) -> Tensor:
        found = torch.cat(tables, 1).index_select(0, labels.clamp_min(0).flatten())
        return found.unflatten(0, labels.shape)

    uniform = None
    if noise is not None:
        uniform = torch.cat([noise[layer.layer_name] for layer in layers], -1)
    gate = hard_gate(of_labels([layer.alpha_hard for layer in layers]), uniform)
    if mode.soft:
        (start,) = {layer.soft_init for layer in layers}
        gate = gate * soft_gate(of_labels([layer.alpha_soft for layer in layers]), start)
    if labels.dim() == 1:
        return gate
    return gate.masked_fill(labels.eq(-1).unsqueeze(2), 1.0).prod(1)


def _rows_of(table: Tensor, rows: Tensor, neutral: float | Tensor) -> Tensor:
    """``[B, J, O]`` of ``table [K, O]``: ``neutral`` for -1 and repetitions, NaN out of range."""
    rows = distinct_labels(rows)
    found = table.index_select(0, rows.clamp(0, len(table) - 1).flatten()).unflatten(0, rows.shape)
    found = torch.where((rows == -1).unsqueeze(2), neutral, found)
    return found.masked_fill(((rows < -1) | (rows >= len(table))).unsqueeze(2), torch.nan)


class _GatedOutput(DurableLayer):
    """A layer without statistics whose output is multiplied by its gates, bias included."""

    _channel_dim: int

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        selection = active_selection(self._title())
        if selection.rows is None:
            return y
        if self.mode.groups is not None:
            gate = self.group_gates().index_select(0, self.mode.groups)
        else:
            count = y.shape[0] if selection.uniform else selection.rows.shape[0]
            gate = self.row_gates(selection.expand(count, y.device, self.num_classes))
        if y.shape[0] != gate.shape[0]:  # windows of an image lie side by side
            if y.shape[0] % max(gate.shape[0], 1):
                raise ValueError(
                    f"{gate.shape[0]} forget labels were given for a batch of {y.shape[0]} samples"
                )
            gate = gate.repeat_interleave(y.shape[0] // gate.shape[0], 0)
        shape = [gate.shape[0]] + [1] * (y.dim() - 1)
        shape[self._channel_dim] = gate.shape[1]
        return y * gate.to(y.dtype).reshape(shape)


@register_maskable(nn.Linear, DURABLE)
class DurableLinear(_GatedOutput, nn.Linear):
    """``nn.Linear`` with durable gates behind its bias."""

    _base_type = nn.Linear
    _channel_dim = -1


@register_maskable(nn.Conv2d, DURABLE)
class DurableConv2d(_GatedOutput, nn.Conv2d):
    """``nn.Conv2d`` without a BatchNorm behind it, with durable gates behind its bias."""

    _base_type = nn.Conv2d
    _channel_dim = 1


@register_maskable(nn.BatchNorm2d, DURABLE)
class DurableBatchNorm2d(DurableLayer, nn.BatchNorm2d):
    """``nn.BatchNorm2d`` with durable gates behind it, and a mean and a variance for every row.

    Attributes:
        row_mean, row_var: ``[num_classes, O]``, statistics under each row; at the start those of
            the base, so that a fresh row is the original layer, bit by bit.
        row_pair_mean: ``[R * (R - 1) / 2, O]``, means under every two of R rows, in the order of
            :meth:`pair_index`; None where they were not measured.
        row_pair_place: ``[num_classes]`` int64, the place of each row among these R, -1 for none;
            None: R is num_classes.
    """

    _base_type = nn.BatchNorm2d

    def _add_filters(self, num_classes: int, *options: object, **more: object) -> None:
        if not self.track_running_stats or self.running_mean is None or not self.affine:
            raise ValueError(
                "it has no running statistics or no scale, which durable filters replace per row"
            )
        super()._add_filters(num_classes, *options, **more)
        self.register_buffer("row_mean", self.running_mean.repeat(num_classes, 1))
        self.register_buffer("row_var", self.running_var.repeat(num_classes, 1))
        self.register_buffer("row_pair_mean", None)
        self.register_buffer("row_pair_place", None)

    def named_statistics(self) -> dict[str, Tensor]:
        tables = {name: getattr(self, name) for name in _STATISTICS}
        return {name: table for name, table in tables.items() if table is not None}

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *more: object) -> None:
        self.row_pair_mean = self.row_pair_place = None
        if f"{prefix}row_pair_mean" in state:
            self.start_pairs(state.get(f"{prefix}row_pair_place"))
        super()._load_from_state_dict(state, prefix, *more)

    def start_pairs(self, place: Tensor | None = None) -> None:
        """Gives every two rows that have a ``place`` the mean that they have unmeasured."""
        self.row_pair_mean = self.row_pair_place = None
        rows = torch.arange(self.num_classes, device=self.row_mean.device)
        if place is not None:
            place = place.to(rows)
            rows = rows[place >= 0]
        self.row_pair_mean = self.row_statistics(torch.combinations(rows))[0]
        self.row_pair_place = place

    def pair_index(self, pairs: Tensor) -> Tensor:
        """Places ``[B]`` in :attr:`row_pair_mean` of ``pairs [B, 2]`` of rows; -1 where none is."""
        if self.row_pair_place is not None:
            place = self.row_pair_place[pairs.clamp(0, self.num_classes - 1)]
            pairs = torch.where(pairs < 0, -1, place)
        count = (1 + math.isqrt(1 + 8 * len(self.row_pair_mean))) // 2
        first, second = pairs.amin(1), pairs.amax(1)
        index = first * (2 * count - first - 1) // 2 + second - first - 1
        return index.masked_fill(first < 0, -1)

    def row_statistics(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance ``[B, O]`` under ``rows [B, J]``.

        Several rows: ratios of variances are multiplied. Shifts of means of all pairs are added,
        less those of the rows that are counted more than once; where pairs were not measured,
        shifts of rows are added, less what both change: :data:`SHARED_SHIFT`. An untouched row
        changes nothing, alone or with others.
        """
        mean, var = self.running_mean, self.running_var + self.eps
        moves = _rows_of(self.row_mean - mean, rows, 0.0)  # [B, J, O]
        moved = moves.sum(1)
        if rows.shape[1] > 1:
            count = moves.ne(0).any(2).sum(1, keepdim=True)
            if self.row_pair_mean is None:
                together = (1 - SHARED_SHIFT) * moved
            else:
                together = self._moved_by_pairs(rows) - (count - 2) * moved
            moved = torch.where(count > 1, together, moved)
        ratio = _rows_of((self.row_var + self.eps) / var, rows, 1.0).prod(1)
        return mean + moved, var * ratio - self.eps

    def _moved_by_pairs(self, rows: Tensor) -> Tensor:
        """``[B, O]``: the shifts of means under every two of ``rows [B, J]``, added."""
        columns = torch.combinations(torch.arange(rows.shape[1], device=rows.device))
        pairs = distinct_labels(rows)[:, columns].flatten(0, 1)  # [B * P, 2]
        index = self.pair_index(pairs)
        known = index.clamp(0, len(self.row_pair_mean) - 1)
        moved = self.row_pair_mean.index_select(0, known) - self.running_mean
        moved = moved.masked_fill(index.eq(-1).unsqueeze(1), 0.0)
        return moved.unflatten(0, (len(rows), -1)).sum(1)

    def tables(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift ``[B, O]`` of the plain layer's output under ``rows [B, J]``.

        Of an untouched row they are exactly 1 and 0.
        """
        gate = self.row_gates(rows)
        mean, var = self.row_statistics(rows)
        ratio = torch.sqrt((self.running_var + self.eps) / (var + self.eps))
        slope = self.weight * torch.rsqrt(var + self.eps)
        scale = gate * ratio
        shift = gate * (self.bias + slope * (self.running_mean - mean)) - scale * self.bias
        return scale, shift

    def forward(self, x: Tensor) -> Tensor:
        return self._behind(self._normalised(x))

    def _behind(self, y: Tensor) -> Tensor:
        """What the base type computes behind its normalisation."""
        return y

    def _normalised(self, x: Tensor) -> Tensor:
        selection = active_selection(self._title())
        if selection.rows is not None and self.mode.groups is not None:
            gate = self.group_gates()
            correct = partial(self.mode.corrected, self.layer_name)
            y, mean, var = _GroupNorm.apply(
                x, gate, self.weight, self.bias, self.mode.groups, self.eps, correct
            )
            if self.mode.moments is not None:
                self.mode.moments(self.layer_name, mean, var)
            return y
        y = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )
        if selection.rows is None:
            return y
        scale, shift = self.tables(selection.expand(y.shape[0], y.device, self.num_classes))
        return torch.addcmul(_wide(shift, y), y, _wide(scale, y))

    def bake(self, forget: Sequence[int], prune_below: float = 0.0) -> nn.Module:
        """The plain layer of one row: its statistics, and its gates in weight and bias.

        A closed channel gets mean 0 and variance 1, so that nothing of its input is left in it.
        """
        plain = super().bake(forget, prune_below)
        for name in _STATISTICS:
            del plain._buffers[name]
        if forget:
            rows = self._label_list(forget)
            mean, var = (t[0] for t in self.row_statistics(rows))
            closed = plain.weight.eq(0) & plain.bias.eq(0)
            plain.running_mean.copy_(mean.masked_fill(closed, 0.0))
            plain.running_var.copy_(var.masked_fill(closed, 1.0))
        return plain


@register_maskable("timm.layers.norm_act.BatchNormAct2d", DURABLE)
class DurableBatchNormAct2d(DurableBatchNorm2d):
    """timm's ``BatchNormAct2d``: BatchNorm, dropout and activation in one module."""

    def _behind(self, y: Tensor) -> Tensor:
        return self.act(self.drop(y))


def _wide(table: Tensor, like: Tensor) -> Tensor:
    return table.to(like.dtype)[:, :, None, None]


class _GroupNorm(torch.autograd.Function):
    """Normalises by the corrected moments of groups of samples, and gates: two passes each way.

    ``y = A[k] * x + C[k]`` with ``A = gate * gamma / sqrt(var + eps)``, ``C = gate * beta - mean *
    A`` for the group ``k`` of a sample; the gradient runs through the moments too. Returns the
    moments ``[G, O]`` as well, without gradient.
    """

    @staticmethod
    def forward(ctx, x, gate, gamma, beta, groups, eps, correct):
        wide = torch.promote_types(x.dtype, torch.float32)
        mean_b, var_b = sample_moments(x)  # [B, O]
        share = F.one_hot(groups, len(gate)).to(wide)  # [B, G]
        share = share / share.sum(0)
        mean = share.T @ mean_b  # [G, O]
        var = share.T @ (var_b + (mean_b - mean[groups]).square())
        own = mean, var
        mean, var = correct(*own, eps)
        slope = gamma * torch.rsqrt(var + eps)
        scale = gate * slope
        shift = gate * beta - mean * scale
        ctx.save_for_backward(x, gate, gamma, beta, groups, mean, var, *own)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var)
        return torch.addcmul(_wide(shift[groups], x), x, _wide(scale[groups], x)), mean, var

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, *_):
        x, gate, gamma, beta, groups, mean, var, own_mean, own_var = ctx.saved_tensors
        wide = mean.dtype
        inverse = torch.rsqrt(var + ctx.eps)
        scale = gate * gamma * inverse
        member = F.one_hot(groups, len(gate)).to(wide)  # [B, G]
        sum_b = dy.sum((2, 3), dtype=wide)  # [B, O]
        dot_b = (dy * x).sum((2, 3), dtype=wide)
        sum_g, dot_g = member.T @ sum_b, member.T @ dot_b  # [G, O]
        dscale = dot_g - mean * sum_g
        dgate = dscale * gamma * inverse + sum_g * beta
        count = member.sum(0).unsqueeze(1) * x[0, 0].numel()
        # By the variance of the samples: a correction multiplies it, scale / variance stays.
        dvar = -0.5 * dscale * scale * torch.rsqrt(own_var + ctx.eps).square()
        if not ctx.needs_input_grad[0]:
            return None, dgate, None, None, None, None, None
        on_x = 2 * dvar / count
        constant = (-scale * sum_g) / count - on_x * own_mean
        dx = torch.addcmul(_wide(constant[groups], x), x, _wide(on_x[groups], x))
        dx = torch.addcmul(dx, dy, _wide(scale[groups], x))
        return dx, dgate, None, None, None, None, None
