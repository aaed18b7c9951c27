"""Objectives of untraining: what the forget half and the retain half are trained towards.

An objective says what one forget sample costs, what one retained sample costs, and how the two
means make the loss. The same three methods give the training loss and the validation loss. A new
objective is one subclass of :class:`Objective`, passed as ``untrain(..., objective=...)``.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from wfnet import gates
from wfnet.gate_tables import side_by_side
from wfnet.network import WFNet
from wfnet.untraining.expansion import ExpandedBatch


@dataclass(frozen=True)
class Losses:
    """The loss of a batch and what it is made of.

    Attributes:
        total: scalar, to be differentiated.
        terms: scalars by name, detached, for logs.
    """

    total: Tensor
    terms: dict[str, Tensor]


class Objective(ABC):
    """What untraining minimises.

    Attributes:
        needs_original: whether :meth:`retain` reads the original network's logits.
    """

    needs_original: bool = False

    @abstractmethod
    def forget(self, logits: Tensor, target: Tensor) -> Tensor:
        """``[m]``: cost of forget samples, logits ``[m, K]`` under the rows of ``target [m]``."""

    @abstractmethod
    def retain(self, logits: Tensor, target: Tensor, original: Tensor | None) -> Tensor:
        """``[m]``: cost of retained samples, logits ``[m, K]`` under rows of other classes.

        ``original [m, K]`` are the original network's logits if ``needs_original``, else None.
        """

    @abstractmethod
    def total(self, forget: Tensor, retain: Tensor, net: WFNet) -> Losses:
        """The loss from the means (scalars) of :meth:`forget` and :meth:`retain`.

        Means are weighted by ``batch.weight``: samples under compound rows count in the same two
        terms as those under one row.
        """

    def costs(
        self, logits: Tensor, batch: ExpandedBatch, original: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """:meth:`forget` and :meth:`retain` of an expanded batch; arguments as for a call."""
        half = batch.retain_half
        if original is not None:
            original = full_precision(original).index_select(0, batch.source[half])
        logits = full_precision(logits)
        return (
            self.forget(logits[batch.forget_half], batch.target[batch.forget_half]),
            self.retain(logits[half], batch.target[half], original),
        )

    def __call__(
        self, logits: Tensor, batch: ExpandedBatch, original: Tensor | None, net: WFNet
    ) -> Losses:
        """Loss of an expanded batch; logits and loss are taken to fp32 if they are less.

        Args:
            logits: ``[B, K]`` of the filtered network.
            batch: rows, sources and labels of the ``B`` samples, on the device of ``logits``.
            original: ``[n, K]`` logits of the original network for the un-expanded images (they
                are gathered by ``batch.source``), or None if the objective needs none.
            net: the filtered network, for terms that read its gates.
        """
        sums, counts = weighted_sums(self.costs(logits, batch, original), batch)
        return self.total(*(sums / counts.clamp_min(1)).unbind(), net)


def weighted_sums(costs: Sequence[Tensor], batch: ExpandedBatch) -> tuple[Tensor, Tensor]:
    """Returns the sums of both halves' costs ``[2]`` and of their weights ``[2]``."""
    weights = [torch.ones_like(cost) for cost in costs]
    if batch.weight is not None:
        weights = [batch.weight[batch.forget_half], batch.weight[batch.retain_half]]
    sums = torch.stack([(c * w).sum() for c, w in zip(costs, weights, strict=True)])
    return sums, torch.stack([w.sum() for w in weights]).to(sums.dtype)


