"""``scrub``: a student leaves its teacher, the original network, on the class and stays elsewhere.

Kurmanji et al., "Towards Unbounded Machine Unlearning", NeurIPS 2023, equation 3: with the
divergence ``d(x) = KL(teacher(x) || student(x))``, lowered is

    alpha * mean of d on others + gamma * mean cross entropy on others - mean of d on the class.

Alpha is that of the authors' code for small networks (0.5 there for larger ones, with which the
student hardly leaves its teacher on the digits). As the authors do, epochs alternate: in the first
``max_epochs`` of them first a pass that raises ``d`` on the class, in all of them a pass over the
other images. Before the first step ``d`` is 0, and with frozen statistics so is its gradient: small
minibatches of the class make many steps.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Generator, Tensor, nn
from torch.nn import functional as F

from wfnet.baselines.fine_tuned import FineTuneConfig, FineTuned, Minibatch, shuffled, taught
from wfnet.baselines.method import Origin
from wfnet.services import settings
from wfnet.services.settings import setting
from wfnet.untraining.objectives import distillation


@dataclass(frozen=True)
class ScrubConfig(FineTuneConfig):
    """Passes over the class and their minibatches, alpha, gamma, and the temperature of both
    softmaxes in ``d``."""

    max_epochs: int = setting(5, settings.positive_int)
    class_batch_size: int = setting(16, settings.positive_int)
    alpha: float = setting(0.001, settings.non_negative_float)
    gamma: float = setting(1.0, settings.non_negative_float)
    temperature: float = setting(4.0, settings.positive_float)


class Scrub(FineTuned):
    """Passes away from the original on the class, then back to it on all others."""

    name = "scrub"
    defaults = ScrubConfig(epochs=10, lr=0.03)
    grid = tuple({"lr": lr, "max_epochs": passes} for passes in (5, 4) for lr in (0.03, 0.02, 0.05))

    def prepare(self, origin: Origin, label: int, config: ScrubConfig) -> nn.Module:
        return copy.deepcopy(origin.original).eval()

    def order(
        self, config: ScrubConfig, own: Tensor, others: Tensor, epoch: int, seed: Generator
    ) -> Iterable[Tensor]:
        if epoch < config.max_epochs:
            yield from shuffled(own, seed).split(config.class_batch_size)
        yield from shuffled(others, seed).split(config.batch_size)

    def loss(self, config: ScrubConfig, batch: Minibatch) -> Tensor:
        scale, teacher = config.temperature, taught(batch.prepared, batch)
        divergence = scale**2 * distillation(batch.logits / scale, teacher / scale).mean()
        if batch.own.all():
            return -divergence
        hard = F.cross_entropy(batch.logits, batch.targets)
        return config.alpha * divergence + config.gamma * hard
