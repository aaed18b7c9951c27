"""Rewriting a traced network before it is planned, so that more of it folds.

No rewrite changes what the network computes. They take away what only stands between operations
that fold (dropout in evaluation mode, a norm layer with an activation inside), and they give
operations a form that a plan can run: one call per item of a split, a result of its own for what
the network computes in place.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from wfnet.durable_layers import DurableBatchNorm2d, DurableBatchNormAct2d, DurableConv2d
from wfnet.functional import same_padding
from wfnet.fusion.trace import NotFusable, is_hooked, name_of, run_example, splits
from wfnet.layers import MaskedLayer, WFConv2d, WFConv2dSame

# -- values changed in place ----------------------------------------------------------------------


_IN_PLACE_OPERATORS = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ipow: operator.pow,
    operator.imod: operator.mod,
    operator.ifloordiv: operator.floordiv,
}


def changed_in_place(node: fx.Node, modules: dict[str, nn.Module]) -> fx.Node | None:
    """The value that ``node`` overwrites with its result; None if it overwrites none."""
    name = name_of(node)
    if node.op == "call_module":
        module = modules[node.target]
        # An activation inside of a norm layer overwrites the layer's own result.
        norm = isinstance(module, nn.modules.batchnorm._BatchNorm | nn.GroupNorm | nn.LayerNorm)
        writes = not norm and any(getattr(m, "inplace", False) for m in module.modules())
    elif node.op == "call_function":
        writes = bool(node.kwargs.get("inplace")) or node.target in _IN_PLACE_OPERATORS
        if getattr(operator, name, None) is not node.target:  # operator.and_ writes nothing
            writes = writes or name.endswith("_")
    else:
        writes = node.op == "call_method" and name.endswith("_") and not name.endswith("__")
    return next(iter(node.all_input_nodes), None) if writes else None


def check_in_place(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Raises NotFusable where a value is changed in place that is read later, or that stays."""
    for node in graph.nodes:
        if node.target in (operator.setitem, operator.delitem) or isinstance(
            node.kwargs.get("out"), fx.Node
        ):
            raise NotFusable(f"{node.name!r} writes into a tensor that others read")
        changed = changed_in_place(node, modules)
        if changed is not None and (changed.op == "get_attr" or max(changed.users) is not node):
            raise _changed(node)


def _changed(node: fx.Node) -> NotFusable:
    return NotFusable(f"{node.name!r} changes a value in place that others read")


def run_example_in_place(
    model: nn.Module, graph: fx.Graph, modules: dict[str, nn.Module], images: Tensor
) -> None:
    """As :func:`wfnet.fusion.trace.run_example`, watching what is changed in place.

    Raises:
        NotFusable: also if a value is changed that is read later through another view of its
            memory.
    """

    def check_alone(node: fx.Node, values: dict[fx.Node, object]) -> None:
        changed = changed_in_place(node, modules)
        if changed is None:
            return
        for other, value in values.items():
            if other is not changed and any(
                _overlap(values[changed], tensor)
                for user in other.users
                if user > node
                for tensor in _read_by(user, value)
            ):
                raise _changed(node)

    run_example(model, graph, images, check_alone)