def full_precision(logits: Tensor) -> Tensor:
    """``logits`` in fp32, or fp64 where they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def class_gap(logits: Tensor, labels: Tensor) -> Tensor:
    """``z_label - logsumexp(z without z_label)`` per sample, ``[m, K]`` and ``[m]`` -> ``[m]``."""
    index = labels.unsqueeze(1)
    others = logits.scatter(1, index, -torch.inf).logsumexp(1)
    return logits.gather(1, index).squeeze(1) - others


def not_label(logits: Tensor, target: Tensor) -> Tensor:
    """``-log(1 - p(target))`` per sample, exact at any margin (design section 2, "Objectives").

    Equal to ``logsumexp(z) - logsumexp(z without z_target)``, written as the softplus of the
    margin ``z_target - logsumexp(z without z_target)``: no cancellation where p is small, and where
    p is 1 to all digits the gradient with respect to the margin is 1, not 0 as of a clamped log.

    Args:
        logits: ``[m, K]`` in fp32 or fp64, K >= 2.
        target: ``[m]`` int64.
    """
    return F.softplus(class_gap(logits, target))


def distillation(logits: Tensor, original: Tensor) -> Tensor:
    """``KL(softmax(original) || softmax(logits))`` per sample, ``[m, K]`` each -> ``[m]``."""
    return F.kl_div(
        F.log_softmax(logits, 1), F.log_softmax(original, 1), reduction="none", log_target=True
    ).sum(1)


def closed_share(net: WFNet) -> Tensor:
    """``mean over filter matrices of mean(1 - gate)``, a scalar, differentiable (paper, eq. 3).

    One pass over all filters, forward and backward, for any number of layers.
    """
    scale = next(iter(net.masked_layers.values())).gate_scale
    return _ClosedShare.apply(scale, *net.filter_parameters())


class _ClosedShare(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scale, *filters):
        ctx.scale = scale
        ctx.save_for_backward(*filters)
        closed = 1 - gates.gate(side_by_side(filters), scale)
        return (closed.mean(0) * _column_weights(filters)).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        filters = ctx.saved_tensors
        flat = side_by_side(filters)
        slope = gates.gate(flat, ctx.scale) * torch.sigmoid(-flat)
        gradient = slope.mul_(_column_weights(filters) * (-dout / flat.shape[0])).to(flat.dtype)
        return None, *gradient.split([matrix.shape[1] for matrix in filters], 1)


def _column_weights(filters: Sequence[Tensor]) -> Tensor:
    """``[total]``: what a column's mean contributes to the mean over matrices."""
    wide = torch.promote_types(filters[0].dtype, torch.float32)
    return _weights_of(tuple(f.shape[1] for f in filters), wide, filters[0].device)


