"""``salun``: random labels, learned by the weights alone that matter to the class.

Fan et al., "SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency", ICLR 2024.
With the gradient ``g`` of the loss on all images of the class, the mask ``m = |g| >= gamma`` has
the largest ``saliency`` of all weights (half of them in the paper), and the network learns
``original + m * change``.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wfnet.baselines.fine_tuned import FineTuneConfig, RandomLabels
from wfnet.baselines.method import Origin
from wfnet.evaluation.relearning import epoch_logits
from wfnet.services import settings
from wfnet.services.layout import safe_layout
from wfnet.services.settings import setting


@dataclass(frozen=True)
class SaliencyConfig(FineTuneConfig):
    """``saliency``: the fraction of the weights that are changed."""

    saliency: float = setting(0.5, settings.fraction)


class SaliencyUnlearning(RandomLabels):
    """Random labels with the gradients of all other weights at 0, and no weight decay."""

    name = "salun"
    defaults = SaliencyConfig(epochs=5, lr=0.003)
    grid = tuple({"lr": lr, "saliency": s} for s in (0.5, 0.2) for lr in (0.003, 0.01, 0.03))
    unused = ("weight_decay",)

    def prepare(self, origin: Origin, label: int, config: SaliencyConfig) -> list[Tensor]:
        """Returns for each parameter which of its entries are learned.

        Raises:
            ValueError: for weight decay, which would change all others, too.
        """
        if config.weight_decay:
            raise ValueError("salun leaves most weights alone: weight_decay must be 0 for it")
        model = copy.deepcopy(origin.original).eval().requires_grad_(True)
        parts = list(origin.images(label)[0].split(config.batch_size))
        options = origin.options()
        with safe_layout(model):
            for batch, logits in epoch_logits(model, origin.train, parts, options, config.seed, 0):
                labels = batch.labels.to(logits.device)
                F.cross_entropy(logits, labels, reduction="sum").backward()
        found = [
            torch.zeros_like(p) if p.grad is None else p.grad.abs() for p in model.parameters()
        ]
        together = torch.cat([gradient.flatten() for gradient in found])
        kept = max(1, round(config.saliency * len(together)))
        least = together.kthvalue(len(together) - kept + 1).values
        return [gradient >= least for gradient in found]

    def change_gradients(self, model: nn.Module, prepared: list[Tensor]) -> None:
        for weight, mask in zip(model.parameters(), prepared, strict=True):
            if weight.grad is not None:
                weight.grad.mul_(mask)
