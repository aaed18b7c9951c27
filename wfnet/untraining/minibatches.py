"""The minibatches of a run, read and expanded: what each process has of them, in order."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wfnet.data import Batch, CorruptImages, Dataset, batches
from wfnet.data.loading import LostWorker
from wfnet.services.ranks import Ranks
from wfnet.services.seeds import generator_for
from wfnet.untraining.durable import expand_groups, groups_of
from wfnet.untraining.expansion import ExpandedBatch, Sampler, expand
from wfnet.untraining.multilabel import expand_multi_label
from wfnet.untraining.untrain_config import UntrainConfig

logger = logging.getLogger("wfnet")

_LOST_WORKERS = 3  # times that data workers are started anew


@dataclass(frozen=True)
class Share:
    """What one process has of a minibatch: all of it, if there is no other process.

    Attributes:
        images: ``[m, C, H, W]``, those that this process has read; None if there are none.
        batch: the samples of the whole expanded minibatch that use them.
        rows: ``[R]``, distinct forget labels of the whole expanded minibatch.
        leader: the first rank that has samples.
    """

    images: Tensor | None
    batch: ExpandedBatch
    rows: Tensor
    leader: int = 0


class MinibatchReader:
    """Reads minibatch after minibatch, each rank its share of the images.

    Every rank knows all labels of a minibatch, and draws the rows of the whole of it: what a run
    learns does not depend on the number of ranks. An unreadable image is replaced by another one of
    its class, so sizes and labels are known before anything is read.

    Args:
        dataset: the training images.
        labels: ``[N]``, their labels.
        multi_hot: ``[N, K]`` bool for images with several labels, else None; these are read by one
            process alone.
        num_classes: K.
        rows: ``[R]``, those that are untrained; None: all.
        sampler: which images make up a minibatch.
        config: settings of the run.
        ranks: who shares the minibatches.
        corrupt: where unreadable images are counted.
        pin_memory: read into page-locked memory.
    """

    def __init__(
        self,
        dataset: Dataset,
        labels: Tensor,
        multi_hot: Tensor | None,
        num_classes: int,
        rows: Tensor | None,
        sampler: Sampler,
        config: UntrainConfig,
        ranks: Ranks,
        corrupt: CorruptImages,
        pin_memory: bool,
    ):
        self.dataset, self.labels, self.multi_hot = dataset, labels, multi_hot
        self.num_classes, self.rows = num_classes, rows
        self.sampler, self.config = sampler, config
        self.ranks, self.corrupt, self.pin_memory = ranks, corrupt, pin_memory
        self.original: Tensor | None = None  # [N, K] logits of all images, where they are known

    def shares(self, position: int, stop: int, stopping: Callable[[], bool]) -> Iterator[Share]:
        """Yields this rank's shares of the minibatches ``position .. stop - 1``.

        A few lost data workers are replaced.

        Args:
            position, stop: numbers of minibatches.
            stopping: whether the run is to stop; a worker lost then ends the shares.

        Raises:
            LostWorker: if workers die again and again.
            RuntimeError: for too many corrupt images, or none of a class that can be read.
        """
        lost = 0
        while position < stop:
            try:
                with contextlib.closing(self._read(position, stop)) as stream:
                    for batch in stream:
                        yield self._share(position, batch)
                        position += 1
            except LostWorker as error:
                if stopping():  # the signal reached the workers, too
                    return
                lost += 1
                if lost > _LOST_WORKERS:
                    raise
                logger.warning(
                    f"{error}; new ones go on from minibatch {position} ({lost} of at most "
                    f"{_LOST_WORKERS} times)"
                )

    def _read(self, position: int, stop: int) -> Iterator[Batch | None]:
        """Yields this rank's images of each minibatch; None where it has none of them."""
        if self.ranks.rank >= self.config.images:
            return (None for _ in range(position, stop))
        return batches(
            self.dataset,
            map(self.ranks.share, self.sampler.batches(position, stop)),
            self.config.workers,
            self.corrupt,
            pin_memory=self.pin_memory,
            seed=self.config.seed,
            start=position,
            replace_corrupt=True,
        )

    def _share(self, position: int, batch: Batch | None) -> Share:
        if self.ranks.alone:
            whole = self._expand(position, batch.indices)
            if self.original is not None:
                whole = replace(whole, original=self.original[batch.indices])
            return Share(batch.images, whole, whole.rows)
        chosen = self.sampler.batch(position)
        whole = self._expand(position, chosen)
        owner = torch.arange(len(chosen)) % self.ranks.size  # of each image
        owner_of_sample = owner[whole.source]
        mine = owner_of_sample == self.ranks.rank
        own = ExpandedBatch(
            whole.forget[mine],
            whole.source[mine] // self.ranks.size,
            whole.target[mine],
            int(mine[whole.forget_half].sum()),
            weight=whole.weights_of(mine),
        )
        images = None if batch is None or not len(own) else batch.images
        return Share(images, own, whole.rows, int(owner_of_sample.min()))

    def _expand(self, position: int, indices: Tensor) -> ExpandedBatch:
        """Returns the expanded batch of minibatch ``position``, which has these images."""
        config = self.config
        if config.objective == "durable":
            return expand_groups(self.labels[indices], groups_of(config))
        settings = {
            "label_expansion": config.label_expansion,
            "generator": generator_for(config.seed, 4, position),
            "share_images": config.share_images,
            "forget_size": None if config.share_images else config.batch_size // 2,
        }
        if self.multi_hot is not None:
            return expand_multi_label(self.multi_hot[indices], **settings)
        settings |= {"rows": self.rows, "compound": config.compound}
        return expand(self.labels[indices], self.num_classes, **settings)
