"""How a classifier is wrapped for a recipe of untraining: where its filters start."""

from __future__ import annotations

from typing import Any

from torch import nn

from wfnet.network import WFNet
from wfnet.targets import choose_targets

# Where qkv projections alone are masked, patches also reach the head past them. Gates that range up
# to 1 / sigmoid(-1) = 3.7 can amplify instead of only attenuate, and forget far better.
QKV_ALPHA_INIT = -1.0
# Hard gates close from here within the first visits of a row (design section 7).
DURABLE_ALPHA_INIT = 2.0


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
        recipe: "balanced", "paper" or "durable" (gates behind BatchNorm).
        alpha_init: first value of the filters instead of the recipe's.
        arguments: of :class:`wfnet.WFNet`.

    Raises:
        ValueError: as :class:`wfnet.WFNet`.
    """
    arguments["normalize_gate"] = recipe != "paper"
    if recipe == "durable":
        arguments["gate"] = "durable"
        alpha_init = DURABLE_ALPHA_INIT if alpha_init is None else alpha_init
    if alpha_init is None:
        chosen = choose_targets(classifier, arguments.get("targets"), num_classes)
        only_linear = all(isinstance(classifier.get_submodule(n), nn.Linear) for n in chosen)
        alpha_init = QKV_ALPHA_INIT if recipe == "balanced" and chosen and only_linear else 3.0
    return WFNet(classifier, num_classes, alpha_init=alpha_init, **arguments)
