"""All baselines by name. A new one is a :class:`Method`, and its line here."""

from __future__ import annotations

from torch import nn

from wfnet.baselines.fine_tuned import NegativeGradient, NegGradPlus, RandomLabels
from wfnet.baselines.method import BaselineConfig, Method, Origin
from wfnet.baselines.retrained import Retrained
from wfnet.baselines.trivial import BiasShifted, LogitMasked

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        LogitMasked(),
        BiasShifted(),
        Retrained(),
        RandomLabels(),
        NegativeGradient(),
        NegGradPlus(),
    )
}


def unlearn(
    method: str, origin: Origin, label: int, config: BaselineConfig | None = None
) -> nn.Module:
    """Makes one baseline: a plain model, in evaluation mode, that is to have forgotten a class.

    Deterministic given its arguments, the number of threads and the device. The original network
    and the caller's random state stay as they are.

    Args:
        method: one of ``METHODS``.
        config: settings; the method's defaults if None.

    Raises:
        ValueError: for an unknown method, or a class without training images or without others.
        FloatingPointError: if the loss is not finite.
    """
    if method not in METHODS:
        raise ValueError(f"there is no baseline {method!r}; choose of {', '.join(METHODS)}")
    return METHODS[method].unlearn(origin, label, config or METHODS[method].defaults)
