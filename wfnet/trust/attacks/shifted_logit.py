"""A constant added to the logit of the class.

It is chosen so that the class is predicted as often as it occurs among unlabelled images. That
brings back a class that is merely voted down at the output.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from wfnet.trust.attacks.attack import Attack, Attacked
from wfnet.trust.subject import Subject


def class_offset(logits: Tensor, label: int, share: float) -> float:
    """Returns what to add to the logit of ``label`` so that ``share`` of the images get it.

    Args:
        logits: ``[n, K]``.
        label: the class.
        share: fraction of the images that are to be predicted as the class.
    """
    others = logits.clone()
    others[:, label] = -torch.inf
    gap = (others.amax(1) - logits[:, label]).sort().values  # an offset above it predicts the class
    count = min(max(round(share * len(gap)), 1), len(gap))
    following = gap[count] if count < len(gap) else gap[count - 1] + 1
    return ((gap[count - 1] + following) / 2).item()


def shift(model: nn.Module, subject: Subject) -> Callable[[Tensor], Tensor]:
    """Returns the change of ``model``'s logits that predicts the class as often as it occurs."""
    label = subject.label
    seen = subject.logits(model, "unlabelled")
    offset = class_offset(seen, label, subject.share)

    def shifted(logits: Tensor) -> Tensor:
        logits = logits.clone()
        logits[:, label] += offset
        return logits

    return shifted


def _apply(model: nn.Module, subject: Subject) -> Attacked:
    return Attacked(model, shift(model, subject))


ATTACK = Attack(
    "offset",
    "the class's logit shifted until it is predicted as often as it occurs",
    _apply,
    moves_logits=True,
)
