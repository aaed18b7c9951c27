"""BatchNorm statistics estimated anew on unlabelled images.

As in Li et al., "Revisiting Batch Normalization For Practical Domain Adaptation" (2016): every
running mean and variance becomes that of the layer's inputs on images that the attacker has. A gate
in front of a BatchNorm that is not exactly 0 is a scale, and estimated statistics divide it out
again. Once with images of all classes, once without those of the forgotten one.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from wfnet.trust.attacks.attack import Attack, Attacked
from wfnet.trust.subject import BATCH, Subject


def reestimated(model: nn.Module, images: Tensor, seed: int = 0) -> nn.Module | None:
    """Returns a copy whose BatchNorm statistics are those of ``images``; None without BatchNorm.

    Layers are re-estimated together in one pass over shuffled batches, as a cumulative average.

    Args:
        model: a plain model.
        images: ``[n, C, H, W]``.
        seed: of the order of the images.
    """
    changed = copy.deepcopy(model).eval()
    norms = [m for m in changed.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return None
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
        norm.train()
    weight = next(changed.parameters())
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    parts = [part for part in order.split(BATCH) if len(part) > 1]
    with torch.no_grad():
        for part in parts:
            changed(images[part].to(weight.device, weight.dtype))
    return changed.eval()


def _of_all(model: nn.Module, subject: Subject) -> Attacked | None:
    changed = reestimated(model, subject.unlabelled.images, subject.settings.seed)
    return changed and Attacked(changed)


def _of_others(model: nn.Module, subject: Subject) -> Attacked | None:
    changed = reestimated(model, subject.train_retain.images, subject.settings.seed)
    return changed and Attacked(changed)


OF_ALL = Attack(
    "batchnorm_all", "BatchNorm re-estimated on unlabelled images of all classes", _of_all
)
OF_OTHERS = Attack(
    "batchnorm_retain", "BatchNorm re-estimated on images of the other classes", _of_others
)
