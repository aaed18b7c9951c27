"""One untraining run on several processes, over `torch.distributed`: same filters, less time.

Every rank draws the same minibatch from the same seed, reads and runs its share of the images, and
adds up gradients with the others. What is random is drawn for the whole minibatch, so a run depends
on its configuration and its data, not on the number of ranks; only the order in which floating
point sums are taken does. All means are taken over the whole minibatch, whatever share of it each
rank has: shares may differ in size, and one may be empty.

Filter gradients have few rows other than 0, those of the labels in the minibatch, and every rank
knows all labels. So only these rows are sent, without any index (:func:`add_rows`).

    torchrun --nproc-per-node 8 -m wfnet untrain ...

or, in a program of one's own, ``torch.distributed.init_process_group`` and then ``wfnet.untrain``
on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wfnet.network import WFNet
from wfnet.services.device_copies import to_device_async
from wfnet.services.ranks import Ranks
from wfnet.untraining.expansion import ExpandedBatch
from wfnet.untraining.minibatches import Share
from wfnet.untraining.objectives import Losses, Objective, full_precision
from wfnet.untraining.step import UntrainingStep, mean_losses


class SharedObjective(Objective):
    """An objective whose means run over the samples of all ranks.

    The loss that a rank returns has the value of the whole minibatch's loss, the same bits on every
    rank; its gradient is this rank's contribution, and contributions add up to the gradient. Only
    :meth:`Objective.forget`, ``retain`` and ``total`` of the objective are used.

    Attributes:
        leads: whether this rank's gradient has what the loss says of the filters themselves (a
            regulariser); one rank must.
    """

    def __init__(self, objective: Objective, ranks: Ranks):
        self.objective, self.ranks = objective, ranks
        self.leads = ranks.first

    @property
    def needs_original(self) -> bool:
        return self.objective.needs_original

    def forget(self, logits: Tensor, target: Tensor) -> Tensor:
        return self.objective.forget(logits, target)

    def retain(self, logits: Tensor, target: Tensor, original: Tensor | None) -> Tensor:
        return self.objective.retain(logits, target, original)

    def total(self, forget: Tensor, retain: Tensor, net: WFNet) -> Losses:
        return self.objective.total(forget, retain, net)

    def __call__(
        self, logits: Tensor, batch: ExpandedBatch, original: Tensor | None, net: WFNet
    ) -> Losses:
        half = batch.retain_half
        if original is not None:
            original = full_precision(original).index_select(0, batch.source[half])
        logits = full_precision(logits)
        costs = (
            self.forget(logits[batch.forget_half], batch.target[batch.forget_half]),
            self.retain(logits[half], batch.target[half], original),
        )
        if batch.weight is None:
            sums = torch.stack([cost.sum() for cost in costs])
            counts = sums.new_tensor([cost.numel() for cost in costs])
        else:
            weights = [batch.weight[part] for part in (batch.forget_half, half)]
            sums = torch.stack([(c * w).sum() for c, w in zip(costs, weights, strict=True)])
            counts = torch.stack([w.sum() for w in weights]).to(sums.dtype)
        return self._from_sums(sums, counts, net)

    def without_samples(self, net: WFNet) -> Losses:
        """The loss on a rank that has none of the minibatch's samples."""
        like = net.filter_parameters()[0]
        dtype = torch.promote_types(like.dtype, torch.float32)
        zeros = torch.zeros(2, dtype=dtype, device=like.device)
        with torch.no_grad():
            return self._from_sums(zeros, zeros.clone(), net)

    def _from_sums(self, sums: Tensor, counts: Tensor, net: WFNet) -> Losses:
        whole = self.ranks.add(torch.cat((sums.detach(), counts)))
        counts = whole[2:].clamp_min(1)
        means = (whole[:2] / counts).unbind()
        if not sums.requires_grad:
            return self.total(*means, net)
        forget, retain = (mean.detach().requires_grad_() for mean in means)
        losses = self.total(forget, retain, net)
        slopes = torch.autograd.grad(
            losses.total, (forget, retain), retain_graph=True, allow_unused=True
        )
        total = losses.total if self.leads else losses.total.detach()
        for slope, own in zip(slopes, (sums / counts).unbind(), strict=True):
            if slope is not None:  # adds exactly 0, and the gradient of this rank's part
                total = total + slope * (own - own.detach())
        return Losses(total, losses.terms)


def bytes_sent(rows: int, row_bytes: int, ranks: int) -> int:
    """Bytes that each of W ranks sends when R rows are added up in a ring: ``2 (W - 1) / W * R``
    rows."""
    return 2 * (ranks - 1) * rows * row_bytes // ranks


# Of the rows: a larger share is sent with all others, which saves the copies of what is sent.
# (Measured in docs/scale.md; all-gathering each rank's own rows sends less, and took longer.)
_FEW = 0.5


def add_rows(gradient: Tensor, rows: Tensor, ranks: Ranks) -> int:
    """Replaces the rows of ``gradient`` by their sums over ranks, on every rank the same bits.

    Args:
        gradient: ``[K, C]``.
        rows: ``[R]`` int64 on the host, distinct: those that may differ from 0 on some rank. If
            they are few, nothing else is sent; otherwise the whole matrix is added up.
        ranks: all of them, with the same ``rows``.

    Returns:
        Bytes that each rank has sent (:func:`bytes_sent`).
    """
    row_bytes = gradient.shape[1] * gradient.element_size()
    if len(rows) > _FEW * gradient.shape[0]:
        ranks.add(gradient)
        return bytes_sent(gradient.shape[0], row_bytes, ranks.size)
    rows = to_device_async(rows, gradient.device)
    gradient.index_copy_(0, rows, ranks.add(gradient.index_select(0, rows)))
    return bytes_sent(len(rows), row_bytes, ranks.size)


class SharedStep(UntrainingStep):
    """An :class:`~wfnet.untraining.step.UntrainingStep` over the shares of all ranks.

    Args:
        ranks: who shares the minibatches.
        rows_only: whether rows without a label in the minibatches need no gradient (RowAdam).
        others: as for :class:`~wfnet.untraining.step.UntrainingStep`.
    """

    def __init__(
        self, ranks: Ranks, net: WFNet, objective: Objective, *others: Any, rows_only: bool
    ):
        super().__init__(net, SharedObjective(objective, ranks), *others)
        self.ranks, self.rows_only = ranks, rows_only
        self.sent = 0  # bytes of gradients

    def differentiate(self, shares: Sequence[Share]) -> Losses:
        """Writes the mean gradient over whole minibatches, as every rank then has it."""
        found = []
        for number, share in enumerate(shares):
            self.objective.leads = share.leader == self.ranks.rank
            weight, first = 1 / len(shares), number == 0
            if share.images is not None:
                images = share.images.to(self.device, non_blocking=True)
                found.append(self.accumulate(images, share.batch.to(self.device), weight, first))
                continue
            if first:
                self.gradient.zero_()
            found.append(self.objective.without_samples(self.net))
        rows = torch.arange(self.gradient.shape[0])
        if self.rows_only:
            rows = torch.cat([share.rows for share in shares]).unique()
        self.sent += add_rows(self.gradient, rows, self.ranks)
        for parameter, gradient in zip(self.params, self.columns, strict=True):
            parameter.grad = gradient
        return mean_losses(found)
