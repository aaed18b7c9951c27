"""The objective of untraining on images with several labels each.

Paper, "Multi-class unlearning": a random true label of the image selects the row in the unlearning
half; binary cross entropy takes the place of cross entropy. Outputs are independent: under the row
of a label only its own output is to be unlearned, the outputs of the image's other labels are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from wfnet.network import WFNet
from wfnet.untraining.expansion import ExpandedBatch
from wfnet.untraining.objectives import (
    BalancedObjective,
    Losses,
    Objective,
    PaperObjective,
    full_precision,
)


@dataclass(frozen=True)
class MultiLabelObjective(Objective):
    """A recipe's objective with binary cross entropies.

    Output ``z_l`` of the label ``l`` whose row a forget sample goes through costs its binary cross
    entropy, of whose mean recipe ``paper`` takes the reciprocal, or with recipe ``balanced``
    ``-log(1 - sigmoid(z_l - m_l))``, where ``m_l`` is the mean original logit of images that lack
    ``l`` (of this minibatch; 0 where the recipe does not distil). Measured from 0 instead, images
    with the label would come to rest below one half and still above all others: a ranking (average
    precision) would show that nothing was forgotten. All other outputs of forget samples and all
    outputs of retained ones are kept: their divergence from the original network's (as Bernoulli
    distributions) where the recipe distils, else their binary cross entropy, summed over outputs.

    Args:
        recipe: the objective for one label, which puts the means together.
    """

    recipe: BalancedObjective | PaperObjective

    @property
    def needs_original(self) -> bool:
        return self.recipe.needs_original

    def forget(self, logits: Tensor, target: Tensor) -> Tensor:
        """``[m]``: cost of the outputs ``logits [m]`` of the samples' own labels."""
        return F.softplus(-logits if isinstance(self.recipe, PaperObjective) else logits)

    def retain(self, logits: Tensor, target: Tensor, original: Tensor | None) -> Tensor:
        """``[m, K]``: cost of each output; ``target`` and ``original`` are ``[m, K]``."""
        if original is None:
            return F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        return bernoulli_divergence(logits, original)

    def total(self, forget: Tensor, retain: Tensor, net: WFNet) -> Losses:
        return self.recipe.total(forget, retain, net)

    def costs(
        self, logits: Tensor, batch: ExpandedBatch, original: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Costs ``[forget_size]`` of unlearned outputs and ``[B]`` of retained ones."""
        logits, row = full_precision(logits), batch.forget.unsqueeze(1)
        own = logits.gather(1, row).squeeze(1)[batch.forget_half]
        if original is not None:
            original = full_precision(original).index_select(0, batch.source)
            lacking = 1 - batch.target
            level = (original * lacking).sum(0) / lacking.sum(0).clamp_min(1)  # [K]
            own = own - level[batch.forget[batch.forget_half]]
        kept = self.retain(logits, batch.target, original)
        unlearned = torch.zeros_like(kept, dtype=torch.bool)
        unlearned[batch.forget_half].scatter_(1, row[batch.forget_half], True)
        return self.forget(own, batch.target), kept.masked_fill(unlearned, 0.0).sum(1)


def bernoulli_divergence(logits: Tensor, original: Tensor) -> Tensor:
    """``KL(Bernoulli(sigmoid(original)) || Bernoulli(sigmoid(logits)))``, elementwise."""
    p = original.sigmoid()
    on = F.logsigmoid(original) - F.logsigmoid(logits)
    off = F.logsigmoid(-original) - F.logsigmoid(-logits)
    return p * on + (1 - p) * off
