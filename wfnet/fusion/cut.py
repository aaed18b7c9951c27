"""Cutting a traced network before its first masked layer.

:func:`split_at_features` cuts where one tensor crosses: the part before it takes images, and the
rest is a network like any other, of features instead of images.

:func:`split_at_first_mask` cuts right before the first mask, where several may cross. The part
before the cut takes images; the rest takes a run, which it asks for masked layers and for
tensors of the cut as samples see them (:class:`wfnet.fusion.transformer.Samples`), and the tensors
that cross. A masked layer is called together with the views that are first taken of its result
(query, key and value, say): a compiler then computes them again in backward.
"""

import operator
from collections.abc import Callable

from torch import Tensor, fx, nn

from wfnet.durable_layers import DurableBatchNorm2d, DurableLayer
from wfnet.fusion.plan import EXPANDED, SOURCE
from wfnet.fusion.rewrite import changed_in_place, check_in_place, erase_idle
from wfnet.fusion.trace import NotFusable, check_traceable, name_of, run_example, trace
from wfnet.layers import MaskedLayer, WFLinear

# Operations whose result is a view of their first argument, or a copy that stands for it.
_VIEWS = frozenset(
    ("chunk", "contiguous", "expand", "flatten", "getitem", "movedim", "narrow", "permute")
    + ("reshape", "select", "split", "squeeze", "swapaxes", "tensor_split", "transpose")
    + ("unbind", "unflatten", "unsqueeze", "view")
)


def split_at_features(
    model: nn.Module, images: Tensor
) -> tuple[fx.GraphModule, fx.GraphModule, str] | None:
    """The frozen part of a network, the rest as a network of its result, and where it was cut.

    The cut is the last tensor in front of all masks that everything behind it is computed from.
    Both parts share the modules of ``model``; those of the rest are in the same order.

    Args:
        images: an example ``[N, C, H, W]``; the network is run on it, without labels.

    Returns:
        ``[N, C, H, W]`` to features ``[N, ...]``; features to what ``model`` returns; the name of
        the operation that makes features. None where the images themselves are that tensor.

    Raises:
        NotFusable: if the network cannot be traced, has hooks or a second input, or changes
            tensors in place that others read.
    """
    graph, image, modules = _traced(model)
    check_in_place(graph, modules)
    run_example(model, graph, images)
    late = _behind_masks(graph, modules)
    result = next(iter(reversed(graph.nodes)))
    for at in reversed(graph.nodes):
        shape = at.meta.get("shape")
        if at in late or at is image or not shape or shape[0] != 2:
            continue
        if not at.meta["dtype"].is_floating_point:
            continue
        front, rest = _needed(at), _needed(result, stop=at)
        split = any(changed_in_place(n, modules) in front for n in graph.nodes if n not in front)
        if image not in rest and image in front and not split:
            break
    else:
        return None
    parts = []
    for wanted, given in ((front, None), (rest, at)):
        part, copies = fx.Graph(), {}
        if given is not None:
            copies[given] = part.placeholder("features")
        for node in graph.nodes:
            if node in wanted and node not in copies:
                copies[node] = part.node_copy(node, lambda n, copies=copies: copies[n])
        if given is None:
            part.output(copies[at])
        parts.append(fx.GraphModule(model, part, type(model).__name__))
        _in_order_of(model, parts[-1])
    return *parts, at.name


def _traced(model: nn.Module) -> tuple[fx.Graph, fx.Node, dict[str, nn.Module]]:
    """The graph of a network that is traced as a whole, its images, and its modules by name."""
    check_traceable(model, model.named_modules())
    graph, image, failure = trace(model)
    if failure is not None:
        raise failure
    return graph, image, dict(model.named_modules())


def _behind_masks(graph: fx.Graph, modules: dict[str, nn.Module]) -> set[fx.Node]:
    """Nodes that a mask decides about, and convolutions that fold with a masked norm."""
    late: set[fx.Node] = set()
    for node in graph.nodes:
        module = modules[node.target] if node.op == "call_module" else None
        masks = module is not None and any(isinstance(m, MaskedLayer) for m in module.modules())
        if masks or node.op == "output" or not late.isdisjoint(node.all_input_nodes):
            late.add(node)
        if isinstance(module, DurableBatchNorm2d):
            late.update(node.all_input_nodes)
    return late


def _needed(result: fx.Node, stop: fx.Node | None = None) -> set[fx.Node]:
    """What ``result`` is computed from, itself included, where ``stop`` is given."""
    found: set[fx.Node] = set()
    waiting = [result]
    while waiting:
        node = waiting.pop()
        if node is not stop and node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found


def _in_order_of(model: nn.Module, part: nn.Module) -> None:
    """Puts the modules of ``part`` in the order that they have in ``model``."""
    part._modules = {n: part._modules[n] for n in model._modules if n in part._modules}
    for name, module in part._modules.items():
        if module is not model._modules[name]:
            _in_order_of(model._modules[name], module)


