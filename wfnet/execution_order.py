"""Layers in the order in which they run, which is not always that in which they were registered."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx, nn


def execution_order(model: nn.Module, names: Sequence[str]) -> list[str]:
    """``names`` in the order of their first call in the forward pass of ``model``.

    A projection shortcut, say, is registered after the convolutions of its block but may run before
    them. The network is traced with torch.fx, nothing is computed. Where it cannot be traced
    (control flow that depends on data), the order of registration stays; so do names that are not
    called, at the end.

    Args:
        model: a plain classifier or the ``model`` of a :class:`wfnet.WFNet`.
        names: of modules of ``model``.
    """
    wanted = set(names)
    try:
        graph = _Tracer(wanted).trace(model)
    except Exception:  # whatever a forward pass raises when it is traced
        return list(names)
    called = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    found = [name for name in dict.fromkeys(called) if name in wanted]
    return found + [name for name in names if name not in set(found)]


class _Tracer(fx.Tracer):
    """Does not look inside the layers that are asked for."""

    def __init__(self, names: set[str]):
        super().__init__()
        self.names = names

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.names or super().is_leaf_module(
            m, module_qualified_name
        )
