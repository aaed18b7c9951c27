"""How a classifier is wrapped for a recipe of untraining: where its filters start."""

from __future__ import annotations

from typing import Any

from torch import nn

from wfnet.network import WFNet

# Hard gates close from here within the first visits of a row (design section 7).
DURABLE_ALPHA_INIT = 2.0


def masks_linear_maps(net: WFNet) -> bool:
    """Returns whether all masked layers are linear maps, as those of a transformer are."""
    return all(isinstance(layer, nn.Linear) for layer in net.masked_layers.values())


def wrap(
    classifier: nn.Module,
    num_classes: int,
    recipe: str = "balanced",
    alpha_init: float | None = None,
    **arguments: Any,
) -> WFNet:
    """The classifier with fresh filters as a recipe wants them.

    Recipe ``paper`` has plain sigmoid gates, recipe ``balanced`` normalised ones, recipe
    ``durable`` hard and soft ones behind the layers.

    Args:
        classifier: copied, not changed.
        num_classes: of the classifier.
        recipe: "balanced", "paper" or "durable".
        alpha_init: first value of the filters (of hard gates) instead of the recipe's.
        arguments: of :class:`wfnet.WFNet`.

    Raises:
        ValueError: as :class:`wfnet.WFNet`.
    """
    arguments["normalize_gate"] = recipe != "paper"
    if recipe == "durable":
        arguments["gate"] = "durable"
    if alpha_init is None:
        alpha_init = DURABLE_ALPHA_INIT if recipe == "durable" else 3.0
    return WFNet(classifier, num_classes, alpha_init=alpha_init, **arguments)
