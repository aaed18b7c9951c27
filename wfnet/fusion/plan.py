"""Making the plan: which operations of a frozen network fold into which fused convolution.

:func:`make_plan` traces the network with torch.fx, rewrites the graph
(:mod:`wfnet.fusion.rewrite`), and folds convolution, BatchNorm, residual sum and ReLU into
:class:`ConvStep`. Whatever it does not recognise stays an ordinary call (:class:`CallStep`), masked
layers of other kinds and blocks that cannot be traced included. :func:`_link` then says, for every
convolution, which layer lies below it: when the gradient that a convolution sends down is the last
one to reach its input, the epilogue backward of the layer that made that input runs in the same
pass.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from wfnet.backends.contract import ConvGeometry
from wfnet.durable_layers import DurableConv2d, DurableLayer
from wfnet.fusion import rewrite
from wfnet.fusion.trace import NotFusable, check_traceable, is_hooked, run_example, trace
from wfnet.layers import MaskedLayer

_ADD = {operator.add, operator.iadd, torch.add, "add", "add_"}
_RELU = {F.relu, torch.relu, torch.relu_, "relu", "relu_"}
# What a tensor is computed from: nothing of the batch, source images, or expanded samples.
CONSTANT, SOURCE, EXPANDED = 0, 1, 2


@dataclass(eq=False)
class ConvStep:
    """``out = act(A * conv(input) + C + residual)`` with A and C from gates, bias and BatchNorm.

    Attributes:
        layer: the convolution; masked itself, or with durable gates behind the norm.
        norm: with weight, bias, running_mean, running_var and eps of a frozen BatchNorm.
        index: among the convolutions of the plan, in module order.
        at_source: whether the input has one row per source image (nothing below is masked): then
            no gradient is sent down.
        residual_learns: whether the residual needs a gradient: it comes from behind a mask.
        shortcut: the step that made the residual, where nobody else reads it and it ends there
            without an activation (a projection shortcut): it receives the same ``g``.
        below: the step that made the input, where this step's input gradient is the last one
            to reach it: its elementwise backward happens in this step's dgrad.
    """

    name: str
    layer: nn.Conv2d
    input: fx.Node
    output: fx.Node
    geometry: ConvGeometry
    norm: nn.Module | None = None
    residual: fx.Node | None = None
    relu: bool = False
    index: int = field(init=False)
    at_source: bool = field(init=False)
    residual_learns: bool = field(init=False)
    shortcut: "ConvStep | None" = field(init=False, default=None)
    below: "ConvStep | None" = field(init=False, default=None)

    @property
    def masked(self) -> MaskedLayer:
        """The layer that has the filters."""
        return self.norm if isinstance(self.norm, MaskedLayer) else self.layer

    @property
    def reads(self) -> list[fx.Node]:
        return [self.input] if self.residual is None else [self.input, self.residual]


@dataclass(eq=False)
class CallStep:
    """Any other operation of the network, called as the network calls it.

    Attributes:
        arguments: ``(args, kwargs)`` with a fx.Node where a computed value goes.
        in_place: whether it overwrites what it is given: it must be given a copy.
        layers: masked layers inside that run by their own operators and need forget labels.
        below: as :attr:`ConvStep.below`, for a step that reads one value.
    """

    call: Callable[..., object]
    arguments: tuple
    output: fx.Node
    in_place: bool
    layers: tuple[MaskedLayer, ...] = ()
    level: int = field(init=False)  # CONSTANT, SOURCE or EXPANDED
    below: ConvStep | None = field(init=False, default=None)

    @property
    def reads(self) -> list[fx.Node]:
        return self.output.all_input_nodes


@dataclass
class Plan:
    """Steps in execution order, and after each step the values that no later step reads.

    Attributes:
        layers: the masked layers that the steps run, folded or not, in module order.
        level: whether a value has one row per source image or per sample.
    """

    steps: list[ConvStep | CallStep]
    image: fx.Node
    result: fx.Node
    layers: list[MaskedLayer]
    level: dict[fx.Node, int] = field(init=False)
    dead_after: list[list[fx.Node]] = field(init=False)

    def __post_init__(self) -> None:
        self.level = _levels(self.steps, self.image)
        self.dead_after = _last_reads(self.steps, self.result)
        convs = sorted(self.convolutions, key=lambda step: self.layers.index(step.masked))
        for index, step in enumerate(convs):
            step.index = index
        _link(self.steps, self.level, self.result)

    @property
    def durable(self) -> bool:
        """Whether the gates of its steps are durable ones."""
        return isinstance(self.layers[0], DurableLayer)

    @property
    def convolutions(self) -> list[ConvStep]:
        return [step for step in self.steps if isinstance(step, ConvStep)]

    @property
    def masked_calls(self) -> list[str]:
        """Names of steps that are not folded and have masked layers inside."""
        calls = [step for step in self.steps if isinstance(step, CallStep)]
        return [step.output.name for step in calls if step.layers]

    def describe(self) -> str:
        """One line for the log: how much of the network is fused."""
        convs = self.convolutions
        text = (
            f"fused {len(convs)} convolutions with {sum(s.norm is not None for s in convs)} "
            f"BatchNorm, {sum(s.relu for s in convs)} ReLU and "
            f"{sum(s.residual is not None for s in convs)} residual sums; "
            f"{len(self.steps) - len(convs)} other operations run as they are"
        )
        apart = self.masked_calls
        return f"{text}, with masked layers in {', '.join(apart)}" if apart else text


def make_plan(model: nn.Module, images: Tensor | None = None) -> Plan:
    """Traces ``model`` and folds what follows each masked convolution.

    Modules with hooks, blocks whose control flow torch.fx cannot follow, and masked layers that are
    no convolutions, are called as they are.

    Args:
        model: whose masked layers may be of any kind.
        images: an example ``[N, C, H, W]``. With it a sum that broadcasts is not folded.

    Raises:
        NotFusable: if the network cannot be traced, or no convolution folds.
    """
    check_traceable(model, [("", model)])
    graph, image, failure = trace(model)
    folder = _Folder(model, graph, image)
    rewrite.erase_idle(graph, folder.modules)
    rewrite.check_in_place(graph, folder.modules)
    if images is not None:
        run_example(model, graph, images)
    folder.grow_all()
    if not folder.grown:
        raise failure or NotFusable("it has no masked convolution that folds")
    return folder.plan()


@dataclass(frozen=True)
class _Method:
    """A method of its first argument."""

    name: str

    def __call__(self, receiver: object, *args: object, **kwargs: object) -> object:
        return getattr(receiver, self.name)(*args, **kwargs)


class _Folder:
    """Walks the traced graph and grows a ConvStep from every masked convolution."""

    def __init__(self, model: nn.Module, graph: fx.Graph, image: fx.Node):
        self.modules = dict(model.named_modules())
        self.model = model
        self.graph, self.image = graph, image
        self.masked = [m for m in model.modules() if isinstance(m, MaskedLayer)]
        self.grown: dict[fx.Node, ConvStep] = {}  # by the node whose value the step computes
        self.absorbed: set[fx.Node] = set()

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.modules[node.target] if node.op == "call_module" else None

    def grow_all(self) -> None:
        for node in list(self.graph.nodes):
            layer = self._module(node)
            if layer is not None and rewrite.folds(layer) and self._has_gates(node, layer):
                self._grow(node)

    def _has_gates(self, node: fx.Node, layer: nn.Module) -> bool:
        """Whether there are filters in a convolution, or in the norm behind it."""
        if isinstance(layer, MaskedLayer):
            return True
        follower = next(iter(node.users))
        return len(node.users) == 1 and rewrite.is_durable_norm(self._module(follower))

    def plan(self) -> Plan:
        """The steps, now that every convolution has grown."""
        steps: list[ConvStep | CallStep] = []
        result = None
        for node in self.graph.nodes:
            if node in self.grown:
                steps.append(self.grown[node])
            elif node.op == "output":
                result = node.args[0]
            elif node.op != "placeholder" and node not in self.absorbed:
                steps.append(self._call(node))
        if not isinstance(result, fx.Node):
            raise NotFusable("its forward returns more than one tensor")
        called: set[MaskedLayer] = set()
        for step in steps:
            called.update([step.masked] if isinstance(step, ConvStep) else step.layers)
        layers = [layer for layer in self.masked if layer in called]
        return Plan(steps, self.image, result, layers)

    def _grow(self, node: fx.Node) -> None:
        """Absorbs BatchNorm, one residual sum and a ReLU as long as nobody else reads between."""
        layer, (value,) = self.modules[node.target], node.all_input_nodes
        pad, padding = rewrite.padding_of(layer)
        if pad is not None:
            with self.graph.inserting_before(node):
                name = f"{node.name}_padded"
                value = self.graph.create_node("call_function", pad, (value,), name=name)
        geometry = ConvGeometry(layer.stride, padding, layer.dilation, layer.groups)
        step = ConvStep(node.target, layer, value, node, geometry)
        while len(step.output.users) == 1 and not step.relu:
            (follower,) = step.output.users
            if not self._absorb(step, follower):
                break
            self.absorbed.add(step.output)
            step.output = follower
        self.grown[step.output] = step

    def _absorb(self, step: ConvStep, node: fx.Node) -> bool:
        if node in self.absorbed or node in self.grown:  # the sum that the other summand took
            return False
        module = self._module(node)
        if module is not None and is_hooked(module):
            return False
        durable = isinstance(step.layer, DurableConv2d)
        if rewrite.is_durable_norm(module) or (rewrite.is_frozen_norm(module) and not durable):
            if step.norm or step.residual:
                return False
            step.norm = module
            rewrite.split_norm(self.graph, node, self.modules)
            return True
        called = None if module is not None else node.target
        if type(module) is nn.ReLU or called in _RELU:
            step.relu = True
            return True
        if called in _ADD and len(node.args) == 2 and not node.kwargs and not step.residual:
            first, second = node.args
            other = second if first is step.output else first
            if not isinstance(other, fx.Node) or other is step.output:
                return False
            shapes = [summand.meta.get("shape") for summand in node.args]
            if shapes[0] != shapes[1] and None not in shapes:  # it broadcasts
                return False
            step.residual = other
            return True
        return False

    def _call(self, node: fx.Node) -> CallStep:
        layers: tuple[MaskedLayer, ...] = ()
        kwargs = dict(node.kwargs)
        call = node.target
        if node.op == "call_module":
            call = self.modules[node.target]
            layers = tuple(m for m in call.modules() if isinstance(m, MaskedLayer))
        elif node.op == "call_method":
            call = _Method(node.target)
        elif node.op == "get_attr":
            call = partial(operator.attrgetter(node.target), self.model)
        in_place = rewrite.changed_in_place(node, self.modules) is not None
        plain = rewrite.out_of_place(node, call) if in_place else None
        if plain is not None:
            call, in_place = plain, False
            kwargs.pop("inplace", None)
        return CallStep(call, (node.args, kwargs), node, in_place, layers)


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
            if step.layers:
                step.level = EXPANDED
            level[step.output] = step.level
    return level


def _link(steps: list[ConvStep | CallStep], level: dict[fx.Node, int], result: fx.Node) -> None:
    """Fills in what backward needs to know of every convolution; see :class:`ConvStep`."""
    maker = {step.output: step for step in steps if isinstance(step, ConvStep)}
    readers: dict[fx.Node, list[ConvStep | CallStep]] = {}
    for step in steps:
        for node in dict.fromkeys(step.reads):
            readers.setdefault(node, []).append(step)
    for step in maker.values():
        step.at_source = level[step.input] == SOURCE
        step.residual_learns = step.residual is not None and level[step.residual] == EXPANDED
        made = maker.get(step.residual)
        bare = made is not None and not made.relu and made.residual is None
        alone = readers.get(step.residual) == [step] and step.residual is not step.input
        if bare and alone and step.residual is not result:
            step.shortcut = made
        # Backward runs through the steps in reverse: the first reader sends its gradient last.
        if not step.at_source and readers[step.input][0] is step:
            step.below = maker.get(step.input)
    for step in steps:
        if isinstance(step, CallStep) and len(step.reads) == 1:
            (node,) = step.reads
            step.below = maker.get(node) if readers[node][0] is step else None
