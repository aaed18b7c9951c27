"""``undo``: suppress the class, damage the weights, distil the suppressed network into the rest.

Lee et al., "Distillation Robustifies Unlearning", NeurIPS 2025 (UNDO): unlearn, noise, distil on
outputs. NegGrad+ makes the teacher, as gradient difference does there. The student starts from

    (1 - alpha) * teacher + alpha * beta * newly initialised weights

(matrices and convolutions alone; beta is 0.1 there and alpha runs to 0.8) and lowers
``KL(teacher || student)`` on all training images without their labels. What the teacher only hides
is not in its outputs, so less of it comes back under fine-tuning; how much is decided by alpha. The
authors distil until 95% of the teacher's accuracy is back; here for ``epochs``.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from wfnet.baselines.fine_tuned import FineTuneConfig, FineTuned, Minibatch, NegGradPlus, taught
from wfnet.baselines.method import Origin
from wfnet.evaluation.initialisation import reinitialise
from wfnet.services import settings
from wfnet.services.settings import setting
from wfnet.untraining.objectives import distillation


@dataclass(frozen=True)
class UndoConfig(FineTuneConfig):
    """``teacher_lr``: of NegGrad+, which has its other defaults."""

    alpha: float = setting(0.8, settings.Number(0.0, 1.0))
    beta: float = setting(0.1, settings.non_negative_float)
    teacher_lr: float = setting(0.001, settings.positive_float)


class Undo(FineTuned):
    """Distillation of a suppressed network into a damaged copy of it."""

    name = "undo"
    defaults = UndoConfig(epochs=10, lr=0.05, batch_norm="train")
    grid = tuple(
        {"lr": lr, "teacher_lr": teacher} for teacher in (0.001, 0.003) for lr in (0.05, 0.02, 0.1)
    )

    def prepare(self, origin: Origin, label: int, config: UndoConfig) -> nn.Module:
        known = replace(NegGradPlus.defaults, lr=config.teacher_lr, seed=config.seed)
        return NegGradPlus().unlearn(origin, label, known)

    def start(self, origin: Origin, config: UndoConfig, prepared: nn.Module) -> nn.Module:
        model = copy.deepcopy(prepared)
        noise = reinitialise(origin.original, config.seed).parameters()
        with torch.no_grad():
            for weight, drawn in zip(model.parameters(), noise, strict=True):
                if weight.dim() > 1:
                    weight.mul_(1 - config.alpha).add_(drawn, alpha=config.alpha * config.beta)
        return model

    def loss(self, config: UndoConfig, batch: Minibatch) -> Tensor:
        return distillation(batch.logits, taught(batch.prepared, batch)).mean()
