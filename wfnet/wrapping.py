"""How a classifier is wrapped for a recipe of untraining: where its filters start."""

from __future__ import annotations

from typing import Any

from torch import nn

from wfnet.layers import WFLinear
from wfnet.network import WFNet

# Where qkv projections alone are masked, patches also reach the head past them. Gates that range up
# to 1 / sigmoid(-1) = 3.7 can amplify instead of only attenuate, and forget far better.
QKV_ALPHA_INIT = -1.0


def wrap(
    classifier: nn.Module,
    num_classes: int,
    recipe: str = "balanced",
    alpha_init: float | None = None,
    **arguments: Any,
) -> WFNet:
    """The classifier with fresh filters as a recipe wants them.

    Recipe ``paper`` has plain sigmoid gates. Recipe ``balanced`` has normalised ones; where only
    qkv projections are masked they start low, at ``QKV_ALPHA_INIT``.

    Args:
        classifier: copied, not changed.
        num_classes: of the classifier.
        recipe: "balanced" or "paper".
        alpha_init: first value of the filters instead of the recipe's.
        arguments: of :class:`wfnet.WFNet`.

    Raises:
        ValueError: as :class:`wfnet.WFNet`.
    """
    arguments["normalize_gate"] = recipe != "paper"
    start = 3.0 if alpha_init is None else alpha_init
    net = WFNet(classifier, num_classes, alpha_init=start, **arguments)
    only_linear = all(isinstance(layer, WFLinear) for layer in net.masked_layers.values())
    if recipe == "balanced" and alpha_init is None and only_linear:
        return WFNet(classifier, num_classes, alpha_init=QKV_ALPHA_INIT, **arguments)
    return net