def split_at_first_mask(
    model: nn.Module, images: Tensor
) -> tuple[fx.GraphModule, fx.GraphModule, list[MaskedLayer]]:
    """The network before its first masked layer, from there on, and its masked layers.

    The rest takes a run and the tensors that cross the cut.

    Args:
        images: an example ``[N, C, H, W]``; the network is run on it, without labels.

    Raises:
        NotFusable: if the network cannot be traced, has hooks or a second input, or masks anything
            but linear maps.
    """
    graph, image, modules = _traced(model)
    erase_idle(graph, modules)
    run_example(model, graph, images)
    level: dict[fx.Node, int] = {image: SOURCE}
    called: dict[fx.Node, MaskedLayer] = {}
    for node in graph.nodes:
        module = modules[node.target] if node.op == "call_module" else None
        if isinstance(module, MaskedLayer):
            called[node] = module
        if node is not image:
            below = max((level.get(read, 0) for read in node.all_input_nodes), default=0)
            level[node] = EXPANDED if node in called else below
    layers = [module for module in modules.values() if module in called.values()]
    for layer in layers:
        if type(layer).forward is not WFLinear.forward:
            durable = isinstance(layer, DurableLayer)
            what = "has durable gates, not fused here" if durable else "is no linear map"
            raise NotFusable(f"{layer.layer_name!r} {what}")
    cut = _Cut(graph, level)
    positions = {node: layers.index(layer) for node, layer in called.items()}
    return cut.prefix(model), cut.rest(model, positions), layers


class _Cut:
    """Copies the nodes of a graph to both sides of the cut.

    Attributes:
        crossing: tensors of source images that are read behind the cut.
        again: what else is read there: a size of the batch counts source images before the cut, so
            that it is read anew.
    """

    def __init__(self, graph: fx.Graph, level: dict[fx.Node, int]):
        self.graph, self.level = graph, level
        self.late = {n for n in graph.nodes if level[n] == EXPANDED or n.op == "output"}
        self.crossing: dict[fx.Node, None] = {}
        self.again: set[fx.Node] = set()
        for node in graph.nodes:
            if node in self.late:
                self._cross(node)

    def _cross(self, reader: fx.Node) -> None:
        for node in reader.all_input_nodes:
            if "shape" in node.meta and self.level[node] == SOURCE:
                self.crossing[node] = None
            elif node not in self.late and node not in self.again:
                self.again.add(node)
                self._cross(node)

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

    def rest(self, model: nn.Module, masked: dict[fx.Node, int]) -> fx.GraphModule:
        """From a run and the tensors that cross; ``masked``: indices of layers by their calls."""
        graph = fx.Graph()
        run = graph.placeholder("run")
        raw = {node: graph.placeholder(f"crossing_{i}") for i, node in enumerate(self.crossing)}
        copies: dict[fx.Node, fx.Node] = {}
        seen: dict[tuple[str, fx.Node], fx.Node] = {}  # tensors of the cut as samples see them

        def read(node: fx.Node, how: str) -> fx.Node:
            if node not in raw:
                return copies[node]
            if (how, node) not in seen:
                seen[how, node] = graph.call_method(how, (run, raw[node]))
            return seen[how, node]

        inside: set[fx.Node] = set()
        for node in self.graph.nodes:
            if node in inside:
                continue
            if node in masked:
                (x,) = node.all_input_nodes
                region = self._with_views(node)
                inside.update(region)
                sizes = dict.fromkeys(n for v in region[1:] for n in v.all_input_nodes)
                sizes = [size for size in sizes if size not in inside]
                results = [n for n in region if not inside.issuperset(n.users)]
                call = _masked_call(masked[node], x in raw, region, sizes, results)
                given = raw[x] if x in raw else copies[x]
                made = graph.call_function(call, (run, given, *(copies[size] for size in sizes)))
                for i, result in enumerate(results):
                    copies[result] = graph.call_function(operator.getitem, (made, i))
            elif node in self.late or node in self.again:
                how = "shaped" if node in self.again else "expanded"
                copies[node] = graph.node_copy(node, lambda n, how=how: read(n, how))
        return fx.GraphModule(model, graph)

    def _with_views(self, masked: fx.Node) -> list[fx.Node]:
        """A masked layer's call and the views of its result, as far as sizes are known before."""
        region = [masked]
        for node in self.graph.nodes:
            reads = node.all_input_nodes
            view = node.op != "call_module" and name_of(node) in _VIEWS
            known = all(n in region or ("shape" not in n.meta and n < masked) for n in reads)
            if view and known and reads and reads[0] in region:
                region.append(node)
        return region


def _masked_call(
    index: int, at_source: bool, region: list[fx.Node], sizes: list[fx.Node], results: list[fx.Node]
) -> Callable[..., tuple]:
    """A function of a run, a layer's input and ``sizes`` that returns views of its result."""
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in [region[0], *sizes]}
    for node in region[1:]:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.output(tuple(copies[node] for node in results))
    views = fx.GraphModule({}, graph).forward

    def masked(run: object, x: Tensor, *sizes: object) -> tuple:
        return run.masked(index, x, at_source, lambda y: views(y, *sizes))

    masked.__name__ = f"masked_{region[0].name}"  # the code that torch.fx writes calls it so
    return masked
