"""One untraining run on several processes, over `torch.distributed`: same filters, less time.

Every rank draws the same minibatch from the same seed, reads and runs its share of the images, and
adds up gradients with the others. What is random is drawn for the whole minibatch, so a run depends
on its configuration and its data, not on the number of ranks; only the order in which floating
point sums are taken does. All means are taken over the whole minibatch, whatever share of it each
rank has: shares may differ in size.

Filter gradients have few rows other than 0, those of the labels in the minibatch, and every rank
knows all labels. So only these rows are sent, without any index (:func:`add_rows`).

    torchrun --nproc-per-node 8 -m wfnet untrain ...

or, in a program of one's own, ``torch.distributed.init_process_group`` and then ``wfnet.untrain``
on every rank.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wfnet.backends.autotune import TunedBackend
from wfnet.network import WFNet
from wfnet.services.device_copies import to_device_async
from wfnet.services.ranks import Ranks
from wfnet.untraining.expansion import ExpandedBatch
from wfnet.untraining.objectives import Losses, Objective, weighted_sums
from wfnet.untraining.optimizers import RowAdam
from wfnet.untraining.step import Minibatch, UntrainingStep


class SharedObjective:
    """An objective whose means run over the samples of all ranks.

    The loss that a rank returns has the value of the whole minibatch's loss, the same bits on every
    rank; its gradient is this rank's contribution, and contributions add up to the gradient. Only
    ``forget``, ``retain`` and ``total`` of the objective are used.
    """

    def __init__(self, objective: Objective, ranks: Ranks):
        self.objective, self.ranks = objective, ranks
        self.needs_original = objective.needs_original

    def __call__(
        self, logits: Tensor, batch: ExpandedBatch, original: Tensor | None, net: WFNet
    ) -> Losses:
        sums, counts = weighted_sums(self.objective.costs(logits, batch, original), batch)
        whole = self.ranks.add(torch.cat((sums.detach(), counts)))
        counts = whole[2:].clamp_min(1)
        means = (whole[:2] / counts).unbind()
        forget, retain = (mean.detach().requires_grad_() for mean in means)
        losses = self.objective.total(forget, retain, net)
        slopes = torch.autograd.grad(
            losses.total, (forget, retain), retain_graph=True, allow_unused=True
        )
        # What the loss says of the filters themselves (a regulariser) counts on one rank.
        total = losses.total if self.ranks.first else losses.total.detach()
        for slope, own in zip(slopes, (sums / counts).unbind(), strict=True):
            if slope is not None:  # adds exactly 0, and the gradient of this rank's part
                total = total + slope * (own - own.detach())
        return Losses(total, losses.terms)


# Of the rows: a larger share is sent with all others, which saves the copies of what is sent.
# (Measured in docs/scale.md; all-gathering each rank's own rows sends less, and took longer.)
_FEW = 0.5


def add_rows(gradient: Tensor, rows: Tensor, ranks: Ranks) -> None:
    """Replaces the rows of ``gradient`` by their sums over ranks, on every rank the same bits.

    Args:
        gradient: ``[K, C]``.
        rows: ``[R]`` int64 on the host, distinct: those that may differ from 0 on some rank. If
            they are few, nothing else is sent; otherwise the whole matrix is added up.
        ranks: all of them, with the same ``rows``.
    """
    if len(rows) > _FEW * gradient.shape[0]:
        ranks.add(gradient)
        return
    rows = to_device_async(rows, gradient.device)
    gradient.index_copy_(0, rows, ranks.add(gradient.index_select(0, rows)))


class SharedStep(UntrainingStep):
    """An :class:`~wfnet.untraining.step.UntrainingStep` over the shares of all ranks.

    Args:
        ranks: who shares the minibatches.
        others: as for :class:`~wfnet.untraining.step.UntrainingStep`.
    """

    def __init__(self, ranks: Ranks, net: WFNet, objective: Objective, *others: Any):
        super().__init__(net, SharedObjective(objective, ranks), *others)
        self.ranks = ranks
        self.shared_choices = False

    def differentiate(self, minibatches: Sequence[Minibatch], rows: Tensor) -> Losses:
        """Writes the mean gradient over whole minibatches, as every rank then has it."""
        losses = super().differentiate(minibatches, rows)
        backend = getattr(self.net._fusion.network, "backend", None)
        if isinstance(backend, TunedBackend) and not self.shared_choices:
            backend.share(self.ranks)
            self.shared_choices = True
        if not isinstance(self.optimizer, RowAdam):  # it moves rows without a label, too
            rows = torch.arange(self.gradient.shape[0])
        add_rows(self.gradient, rows, self.ranks)
        return losses
