"""A constant added to the logit of the class.

It is chosen so that the class is predicted as often as it occurs among unlabelled images. That
brings back a class that is merely voted down at the output.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wfnet.trust.attacks.attack import ChangedLogits, attack
from wfnet.trust.subject import Subject


@attack(
    "offset",
    "the class's logit shifted until it is predicted as often as it occurs",
    moves_logits=True,
)
def offset(model: nn.Module, subject: Subject) -> nn.Module:
    seen = subject.logits(model, "unlabelled")
    added = torch.zeros_like(seen[0])
    added[subject.label] = class_offset(seen, subject.label, subject.share)
    return ChangedLogits(model, lambda logits: logits + added)


def class_offset(logits: Tensor, label: int, share: float) -> float:
    """Returns what to add to the logit of ``label`` so that the ``share`` of images get it.

    Args:
        logits: ``[n, K]`` of the images.
        label: the class.
        share: fraction of the images.
    """
    others = logits.clone()
    others[:, label] = -torch.inf
    gap = (others.amax(1) - logits[:, label]).sort().values  # an offset above it predicts the class
    count = min(max(round(share * len(gap)), 1), len(gap))
    following = gap[count] if count < len(gap) else gap[count - 1] + 1
    return ((gap[count - 1] + following) / 2).item()
