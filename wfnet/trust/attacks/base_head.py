"""The class's row of the public base's head put back, then BatchNorm statistics estimated anew.

For holders of the base weights: row ``c`` of the head's weight and bias become the base's. That
brings back a class that was cut from the head, or whose row was changed, if the features still hold
it. Networks without BatchNorm are attacked by the row alone.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from wfnet.head import find_head
from wfnet.trust.attacks.attack import Attack, Attacked
from wfnet.trust.attacks.batchnorm_statistics import reestimated
from wfnet.trust.subject import Subject


def with_base_head_row(
    model: nn.Module, base: nn.Module, label: int, num_classes: int
) -> nn.Module | None:
    """Returns a copy whose head has the base's row ``label``; None where heads differ in shape."""
    changed = copy.deepcopy(model)
    heads = [find_head(network, num_classes) for network in (changed, base)]
    if None in heads:
        return None
    own, public = (head for _, head in heads)
    if own.weight.shape != public.weight.shape:
        return None
    with torch.no_grad():
        own.weight[label] = public.weight[label].to(own.weight)
        if own.bias is not None and public.bias is not None:
            own.bias[label] = public.bias[label].to(own.bias)
    return changed


def _apply(model: nn.Module, subject: Subject) -> Attacked | None:
    if model is subject.original:
        return None
    changed = with_base_head_row(model, subject.original, subject.label, subject.num_classes)
    if changed is None:
        return None
    unlabelled = subject.unlabelled.images
    return Attacked(reestimated(changed, unlabelled, subject.settings.seed) or changed)


ATTACK = Attack(
    "base_head",
    "the base's row of the head put back and BatchNorm re-estimated",
    _apply,
    needs_base=True,
)
