"""A fused plan for a frozen, masked network: one autograd node, one pass per convolution.

Everything that follows a convolution in a frozen network folds into two tables per sample and
channel (design: ``out = act(A * u + C + residual)``)::

    A[b, o] = gamma'[o] * gate_weight[l, o]
    C[b, o] = gamma'[o] * gate_bias[l, o] * bias[o] + beta'[o]
    gamma' = gamma / sqrt(var + eps),  beta' = beta - mean * gamma'

:func:`make_plan` traces the network with torch.fx and folds convolution, BatchNorm, residual sum
and ReLU into :class:`ConvStep`; whatever it does not recognise stays an ordinary call
(:class:`CallStep`), differentiated by a small autograd graph of its own. :class:`FusedNetwork`
executes the plan. Its backward needs no layer input: one branch per convolution is kept, and the
output where a residual makes the ReLU mask depend on it. What comes before the first mask is
computed once per source image and not differentiated; tensors that cross that cut are expanded to
the samples there.

The plan changes nothing in the module: tree, hooks and state-dict keys stay as they are.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from wfnet import backends, gates
from wfnet.backends import Backend, ConvGeometry
from wfnet.layers import MaskedLayer, WFConv2d

logger = logging.getLogger("wfnet")

_ADD = {operator.add, operator.iadd, torch.add}
_RELU = {F.relu, torch.relu, torch.relu_}
# What a tensor is computed from: nothing of the batch, source images, or expanded samples.
_CONSTANT, _SOURCE, _EXPANDED = 0, 1, 2


class NotFusable(Exception):
    """Why a network (or a part of it) runs unfused; one sentence."""


@dataclass
class ConvStep:
    """``out = act(A * conv(input) + C + residual)`` with A and C from gates, bias and BatchNorm."""

    name: str
    layer: WFConv2d
    input: fx.Node
    output: fx.Node
    norm: nn.BatchNorm2d | None = None
    residual: fx.Node | None = None
    relu: bool = False
    geometry: ConvGeometry = field(init=False)
    columns: slice = field(init=False)  # of this layer in tables that hold all layers side by side

    def __post_init__(self) -> None:
        conv = self.layer
        self.geometry = ConvGeometry(conv.stride, conv.padding, conv.dilation, conv.groups)

    @property
    def reads(self) -> list[fx.Node]:
        return [self.input] if self.residual is None else [self.input, self.residual]


@dataclass
class CallStep:
    """Any other operation of the network, called as the network calls it."""

    call: Callable[..., object]
    arguments: tuple  # (args, kwargs) with fx.Node where a computed value goes
    output: fx.Node
    in_place: bool

    @property
    def reads(self) -> list[fx.Node]:
        return self.output.all_input_nodes


@dataclass
class Plan:
    """Steps in execution order, and after each step the values that no later step reads."""

    steps: list[ConvStep | CallStep]
    image: fx.Node
    result: fx.Node
    dead_after: list[list[fx.Node]]

    @property
    def convolutions(self) -> list[ConvStep]:
        return [step for step in self.steps if isinstance(step, ConvStep)]

    def describe(self) -> str:
        """One line for the log: how much of the network is fused."""
        convs = self.convolutions
        return (
            f"fused {len(convs)} convolutions with {sum(s.norm is not None for s in convs)} "
            f"BatchNorm, {sum(s.relu for s in convs)} ReLU and "
            f"{sum(s.residual is not None for s in convs)} residual sums; "
            f"{len(self.steps) - len(convs)} other operations run as they are"
        )


# -- making the plan ------------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, MaskedLayer | nn.BatchNorm2d):
            return True
        if isinstance(m, nn.Sequential):
            return False
        # What holds no masked layer is called as it is, whatever control flow it contains.
        return not any(isinstance(inner, MaskedLayer) for inner in m.modules())


def make_plan(model: nn.Module) -> Plan:
    """Traces ``model`` (whose masked layers are WFConv2d) and folds what follows each convolution.

    Raises:
        NotFusable: if the network cannot be traced, or masks anything but plain convolutions.
    """
    masked = {n: m for n, m in model.named_modules() if isinstance(m, MaskedLayer)}
    for name, layer in masked.items():
        plain = type(layer) is WFConv2d and layer.padding_mode == "zeros"
        if not plain or isinstance(layer.padding, str):
            raise NotFusable(f"{name!r} is no convolution with plain zero padding")
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            raise NotFusable(f"{name or type(model).__name__!r} has hooks, which fusion would skip")
        if getattr(module, "grad_checkpointing", False):
            raise NotFusable("the network checkpoints its activations")
    try:
        graph = _Tracer().trace(model)
    except Exception as error:
        raise NotFusable(f"torch.fx cannot trace it ({error})") from error
    return _Folder(model, graph, masked).plan()


class _Folder:
    """Walks the traced graph and grows a ConvStep from every masked convolution."""

    def __init__(self, model: nn.Module, graph: fx.Graph, masked: dict[str, MaskedLayer]):
        self.modules = dict(model.named_modules())
        self.model = model
        self.nodes = list(graph.nodes)
        self.masked = masked
        self.grown: dict[fx.Node, ConvStep] = {}  # by the node whose value the step computes
        self.absorbed: set[fx.Node] = set()

    def plan(self) -> Plan:
        inputs = [n for n in self.nodes if n.op == "placeholder"]
        for extra in inputs[1:]:
            if extra.users:
                raise NotFusable(f"its forward takes a second input, {extra.name!r}")
        for node in self.nodes:
            owner = str(node.target).rpartition(".")[0]
            if node.op == "get_attr" and owner in self.masked:
                raise NotFusable(f"the network reads the parameters of {owner!r} directly")
        for node in self.nodes:
            if node.op == "call_module" and node.target in self.masked:
                self._grow(node)
        steps: list[ConvStep | CallStep] = []
        result = None
        for node in self.nodes:
            if node in self.grown:
                steps.append(self.grown[node])
            elif node.op == "output":
                result = node.args[0]
            elif node.op != "placeholder" and node not in self.absorbed:
                steps.append(self._call(node))
        if not isinstance(result, fx.Node):
            raise NotFusable("its forward returns more than one tensor")
        return Plan(steps, inputs[0], result, _last_reads(steps, result))

    def _grow(self, node: fx.Node) -> None:
        """Absorbs BatchNorm, one residual sum and a ReLU as long as nobody else reads between."""
        step = ConvStep(node.target, self.masked[node.target], node.args[0], node)
        while len(step.output.users) == 1:
            (follower,) = step.output.users
            if not self._absorb(step, follower):
                break
            self.absorbed.add(step.output)
            step.output = follower
            if step.relu:
                break
        self.grown[step.output] = step

    def _absorb(self, step: ConvStep, node: fx.Node) -> bool:
        if node in self.absorbed or node in self.grown:  # the sum that the other summand took
            return False
        module = self.modules.get(node.target) if node.op == "call_module" else None
        if isinstance(module, nn.Identity) or (
            isinstance(module, nn.Dropout | nn.Dropout2d) and not module.training
        ):
            return True
        if isinstance(module, nn.BatchNorm2d):
            act = _activation_of(module)
            if step.norm or step.residual or act is None or module.running_var is None:
                return False
            step.norm = module
            step.relu = act == "relu"
            return True
        if _is_relu(node, module):
            step.relu = True
            return True
        if _is_sum(node) and step.residual is None:
            first, second = node.args
            other = second if first is step.output else first
            if not isinstance(other, fx.Node) or other is step.output:
                return False
            step.residual = other
            return True
        return False

    def _call(self, node: fx.Node) -> CallStep:
        in_place = False
        if node.op == "call_module":
            call = self.modules[node.target]
            in_place = bool(getattr(call, "inplace", False)) or any(
                getattr(m, "inplace", False) for m in call.modules()
            )
        elif node.op == "call_function":
            call = node.target
            name = getattr(call, "__name__", "")
            in_place = (
                name.endswith("_")
                or bool(node.kwargs.get("inplace"))
                or (getattr(operator, name, None) is call and name.startswith("i"))
            )
        elif node.op == "call_method":
            call = _Method(node.target)
            in_place = node.target.endswith("_")
        elif node.op == "get_attr":
            call = _Attribute(self.model, node.target)
        else:
            raise NotFusable(f"operation {node.op!r} is not known")
        if in_place and any(len(read.users) > 1 for read in node.all_input_nodes[:1]):
            raise NotFusable(f"{node.name!r} changes a value in place that others read")
        return CallStep(call, (node.args, node.kwargs), node, in_place)


@dataclass(frozen=True)
class _Method:
    name: str

    def __call__(self, receiver: object, *args: object, **kwargs: object) -> object:
        return getattr(receiver, self.name)(*args, **kwargs)


@dataclass(frozen=True)
class _Attribute:
    model: nn.Module
    path: str

    def __call__(self) -> object:
        value: object = self.model
        for part in self.path.split("."):
            value = getattr(value, part)
        return value


def _activation_of(norm: nn.BatchNorm2d) -> str | None:
    """'none' or 'relu' for a norm layer that we know, None for one that does something else."""
    if type(norm).forward is nn.BatchNorm2d.forward:
        return "none"
    if type(norm).__name__ != "BatchNormAct2d" or not isinstance(norm.drop, nn.Identity):
        return None
    if isinstance(norm.act, nn.Identity):
        return "none"
    return "relu" if type(norm.act) is nn.ReLU else None


def _is_relu(node: fx.Node, module: nn.Module | None) -> bool:
    if module is not None:
        return type(module) is nn.ReLU
    if node.op == "call_function":
        return node.target in _RELU
    return node.op == "call_method" and node.target in ("relu", "relu_")


def _is_sum(node: fx.Node) -> bool:
    known = (node.op == "call_function" and node.target in _ADD) or (
        node.op == "call_method" and node.target in ("add", "add_")
    )
    return known and len(node.args) == 2 and not node.kwargs


def _last_reads(steps: list[ConvStep | CallStep], result: fx.Node) -> list[list[fx.Node]]:
    seen = {result}
    dead: list[list[fx.Node]] = []
    for step in reversed(steps):
        last = [node for node in dict.fromkeys([*step.reads, step.output]) if node not in seen]
        seen.update(last)
        dead.append(last)
    return dead[::-1]


# -- running the plan -----------------------------------------------------------------------------


class FusedNetwork:
    """Executes a :class:`Plan`; the filters of all layers become tables at once.

    Args:
        plan: from :func:`make_plan`.
        backend: who runs the fused convolutions (:meth:`Backend.fused_conv2d`).
    """

    def __init__(self, plan: Plan, backend: Backend):
        self.plan = plan
        self.backend = backend
        self.convs = plan.convolutions
        self.with_bias = [step for step in self.convs if step.layer.bias is not None]
        start = 0
        for step in self.convs:
            step.columns = slice(start, start + step.layer.out_channels)
            start += step.layer.out_channels
        self._folded: tuple[object, Tensor, Tensor, Tensor] | None = None
        self._weights: dict[tuple[str, torch.dtype], tuple[object, Tensor]] = {}

    def filters(self) -> list[Tensor]:
        """Filter matrices in the order in which :meth:`__call__` differentiates them."""
        return [s.layer.alpha_weight for s in self.convs] + [
            s.layer.alpha_bias for s in self.with_bias
        ]

    def __call__(self, images: Tensor, rows: Tensor, source: Tensor | None) -> Tensor:
        """Logits ``[B, K]``; images ``[N, C, H, W]``, labels ``[B, J]``, ``source`` ``[B]``.

        Gradients reach the filters only; double backward raises.
        """
        filters = self.filters()
        if torch.is_grad_enabled() and any(f.requires_grad for f in filters):
            return _FusedFunction.apply(self, images, rows, source, *filters)
        return _Run(self, images, rows, source, filters, save=False).forward()

    def folded(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """gamma', beta' and bias of all layers side by side, ``[sum of channels]``, fp32 or up."""
        key = tuple(
            (t.data_ptr(), t._version, t.device, t.dtype)
            for step in self.convs
            for t in _constants_of(step)
        )
        if self._folded is None or self._folded[0] != key:
            gamma, beta, bias = zip(*(_fold(step) for step in self.convs), strict=True)
            self._folded = (key, torch.cat(gamma), torch.cat(beta), torch.cat(bias))
        return self._folded[1:]

    def weight(self, step: ConvStep, dtype: torch.dtype) -> Tensor:
        """The frozen weight in ``dtype``, converted once."""
        weight = step.layer.weight
        if weight.dtype == dtype:
            return weight
        key = (weight.data_ptr(), weight._version, weight.device)
        cached = self._weights.get((step.name, dtype))
        if cached is None or cached[0] != key:
            cached = (key, weight.detach().to(dtype))
            self._weights[step.name, dtype] = cached
        return cached[1]


def _constants_of(step: ConvStep) -> Iterable[Tensor]:
    norm = step.norm
    tensors = [step.layer.bias]
    if norm is not None:
        tensors += [norm.weight, norm.bias, norm.running_mean, norm.running_var]
    return (t for t in tensors if t is not None)


def _fold(step: ConvStep) -> tuple[Tensor, Tensor, Tensor]:
    """gamma', beta' and bias ``[O]`` of one layer."""
    conv, norm = step.layer, step.norm
    dtype = torch.promote_types(conv.weight.dtype, torch.float32)
    ones = torch.ones(conv.out_channels, dtype=dtype, device=conv.weight.device)
    bias = torch.zeros_like(ones) if conv.bias is None else conv.bias.detach().to(dtype)
    if norm is None:
        return ones, torch.zeros_like(ones), bias
    gamma = ones if norm.weight is None else norm.weight.detach().to(dtype)
    beta = torch.zeros_like(ones) if norm.bias is None else norm.bias.detach().to(dtype)
    gamma = gamma / torch.sqrt(norm.running_var.to(dtype) + norm.eps)
    return gamma, beta - norm.running_mean.to(dtype) * gamma, bias


class _Run:
    """One forward pass, and the backward pass that belongs to it."""

    def __init__(
        self,
        network: FusedNetwork,
        images: Tensor,
        rows: Tensor,
        source: Tensor | None,
        filters: list[Tensor],
        save: bool,
    ):
        self.network = network
        self.images = images
        self.rows = rows
        self.source = source
        self.filters = filters
        self.save = save
        device = images.device.type
        autocast = torch.is_autocast_enabled(device) and images.dtype != torch.float64
        self.dtype = torch.get_autocast_dtype(device) if autocast else images.dtype
        self.values: dict[fx.Node, object] = {}
        self.level: dict[fx.Node, int] = {}
        self.tape: list[object] = []

    # -- tables -----------------------------------------------------------------------------------

    def _gate_rows(self, alphas: list[Tensor], steps: list[ConvStep]) -> Tensor:
        """Gates of all ``steps`` side by side, ``[B, sum of channels]``."""
        tables = [
            self.network.backend.gate_rows(alpha.detach(), self.rows, step.layer.gate_scale)
            for alpha, step in zip(alphas, steps, strict=True)
        ]
        return torch.cat(tables, 1)

    def tables(self) -> tuple[Tensor, Tensor]:
        """A and C of all layers, ``[B, sum of channels]``."""
        convs, with_bias = self.network.convs, self.network.with_bias
        gamma, beta, bias = self.network.folded(self.images.device)
        scale = self._gate_rows(self.filters[: len(convs)], convs) * gamma
        shift = beta.expand(scale.shape[0], -1)
        self.bias_part = None
        if with_bias:
            columns = torch.cat(
                [torch.arange(s.columns.start, s.columns.stop) for s in with_bias]
            ).to(scale.device)
            gates_of_bias = self._gate_rows(self.filters[len(convs) :], with_bias)
            self.bias_part = gates_of_bias * (gamma * bias)[columns]
            shift = shift.index_add(1, columns, self.bias_part)
        return scale, shift

    # -- forward ----------------------------------------------------------------------------------

    def forward(self) -> Tensor:
        plan = self.network.plan
        self.scale, self.shift = self.tables()
        self.values[plan.image] = self.images
        self.level[plan.image] = _SOURCE
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
        if self.source is None or self.level[node] != _SOURCE or not isinstance(value, Tensor):
            return value
        return gates.gather_samples(value, self.source)

    def _convolve(self, step: ConvStep) -> None:
        x = self.values[step.input]
        at_source = self.level[step.input] == _SOURCE
        residual = None if step.residual is None else self._expanded(step.residual)
        scale, shift = self.scale[:, step.columns], self.shift[:, step.columns]
        out, branch, kept = self.network.backend.fused_conv2d(
            x.to(self.dtype),
            self.network.weight(step, self.dtype),
            scale,
            shift,
            None if residual is None else residual.to(self.dtype),
            step.relu,
            self.source if at_source else None,
            step.geometry,
            self.save,
        )
        self.values[step.output] = out
        self.level[step.output] = _EXPANDED
        if self.save:
            through = step.residual is not None and self.level[step.residual] == _EXPANDED
            self.tape.append((branch, kept, tuple(x.shape), not at_source, through))

    def _call(self, step: CallStep) -> None:
        level = max((self.level[node] for node in step.reads), default=_CONSTANT)
        record = self.save and level == _EXPANDED
        leaves: dict[fx.Node, Tensor] = {}

        def value_of(argument: object) -> object:
            if not isinstance(argument, fx.Node):
                return argument
            value = self._expanded(argument) if level == _EXPANDED else self.values[argument]
            if not isinstance(value, Tensor):
                return value
            if record and self.level[argument] == _EXPANDED and value.is_floating_point():
                value = leaves.setdefault(argument, value.detach().requires_grad_())
            return value.clone() if step.in_place else value

        with torch.set_grad_enabled(record):
            args, kwargs = fx.node.map_aggregate(step.arguments, value_of)
            result = step.call(*args, **kwargs)
        if isinstance(result, Tensor):
            attached = record and result.requires_grad
            self.values[step.output] = result.detach() if attached else result
            self.level[step.output] = level
        elif any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            raise NotFusable(f"{step.output.name!r} returns several tensors")
        else:
            attached = False
            self.values[step.output] = result
            self.level[step.output] = _CONSTANT
        if self.save:
            self.tape.append((leaves, result) if attached else None)

    # -- backward ---------------------------------------------------------------------------------

    def backward(self, dout: Tensor) -> list[Tensor]:
        """Gradients of the filters, in the order of :meth:`FusedNetwork.filters`."""
        if not self.tape:
            raise RuntimeError(
                "backward through a fused network a second time; its branches are freed by the "
                "first (retain_graph is not supported with fuse=True)"
            )
        plan = self.network.plan
        gradients: dict[fx.Node, Tensor] = {plan.result: dout}
        owned: set[fx.Node] = set()
        t1 = torch.zeros_like(self.scale)
        t0 = torch.zeros_like(self.scale) if self.network.with_bias else None

        def add(node: fx.Node, gradient: Tensor, own: bool) -> None:
            if node not in gradients:
                gradients[node] = gradient
                owned.update([node] if own else [])
            elif node in owned:
                gradients[node].add_(gradient)
            else:
                gradients[node] = gradients[node] + gradient
                owned.add(node)

        for step in reversed(plan.steps):
            kept = self.tape.pop()
            gradient = gradients.pop(step.output, None)
            if gradient is None or kept is None:
                continue
            if isinstance(step, CallStep):
                leaves, result = kept
                for node, leaf in zip(
                    leaves,
                    torch.autograd.grad(result, list(leaves.values()), gradient, allow_unused=True),
                    strict=True,
                ):
                    if leaf is not None:
                        add(node, leaf, own=False)
                continue
            branch, output, input_shape, need_dx, through = kept
            scale, shift = self.scale[:, step.columns], self.shift[:, step.columns]
            dx, g, step_t1, step_t0 = self.network.backend.fused_conv2d_backward(
                gradient.to(self.dtype),
                branch,
                output,
                self.network.weight(step, self.dtype),
                scale,
                shift,
                self.source if branch.shape[0] != scale.shape[0] else None,
                input_shape,
                step.relu,
                step.geometry,
                need_dx,
                step.layer.bias is not None,
                step.output in owned,
            )
            own = step.relu or step.output in owned
            owned.discard(step.output)
            t1[:, step.columns].add_(step_t1)
            if step_t0 is not None:
                t0[:, step.columns].add_(step_t0)
            if through:
                add(step.residual, g, own)
            if need_dx:
                add(step.input, dx, own=True)
        return self._filter_gradients(t1, t0)

    def _filter_gradients(self, t1: Tensor, t0: Tensor | None) -> list[Tensor]:
        convs, with_bias = self.network.convs, self.network.with_bias
        found = _reduce(t1, self.filters[: len(convs)], [s.columns for s in convs], self.rows)
        if with_bias:
            parts = torch.cat([t0[:, s.columns] for s in with_bias], 1) * self.bias_part
            start, columns = 0, []
            for step in with_bias:
                columns.append(slice(start, start + step.layer.out_channels))
                start += step.layer.out_channels
            found += _reduce(parts, self.filters[len(convs) :], columns, self.rows)
        return found


def _reduce(t: Tensor, alphas: list[Tensor], columns: list[slice], rows: Tensor) -> list[Tensor]:
    """Segmented sums of log-derivatives ``[B, sum of channels]`` into one gradient per matrix."""
    labels = gates.distinct_labels(rows)
    if labels.shape[1] > 1:
        t = t.unsqueeze(1).expand(-1, labels.shape[1], -1).flatten(0, 1)
    total = gates.segment_sum(t, labels.flatten(), alphas[0].shape[0])
    return [
        (torch.sigmoid(-alpha.detach().to(total.dtype)) * total[:, part]).to(alpha.dtype)
        for alpha, part in zip(alphas, columns, strict=True)
    ]


class _FusedFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, network, images, rows, source, *filters):
        ctx.run = _Run(network, images, rows, source, list(filters), save=True)
        ctx.save_for_backward(*filters)  # autograd notices filters that change before backward
        return ctx.run.forward()

    @staticmethod
    def backward(ctx, dout):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "double backward through a fused network is not supported; use fuse=False and "
                "backend='reference', which is plain PyTorch"
            )
        _ = ctx.saved_tensors
        return None, None, None, None, *ctx.run.backward(dout)


def check_plan(
    network: FusedNetwork, unfused: Callable[[Tensor, Tensor], Tensor], images: Tensor
) -> None:
    """Compares the fused with the unfused network on a few images under mixed rows.

    Raises:
        NotFusable: if they differ by more than rounding.
    """
    classes = network.convs[0].layer.num_classes
    few = images[:2]
    source = torch.tensor([0, few.shape[0] - 1, 0], device=images.device)
    rows = torch.tensor([[0], [classes - 1], [-1]], device=images.device)
    with torch.no_grad():
        try:
            fused = network(few, rows, source)
        except NotFusable:
            raise
        except Exception as error:
            raise NotFusable(f"running the plan failed ({error})") from error
        expected = unfused(gates.gather_samples(few, source), rows)
    span = expected.abs().max().clamp_min(1e-6)
    error = ((fused - expected).abs().max() / span).item()
    limit = 64 * torch.finfo(fused.dtype).eps * len(network.convs) ** 0.5
    if not error <= limit:
        raise NotFusable(f"fused and unfused outputs differ by {error:.1e} (limit {limit:.1e})")


def backend_for(layers: Iterable[MaskedLayer]) -> Backend:
    """The one backend of ``layers`` that runs fused convolutions.

    Raises:
        NotFusable: if they ask for different backends, or for one without fused convolutions.
    """
    names = {backends.requested(layer.backend) for layer in layers}
    name = names.pop() if len(names) == 1 else None
    if name is None:
        raise NotFusable("its layers ask for different backends")
    if name == "reference":
        raise NotFusable("the reference backend is never fused")
    backend = backends.get("eager" if name == "auto" else name)
    if not backend.fuses:
        raise NotFusable(f"backend {name!r} has no fused convolutions")
    return backend
