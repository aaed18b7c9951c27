"""The fused plan as one graph for ``torch.compile``: for the eager backend, on any device.

Where kernels run the epilogue backward inside of a GEMM, the eager backend makes separate passes
over memory. :func:`graph_of` writes the plan down as one graph of differentiable PyTorch operations
between convolutions, and the compiler fuses what lies between them, forward and backward. Two
things are kept from the plan: what comes before the first mask runs once per source image, and a
convolution's input gradient reads no input, so that only the branches ``u`` need to be kept. The
tables are inputs of the graph: new labels never recompile.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from wfnet import gates
from wfnet.backends.contract import ConvGeometry
from wfnet.backends.eager import conv2d_input_gradient
from wfnet.fusion.execution import PlanNetwork, TableRun, max_pool_window
from wfnet.fusion.plan import EXPANDED, SOURCE, CallStep, ConvStep, Plan
from wfnet.fusion.run import CompiledGraph, Run, write_sums
from wfnet.operators import memory_format_of


class CompiledNetwork(PlanNetwork):
    """A :class:`PlanNetwork` of the eager backend whose plan is compiled, anew for every size.

    Further sizes of a batch run the plan as it is; so does everything if compiling fails.
    """

    def __init__(self, network: PlanNetwork):
        super().__init__(network.plan, network.backend)
        self.graph = CompiledGraph(graph_of(self.plan, self.convs))

    def start(self, images: Tensor, rows: Tensor, source: Tensor | None, save: bool = True) -> Run:
        if self.graph.takes(images, rows.shape[0], source is None, save):
            return CompiledRun(self, images, rows, source, save)
        return super().start(images, rows, source, save)

    def describe(self) -> str:
        return f"{super().describe()}; compiled"


class CompiledRun(TableRun):
    """Tables before and filter gradients after the compiled graphs."""

    network: CompiledNetwork

    def forward(self) -> Tensor:
        network, tables = self.network, self.tables
        weights = [network.weight(step.layer, self.dtype) for step in network.convs]
        with torch.enable_grad():
            self.scales = [scale.detach().requires_grad_(self.save) for scale in tables.scales]
            self.shifts = [
                shift.detach().requires_grad_(self.save and step.layer.bias is not None)
                for shift, step in zip(tables.shifts, network.convs, strict=True)
            ]
            inputs = (self.images, self.source, weights, self.scales, self.shifts)
            logits = network.graph(*inputs)
            if logits is None:  # the graph as it is: the tables are those of this run already
                logits = graph_of(network.plan, network.convs)(*inputs)
        self.logits = logits
        return logits.detach()

    def propagate(self, dout: Tensor) -> None:
        learned = [shift for shift in self.shifts if shift.requires_grad]
        found = list(torch.autograd.grad(self.logits, [*self.scales, *learned], dout))
        of_scales, of_learned = found[: len(self.scales)], iter(found[len(self.scales) :])
        of_shifts = [next(of_learned) if s.requires_grad else None for s in self.shifts]
        del self.logits, self.scales, self.shifts
        write_sums(self.tables, of_scales, of_shifts)


# -- the plan as a graph ---------------------------------------------------------------------------


def graph_of(plan: Plan, convs: list[ConvStep]) -> fx.GraphModule:
    """A module of ``(images, source, weights, scales, shifts)`` that returns logits ``[B, K]``.

    Args:
        plan: what to write down.
        convs: its convolutions, in the order of the three lists that the module takes: frozen
            weights, and tables ``[B, O]`` by which it can be differentiated.
    """
    graph, calls = fx.Graph(), nn.Module()
    images, source, *lists = (
        graph.placeholder(name) for name in ("images", "source", "weights", "scales", "shifts")
    )
    values: dict[fx.Node, fx.Node] = {plan.image: images}
    expanded: dict[fx.Node, fx.Node] = {}

    def per_sample(node: fx.Node) -> fx.Node:
        if plan.level[node] != SOURCE:
            return values[node]
        if node not in expanded:
            expanded[node] = graph.call_function(_per_sample, (values[node], source))
        return expanded[node]

    for step in plan.steps:
        if isinstance(step, ConvStep):
            weight, scale, shift = (
                graph.call_function(_item, (tensors, convs.index(step))) for tensors in lists
            )
            residual = None if step.residual is None else per_sample(step.residual)
            of_samples = source if step.at_source else None
            arguments = (values[step.input], weight, scale, shift, residual, step.relu, of_samples)
            values[step.output] = graph.call_function(
                fused_convolution, (*arguments, *_geometry_of(step))
            )
        else:
            name = f"call_{len(values)}"
            calls.add_module(name, _Call(step))
            read = per_sample if step.level == EXPANDED else values.__getitem__
            args, kwargs = fx.node.map_arg(step.arguments, read)
            window = max_pool_window(step)
            if window is None:
                values[step.output] = graph.call_module(name, args, kwargs)
            else:
                values[step.output] = graph.call_function(max_pool2d, (*args, window))
    graph.output(per_sample(plan.result))
    return fx.GraphModule(calls, graph)


def _item(tensors: list[Tensor], index: int) -> Tensor:
    return tensors[index]


def _per_sample(value: object, source: Tensor | None) -> object:
    return gates.gather_samples(value, source) if isinstance(value, Tensor) else value


def _geometry_of(step: ConvStep) -> tuple:
    geometry = step.geometry
    return geometry.stride, geometry.padding, geometry.dilation, geometry.groups


class _Call(nn.Module):
    """A step that is called as it is, without a name of its own in the network."""

    def __init__(self, step: CallStep):
        super().__init__()
        self.call: Callable[..., object] = step.call
        self.in_place = step.in_place

    def forward(self, *args: object, **kwargs: object) -> object:
        if self.in_place:  # what it overwrites may be the caller's
            args = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)
        return self.call(*args, **kwargs)


def fused_convolution(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    relu: bool,
    source: Tensor | None,
    *geometry: object,
) -> Tensor:
    """``act(scale * conv(x) + shift + residual)`` (:class:`wfnet.backends.contract.Epilogue`)."""
    u = gates.gather_samples(
        _FrozenConvolution.apply(x.to(weight.dtype), weight, *geometry), source
    )
    y = u * scale[:, :, None, None] + shift[:, :, None, None]
    if residual is not None:
        y = y + residual
    if not relu:
        return y.to(weight.dtype)
    return (F.relu(y) if residual is None else _MaskedRelu.apply(y)).to(weight.dtype)


class _MaskedRelu(torch.autograd.Function):
    """ReLU that keeps one byte an element. Compilers write bytes faster than truth values."""

    @staticmethod
    def forward(ctx, y):
        out = F.relu(y)
        ctx.save_for_backward(out.clamp(max=1).ceil().to(torch.uint8))
        return out

    @staticmethod
    def backward(ctx, dout):
        (alive,) = ctx.saved_tensors
        return dout * alive


class _FrozenConvolution(torch.autograd.Function):
    """A convolution whose input gradient keeps no input: the weight is frozen."""

    @staticmethod
    def forward(ctx, x, weight, stride, padding, dilation, groups):
        ctx.save_for_backward(weight)
        channels_last = memory_format_of(x, weight) is torch.channels_last
        ctx.arguments = (list(x.shape), channels_last, stride, padding, dilation, groups)
        return F.conv2d(x, weight, None, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx, du):
        (weight,) = ctx.saved_tensors
        dx = torch.ops.wfnet.conv2d_input_gradient(du, weight, *ctx.arguments)
        return dx, None, None, None, None, None


def max_pool2d(x: Tensor, window: tuple) -> Tensor:
    """``F.max_pool2d``; on a CPU through PyTorch's own kernels, which compiled code is behind."""
    if x.device.type != "cpu":
        return F.max_pool2d(x, *window)
    return _MaxPool.apply(x, *window)


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *window):
        out, positions = torch.ops.wfnet.max_pool2d(x, *window)
        ctx.save_for_backward(positions)
        channels_last = memory_format_of(x, x) is torch.channels_last
        ctx.arguments = (list(x.shape), channels_last, *window)
        return out

    @staticmethod
    def backward(ctx, dout):
        (positions,) = ctx.saved_tensors
        dx = torch.ops.wfnet.max_pool2d_backward(dout, positions, *ctx.arguments)
        return dx, None, None, None, None, None


