"""Networks that mask linear maps (transformers): a prefix per source image, and a compiled rest.

:func:`split_at_first_mask` traces the network with torch.fx and cuts it before the first masked
layer: what comes before (patch embedding, positions, the first norm) runs once per source image and
is not differentiated; the tensors that cross the cut are expanded to the samples there. The rest is
the network's own operations, with the gate in the epilogue of the qkv product and PyTorch's
scaled-dot-product attention; it can be compiled as one graph, with forget labels as an input, so
that new labels never recompile.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, fx, nn

from wfnet import gates
from wfnet.fusion.plan import EXPANDED, SOURCE, NotFusable, check_traceable, trace
from wfnet.labels import Selection, forgetting
from wfnet.layers import MaskedLayer


class TrunkNetwork:
    """Runs a network in two parts: ``prefix`` per source image, ``rest`` per sample.

    Args:
        prefix: ``[N, C, H, W]`` images to the tensors that cross the cut.
        rest: those tensors, one row per sample, to logits.
        compiled: compile the rest.
    """

    def __init__(self, prefix: nn.Module, rest: nn.Module, compiled: bool):
        self.prefix = prefix
        self.rest = rest
        self.compiled = compiled
        self._run = torch.compile(self._forward, fullgraph=True) if compiled else self._forward

    def _forward(self, rows: Tensor, crossing: tuple[Tensor, ...]) -> Tensor:
        with forgetting(Selection(rows)):
            return self.rest(*crossing)

    def __call__(self, images: Tensor, rows: Tensor, source: Tensor | None) -> Tensor:
        """Logits ``[B, K]``; images ``[N, C, H, W]``, labels ``[B, J]``, ``source`` ``[B]``."""
        with torch.no_grad():
            crossing = self.prefix(images)
        return self._run(rows, tuple(gates.gather_samples(t, source) for t in crossing))

    def describe(self) -> str:
        """One line for the log: what runs how."""
        once = sum(node.op not in ("placeholder", "output") for node in self.prefix.graph.nodes)
        how = "compiled" if self.compiled else "as it is"
        return f"{once} operations before the first mask run once per image, the rest runs {how}"


def split_at_first_mask(model: nn.Module, images: Tensor) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The network before its first masked layer, and from there on.

    Args:
        images: an example ``[N, C, H, W]``; the part before the first mask is run on it.

    Raises:
        NotFusable: if the network cannot be traced, or has hooks or a second input.
    """
    check_traceable(model)
    graph, image = _graph_of(model)
    modules = dict(model.named_modules())
    level: dict[fx.Node, int] = {image: SOURCE}
    for node in graph.nodes:
        masks = node.op == "call_module" and isinstance(modules[node.target], MaskedLayer)
        below = max((level.get(read, 0) for read in node.all_input_nodes), default=0)
        if node is not image:
            level[node] = EXPANDED if masks else below
    tensors = _tensors_before(model, graph, level, images)
    cut = _Cut(graph, level, tensors)
    return cut.prefix(model), cut.rest(model)


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


def _tensors_before(
    model: nn.Module, graph: fx.Graph, level: dict[fx.Node, int], images: Tensor
) -> set[fx.Node]:
    """Values before the first mask that are tensors; the others are sizes and the like."""
    found: set[fx.Node] = set()

    class Watch(fx.Interpreter):
        def run_node(self, node: fx.Node) -> object:
            if level[node] == EXPANDED or node.op == "output":
                return None
            value = super().run_node(node)
            if isinstance(value, Tensor):
                found.add(node)
            return value

    with torch.no_grad():
        try:
            Watch(fx.GraphModule(model, graph)).run(images)
        except Exception as error:
            raise NotFusable(f"running its first layers failed ({error})") from error
    return found


class _Cut:
    """Copies the nodes of a graph to both sides of the cut."""

    def __init__(self, graph: fx.Graph, level: dict[fx.Node, int], tensors: set[fx.Node]):
        self.graph, self.level, self.tensors = graph, level, tensors
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
        if node in self.tensors and self.level[node] == SOURCE:
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

    def rest(self, model: nn.Module) -> fx.GraphModule:
        graph = fx.Graph()
        copies = {node: graph.placeholder(f"crossing_{i}") for i, node in enumerate(self.crossing)}
        for node in self.graph.nodes:
            if node in self.late or node in self.again:
                copies[node] = graph.node_copy(node, lambda n: copies[n])
        return fx.GraphModule(model, graph)
