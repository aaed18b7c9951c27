"""Untraining on images with several labels each: expansion and objective.

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


def expand_multi_label(
    multi_hot: Tensor,
    label_expansion: int,
    generator: torch.Generator,
    share_images: bool = False,
    forget_size: int | None = None,
) -> ExpandedBatch:
    """Expands a minibatch of multi-label images (:func:`wfnet.untraining.expansion.expand` for one
    label).

    Args:
        multi_hot: ``[n, K]`` bool, true labels; every image has one and lacks one.
        label_expansion: M, how many rows each retained image goes through, drawn uniformly over
            the labels that it lacks, independently, with replacement.
        generator: source of all rows.
        share_images, forget_size: as for one label.

    Returns:
        The samples; ``forget`` is a random true label in the forget half, and ``target`` is
        ``[B, K]`` float32, the true labels of each sample.
    """
    n = len(multi_hot)
    size = n // 2 if forget_size is None else min(forget_size, n)
    forgotten = torch.arange(n if share_images else size)
    retained = torch.arange(n) if share_images else torch.arange(size, n)
    own = torch.zeros(0, dtype=torch.int64)
    if len(forgotten):
        own = multi_hot[forgotten].float().multinomial(1, generator=generator).squeeze(1)
    others = torch.zeros(0, dtype=torch.int64)
    if len(retained):
        lacking = (~multi_hot[retained]).float()
        others = lacking.multinomial(label_expansion, True, generator=generator).flatten()
    source = torch.cat((forgotten, retained.repeat_interleave(label_expansion)))
    return ExpandedBatch(
        torch.cat((own, others)), source, multi_hot[source].float(), len(forgotten)
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

    def __call__(
        self, logits: Tensor, batch: ExpandedBatch, original: Tensor | None, net: WFNet
    ) -> Losses:
        if original is not None:
            original = full_precision(original).index_select(0, batch.source)
        forget, retain = self.terms(full_precision(logits), batch, original)
        sizes = max(forget.numel(), 1), max(retain.numel(), 1)
        return self.total(forget.sum() / sizes[0], retain.sum() / sizes[1], net)

    def terms(
        self, logits: Tensor, batch: ExpandedBatch, original: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Costs ``[forget_size]`` of unlearned outputs and ``[B]`` of retained ones.

        ``logits`` and ``original`` are ``[B, K]``.
        """
        row = batch.forget.unsqueeze(1)
        own = logits.gather(1, row).squeeze(1)[batch.forget_half]
        if original is not None:
            own = own - self._level(original, batch.target)[batch.forget[batch.forget_half]]
        kept = self.retain(logits, batch.target, original)
        unlearned = torch.zeros_like(kept, dtype=torch.bool)
        unlearned[batch.forget_half].scatter_(1, row[batch.forget_half], True)
        return self.forget(own, batch.target), kept.masked_fill(unlearned, 0.0).sum(1)

    @staticmethod
    def _level(original: Tensor, target: Tensor) -> Tensor:
        """``[K]``: mean original logit of the samples that lack each label; 0 without any."""
        lacking = 1 - target
        return (original * lacking).sum(0) / lacking.sum(0).clamp_min(1)


def bernoulli_divergence(logits: Tensor, original: Tensor) -> Tensor:
    """``KL(Bernoulli(sigmoid(original)) || Bernoulli(sigmoid(logits)))``, elementwise."""
    p = original.sigmoid()
    on = F.logsigmoid(original) - F.logsigmoid(logits)
    off = F.logsigmoid(-original) - F.logsigmoid(-logits)
    return p * on + (1 - p) * off
