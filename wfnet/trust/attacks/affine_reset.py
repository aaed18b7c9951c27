"""Scale and shift of every BatchNorm put back to 1 and 0, then its statistics estimated anew.

``gamma_o <- 1`` and ``beta_o <- 0`` where ``gamma_o`` is not 0, then re-estimation as in
:mod:`wfnet.trust.attacks.batchnorm_statistics`. A gate behind a BatchNorm lives in ``gamma`` and
``beta``: re-estimation alone leaves it there, this attack takes it out unless it is exactly 0. From
wfnet's own study of such gates; ``gamma = 1, beta = 0`` is what Ioffe and Szegedy, "Batch
Normalization" (ICML 2015), start training with.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from wfnet.trust.attacks.attack import attack
from wfnet.trust.attacks.batchnorm_statistics import batchnorm_all
from wfnet.trust.subject import Subject


@attack("affine_reset", "BatchNorm's scale and shift reset to 1 and 0, then re-estimated")
def affine_reset(model: nn.Module, subject: Subject) -> nn.Module | None:
    for norm in model.modules():
        if isinstance(norm, _BatchNorm) and norm.affine:
            surviving = norm.weight != 0
            norm.weight[surviving] = 1.0
            norm.bias[surviving] = 0.0
    return batchnorm_all(model, subject)
