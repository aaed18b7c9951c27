"""Tracing a network with torch.fx, and running the trace on an example for its shapes.

Leaves of a trace are masked layers and whatever holds none: what is inside of those is called as it
is, with any control flow.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as global_hooks

from wfnet.head import first_output
from wfnet.labels import forgetting
from wfnet.layers import MaskedLayer


class NotFusable(Exception):
    """Why a network (or a part of it) runs unfused; one sentence."""


def because(what: str, error: Exception) -> NotFusable:
    """Returns a :class:`NotFusable` that says ``what``, with the first sentence of ``error``."""
    reason = str(error).strip().partition("\n")[0].partition(". ")[0]
    return NotFusable(f"{what} ({reason})")


def is_hooked(module: nn.Module) -> bool:
    """Whether calling ``module`` does more than its forward: then it must be called as it is."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def global_hooks_of_torch() -> tuple[int, ...]:
    """Returns the ids of hooks that PyTorch calls for every module."""
    kinds = ("forward", "forward_pre", "backward", "backward_pre")
    return tuple(i for kind in kinds for i in getattr(global_hooks, f"_global_{kind}_hooks"))


def check_traceable(model: nn.Module, unhooked: Iterable[tuple[str, nn.Module]]) -> None:
    """Raises NotFusable for what a trace of ``model`` would lose: hooks, checkpoints.

    Args:
        unhooked: modules by name that may have no hooks of their own.
    """
    for name, module in unhooked:
        if is_hooked(module):
            raise NotFusable(f"{name or type(model).__name__!r} has hooks, which fusion would skip")
    if global_hooks_of_torch():
        raise NotFusable("PyTorch calls hooks for every module, which fusion would skip")
    if any(getattr(module, "grad_checkpointing", False) for module in model.modules()):
        raise NotFusable("the network checkpoints its activations")


def name_of(node: fx.Node) -> str:
    """Returns the name of the function, method or module that ``node`` calls."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


class _Logits(nn.Module):
    """A network as a function of images alone, whatever else it takes and returns."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return first_output(self.model(images), (Tensor, fx.Proxy))


class _Tracer(fx.Tracer):
    """Leaves are masked layers, what holds none, and what is ``opaque``."""

    def __init__(self, opaque: set[nn.Module]):
        super().__init__()
        self.opaque = opaque
        self.failed: nn.Module | None = None  # the innermost module that cannot be traced

    def path_of_module(self, mod: nn.Module) -> str:
        return super().path_of_module(mod).removeprefix("model").removeprefix(".")

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if m is self.root.model:
            return False
        if isinstance(m, MaskedLayer | nn.BatchNorm2d) or m in self.opaque:
            return True
        if isinstance(m, nn.Sequential):
            return False
        return not any(isinstance(inner, MaskedLayer) for inner in m.modules())

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> object:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or m
            raise


def trace(model: nn.Module) -> tuple[fx.Graph, fx.Node, NotFusable | None]:
    """Traces ``model``, with modules that have hooks, or that torch.fx cannot follow, as leaves.

    Returns:
        The graph from images to logits, its one input (the images; other inputs have their
        defaults), and the first thing that torch.fx could not follow.

    Raises:
        NotFusable: if torch.fx cannot follow the control flow of the network itself.
    """
    root = _Logits(model)
    opaque = {module for module in model.modules() if is_hooked(module)}
    first: NotFusable | None = None
    while True:
        tracer = _Tracer(opaque)
        try:
            graph = tracer.trace(root)
            break
        except Exception as error:
            first = first or because("torch.fx cannot trace it", error)
            if tracer.failed in (None, model) or tracer.failed in opaque:
                raise first from error
            opaque.add(tracer.failed)
    for node in graph.nodes:
        if node.op == "get_attr":
            node.target = _attribute_of(model, root, node.target)
    return graph, next(iter(graph.nodes)), first


def _attribute_of(model: nn.Module, root: _Logits, name: str) -> str:
    """The name in ``model`` of an attribute of its trace's root: constants are moved there."""
    if name.startswith("model."):
        return name.removeprefix("model.")
    number = 0
    while hasattr(model, f"_tensor_constant{number}"):
        number += 1
    setattr(model, f"_tensor_constant{number}", getattr(root, name))
    return f"_tensor_constant{number}"


def execution_order(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Returns ``names`` in the order of their first call in the forward pass of ``model``.

    A projection shortcut, say, is registered after the convolutions of its block but may run before
    them. Nothing is computed. Where the network cannot be traced (control flow that depends on
    data), the order of registration stays; so do names that are not called, at the end.

    Args:
        model: a plain classifier or the ``model`` of a :class:`wfnet.WFNet`.
        names: of modules of ``model``.
    """
    wanted, tracer = set(names), fx.Tracer()
    is_leaf = tracer.is_leaf_module
    tracer.is_leaf_module = lambda module, name: name in wanted or is_leaf(module, name)
    try:
        graph = tracer.trace(model)
    except Exception:  # whatever a forward pass raises when it is traced
        return list(names)
    called = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    found = [name for name in dict.fromkeys(called) if name in wanted]
    return found + [name for name in names if name not in set(found)]


class _Shapes(fx.Interpreter):
    def run_node(self, node: fx.Node) -> object:
        value = super().run_node(node)
        if isinstance(value, Tensor):
            node.meta["shape"], node.meta["dtype"] = value.shape, value.dtype
        return value


def run_example(model: nn.Module, graph: fx.Graph, images: Tensor) -> None:
    """Runs ``graph`` without labels on one of ``images`` ``[N, ...]``, twice side by side.

    Shapes and dtypes of tensors are in ``node.meta["shape"]`` and ``["dtype"]`` then.

    Raises:
        NotFusable: if that fails.
    """
    with torch.no_grad(), forgetting(None):
        try:
            _Shapes(model, graph=graph).run(images[:1].repeat(2, *[1] * (images.dim() - 1)))
        except Exception as error:
            raise because("running its graph failed", error) from error
