"""All baselines by name. A new one is a file with a :class:`Method`, and its line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from wfnet.baselines.method import BaselineConfig, Method, Task
from wfnet.baselines.negative_gradient import NegativeGradient
from wfnet.baselines.neggrad_plus import NegGradPlus
from wfnet.baselines.random_labels import RandomLabels
from wfnet.baselines.retrained import Retrained
from wfnet.data import CorruptImages, Dataset

METHODS: dict[str, Method] = {
    method.name: method
    for method in (Retrained(), RandomLabels(), NegativeGradient(), NegGradPlus())
}


def method_named(name: str) -> Method:
    """Returns the baseline ``name``.

    Raises:
        ValueError: if there is none.
    """
    if name not in METHODS:
        raise ValueError(f"there is no baseline {name!r}; choose of {', '.join(METHODS)}")
    return METHODS[name]


def unlearn(
    method: str,
    original: nn.Module,
    train: Dataset,
    label: int,
    config: BaselineConfig | None = None,
    training: Mapping[str, Any] | None = None,
    fresh: Callable[[], nn.Module] | None = None,
    workers: int = 0,
    max_corrupt: int | CorruptImages | None = None,
) -> nn.Module:
    """Makes one baseline: a plain model that is to have forgotten class ``label``.

    Deterministic given its arguments, the number of threads and the device. ``original`` and the
    caller's random state stay as they are.

    Args:
        method: one of ``METHODS``.
        config: settings; the method's defaults if None.
        original, train, label, training, fresh, workers, max_corrupt: as in
            :class:`wfnet.baselines.method.Task`.

    Returns:
        A classifier in evaluation mode on the device of ``original``.

    Raises:
        ValueError: for an unknown method, or a class without training images or without others.
        FloatingPointError: if the loss is not finite.
    """
    chosen = method_named(method)
    task = Task(
        original,
        train,
        label,
        config or chosen.defaults,
        training or {},
        fresh,
        workers,
        max_corrupt,
    )
    return chosen.unlearn(task)