def _read_by(user: fx.Node, value: object) -> list[Tensor]:
    """The tensors of ``value`` that ``user`` reads: one, where it takes an item."""
    if isinstance(value, tuple | list) and user.target is operator.getitem:
        value = value[user.args[1]] if _is_constant(user.args[1]) else value
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _overlap(value: Tensor, other: Tensor) -> bool:
    """Whether two tensors have elements in common."""
    memory = value.untyped_storage()
    if memory.data_ptr() != other.untyped_storage().data_ptr():
        return False
    marks = torch.zeros(memory.nbytes() // value.element_size(), dtype=torch.bool)
    marks.as_strided(value.shape, value.stride(), value.storage_offset()).fill_(True)
    return bool(marks.as_strided(other.shape, other.stride(), other.storage_offset()).any())


@dataclass(frozen=True)
class Method:
    """A method of its first argument."""

    name: str

    def __call__(self, receiver: object, *args: object, **kwargs: object) -> object:
        return getattr(receiver, self.name)(*args, **kwargs)


@dataclass(frozen=True)
class _InDtypeOfFirst:
    """An operation whose result keeps the dtype of its first argument, as in place it would."""

    call: Callable[..., Tensor]

    def __call__(self, first: Tensor, *args: object, **kwargs: object) -> Tensor:
        result = self.call(first, *args, **kwargs)
        return result.to(first.dtype) if isinstance(first, Tensor) else result


def out_of_place(node: fx.Node, call: Callable[..., object]) -> Callable[..., object] | None:
    """``call`` with a result of its own instead of overwriting its input, None if there is none.

    Args:
        node: changes a value in place.
        call: what it calls, without its ``inplace`` keyword.
    """
    if node.op == "call_module":
        known = type(call).__module__.startswith(("torch.nn.", "timm.layers."))
        if not known or any(True for _ in call.children()):
            return None
        twin = copy.copy(call)  # the parameters are shared
        twin.inplace = False
        return twin
    name = name_of(node)
    if node.op == "call_method":
        plain = name[:-1]
        return _InDtypeOfFirst(Method(plain)) if callable(getattr(Tensor, plain, None)) else None
    if node.target in _IN_PLACE_OPERATORS:
        return _InDtypeOfFirst(_IN_PLACE_OPERATORS[node.target])
    if "inplace" in node.kwargs:
        return call if getattr(F, name, None) is call else None
    for home in (torch, F):
        plain = getattr(home, name[:-1], None)
        if getattr(home, name, None) is call and plain is not None:
            return _InDtypeOfFirst(plain)
    return None


# -- operations with several results --------------------------------------------------------------


@dataclass(frozen=True, eq=False)  # slices have no hash
class Item:
    """One of the tensors that a split returns: a view.

    Attributes:
        path: indices into the result, one after the other; all but the last are slices.
    """

    split: Callable[..., object]
    path: tuple[int | slice, ...]

    def __call__(self, *args: object, **kwargs: object) -> Tensor:
        value = self.split(*args, **kwargs)
        for index in self.path:
            value = value[index]
        return value


def take_items(graph: fx.Graph) -> None:
    """Replaces every operation that splits a tensor by one call for each item that is read.

    Raises:
        NotFusable: if somebody reads all items and their number is not known.
    """
    for node in list(graph.nodes):
        if splits(node):
            split = node.target if node.op == "call_function" else Method(node.target)
            _take_items(graph, node, _Split(node, split), ())


@dataclass(frozen=True)
class _Split:
    node: fx.Node
    call: Callable[..., object]

    def item(self, graph: fx.Graph, before: fx.Node, path: tuple[int | slice, ...]) -> fx.Node:
        with graph.inserting_before(before):
            return graph.create_node(
                "call_function",
                Item(self.call, path),
                self.node.args,
                self.node.kwargs,
                name=f"{self.node.name}_item",
            )


def _take_items(
    graph: fx.Graph,
    several: fx.Node,
    split: _Split,
    path: tuple[int | slice, ...],
) -> None:
    for user in list(several.users):
        index = user.args[1] if user.target is operator.getitem else None
        if isinstance(index, int):
            item = split.item(graph, user, (*path, index))
            user.replace_all_uses_with(item)
            graph.erase_node(user)
            item.meta = dict(user.meta)
        elif isinstance(index, slice) and _is_constant(index):
            _take_items(graph, user, split, (*path, index))
        else:
            count = several.meta.get("count")
            if count is None:
                raise NotFusable(
                    f"{user.name!r} reads all results of {split.node.name!r}, whose number is "
                    "not known"
                )
            items = [split.item(graph, user, (*path, i)) for i in range(count)]
            user.args = map_arg(user.args, lambda n, items=items: items if n is several else n)
            user.kwargs = map_arg(user.kwargs, lambda n, items=items: items if n is several else n)
    if not several.users:
        graph.erase_node(several)


def _is_constant(index: object) -> bool:
    """Whether ``index`` is a basic index (a view) that no computed value goes into."""
    if isinstance(index, tuple):
        return all(_is_constant(part) for part in index)
    if isinstance(index, slice):
        return all(
            bound is None or isinstance(bound, int)
            for bound in (index.start, index.stop, index.step)
        )
    whole = isinstance(index, int) and not isinstance(index, bool)
    return whole or index is None or index is Ellipsis


def is_part(node: fx.Node) -> bool:
    """Whether the value of ``node`` is a view of some elements of one other value."""
    if len(node.all_input_nodes) != 1 or node.args[0] is not node.all_input_nodes[0]:
        return False
    if isinstance(node.target, Item):
        return True
    return node.target is operator.getitem and _is_constant(node.args[1])


# -- modules that do nothing, norms, padding ------------------------------------------------------

_IDLE = {
    "timm.layers.drop.DropPath",
    "timm.layers.drop.DropBlock2d",
    "torchvision.ops.drop_block.DropBlock2d",
    "torchvision.ops.stochastic_depth.StochasticDepth",
}


def title_of(module: nn.Module) -> str:
    """The type of ``module``, of a package that need not be installed."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def is_idle(module: nn.Module) -> bool:
    """Whether ``module`` returns what it is given: identities, and dropout in evaluation mode."""
    if is_hooked(module):
        return False
    if isinstance(module, nn.Identity):
        return True
    drops = isinstance(module, nn.modules.dropout._DropoutNd) or title_of(module) in _IDLE
    return drops and not module.training


def erase_idle(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Removes modules that return what they are given: they would separate what folds."""
    for node in list(graph.nodes):
        idle = node.op == "call_module" and is_idle(modules[node.target])
        if idle and len(node.all_input_nodes) == 1 and len(node.args) == 1 and not node.kwargs:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


# Their weight, bias, running_mean, running_var and eps make the map of nn.BatchNorm2d. Those of
# timm drop and activate behind it, with modules `drop` and `act`.
_NORMS = {
    "timm.layers.norm_act.BatchNormAct2d",
    "timm.layers.norm_act.FrozenBatchNormAct2d",
    "torchvision.ops.misc.FrozenBatchNorm2d",
}


def is_frozen_norm(module: nn.Module | None) -> bool:
    """Whether ``module`` is a constant affine map per channel, then ``drop`` and ``act`` if any."""
    if isinstance(module, NormSlice):
        return True
    if module is None or module.training or "forward" in vars(module) or is_hooked(module):
        return False
    if getattr(module, "running_var", None) is None:
        return False
    plain = (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward)
    return title_of(module) in _NORMS or type(module).forward in plain


def split_norm(graph: fx.Graph, node: fx.Node, modules: dict[str, nn.Module]) -> None:
    """Gives what a norm layer does behind its affine map nodes of its own; ``node`` is the map.

    From here on ``node`` must not be called as the module it names.
    """
    users, value = list(node.users), node
    for name in ("drop", "act"):
        inner = getattr(modules[node.target], name, None)
        if inner is None or is_idle(inner):
            continue
        target = f"{node.target}.{name}"
        modules[target] = inner
        with graph.inserting_after(value):
            value = graph.create_node("call_module", target, (value,))
        value.meta = dict(node.meta)
    for user in users:
        user.replace_input_with(node, value)


@dataclass(frozen=True)
class NormSlice:
    """Some channels of a frozen norm."""

    norm: nn.Module
    channels: slice

    def __getattr__(self, name: str) -> Tensor | float | None:
        if name not in ("weight", "bias", "running_mean", "running_var", "eps"):
            raise AttributeError(name)
        value = getattr(self.norm, name)
        return value[self.channels] if isinstance(value, Tensor) else value


def distribute_norms(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Moves every norm behind a concatenation of convolutions in front of it, in slices.

    The convolutions of a mixed convolution have one norm in common; each folds its own channels.
    """
    for node in list(graph.nodes):
        if node.op != "call_module" or not is_frozen_norm(modules[node.target]):
            continue
        (joined,) = node.all_input_nodes
        parts = _convolutions_joined(joined, modules)
        if parts is None:
            continue
        split_norm(graph, node, modules)
        start = 0
        for part in parts:
            stop = start + modules[part.target].out_channels
            target = f"{node.target}[{start}:{stop}]"
            modules[target] = NormSlice(modules[node.target], slice(start, stop))
            with graph.inserting_after(part):
                normed = graph.create_node(
                    "call_module", target, (part,), name=f"{node.name}_{start}"
                )
            joined.replace_input_with(part, normed)
            normed.meta = dict(part.meta)
            start = stop
        node.replace_all_uses_with(joined)
        graph.erase_node(node)


def _convolutions_joined(node: fx.Node, modules: dict[str, nn.Module]) -> list[fx.Node] | None:
    """The convolutions whose channels ``node`` concatenates, if it joins those and nothing else."""
    if node.target not in (torch.cat, torch.concat) or len(node.users) != 1:
        return None
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    parts = node.all_input_nodes
    alone = dim == 1 and list(node.args[0]) == parts and all(len(p.users) == 1 for p in parts)
    fold = alone and all(
        p.op == "call_module"
        and isinstance(modules[p.target], MaskedLayer)
        and folds(modules[p.target])
        for p in parts
    )
    return parts if fold else None


def folds(layer: nn.Module) -> bool:
    """Whether ``layer`` is a convolution that a plan can fold with what follows."""
    kinds = (WFConv2d, WFConv2dSame, DurableConv2d)
    plain = type(layer) is nn.Conv2d and "forward" not in vars(layer)
    return (plain or type(layer) in kinds) and not is_hooked(layer)


def is_durable_norm(module: nn.Module | None) -> bool:
    """Whether ``module`` is a norm with durable gates, then ``drop`` and ``act`` if any."""
    known = type(module) in (DurableBatchNorm2d, DurableBatchNormAct2d)
    return known and not is_hooked(module) and not module.training


@dataclass(frozen=True)
class Padded:
    """The input of a convolution with the padding applied that is not the same zeros all around."""

    layer: nn.Conv2d

    def __call__(self, x: Tensor) -> Tensor:
        x, padding = self._padded(self.layer, x)
        if padding == "same":
            high, wide = same_padding(self.layer.kernel_size, self.layer.dilation)
            x = F.pad(x, [0, wide % 2, 0, high % 2])
        return x

    @property
    def needed(self) -> bool:
        """Whether it may be another tensor than the input."""
        layer = self.layer
        return self._all or (
            layer.padding == "same"
            and any(size % 2 for size in same_padding(layer.kernel_size, layer.dilation))
        )

    @property
    def remaining(self) -> tuple[int, int]:
        """Zero padding that is left to the convolution."""
        layer = self.layer
        if self._all or layer.padding == "valid":
            return 0, 0
        if layer.padding == "same":
            high, wide = same_padding(layer.kernel_size, layer.dilation)
            return high // 2, wide // 2
        return layer.padding

    @property
    def _all(self) -> bool:
        """Whether nothing is left to the convolution."""
        layer = self.layer
        return layer.padding_mode != "zeros" or self._padded is not WFConv2d._padded

    @property
    def _padded(self) -> Callable[..., tuple]:
        return getattr(type(self.layer), "_padded", WFConv2d._padded)
