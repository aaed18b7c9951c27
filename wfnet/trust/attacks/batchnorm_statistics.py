"""BatchNorm statistics estimated anew on unlabelled images.

As in Li et al., "Revisiting Batch Normalization For Practical Domain Adaptation" (2016): every
running mean and variance becomes that of the layer's inputs on images that the attacker has. A gate
in front of a BatchNorm that is not exactly 0 is a scale, and estimated statistics divide it out
again. Once with images of all classes, once without those of the forgotten one.

A gate behind a BatchNorm lives in its scale ``gamma`` and shift ``beta``, where re-estimation alone
leaves it. ``affine_reset`` takes it out unless it is exactly 0: ``gamma_o <- 1``, ``beta_o <- 0``
where ``gamma_o`` is not 0, then re-estimation. From wfnet's own study of such gates; 1 and 0 are
what Ioffe and Szegedy, "Batch Normalization" (ICML 2015), start training with.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from wfnet.trust.attacks.attack import attack
from wfnet.trust.subject import BATCH, Subject


@attack("batchnorm_all", "BatchNorm re-estimated on unlabelled images of all classes")
def batchnorm_all(model: nn.Module, subject: Subject) -> nn.Module | None:
    return _reestimate(model, subject.unlabelled.images, subject.settings.seed)


@attack("batchnorm_retain", "BatchNorm re-estimated on images of the other classes")
def batchnorm_retain(model: nn.Module, subject: Subject) -> nn.Module | None:
    return _reestimate(model, subject.train_retain.images, subject.settings.seed)


@attack("affine_reset", "BatchNorm's scale and shift reset to 1 and 0, then re-estimated")
def affine_reset(model: nn.Module, subject: Subject) -> nn.Module | None:
    for norm in model.modules():
        if isinstance(norm, _BatchNorm) and norm.affine:
            surviving = norm.weight != 0
            norm.weight[surviving] = 1.0
            norm.bias[surviving] = 0.0
    return batchnorm_all(model, subject)


def _reestimate(model: nn.Module, images: Tensor, seed: int) -> nn.Module | None:
    """Re-estimates all layers in one pass over shuffled batches, as a cumulative average."""
    model.eval()
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return None
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
        norm.train()
    weight = next(model.parameters())
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    for part in order.split(BATCH):
        if len(part) > 1:
            model(images[part].to(weight.device, weight.dtype))
    return model.eval()
