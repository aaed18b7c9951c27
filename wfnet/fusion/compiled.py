"""Fused networks as one graph for ``torch.compile``: for the eager backend, on any device.

Where kernels run the epilogue backward inside of a GEMM, the eager backend makes separate passes
over memory. :func:`graph_of` writes a plan down as one graph of differentiable PyTorch operations
between convolutions, and the compiler fuses what lies between them, forward and backward. Two
things are kept from the plan: what comes before the first mask runs once per source image, and a
convolution's input gradient reads no input, so that only the branches ``u`` need to be kept. The
tables are inputs of the graph: new labels never recompile.
"""

import operator
from collections.abc import Callable
from types import FunctionType, MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from wfnet import gates
from wfnet.backends.contract import ConvGeometry
from wfnet.backends.eager import conv2d_input_gradient
from wfnet.fusion.execution import PlanNetwork, expand
from wfnet.fusion.plan import EXPANDED, SOURCE, CallStep, ConvStep, Plan
from wfnet.fusion.run import Run
from wfnet.operators import memory_format_of
from wfnet.services.log import logger

# So many batches that differ in size, dtype or use have a compiled graph of their own: as many as
# the compiler itself keeps of one function.
_MOST_GRAPHS = 8


class CompiledGraph:
    """A function that is compiled anew for every kind of batch, up to as many as are kept.

    Args:
        function: takes tensors, and lists of tensors, to logits.
    """

    def __init__(self, function: Callable[..., Tensor]):
        if isinstance(function, MethodType):  # what is compiled is kept, and counted, by code
            of_class = function.__func__
            own = FunctionType(of_class.__code__.replace(), of_class.__globals__)
            function = MethodType(own, function.__self__)
        self._function = function
        self._compiled = torch.compile(function, fullgraph=True, dynamic=False)
        self._kinds: set[tuple] = set()
        self.works = True

    def takes(self, images: Tensor, *kind: object) -> bool:
        """Whether a batch runs compiled: one of a kind that is known, or one of the first few."""
        device = images.device.type
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        key = (images.shape, images.dtype, autocast, *kind)
        if not self.works or (key not in self._kinds and len(self._kinds) == _MOST_GRAPHS):
            return False
        self._kinds.add(key)
        return True

    def __call__(self, *inputs: object) -> Tensor:
        """Logits; uncompiled if that fails (no C++ compiler, say), with a line in the log."""
        from torch._dynamo.exc import TorchDynamoException  # half of the time of `import wfnet`

        try:
            return self._compiled(*inputs)
        except TorchDynamoException as error:
            reason = " ".join(str(error).strip().split("\n\n")[0].split())
            logger.warning("the fused network runs uncompiled: compiling failed (%s)", reason)
            self.works = False
            return self._function(*inputs)


class GraphRun(Run):
    """A run whose network has a ``graph`` of ``(images, source, weights, scales, shifts)``.

    Weights in the dtype of the run and tables ``[B, O]`` are lists, in the order of the folded
    layers; by the tables it can be differentiated.
    """

    def forward(self) -> Tensor:
        network, tables = self.network, self.tables
        weights = [network.weight(layer, self.dtype) for layer, _ in network.folded]
        learned = [self.save and layer.bias is not None for layer, _ in network.folded]
        with torch.set_grad_enabled(self.save):
            self.scales = [scale.detach().requires_grad_(self.save) for scale in tables.scales]
            self.shifts = [
                shift.detach().requires_grad_(learns)
                for shift, learns in zip(tables.shifts, learned, strict=True)
            ]
            logits = network.graph(self.images, self.source, weights, self.scales, self.shifts)
        if self.save:
            self.logits = logits
        return logits.detach()

    def propagate(self, dout: Tensor) -> None:
        shifts = [shift for shift in self.shifts if shift.requires_grad]
        inputs = [*self.scales, *shifts]
        found = torch.autograd.grad(self.logits, inputs, dout.to(self.logits.dtype))
        del self.logits, self.scales, self.shifts
        tables = self.tables
        for t1, scale, of_scale in zip(tables.t1, tables.scales, found, strict=False):
            torch.mul(of_scale, scale, out=t1)  # t1 is the derivative by the log of the scale
        sums = [t0 for t0 in tables.t0 if t0 is not None]
        for t0, of_shift in zip(sums, found[len(tables.scales) :], strict=True):
            t0.copy_(of_shift)


class CompiledNetwork(PlanNetwork):
    """A :class:`PlanNetwork` of the eager backend whose plan is compiled, anew for every size.

    Further sizes of a batch run the plan as it is; so does everything if compiling fails.
    """

    def __init__(self, network: PlanNetwork):
        super().__init__(network.plan, network.backend)
        self.graph = CompiledGraph(graph_of(self.plan))

    def start(self, images: Tensor, rows: Tensor, source: Tensor | None, save: bool = True) -> Run:
        if self.graph.takes(images, rows.shape[0], source is None, save):
            return GraphRun(self, images, rows, source, save)
        return super().start(images, rows, source, save)

    def describe(self) -> str:
        return f"{super().describe()}; compiled"


# -- the plan as a graph ---------------------------------------------------------------------------


def graph_of(plan: Plan) -> fx.GraphModule:
    """A module of the arguments of :class:`GraphRun` that returns logits ``[B, K]``."""
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
            expanded[node] = graph.call_function(expand, (values[node], source))
        return expanded[node]

    for step in plan.steps:
        if isinstance(step, ConvStep):
            tables = [
                graph.call_function(operator.getitem, (tensors, step.index)) for tensors in lists
            ]
            residual = None if step.residual is None else per_sample(step.residual)
            of_samples = source if step.at_source else None
            geometry = step.geometry
            values[step.output] = graph.call_function(
                fused_convolution,
                (values[step.input], *tables, residual, step.relu, of_samples)
                + (geometry.stride, geometry.padding, geometry.dilation, geometry.groups),
            )
        else:
            read = per_sample if step.level == EXPANDED else values.__getitem__
            args, kwargs = fx.node.map_arg(step.arguments, read)
            name = f"call_{len(values)}"
            calls.add_module(name, _Call(step))
            values[step.output] = graph.call_module(name, args, kwargs)
    graph.output(per_sample(plan.result))
    return fx.GraphModule(calls, graph)


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


# The compiler would make a real input for PyTorch's input gradient, in a layout of its choice, to
# which the gradient is then converted: this operator it leaves alone.
_library = torch.library.Library("wfnet", "FRAGMENT")
_library.define(
    "conv2d_input_gradient(Tensor du, Tensor weight, SymInt[] input_shape, bool channels_last, "
    "int[] stride, int[] padding, int[] dilation, int groups) -> Tensor"
)


def _layout(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


@torch.library.impl(_library, "conv2d_input_gradient", "CompositeExplicitAutograd")
def _(du, weight, input_shape, channels_last, *geometry):
    du = du.contiguous(memory_format=_layout(channels_last))
    dx = conv2d_input_gradient(du, weight, tuple(input_shape), ConvGeometry(*geometry))
    return dx.contiguous(memory_format=_layout(channels_last))


@torch.library.register_fake("wfnet::conv2d_input_gradient", lib=_library)
def _(du, weight, input_shape, channels_last, *geometry):
    return du.new_empty(input_shape).to(memory_format=_layout(channels_last))
