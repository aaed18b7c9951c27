"""Running a plan: forward with the branches kept, backward as a chain of input gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_leaves

from wfnet import gates
from wfnet.backends.contract import (
    Activation,
    Backend,
    Epilogue,
    LayerBelow,
    LayerGradient,
    PoolGeometry,
)
from wfnet.fusion.plan import EXPANDED, SOURCE, CallStep, ConvStep, Plan
from wfnet.fusion.run import FusedNetwork, Run
from wfnet.fusion.trace import NotFusable, is_hooked
from wfnet.gate_tables import GatedLayer, StepTables
from wfnet.labels import Selection, forgetting
from wfnet.layers import MaskedLayer


class PlanNetwork(FusedNetwork):
    """Executes a :class:`Plan`; the filters of all its convolutions become tables at once.

    Args:
        plan: from :func:`make_plan`.
        backend: who runs the fused convolutions.
    """

    def __init__(self, plan: Plan, backend: Backend):
        super().__init__()
        self.plan = plan
        self.backend = backend
        # In the order of the network's modules, as `WFNet.filter_parameters`.
        self.convs = sorted(plan.convolutions, key=lambda step: step.index)

    @property
    def layers(self) -> tuple[MaskedLayer, ...]:
        return tuple(self.plan.layers)

    def start(self, images: Tensor, rows: Tensor, source: Tensor | None, save: bool = True) -> Run:
        return PlanRun(self, images, rows, source, save)

    def describe(self) -> str:
        return self.plan.describe()

    def folded_filters(self) -> list[Tensor]:
        """Filter matrices of the folded layers, in the order of the tables' gradients."""
        return [matrix for step in self.convs for matrix in step.masked.named_filters().values()]

    def tables(self, rows: Tensor, save: bool) -> StepTables:
        """Tables of one pass over labels ``rows`` ``[B, J]``; ``save``: with column sums."""
        tables = self._tables_over(
            self.folded_filters(),
            (tensor for step in self.convs for tensor in _constants_of(step)),
            lambda: self.backend.gate_tables([_gated(step) for step in self.convs]),
        )
        return tables(rows, save)


def _constants_of(step: ConvStep) -> Iterable[Tensor]:
    norm = step.norm
    tensors = [step.layer.bias]
    if norm is not None:
        tensors += [norm.weight, norm.bias, norm.running_mean, norm.running_var]
    return (t for t in tensors if t is not None)


def _gated(step: ConvStep) -> GatedLayer:
    conv, norm = step.layer, step.norm
    of_norm = {}
    if norm is not None:
        of_norm = {
            "gamma": norm.weight,
            "beta": norm.bias,
            "mean": norm.running_mean,
            "var": norm.running_var,
            "eps": norm.eps,
        }
    return GatedLayer(
        conv.alpha_weight, conv.alpha_bias, conv.bias, gate_scale=conv.gate_scale, **of_norm
    )


@dataclass
class _Kept:
    """What a convolution keeps from forward to backward."""

    branch: Tensor
    mask: Tensor | None
    input_shape: tuple[int, ...]


