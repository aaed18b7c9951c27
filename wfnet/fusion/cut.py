"""Cutting a traced network before its first masked layer.

The part before the cut takes images; the rest takes a run, which it asks for masked layers and for
tensors of the cut as samples see them (:class:`Samples`), and the tensors that cross. A masked
layer is called together with the views that are first taken of its result
(:class:`wfnet.fusion.views.MaskedCall`).
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, fx, nn
from torch.autograd.graph import saved_tensors_hooks

from wfnet.durable_layers import DurableLayer
from wfnet.fusion.plan import EXPANDED, SOURCE
from wfnet.fusion.rewrite import changed_in_place, erase_idle
from wfnet.fusion.tokens import drop_unread_tokens
from wfnet.fusion.trace import NotFusable, check_traceable, run_example, trace
from wfnet.fusion.views import MaskedCall, is_view
from wfnet.layers import MaskedLayer, WFLinear


class Samples(Protocol):
    """What the rest asks of a run (:class:`wfnet.fusion.transformer.Samples`)."""

    watches: bool

    def expanded(self, x: Tensor) -> Tensor: ...

    def shaped(self, x: Tensor) -> Tensor: ...

    def masked(self, call: MaskedCall, x: Tensor, sizes: tuple) -> tuple: ...

    def pack(self, t: Tensor) -> tuple: ...

    def unpack(self, packed: tuple) -> Tensor: ...


def split_at_first_mask(
    model: nn.Module, images: Tensor
) -> tuple[fx.GraphModule, fx.GraphModule, list[MaskedLayer]]:
    """The network before its first masked layer, from there on, and its masked layers.

    The rest takes a run, which it asks for masked layers and for tensors of the cut as samples see
    them (:class:`Samples`), and the tensors that cross the cut.

    Args:
        images: an example ``[N, C, H, W]``; the network is run on it, without labels.

    Raises:
        NotFusable: if the network cannot be traced, has hooks or a second input, or masks anything
            but linear maps.
    """
    check_traceable(model, model.named_modules())
    graph, image = _graph_of(model)
    modules = dict(model.named_modules())
    erase_idle(graph, modules)
    run_example(model, graph, images)
    drop_unread_tokens(graph, modules)
    level: dict[fx.Node, int] = {image: SOURCE}
    called: set[nn.Module] = set()
    for node in graph.nodes:
        masks = node.op == "call_module" and isinstance(modules[node.target], MaskedLayer)
        below = max((level.get(read, 0) for read in node.all_input_nodes), default=0)
        if node is not image:
            level[node] = EXPANDED if masks else below
        if masks:
            called.add(modules[node.target])
    for name, module in modules.items():
        if module in called and type(module).forward is not WFLinear.forward:
            durable = isinstance(module, DurableLayer)
            what = "has durable gates, not fused here" if durable else "is no linear map"
            raise NotFusable(f"{name!r} {what}")
    layers = [module for module in modules.values() if module in called]
    cut = _Cut(graph, level)
    return cut.prefix(model), cut.rest(model, layers), layers


def _graph_of(model: nn.Module) -> tuple[fx.Graph, fx.Node]:
    """The traced network, whose one input is the images; other inputs have their defaults."""
    others = list(inspect.signature(model.forward).parameters.values())[1:]
    constants = {
        p.name: None if p.default is p.empty else p.default
        for p in others
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }
    graph = trace(model, constants)
    image, *extra = [node for node in graph.nodes if node.op == "placeholder"]
    for node in extra:
        _erase_assertions(graph, node)
    return graph, image


def _erase_assertions(graph: fx.Graph, node: fx.Node) -> None:
    """Removes an input that fx keeps only to assert that it has the value of the trace."""
    for user in list(node.users):
        if not user.users and "assert" not in getattr(user.target, "__name__", ""):
            raise NotFusable(f"its forward reads another input than the images in {user.name!r}")
        _erase_assertions(graph, user)
    graph.erase_node(node)


class _Cut:
    """Copies the nodes of a graph to both sides of the cut."""

    def __init__(self, graph: fx.Graph, level: dict[fx.Node, int]):
        self.graph, self.level = graph, level
        self.late = {n for n in graph.nodes if level[n] == EXPANDED or n.op == "output"}
        # A size of the batch counts source images before the cut: behind it, sizes are read anew.
        self.crossing: list[fx.Node] = []
        self.again: set[fx.Node] = set()
        for node in graph.nodes:
            if node in self.late:
                for read in node.all_input_nodes:
                    self._cross(read)

    def _cross(self, node: fx.Node) -> None:
        if node in self.late or node in self.again or node in self.crossing:
            return
        if "shape" in node.meta and self.level[node] == SOURCE:
            self.crossing.append(node)
            return
        self.again.add(node)
        for read in node.all_input_nodes:
            self._cross(read)

    def prefix(self, model: nn.Module) -> fx.GraphModule:
        graph, copies = fx.Graph(), {}
        for node in self.graph.nodes:
            if node not in self.late:
                copies[node] = graph.node_copy(node, lambda n: copies[n])
        graph.output(tuple(copies[node] for node in self.crossing))
        module = fx.GraphModule(model, graph)
        module.graph.eliminate_dead_code()
        module.recompile()
        return module

    def rest(self, model: nn.Module, layers: list[MaskedLayer]) -> fx.GraphModule:
        graph = fx.Graph()
        run = graph.placeholder("run")
        raw = {node: graph.placeholder(f"crossing_{i}") for i, node in enumerate(self.crossing)}
        copies: dict[fx.Node, fx.Node] = {}
        modules = dict(model.named_modules())
        changes = {changed_in_place(node, modules) for node in self.late} - {None}
        seen: dict[tuple[str, fx.Node], fx.Node] = {}  # tensors of the cut as samples see them

        def read(node: fx.Node, how: str) -> fx.Node:
            if node not in raw:
                return copies[node]
            if (how, node) not in seen:
                seen[how, node] = graph.call_method(how, (run, raw[node]))
            return seen[how, node]

        regions: dict[fx.Node, _Region] = {}  # by the values inside, until one is wanted outside

        def leave(region: _Region) -> None:
            x = region.input
            source = raw.get(x)
            index = layers.index(modules[region.root.target])
            call = region.function(index, x in raw, changes.isdisjoint(region.members))
            arguments = [copies[x] if source is None else source]
            arguments += [read(n, "expanded") for n in region.externals]
            made = graph.call_function(call, (run, *arguments))
            for i, node in enumerate(region.results):
                copies[node] = graph.call_function(operator.getitem, (made, i))
                of_masks.add(node)
            for node in region.members:
                del regions[node]

        of_masks: set[fx.Node] = set()  # results of masked layers, and views of them
        for node in self.graph.nodes:
            if node not in self.late and node not in self.again:
                continue
            module = modules.get(node.target) if node.op == "call_module" else None
            inside = dict.fromkeys(regions[n] for n in node.all_input_nodes if n in regions)
            if len(inside) == 1 and is_view(node):
                (region,) = inside
                region.members.append(node)
                regions[node] = region
                continue
            for region in inside:
                leave(region)
            if isinstance(module, MaskedLayer):
                regions[node] = _Region(node)
                continue
            how = "shaped" if node in self.again else "expanded"
            copies[node] = copy = graph.node_copy(node, lambda n, how=how: read(n, how))
            if of_masks.intersection(node.all_input_nodes) and node.op != "output":
                if is_view(node):
                    of_masks.add(node)
                else:
                    _watch(copy, run, module)
        return fx.GraphModule(model, graph)


@dataclass(eq=False)
class _Region:
    """A masked layer and the views of its result that come before anything else is done with it."""

    root: fx.Node

    def __post_init__(self) -> None:
        self.members = [self.root]

    @property
    def input(self) -> fx.Node:
        (x,) = self.root.all_input_nodes
        return x

    @property
    def externals(self) -> list[fx.Node]:
        """Sizes and the like that the views read."""
        read = [n for member in self.members[1:] for n in member.all_input_nodes]
        return [n for n in dict.fromkeys(read) if n not in self.members]

    @property
    def results(self) -> list[fx.Node]:
        """What is read from outside."""
        return [n for n in self.members if any(user not in self.members for user in n.users)]

    def function(self, index: int, at_source: bool, constant: bool) -> Callable[..., tuple]:
        """A run, the layer's input and :attr:`externals` to :attr:`results`."""
        graph = fx.Graph()
        copies = {self.root: graph.placeholder("y")}
        for node in self.externals:
            copies[node] = graph.placeholder(node.name)
        for node in self.members[1:]:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
        graph.output(tuple(copies[node] for node in self.results))
        call = MaskedCall(index, at_source, constant, fx.GraphModule({}, graph).forward)

        def masked(run: Samples, x: Tensor, *sizes: object) -> tuple:
            return run.masked(call, x, sizes)

        return _named(masked, f"masked_{self.root.name}")


def _named(function: Callable, name: str) -> Callable:
    """The code that torch.fx writes calls a function by its name, which must be one of its own."""
    function.__name__ = name
    return function


def _watch(node: fx.Node, run: fx.Node, module: nn.Module | None) -> None:
    """Lets the run see what autograd saves in the operation of ``node``."""
    call = node.target if module is None else module
    if node.op == "call_method":
        call = getattr(Tensor, node.target)

    def watched(run: Samples, *args: object, **kwargs: object) -> object:
        if not run.watches:
            return call(*args, **kwargs)
        with saved_tensors_hooks(run.pack, run.unpack):
            return call(*args, **kwargs)

    node.op, node.args = "call_function", (run, *node.args)
    node.target = _named(watched, f"watched_{node.name}")
