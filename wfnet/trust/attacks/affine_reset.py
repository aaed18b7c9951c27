"""Scale and shift of every BatchNorm put back to 1 and 0, then its statistics estimated anew.

``gamma_o <- 1`` and ``beta_o <- 0`` where ``gamma_o`` is not 0, then re-estimation as in
:mod:`wfnet.trust.attacks.batchnorm_statistics`. A gate behind a BatchNorm lives in ``gamma`` and
``beta``: re-estimation alone leaves it there, this attack takes it out unless it is exactly 0. From
wfnet's own study of such gates; ``gamma = 1, beta = 0`` is what Ioffe and Szegedy, "Batch
Normalization" (ICML 2015), start training with.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from wfnet.trust.attacks.attack import Attack, Attacked
from wfnet.trust.attacks.batchnorm_statistics import reestimated
from wfnet.trust.subject import Subject


def with_plain_affine(model: nn.Module) -> nn.Module:
    """Returns a copy in which every gamma that is not 0 is 1, and its beta 0."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for norm in changed.modules():
            if isinstance(norm, _BatchNorm) and norm.affine:
                surviving = norm.weight != 0
                norm.weight[surviving] = 1.0
                norm.bias[surviving] = 0.0
    return changed


def _apply(model: nn.Module, subject: Subject) -> Attacked | None:
    changed = reestimated(
        with_plain_affine(model), subject.unlabelled.images, subject.settings.seed
    )
    return changed and Attacked(changed)


ATTACK = Attack(
    "affine_reset", "BatchNorm's scale and shift reset to 1 and 0, then re-estimated", _apply
)