class _Entry(torch.autograd.Function):
    """A value as the input of a recorded call, differentiable without being kept.

    A leaf would be: whoever holds its place in the graph holds the tensor.
    """

    @staticmethod
    def forward(ctx, ticket: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[None, None]:
        return None, None  # only the gradient of its output is ever asked for


@dataclass
class _Recorded:
    """What a recorded call keeps: places in autograd's graph, neither its inputs nor its result.

    What its backward needs is kept by the graph.
    """

    inputs: dict[fx.Node, GradientEdge]
    filters: list[Tensor]  # of masked layers inside
    result: GradientEdge
    dtype: torch.dtype


@dataclass
class _Part:
    """A view of some elements of a value: its gradient is added into that of the whole."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass
class _Pooled:
    """What a maximum pooling keeps from forward to backward."""

    positions: Tensor
    like: Tensor  # its input, without memory
    window: PoolGeometry


def max_pool_window(step: CallStep) -> PoolGeometry | None:
    """Of a step that is a maximum pooling; None for any other step."""
    pool = step.call
    if type(pool) is not nn.MaxPool2d or pool.return_indices or is_hooked(pool):
        return None
    sizes = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    # One number serves both axes, be it in a tuple or not.
    pairs = ((size, size) if isinstance(size, int) else (size[0], size[-1]) for size in sizes)
    return PoolGeometry(*pairs, pool.ceil_mode)


class TableRun(Run):
    """A run of a plan: tables before, filter gradients from their column sums after.

    Attributes:
        tables: of the batch, with room for the column sums that :meth:`propagate` writes.
    """

    network: PlanNetwork

    def __init__(self, network: PlanNetwork, *batch: object):
        super().__init__(network, *batch)
        self.backend = network.backend
        self.tables: StepTables = self._make_tables()
        self.of_calls: dict[Tensor, Tensor] = {}  # gradients of filters that are not in the tables

    def _make_tables(self) -> StepTables:
        return self.network.tables(self.rows, self.save)

    def gradients(self, into: Tensor | None) -> list[Tensor]:
        """Of the tables; of calls too, where layers run by themselves; summed for one run twice."""
        network = self.network
        folded = network.folded_filters()
        if len(folded) == len(network.filters()) and not self.of_calls:
            return self.tables.gradients(into)
        for matrix, gradient in zip(folded, self.tables.gradients(), strict=True):
            self._add_filter(matrix, gradient)
        gradients = [
            self.of_calls[matrix] if matrix in self.of_calls else torch.zeros_like(matrix)
            for matrix in network.filters()
        ]
        self.of_calls.clear()
        if into is None:
            return gradients
        torch.cat(gradients, 1, out=into)
        return list(into.split([gradient.shape[1] for gradient in gradients], 1))

    def _add_filter(self, matrix: Tensor, gradient: Tensor) -> None:
        known = self.of_calls.get(matrix)
        self.of_calls[matrix] = gradient if known is None else known + gradient


class PlanRun(TableRun):
    """Runs the steps of a plan one by one, through the methods of a backend."""

    def __init__(self, network: PlanNetwork, *batch: object):
        super().__init__(network, *batch)
        self.values: dict[fx.Node, object] = {}
        self.kept: dict[ConvStep | CallStep, object] = {}
        self.ticket = torch.zeros((), requires_grad=True) if self.save else None

    # -- forward ----------------------------------------------------------------------------------

    def forward(self) -> Tensor:
        plan = self.network.plan
        self.values[plan.image] = self.images
        for step, dead in zip(plan.steps, plan.dead_after, strict=True):
            if isinstance(step, ConvStep):
                self._convolve(step)
            else:
                self._call(step)
            for node in dead:
                self.values.pop(node, None)
        result = self._expanded(plan.result)
        self.values.clear()
        return result

    def _expanded(self, node: fx.Node) -> object:
        """The value of ``node`` with one row per sample."""
        value = self.values[node]
        level = self.network.plan.level[node]
        if self.source is None or level != SOURCE or not isinstance(value, Tensor):
            return value
        return gates.gather_samples(value, self.source)

    def _cast(self, tensor: Tensor | None) -> Tensor | None:
        """``tensor`` in the dtype of the run."""
        if tensor is None or tensor.dtype == self.dtype:
            return tensor
        return tensor.to(self.dtype)

    def _convolve(self, step: ConvStep) -> None:
        x = self.values[step.input]
        residual = None if step.residual is None else self._expanded(step.residual)
        epilogue = Epilogue(
            scale=self.tables.scales[step.index],
            shift=self.tables.shifts[step.index],
            residual=self._cast(residual),
            relu=step.relu,
            source=self.source if step.at_source else None,
            save=self.save,
        )
        weight = self.network.weight(step.layer, self.dtype)
        self._keep(step, x, self.backend.conv2d(self._cast(x), weight, step.geometry, epilogue))

    def _keep(self, step: ConvStep, x: Tensor, found: Activation) -> None:
        self.values[step.output] = found.out
        if self.save:
            self.kept[step] = _Kept(found.branch, found.mask, tuple(x.shape))

    def _call(self, step: CallStep) -> None:
        plan = self.network.plan
        expanded = step.level == EXPANDED
        record = self.save and expanded
        window = max_pool_window(step) if expanded else None
        if window is not None:
            self._pool(step, window)
            return
        if record and step.part:
            whole = self.values[step.reads[0]]
            if isinstance(whole, Tensor):
                self.values[step.output] = self._run(step, self.values.__getitem__)
                strides = torch.empty_like(whole, device="meta").stride()
                self.kept[step] = _Part(tuple(whole.shape), strides)
                return
        inputs: dict[fx.Node, Tensor] = {}

        def value_of(node: fx.Node) -> object:
            value = self._expanded(node) if expanded else self.values[node]
            if not isinstance(value, Tensor):
                return value
            if record and plan.level[node] == EXPANDED and value.is_floating_point():
                if node not in inputs:
                    inputs[node] = _Entry.apply(self.ticket, value)
                value = inputs[node]
            return value.clone() if step.in_place else value

        with torch.set_grad_enabled(record):
            result = self._run(step, value_of)
        if isinstance(result, Tensor):
            if record and result.requires_grad:
                self.kept[step] = _Recorded(
                    {node: get_gradient_edge(value) for node, value in inputs.items()},
                    [
                        matrix
                        for layer in step.layers
                        for matrix in layer.named_filters().values()
                        if matrix.requires_grad
                    ],
                    get_gradient_edge(result),
                    result.dtype,
                )
                result = result.detach()
        elif any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            raise NotFusable(f"{step.output.name!r} returns several tensors")
        self.values[step.output] = result

    def _run(self, step: CallStep, value_of: Callable[[fx.Node], object]) -> object:
        args, kwargs = fx.node.map_arg(step.arguments, value_of)
        if not step.layers:
            return step.call(*args, **kwargs)
        with forgetting(Selection(self.rows)):
            return step.call(*args, **kwargs)

    def _pool(self, step: CallStep, window: PoolGeometry) -> None:
        """A maximum pooling keeps the positions of its maxima, where autograd keeps its input."""
        x = self._expanded(step.reads[0])
        self.values[step.output], positions = self.backend.max_pool2d(x, window, self.save)
        if self.save:
            self.kept[step] = _Pooled(positions, torch.empty_like(x, device="meta"), window)

    # -- backward ---------------------------------------------------------------------------------

    def propagate(self, dout: Tensor) -> None:
        plan = self.network.plan
        self.of_values: dict[fx.Node, Tensor] = {plan.result: dout}
        self.owned: set[fx.Node] = set()  # whose gradient is ours to overwrite
        self.scaled: dict[ConvStep, Tensor | None] = {}  # by layers whose epilogue is behind them
        for step in reversed(plan.steps):
            if isinstance(step, CallStep):
                self._call_backward(step)
            else:
                self._convolve_backward(step)
        self.kept.clear()

    def _add(self, node: fx.Node, gradient: Tensor, own: bool) -> None:
        if node not in self.of_values:
            self.of_values[node] = gradient
            self.owned.update([node] if own else [])
        elif node in self.owned:
            self.of_values[node].add_(gradient)
        else:
            self.of_values[node] = self.of_values[node] + gradient
            self.owned.add(node)

    def _call_backward(self, step: CallStep) -> None:
        kept = self.kept.pop(step, None)
        gradient = self.of_values.pop(step.output, None)
        self.owned.discard(step.output)
        if kept is None or gradient is None:
            return
        if isinstance(kept, _Pooled):
            self._pool_backward(step, kept, gradient)
            return
        if isinstance(kept, _Part):
            self._add_part(step, kept, gradient)
            return
        found = torch.autograd.grad(
            [kept.result],
            [*kept.inputs.values(), *map(get_gradient_edge, kept.filters)],
            [gradient.to(kept.dtype)],
            allow_unused=True,
        )
        for node, of_input in zip(kept.inputs, found, strict=False):
            if of_input is not None:
                self._add(node, of_input, own=False)
        for matrix, of_filter in zip(kept.filters, found[len(kept.inputs) :], strict=True):
            if of_filter is not None:
                self._add_filter(matrix, of_filter)

    def _pool_backward(self, step: CallStep, kept: _Pooled, gradient: Tensor) -> None:
        node = step.reads[0]
        skip = below = None
        layer = step.below if self.backend.pools_with_epilogue else None
        if layer is not None:
            skip, below = self._cast(self.of_values.pop(node, None)), self._layer_below(layer)
            self.owned.discard(node)
            gradient = self._cast(gradient)
        found = self.backend.max_pool2d_backward(
            gradient, kept.positions, kept.like, kept.window, skip, below
        )
        if layer is None:
            self._add(node, found.grad, own=True)
        else:
            self._take(layer, found, True)

    def _add_part(self, step: CallStep, whole: _Part, gradient: Tensor) -> None:
        (node,) = step.reads
        if node not in self.of_values:
            self.of_values[node] = gradient.new_empty_strided(whole.shape, whole.strides).zero_()
        elif node not in self.owned:
            self.of_values[node] = self.of_values[node].clone()
        self.owned.add(node)
        self._run(step, self.of_values.__getitem__).add_(gradient)

    def _convolve_backward(self, step: ConvStep) -> None:
        if step not in self.scaled:  # no link above ran its epilogue
            dout = self.of_values.pop(step.output, None)
            if dout is None:
                self.kept.pop(step)
                return
            own = step.output in self.owned
            self.owned.discard(step.output)
            below = self._layer_below(step)
            found = self.backend.epilogue_backward(self._cast(dout), below, may_overwrite=own)
            self._take(step, found, own or found.grad is not dout)
            del dout, below, found
        scaled = self.scaled.pop(step)
        kept = self.kept.pop(step)
        if step.at_source:
            return
        skip = self.of_values.pop(step.input, None)
        self.owned.discard(step.input)
        found = self.backend.conv2d_dgrad(
            scaled,
            self.network.weight(step.layer, self.dtype),
            kept.input_shape,
            step.geometry,
            self._cast(skip),
            None if step.below is None else self._layer_below(step.below),
        )
        if step.below is None:
            self._add(step.input, found.grad, own=True)
        else:
            self._take(step.below, found, True)

    def _layer_below(self, step: ConvStep) -> LayerBelow:
        kept, tables = self.kept[step], self.tables
        return LayerBelow(
            branch=kept.branch,
            mask=kept.mask,
            scale=tables.scales[step.index],
            shift=tables.shifts[step.index],
            relu=step.relu,
            t1=tables.t1[step.index],
            t0=tables.t0[step.index],
            source=self.source if step.at_source else None,
            need_grad=step.residual_learns and step.shortcut is None,
            need_scaled_grad=not step.at_source,
            shortcut=None if step.shortcut is None else self._layer_below(step.shortcut),
        )

    def _take(self, step: ConvStep, found: LayerGradient, own: bool) -> None:
        """Takes the results of a layer's elementwise backward; ``own``: they are ours to change."""
        self.scaled[step] = found.scaled_grad
        if step.shortcut is not None:
            self.scaled[step.shortcut] = found.shortcut
        elif step.residual_learns:
            self._add(step.residual, found.grad, own and step.relu)
        for done in (step, step.shortcut):
            if done is not None:  # only its input shape is still of use
                self.kept[done].branch = self.kept[done].mask = None
