"""What of a traced network folds, and rewriting the trace so that more of it does.

No rewrite changes what the network computes. They take away what only stands between operations
that fold: dropout in evaluation mode, and norm layers with an activation inside.
"""

import copy
import operator
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, fx, nn

from wfnet.durable_layers import DurableBatchNorm2d, DurableBatchNormAct2d, DurableConv2d
from wfnet.functional import same_padding
from wfnet.fusion.trace import NotFusable, is_hooked, name_of
from wfnet.layers import WFConv2d, WFConv2dSame

# -- values changed in place ----------------------------------------------------------------------

_IN_PLACE_OPERATORS = ("iadd", "isub", "imul", "itruediv", "ipow", "imod", "ifloordiv")


def changed_in_place(node: fx.Node, modules: dict[str, nn.Module]) -> fx.Node | None:
    """The value that ``node`` overwrites with its result; None if it overwrites none."""
    name = name_of(node)
    if node.op == "call_module":
        module = modules[node.target]
        # An activation inside of a norm layer overwrites the layer's own result.
        norm = isinstance(module, nn.modules.batchnorm._BatchNorm | nn.GroupNorm | nn.LayerNorm)
        writes = not norm and any(getattr(m, "inplace", False) for m in module.modules())
    elif getattr(operator, name, None) is node.target:  # operator.and_ writes nothing
        writes = name in _IN_PLACE_OPERATORS
    else:
        named = name.endswith("_") and not name.endswith("__")
        writes = bool(node.kwargs.get("inplace")) or named
    return next(iter(node.all_input_nodes), None) if writes else None


def check_in_place(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Raises NotFusable where a value is changed in place that is read later, or that stays.

    Who changes a value through another view of its memory is found when the plan is checked.
    """
    for node in graph.nodes:
        if node.target in (operator.setitem, operator.delitem) or isinstance(
            node.kwargs.get("out"), fx.Node
        ):
            raise NotFusable(f"{node.name!r} writes into a tensor that others read")
        changed = changed_in_place(node, modules)
        if changed is not None and (changed.op == "get_attr" or max(changed.users) is not node):
            raise NotFusable(f"{node.name!r} changes a value in place that others read")


def out_of_place(node: fx.Node, call: Callable[..., object]) -> Callable[..., object] | None:
    """What ``node`` calls with a result of its own, without ``inplace``; None if not known."""
    if node.op == "call_module":
        known = type(call).__module__.startswith(("torch.nn.", "timm.layers."))
        if not known or any(True for _ in call.children()):
            return None
        twin = copy.copy(call)  # the parameters are shared
        twin.inplace = False
        return twin
    functional = "inplace" in node.kwargs and getattr(F, name_of(node), None) is call
    return call if functional else None


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
    drops = isinstance(module, nn.modules.dropout._DropoutNd) or title_of(module) in _IDLE
    return isinstance(module, nn.Identity) or (drops and not module.training)


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
    if module is None or module.training or "forward" in vars(module) or is_hooked(module):
        return False
    if getattr(module, "running_var", None) is None:
        return False
    plain = (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward)
    return title_of(module) in _NORMS or type(module).forward in plain


def is_durable_norm(module: nn.Module | None) -> bool:
    """Whether ``module`` is a norm with durable gates, then ``drop`` and ``act`` if any."""
    known = type(module) in (DurableBatchNorm2d, DurableBatchNormAct2d)
    return known and not is_hooked(module) and not module.training


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


def folds(layer: nn.Module) -> bool:
    """Whether ``layer`` is a convolution that a plan can fold with what follows."""
    kinds = (WFConv2d, WFConv2dSame, DurableConv2d)
    plain = type(layer) is nn.Conv2d and "forward" not in vars(layer)
    return (plain or type(layer) in kinds) and not is_hooked(layer)


def padding_of(layer: nn.Conv2d) -> tuple[Callable[[Tensor], Tensor] | None, tuple[int, int]]:
    """What pads the input of ``layer``, if that is not the same zeros all around; what is left."""
    own = getattr(type(layer), "_padded", WFConv2d._padded)
    if layer.padding_mode != "zeros" or own is not WFConv2d._padded:
        return lambda x: own(layer, x)[0], (0, 0)
    if layer.padding == "valid":
        return None, (0, 0)
    if layer.padding != "same":
        return None, layer.padding
    high, wide = same_padding(layer.kernel_size, layer.dilation)
    uneven = [0, wide % 2, 0, high % 2]
    return (lambda x: F.pad(x, uneven)) if any(uneven) else None, (high // 2, wide // 2)
