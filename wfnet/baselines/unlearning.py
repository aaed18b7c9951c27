"""All baselines by name. A new one is a :class:`Method`, and its line here."""

from __future__ import annotations

from torch import nn

from wfnet.baselines.fine_tuned import NegativeGradient, NegGradPlus, RandomLabels
from wfnet.baselines.method import BaselineConfig, Method, Origin
from wfnet.baselines.retrained import Retrained

METHODS: dict[str, Method] = {
    method.name: method
    for method in (Retrained(), RandomLabels(), NegativeGradient(), NegGradPlus())
}


def method_named(name: str) -> Method:
    """Returns the baseline ``name``; ValueError if there is none."""
    if name not in METHODS:
        raise ValueError(f"there is no baseline {name!r}; choose of {', '.join(METHODS)}")
    return METHODS[name]


def unlearn(
    method: str, origin: Origin, label: int, config: BaselineConfig | None = None
) -> nn.Module:
    """Makes one baseline: a plain model that is to have forgotten class ``label``.

    Deterministic given its arguments, the number of threads and the device. The original network
    and the caller's random state stay as they are.

    Args:
        method: one of ``METHODS``.
        origin: the original network and its training images.
        label: the class to forget.
        config: settings; the method's defaults if None.

    Returns:
        A classifier in evaluation mode on the device of the original.

    Raises:
        ValueError: for an unknown method, or a class without training images or without others.
        FloatingPointError: if the loss is not finite.
    """
    chosen = method_named(method)
    return chosen.unlearn(origin, label, config or chosen.defaults)