@lru_cache(16)
def _weights_of(widths: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    shares = [1 / (len(widths) * width) for width in widths for _ in range(width)]
    return torch.tensor(shares, dtype=dtype, device=device)


@dataclass(frozen=True)
class BalancedObjective(Objective):
    """Recipe ``balanced`` (design section 2, "Objectives")::

        L = mean_retain KL(original || filtered) + lambda1 * mean_i [-log(1 - p_i(label_i))]

    Args:
        lambda1: weight of the forget term.
        distil: retain by distillation from the original network; False: by cross entropy.
    """

    lambda1: float = 0.3
    distil: bool = True

    @property
    def needs_original(self) -> bool:
        return self.distil

    def forget(self, logits: Tensor, target: Tensor) -> Tensor:
        return not_label(logits, target)

    def retain(self, logits: Tensor, target: Tensor, original: Tensor | None) -> Tensor:
        if self.distil:
            return distillation(logits, original)
        return F.cross_entropy(logits, target, reduction="none")

    def total(self, forget: Tensor, retain: Tensor, net: WFNet) -> Losses:
        total = retain + self.lambda1 * forget
        return Losses(total, {"retain": retain.detach(), "forget": forget.detach()})


@dataclass(frozen=True)
class PaperObjective(Objective):
    """Recipe ``paper`` (paper eq. 3 in the authors' published form; design section 2)::

        L = (lambda0 * L_retain)^2 + lambda1 / mean_i L_i + lambda2 * mean_layers mean(1 - gate)

    with cross entropies ``L_retain`` (mean over the expanded retain half) and ``L_i`` (forget
    sample i under its own row). The regulariser is differentiated, over all filter matrices.

    Args:
        lambda0, lambda1, lambda2: weights of the three terms.
    """

    lambda0: float = 1.0
    lambda1: float = 1.0
    lambda2: float = 1.0

    def forget(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits, target, reduction="none")

    def retain(self, logits: Tensor, target: Tensor, original: Tensor | None) -> Tensor:
        return F.cross_entropy(logits, target, reduction="none")

    def total(self, forget: Tensor, retain: Tensor, net: WFNet) -> Losses:
        closed = closed_share(net)
        total = (self.lambda0 * retain) ** 2 + self.lambda1 / forget + self.lambda2 * closed
        terms = {"retain": retain.detach(), "forget": forget.detach(), "closed": closed.detach()}
        return Losses(total, terms)


# Weights of recipe balanced for several labels; chosen on validation images, of mosaics of digits.
FORGET = 6.6  # beside costs that are summed over outputs
HOLD = 0.2


@dataclass(frozen=True)
class MultiLabelObjective(Objective):
    """A recipe's objective for images with several labels each, with binary cross entropies.

    Paper, "Multi-class unlearning". Outputs are independent: under the row of a label only its own
    output is to be unlearned, the outputs of the image's other labels are kept.

    Output ``z_l`` of the label ``l`` whose row a forget sample goes through costs its binary cross
    entropy, of whose mean recipe ``paper`` takes the reciprocal. Where the recipe distils (recipe
    ``balanced``) it costs ``-FORGET log(1 - sigmoid(z_l - m_l))``, where ``m_l`` is the mean of
    ``z_l`` over retained samples of this minibatch under row ``l``, none of which has the label
    (without any: of original logits of images that lack it). Measured from 0 instead, images with
    the label would come to rest below one half and still above all others: a ranking (average
    precision) would show that nothing was forgotten. So would a level that runs away: retained
    samples under row ``l`` also pay ``HOLD (z_l - original z_l)^2``, because a divergence of
    probabilities near 0 does not hold a logit. All other outputs of forget samples and all outputs
    of retained ones are kept: their divergence from the original network's (as Bernoulli
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
        own, retained = logits.gather(1, row).squeeze(1), batch.retain_half
        forgotten = own[batch.forget_half]
        if original is not None:
            original = full_precision(original).index_select(0, batch.source)
            level = _levels(own[retained].detach(), batch.forget[retained], original, batch.target)
            forgotten = forgotten - level[batch.forget[batch.forget_half]]
        unlearned = self.forget(forgotten, batch.target)
        kept = self.retain(logits, batch.target, original)
        not_kept = torch.zeros_like(kept, dtype=torch.bool)
        not_kept[batch.forget_half].scatter_(1, row[batch.forget_half], True)
        kept = kept.masked_fill(not_kept, 0.0).sum(1)
        if original is not None:
            unlearned = FORGET * unlearned
            moved = own - original.gather(1, row).squeeze(1)
            kept = torch.cat(
                (kept[batch.forget_half], kept[retained] + HOLD * moved[retained] ** 2)
            )
        return unlearned, kept


def _levels(own: Tensor, rows: Tensor, original: Tensor, target: Tensor) -> Tensor:
    """Returns for each label where an image that lacks it stands: ``[K]``.

    Args:
        own: ``[m]``, outputs of the labels ``rows [m]`` under these rows, of images without them.
        original, target: ``[B, K]``, original logits and labels, for rows without such images.
    """
    lacking = 1 - target
    level = (original * lacking).sum(0) / lacking.sum(0).clamp_min(1)
    count = torch.zeros_like(level).index_add_(0, rows, torch.ones_like(own))
    total = torch.zeros_like(level).index_add_(0, rows, own)
    return torch.where(count > 0, total / count.clamp_min(1), level)


def bernoulli_divergence(logits: Tensor, original: Tensor) -> Tensor:
    """``KL(Bernoulli(sigmoid(original)) || Bernoulli(sigmoid(logits)))``, elementwise."""
    p = original.sigmoid()
    on = F.logsigmoid(original) - F.logsigmoid(logits)
    off = F.logsigmoid(-original) - F.logsigmoid(-logits)
    return p * on + (1 - p) * off
