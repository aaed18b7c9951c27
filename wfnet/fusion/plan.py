"""Making the plan: which operations of a frozen network fold into which fused convolution.

:func:`make_plan` traces the network with torch.fx and folds convolution, BatchNorm, residual sum
and ReLU into :class:`ConvStep`; whatever it does not recognise stays an ordinary call
(:class:`CallStep`). :func:`_link` then says, for every convolution, what its backward finishes:
when the gradient that a convolution sends down is the last one to reach its input, the layer that
made that input is finished in the same pass.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import fx, nn

from wfnet.backends import ConvGeometry
from wfnet.layers import MaskedLayer, WFConv2d

_ADD = {operator.add, operator.iadd, torch.add}
_RELU = {F.relu, torch.relu, torch.relu_}
# What a tensor is computed from: nothing of the batch, source images, or expanded samples.
CONSTANT, SOURCE, EXPANDED = 0, 1, 2


class NotFusable(Exception):
    """Why a network (or a part of it) runs unfused; one sentence."""


@dataclass(eq=False)
class ConvStep:
    """``out = act(A * conv(input) + C + residual)`` with A and C from gates, bias and BatchNorm.

    Attributes:
        at_source: whether the input has one row per source image (nothing below is masked): then
            no gradient is sent down.
        residual_learns: whether the residual needs a gradient: it comes from behind a mask.
        shortcut: the step that made the residual, where nobody else reads it and it ends there
            without an activation (a projection shortcut): it receives the same ``g``.
        finishes: the step that made the input, where this step's input gradient is the last one
            to reach it: its elementwise backward happens in this step's dgrad.
    """

    name: str
    layer: WFConv2d
    position: int  # of the layer among all masked layers, in module order
    input: fx.Node
    output: fx.Node
    norm: nn.BatchNorm2d | None = None
    residual: fx.Node | None = None
    relu: bool = False
    geometry: ConvGeometry = field(init=False)
    index: int = field(init=False)  # among the convolutions of the plan, in module order
    at_source: bool = field(init=False)
    residual_learns: bool = field(init=False)
    shortcut: ConvStep | None = field(init=False, default=None)
    finishes: ConvStep | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        conv = self.layer
        self.geometry = ConvGeometry(conv.stride, conv.padding, conv.dilation, conv.groups)

    @property
    def reads(self) -> list[fx.Node]:
        return [self.input] if self.residual is None else [self.input, self.residual]


@dataclass(eq=False)
class CallStep:
    """Any other operation of the network, called as the network calls it."""

    call: Callable[..., object]
    arguments: tuple  # (args, kwargs) with fx.Node where a computed value goes
    output: fx.Node
    in_place: bool
    level: int = field(init=False)  # CONSTANT, SOURCE or EXPANDED

    @property
    def reads(self) -> list[fx.Node]:
        return self.output.all_input_nodes


@dataclass
class Plan:
    """Steps in execution order, and after each step the values that no later step reads.

    ``level`` says of every value whether it has one row per source image or per sample.
    """

    steps: list[ConvStep | CallStep]
    image: fx.Node
    result: fx.Node
    level: dict[fx.Node, int] = field(init=False)
    dead_after: list[list[fx.Node]] = field(init=False)

    def __post_init__(self) -> None:
        self.level = _levels(self.steps, self.image)
        self.dead_after = _last_reads(self.steps, self.result)
        _link(self.steps, self.level, self.result)

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
    check_traceable(model)
    return _Folder(model, trace(model), masked).plan()


def check_traceable(model: nn.Module) -> None:
    """Raises NotFusable for what a trace would lose: hooks, and checkpointed activations."""
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            raise NotFusable(f"{name or type(model).__name__!r} has hooks, which fusion would skip")
        if getattr(module, "grad_checkpointing", False):
            raise NotFusable("the network checkpoints its activations")


def trace(model: nn.Module, constants: dict[str, object] | None = None) -> fx.Graph:
    """The network as a graph whose leaves are masked layers and what holds none.

    Args:
        constants: values of inputs that control flow depends on.

    Raises:
        NotFusable: if torch.fx cannot follow its control flow.
    """
    try:
        return _Tracer().trace(model, constants)
    except Exception as error:
        raise NotFusable(f"torch.fx cannot trace it ({error})") from error


class _Folder:
    """Walks the traced graph and grows a ConvStep from every masked convolution."""

    def __init__(self, model: nn.Module, graph: fx.Graph, masked: dict[str, MaskedLayer]):
        self.modules = dict(model.named_modules())
        self.model = model
        _erase_identities(graph, self.modules)
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
        return Plan(steps, inputs[0], result)

    def _grow(self, node: fx.Node) -> None:
        """Absorbs BatchNorm, one residual sum and a ReLU as long as nobody else reads between."""
        position = list(self.masked).index(node.target)
        step = ConvStep(node.target, self.masked[node.target], position, node.args[0], node)
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
            # An activation inside of a norm layer overwrites the layer's own result.
            in_place = not isinstance(call, nn.BatchNorm2d) and any(
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


def _erase_identities(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Removes modules that return what they are given: they would separate what folds."""
    for node in list(graph.nodes):
        module = modules.get(node.target) if node.op == "call_module" else None
        idle = isinstance(module, nn.Identity) or (
            isinstance(module, nn.Dropout | nn.Dropout2d) and not module.training
        )
        if idle and len(node.args) == 1 and isinstance(node.args[0], fx.Node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


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


def _levels(steps: list[ConvStep | CallStep], image: fx.Node) -> dict[fx.Node, int]:
    level = {image: SOURCE}
    for step in steps:
        if isinstance(step, ConvStep):
            level[step.output] = EXPANDED
        else:
            step.level = max((level[node] for node in step.reads), default=CONSTANT)
            level[step.output] = step.level
    return level


def _link(steps: list[ConvStep | CallStep], level: dict[fx.Node, int], result: fx.Node) -> None:
    """Fills in what backward needs to know of every convolution; see :class:`ConvStep`."""
    maker = {step.output: step for step in steps if isinstance(step, ConvStep)}
    readers: dict[fx.Node, list[ConvStep | CallStep]] = {}
    for step in steps:
        for node in dict.fromkeys(step.reads):
            readers.setdefault(node, []).append(step)
    for index, step in enumerate(sorted(maker.values(), key=lambda step: step.position)):
        step.index = index
    for step in maker.values():
        step.at_source = level[step.input] == SOURCE
        step.residual_learns = step.residual is not None and level[step.residual] == EXPANDED
        made = maker.get(step.residual)
        bare = made is not None and not made.relu and made.residual is None
        if bare and readers[step.residual] == [step] and step.residual is not result:
            step.shortcut = made
        # Backward runs through the steps in reverse: the first reader sends its gradient last.
        if not step.at_source and readers[step.input][0] is step:
            step.finishes = maker.get(step.input)
