"""``bad_teacher``: the class as a network of random weights sees it, all else as the original does.

Chundawat et al., "Can Bad Teaching Induce Forgetting? Unlearning in Deep Networks Using an
Incompetent Teacher", AAAI 2023, equation 5: with ``l = 1`` for images of the class, the student
lowers ``(1 - l) * KL(original || student) + l * KL(random || student)``.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from wfnet.baselines.fine_tuned import FineTuneConfig, FineTuned, Minibatch, taught
from wfnet.baselines.method import Origin
from wfnet.evaluation.initialisation import reinitialise
from wfnet.untraining.objectives import distillation


class BadTeacher(FineTuned):
    """A student of two teachers."""

    name = "bad_teacher"
    defaults = FineTuneConfig(epochs=5, lr=0.003)
    grid = tuple({"lr": lr} for lr in (0.003, 0.001, 0.01, 0.03))

    def prepare(self, origin: Origin, label: int, config: FineTuneConfig) -> list[nn.Module]:
        good = copy.deepcopy(origin.original).eval()
        return [good, reinitialise(origin.original, config.seed)]

    def loss(self, config: FineTuneConfig, batch: Minibatch) -> Tensor:
        good, bad = (taught(teacher, batch) for teacher in batch.prepared)
        return distillation(batch.logits, torch.where(batch.own[:, None], bad, good)).mean()
