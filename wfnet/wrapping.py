"""How a classifier is wrapped for a recipe of untraining: where its filters start."""

from typing import Any

from torch import nn

from wfnet.network import WFNet
from wfnet.targets import MANY_CLASSES, choose_targets

# Hard gates close from here within the first visits of a row; rows of many classes are visited less
# often for each channel that they close.
DURABLE_ALPHA_INIT, MANY_ALPHA_INIT = 2.0, 1.0
# Behind the last quarter alone some networks keep a part of a class.
QUICK_MASK_FROM = 0.5


def masks_linear_maps(net: WFNet) -> bool:
    """Returns whether all masked layers are linear maps, as those of a transformer are."""
    return all(
        isinstance(layer, nn.Linear | nn.MultiheadAttention) for layer in net.masked_layers.values()
    )


def wrap(
    classifier: nn.Module,
    num_classes: int,
    recipe: str = "balanced",
    alpha_init: float | None = None,
    **arguments: Any,
) -> WFNet:
    """The classifier with fresh filters as a recipe wants them.

    Recipe ``paper`` has plain sigmoid gates, recipe ``balanced`` normalised ones, recipe
    ``durable`` hard and soft ones behind the layers, recipe ``quick`` normalised ones, of
    convolutions in the last half of the stages alone where ``mask_from`` says nothing else.

    Args:
        classifier: copied, not changed.
        num_classes: of the classifier.
        recipe: "balanced", "paper", "durable" or "quick".
        alpha_init: first value of the filters (of hard gates) instead of the recipe's.
        arguments: of :class:`wfnet.WFNet`.

    Raises:
        ValueError: as :class:`wfnet.WFNet`.
    """
    arguments["normalize_gate"] = recipe != "paper"
    if recipe == "durable":
        arguments["gate"] = "durable"
    if recipe == "quick" and arguments.get("mask_from") is None:
        names = choose_targets(classifier, arguments.get("targets"), num_classes)
        # The residual stream of a transformer goes around late masks.
        if any(isinstance(classifier.get_submodule(name), nn.Conv2d) for name in names):
            arguments["mask_from"] = QUICK_MASK_FROM
    if alpha_init is None:
        many = num_classes > MANY_CLASSES
        of_durable = MANY_ALPHA_INIT if many else DURABLE_ALPHA_INIT
        alpha_init = of_durable if recipe == "durable" else 3.0
    return WFNet(classifier, num_classes, alpha_init=alpha_init, **arguments)