# -- operators that the compiler leaves alone ------------------------------------------------------

# It would make a real input for PyTorch's input gradient, in a layout of its choice, to which the
# gradient is then converted.
_library = torch.library.Library("wfnet", "FRAGMENT")
_library.define(
    "conv2d_input_gradient(Tensor du, Tensor weight, SymInt[] input_shape, bool channels_last, "
    "int[] stride, int[] padding, int[] dilation, int groups) -> Tensor"
)
_WINDOW = "int[] kernel_size, int[] stride, int[] padding, int[] dilation, bool ceil_mode"
_library.define(f"max_pool2d(Tensor x, {_WINDOW}) -> (Tensor out, Tensor positions)")
_library.define(
    "max_pool2d_backward(Tensor dout, Tensor positions, SymInt[] input_shape, bool channels_last, "
    f"{_WINDOW}) -> Tensor"
)


def _layout(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


@torch.library.impl(_library, "max_pool2d", "CompositeExplicitAutograd")
def _(x, *window):
    return torch.ops.aten.max_pool2d_with_indices(x, *window)


@torch.library.register_fake("wfnet::max_pool2d", lib=_library)
def _(x, *window):
    return torch.ops.aten.max_pool2d_with_indices(x, *window)


@torch.library.impl(_library, "max_pool2d_backward", "CompositeExplicitAutograd")
def _(dout, positions, input_shape, channels_last, *window):
    layout = _layout(channels_last)
    # Only shape and layout of the input are read; its pages are never touched.
    x = torch.empty(input_shape, dtype=dout.dtype, device=dout.device, memory_format=layout)
    return torch.ops.aten.max_pool2d_with_indices_backward(dout, x, *window, positions).contiguous(
        memory_format=layout
    )


@torch.library.register_fake("wfnet::max_pool2d_backward", lib=_library)
def _(dout, positions, input_shape, channels_last, *window):
    return dout.new_empty(input_shape).to(memory_format=_layout(channels_last))


@torch.library.impl(_library, "conv2d_input_gradient", "CompositeExplicitAutograd")
def _(du, weight, input_shape, channels_last, stride, padding, dilation, groups):
    geometry = ConvGeometry(tuple(stride), tuple(padding), tuple(dilation), groups)
    du = du.contiguous(memory_format=_layout(channels_last))
    dx = conv2d_input_gradient(du, weight, tuple(input_shape), geometry)
    return dx.contiguous(memory_format=_layout(channels_last))


@torch.library.register_fake("wfnet::conv2d_input_gradient", lib=_library)
def _(du, weight, input_shape, channels_last, stride, padding, dilation, groups):
    return du.new_empty(input_shape).to(memory_format=_layout(channels_last))
