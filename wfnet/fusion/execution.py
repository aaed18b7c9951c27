"""Running a plan: forward with the branches kept, backward as a chain of input gradients."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from wfnet import gates
from wfnet.backends.contract import (
    NO_LAYER,
    Activation,
    Backend,
    Epilogue,
    LayerBelow,
    LayerGradient,
    PoolGeometry,
)
from wfnet.fusion.plan import EXPANDED, SOURCE, CallStep, ConvStep, Plan
from wfnet.fusion.run import FusedNetwork, Run
from wfnet.fusion.trace import is_hooked
from wfnet.labels import Selection, forgetting


class PlanNetwork(FusedNetwork):
    """Executes a :class:`Plan`; the filters of all its convolutions become tables at once.

    Args:
        plan: from :func:`make_plan`.
        backend: who runs the fused convolutions.
    """

    def __init__(self, plan: Plan, backend: Backend):
        self.plan = plan
        # In the order of the network's modules, as `WFNet.filter_parameters`.
        self.convs = sorted(plan.convolutions, key=lambda step: step.index)
        super().__init__(plan.layers, [(step.layer, step.norm) for step in self.convs], backend)

    def start(self, images: Tensor, rows: Tensor, source: Tensor | None, save: bool = True) -> Run:
        return PlanRun(self, images, rows, source, save)

    def describe(self) -> str:
        return self.plan.describe()


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


# A tensor of a value: a node, and which one of the tensors that it returns.
_Place = tuple[fx.Node, int]


@dataclass
class _Recorded:
    """What a recorded call keeps: places in autograd's graph, neither its inputs nor its results.

    What its backward needs is kept by the graph.
    """

    inputs: dict[_Place, GradientEdge]
    filters: list[Tensor]  # of masked layers inside
    results: dict[_Place, tuple[GradientEdge, torch.dtype]]


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


class PlanRun(Run):
    """Runs the steps of a plan one by one, through the methods of a backend."""

    network: PlanNetwork

    def __init__(self, network: PlanNetwork, *batch: object):
        super().__init__(network, *batch)
        self.backend = network.backend
        self.values: dict[fx.Node, object] = {}
        self.kept: dict[ConvStep | CallStep, object] = {}
        self.ticket = torch.zeros((), requires_grad=True) if self.save else None
        # Gradients by place, and whether they are ours to overwrite.
        self.of_values: dict[_Place, tuple[Tensor, bool]] = {}
        self.scaled: dict[ConvStep, Tensor | None] = {}  # by layers whose epilogue is behind them

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
        if self.source is None or self.network.plan.level[node] != SOURCE:
            return value
        return expand(value, self.source)

    def _cast(self, tensor: Tensor | None) -> Tensor | None:
        """``tensor`` in the dtype of the run."""
        return None if tensor is None else tensor.to(self.dtype)

    def _convolve(self, step: ConvStep) -> None:
        x = self._cast(self.values[step.input])
        weight = self.network.weight(step.layer, self.dtype)
        found = self.backend.conv2d(x, weight, step.geometry, self._epilogue(step))
        self._keep(step, x, found)

    def _source_of(self, step: ConvStep) -> Tensor | None:
        """``[B]``: sample b has row ``source[b]`` of the layer's product; None: row b."""
        return self.source if step.at_source else None

    def _epilogue(self, step: ConvStep) -> Epilogue:
        residual = None if step.residual is None else self._expanded(step.residual)
        return Epilogue(
            scale=self.tables.scales[step.index],
            shift=self.tables.shifts[step.index],
            residual=self._cast(residual),
            relu=step.relu,
            source=self._source_of(step),
            save=self.save,
        )

    def _keep(self, step: ConvStep, x: Tensor, found: Activation) -> None:
        self.values[step.output] = found.out
        if self.save:
            self.kept[step] = _Kept(found.branch, found.mask, tuple(x.shape))

    def _call(self, step: CallStep) -> None:
        level = self.network.plan.level
        expanded = step.level == EXPANDED
        record = self.save and expanded
        window = max_pool_window(step) if expanded else None
        if window is not None:
            self._pool(step, window)
            return
        inputs: dict[_Place, Tensor] = {}

        def value_of(node: fx.Node) -> object:
            def given(place: int, leaf: object) -> object:
                if not isinstance(leaf, Tensor):
                    return leaf
                if record and level[node] == EXPANDED and leaf.is_floating_point():
                    if (node, place) not in inputs:
                        inputs[node, place] = _Entry.apply(self.ticket, leaf)
                    leaf = inputs[node, place]
                return leaf.clone() if step.in_place else leaf

            leaves, spec = tree_flatten(self._expanded(node) if expanded else self.values[node])
            return tree_unflatten([given(i, leaf) for i, leaf in enumerate(leaves)], spec)

        with torch.set_grad_enabled(record):
            result = self._run(step, value_of)
        if record:
            result = self._record(step, inputs, result)
        self.values[step.output] = result

    def _run(self, step: CallStep, value_of: Callable[[fx.Node], object]) -> object:
        args, kwargs = fx.node.map_arg(step.arguments, value_of)
        if not step.layers:
            return step.call(*args, **kwargs)
        with forgetting(Selection(self.rows)):
            return step.call(*args, **kwargs)

    def _record(self, step: CallStep, inputs: dict[_Place, Tensor], result: object) -> object:
        """Keeps the places of a call in autograd's graph; returns the result without its graph."""
        leaves, spec = tree_flatten(result)
        results: dict[_Place, tuple[GradientEdge, torch.dtype]] = {}
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                results[step.output, i] = get_gradient_edge(leaf), leaf.dtype
                leaves[i] = leaf.detach()
        if results:
            filters = [m for layer in step.layers for m in layer.named_filters().values()]
            self.kept[step] = _Recorded(
                {place: get_gradient_edge(value) for place, value in inputs.items()},
                [matrix for matrix in filters if matrix.requires_grad],
                results,
            )
        return tree_unflatten(leaves, spec)

    def _pool(self, step: CallStep, window: PoolGeometry) -> None:
        """A maximum pooling keeps the positions of its maxima, where autograd keeps its input."""
        x = self._expanded(step.reads[0])
        self.values[step.output], positions = self.backend.max_pool2d(x, window, self.save)
        if self.save:
            self.kept[step] = _Pooled(positions, torch.empty_like(x, device="meta"), window)

    # -- backward ---------------------------------------------------------------------------------

    def propagate(self, dout: Tensor) -> None:
        plan = self.network.plan
        self._add(plan.result, dout, own=False)
        for step in reversed(plan.steps):
            kept = self.kept.get(step)
            if isinstance(kept, _Kept):
                self._convolve_backward(step, kept)
            elif isinstance(kept, _Pooled):
                self._pool_backward(step, kept)
            elif isinstance(kept, _Recorded):
                self._call_backward(kept)
            self.kept.pop(step, None)

    def _add(self, node: fx.Node, gradient: Tensor, own: bool, place: int = 0) -> None:
        known, ours = self._pop(node, place)
        if known is not None:
            gradient, own = known.add_(gradient) if ours else known + gradient, True
        self.of_values[node, place] = gradient, own

    def _pop(self, node: fx.Node, place: int = 0) -> tuple[Tensor | None, bool]:
        """The gradient that has arrived there, and whether it is ours to overwrite."""
        return self.of_values.pop((node, place), (None, False))

    def _call_backward(self, kept: _Recorded) -> None:
        edges, gradients = [], []
        for place, (edge, dtype) in kept.results.items():
            gradient, _ = self._pop(*place)
            if gradient is not None:
                edges.append(edge)
                gradients.append(gradient.to(dtype))
        if not edges:
            return
        wanted = [*kept.inputs.values(), *map(get_gradient_edge, kept.filters)]
        found = torch.autograd.grad(edges, wanted, gradients, allow_unused=True)
        for (node, place), of_input in zip(kept.inputs, found, strict=False):
            if of_input is not None:
                self._add(node, of_input, False, place)
        for matrix, of_filter in zip(kept.filters, found[len(kept.inputs) :], strict=True):
            if of_filter is not None:
                self.add_filter(matrix, of_filter)

    def _pool_backward(self, step: CallStep, kept: _Pooled) -> None:
        gradient, _ = self._pop(step.output)
        if gradient is None:
            return
        (node,) = step.reads
        layer, below = None, NO_LAYER
        if step.below is not None and self.backend.pools_with_epilogue:
            layer, gradient = step.below, self._cast(gradient)
            below = self._layer_below(layer, self._pop(node)[0])
        found = self.backend.max_pool2d_backward(
            gradient, kept.positions, kept.like, kept.window, below
        )
        self._pass_down(node, layer, found)

    def _convolve_backward(self, step: ConvStep, kept: _Kept) -> None:
        if step not in self.scaled:  # no link above ran its epilogue
            dout, own = self._pop(step.output)
            if dout is None:
                return
            below = self._layer_below(step)
            found = self.backend.epilogue_backward(self._cast(dout), below, may_overwrite=own)
            self._take(step, found, own or found.grad is not dout)
            del dout, below, found
        scaled = self.scaled.pop(step)
        if step.at_source:
            return
        skip, _ = self._pop(step.input)
        found = self.backend.conv2d_dgrad(
            scaled,
            self.network.weight(step.layer, self.dtype),
            kept.input_shape,
            step.geometry,
            self._layer_below(step.below, skip),
        )
        self._pass_down(step.input, step.below, found)

    def _pass_down(self, node: fx.Node, layer: ConvStep | None, found: LayerGradient) -> None:
        """Takes a gradient by ``node``, or what lies behind the epilogue of its ``layer``."""
        if layer is None:
            self._add(node, found.grad, own=True)
        else:
            self._take(layer, found, own=True)

    def _layer_below(self, step: ConvStep | None, skip: Tensor | None = None) -> LayerBelow:
        """What ``step``, if any, wants of the gradient that reaches its output."""
        if step is None:
            return replace(NO_LAYER, skip=self._cast(skip))
        kept, tables = self.kept[step], self.tables
        return LayerBelow(
            branch=kept.branch,
            mask=kept.mask,
            scale=tables.scales[step.index],
            shift=tables.shifts[step.index],
            relu=step.relu,
            skip=self._cast(skip),
            t1=tables.t1[step.index],
            t0=tables.t0[step.index],
            source=self._source_of(step),
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


def expand(value: object, source: Tensor | None) -> object:
    """The tensors of ``value``, one row per source image, with one row per sample."""
    return tree_map(
        lambda t: gates.gather_samples(t, source) if isinstance(t, Tensor) else t, value
    )
