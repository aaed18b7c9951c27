"""``ssd``: weights that matter far more to the class than to all images are dampened.

Foster et al., "Fast Machine Unlearning Without Retraining Through Selective Synaptic Dampening",
AAAI 2024. With the diagonals I of the Fisher information, over all training images and over those
of the class, ``w <- min(strength * I_all / I_class, 1) * w`` where ``I_class > selection * I_all``.
No epochs, no learning rate.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wfnet.baselines.method import BaselineConfig, Method, Origin
from wfnet.evaluation.relearning import epoch_logits
from wfnet.services import settings
from wfnet.services.layout import safe_layout
from wfnet.services.modes import evaluation_mode
from wfnet.services.settings import setting


@dataclass(frozen=True)
class DampeningConfig(BaselineConfig):
    """``selection``: alpha, ``strength``: lambda; importances are means over minibatches."""

    selection: float = setting(10.0, settings.positive_float)
    strength: float = setting(1.0, settings.positive_float)
    batch_size: int = setting(64, settings.batch_size)


class SelectiveDampening(Method):
    """Selective synaptic dampening: two passes over images, then one change of the weights."""

    name = "ssd"
    defaults = DampeningConfig()
    grid = tuple(
        {"selection": alpha, "strength": strength}
        for alpha in (10.0, 20.0, 50.0, 100.0)
        for strength in (1.0, 0.1)
    )
    unused = ("seed",)

    def unlearn(self, origin: Origin, label: int, config: DampeningConfig) -> nn.Module:
        model = copy.deepcopy(origin.original).requires_grad_(True)
        own, others = origin.images(label)
        of_class = self._importance(model, origin, own, config)
        of_all = self._importance(model, origin, torch.cat((own, others)), config)
        with torch.no_grad():
            for weight, mine, every in zip(model.parameters(), of_class, of_all, strict=True):
                ratio = (config.strength * every / mine).clamp(max=1)
                weight.copy_(torch.where(mine > config.selection * every, ratio * weight, weight))
        return model.eval()

    def _importance(
        self, model: nn.Module, origin: Origin, positions: Tensor, config: DampeningConfig
    ) -> list[Tensor]:
        """Returns the mean over minibatches of squared gradients, as the authors take it."""
        # Minibatches of single classes would have larger gradients than mixed ones.
        generator = torch.Generator().manual_seed(0)
        order = positions[torch.randperm(len(positions), generator=generator)]
        parts = list(order.split(config.batch_size))
        sums = [torch.zeros_like(weight) for weight in model.parameters()]
        with evaluation_mode(model), safe_layout(model):
            for batch, logits in epoch_logits(model, origin.train, parts, origin.options(), 0, 0):
                loss = F.cross_entropy(logits, batch.labels.to(logits.device))
                gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
                for total, gradient in zip(sums, gradients, strict=True):
                    if gradient is not None:
                        total.addcmul_(gradient, gradient, value=1 / len(parts))
        return sums
