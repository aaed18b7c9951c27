"""One untraining run on several processes, over `torch.distributed`: same filters, less time.

Every rank draws the same minibatch from the same seed, reads and runs its share of the images, and
adds up gradients with the others. What is random is drawn for the whole minibatch, so a run depends
on its configuration and its data, not on the number of ranks; only the order in which floating
point sums are taken does. All means are taken over the whole minibatch, whatever part of it each
rank has: shares may differ in size, an image may be unreadable on one rank, a share may be empty.

Filter gradients have few rows other than 0, those of the labels in the minibatch, and every rank
knows all labels. So only these rows are sent, without any index (:func:`add_rows`).

    torchrun --nproc-per-node 8 -m wfnet untrain ...

or, in a program of one's own, ``torch.distributed.init_process_group`` and then ``wfnet.untrain``
on every rank.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wfnet.data import Batch, CorruptImages
from wfnet.data.dataset import name_of
from wfnet.data.loading import LostWorker
from wfnet.network import WFNet
from wfnet.services.device_copies import to_device_async
from wfnet.services.ranks import Ranks
from wfnet.untraining.expansion import ExpandedBatch, Sampler
from wfnet.untraining.objectives import Losses, Objective, full_precision
from wfnet.untraining.step import UntrainingStep, mean_losses

logger = logging.getLogger("wfnet")

# -- reading --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """What one rank has of a minibatch.

    Attributes:
        position: number of the minibatch.
        images: ``[m, C, H, W]``, those that this rank has read; None if there are none.
        batch: the samples of the whole expanded minibatch that use them.
        rows: distinct forget labels of the whole expanded minibatch.
        size: samples of the whole expanded minibatch.
        read: images of the whole minibatch.
        leader: the first rank that has samples.
        stop: number of a signal that some rank has received, or 0.
    """

    position: int
    images: Tensor | None
    batch: ExpandedBatch
    rows: Tensor
    size: int
    read: int
    leader: int
    stop: int


class SharedReader:
    """Minibatch after minibatch, each rank's part.

    Args:
        ranks: who shares them.
        sampler: the same on every rank.
        labels: ``[N]`` of the data set.
        dataset: names its corrupt images.
        read: minibatches of image positions from a minibatch number on, read; those of which
            nothing remains are skipped.
        expand: the expanded batch of the labels of a minibatch, from (labels, position, whether
            all of its images are there).
        corrupt: where images that any rank cannot read are counted.
        lost_workers: times that data workers may be started anew.
    """

    def __init__(
        self,
        ranks: Ranks,
        sampler: Sampler,
        labels: Tensor,
        dataset: Any,
        read: Callable[[int, Callable[[Tensor], Tensor]], Iterator[Batch]],
        expand: Callable[[Tensor, int, bool], ExpandedBatch],
        corrupt: CorruptImages,
        lost_workers: int,
    ):
        self.ranks, self.sampler, self.labels, self.dataset = ranks, sampler, labels, dataset
        self.read, self.expand, self.corrupt = read, expand, corrupt
        self.lost_workers = lost_workers

    def parts(self, position: int, stop: int, signal: Callable[[], int]) -> Iterator[Part]:
        """Parts of the minibatches ``position .. stop - 1`` that have a readable image."""
        self.position = position
        self.waiting: Batch | None = None
        self.stream = self.read(position, self.ranks.share)
        try:
            while self.position < stop:
                chosen = self.sampler.batch(self.position)
                batch = self._own(self.ranks.share(chosen))
                there, stopping = self._exchange(chosen, batch, signal())
                if there.any():
                    yield self._part(chosen, there, batch, stopping)
                self.position += 1
        finally:
            self.stream.close()

    def _own(self, share: Tensor) -> Batch | None:
        """What could be read of this rank's share of a minibatch; None if nothing."""
        if not len(share):
            return None
        while self.waiting is None or not len(self.waiting.indices):
            try:
                self.waiting = next(self.stream, None)
            except LostWorker:
                if self.lost_workers == 0:
                    raise
                self.lost_workers -= 1
                logger.warning(
                    "a data worker was lost; new ones go on from minibatch %d (%d times more)",
                    self.position, self.lost_workers,
                )  # fmt: skip
                self.stream = self.read(self.position, self.ranks.share)
                continue
            if self.waiting is None:
                return None
        if not torch.isin(self.waiting.indices, share).all():
            return None  # it is of a later minibatch: nothing could be read of this one
        batch, self.waiting = self.waiting, None
        return batch

    def _exchange(self, chosen: Tensor, batch: Batch | None, signal: int) -> tuple[Tensor, int]:
        """Which images of the minibatch some rank has read ``[n]`` bool; a signal, or 0."""
        size = self.ranks.size
        message = torch.zeros(1 + -(-len(chosen) // size), dtype=torch.uint8)
        message[0] = signal
        if batch is not None:
            share = self.ranks.share(chosen)
            message[1 : 1 + len(share)] = torch.isin(share, batch.indices)
        found = self.ranks.exchange(message)
        there = torch.zeros(len(chosen), dtype=torch.bool)
        for rank in range(size):
            part = there[rank::size]
            part.copy_(found[rank, 1 : 1 + len(part)] != 0)
        for index in chosen[~there].tolist():
            name = name_of(self.dataset, index)
            if name not in self.corrupt.found:
                self.corrupt._count(name, "left out by the rank that met it", " on all ranks")
        return there, int(found[:, 0].max())

    def _part(self, chosen: Tensor, there: Tensor, batch: Batch | None, stop: int) -> Part:
        whole = self.expand(self.labels[chosen[there]], self.position, bool(there.all()))
        owner = (torch.arange(len(chosen)) % self.ranks.size)[there]  # of each image
        of_sample = owner[whole.source]
        mine = of_sample == self.ranks.rank
        place = (owner == self.ranks.rank).cumsum(0) - 1  # among the images of this rank
        local = ExpandedBatch(
            whole.forget[mine],
            place[whole.source[mine]],
            whole.target[mine],
            int(mine[whole.forget_half].sum()),
        )
        images = None if batch is None or not len(local) else batch.images
        return Part(
            self.position, images, local, whole.forget.unique(), len(whole), int(there.sum()),
            int(of_sample.min()), stop,
        )  # fmt: skip


# -- gradients ------------------------------------------------------------------------------------


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
        sums = torch.stack([cost.sum() for cost in costs])
        counts = sums.new_tensor([cost.numel() for cost in costs])
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


# Of the rows: a larger part is sent with all others, which saves the copies of what is sent.
# (benchmarks/bench_allreduce.py; all-gathering each rank's own rows sends less, and took longer.)
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
    """An :class:`~wfnet.untraining.step.UntrainingStep` over the parts of all ranks.

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

    def differentiate(self, parts: Sequence[Part]) -> Losses:
        """Writes the mean gradient over whole minibatches, as every rank then has it."""
        found = []
        for number, part in enumerate(parts):
            self.objective.leads = part.leader == self.ranks.rank
            share, first = 1 / len(parts), number == 0
            if part.images is not None:
                images = part.images.to(self.device, non_blocking=True)
                found.append(self.accumulate(images, part.batch.to(self.device), share, first))
                continue
            if first:
                self.gradient.zero_()
            found.append(self.objective.without_samples(self.net))
        rows = torch.arange(self.gradient.shape[0])
        if self.rows_only:
            rows = torch.cat([part.rows for part in parts]).unique()
        self.sent += add_rows(self.gradient, rows, self.ranks)
        for parameter, gradient in zip(self.params, self.columns, strict=True):
            parameter.grad = gradient
        return mean_losses(found)
