"""The minibatches of a run, read and expanded: what each process has of them, in order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from wfnet.data import Batch, CorruptImages, batches
from wfnet.services.ranks import Ranks
from wfnet.services.seeds import generator_for
from wfnet.untraining.durable import expand_groups, groups_of
from wfnet.untraining.expansion import ExpandedBatch, expand
from wfnet.untraining.run_parts import TrainingData, configured_sampler
from wfnet.untraining.untrain_config import UntrainConfig


class Share(NamedTuple):
    """What one process has of a minibatch: all of it, if there is no other process.

    Attributes:
        images: ``[m, C, H, W]``, those that this process has read; None if there are none.
        batch: the samples of the whole expanded minibatch that use them.
        rows: ``[R]``, distinct forget labels of the whole expanded minibatch.
    """

    images: Tensor | None
    batch: ExpandedBatch
    rows: Tensor


@dataclass
class MinibatchReader:
    """Reads minibatch after minibatch, each rank its share of the images.

    Every rank knows all labels of a minibatch, and draws the rows of the whole of it: what a run
    learns does not depend on the number of ranks. An unreadable image is replaced by another one of
    its class, so sizes and labels are known before anything is read.

    Attributes:
        data: the training images.
        config: settings of the run.
        ranks: who shares the minibatches.
        corrupt: where unreadable images are counted.
        pin_memory: read into page-locked memory.
        original: ``[N, K]``, the original network's logits of all images, where they are known.
    """

    data: TrainingData
    config: UntrainConfig
    ranks: Ranks
    corrupt: CorruptImages
    pin_memory: bool
    original: Tensor | None = None

    def __post_init__(self) -> None:
        self.sampler = configured_sampler(self.config, self.data)

    def shares(self, position: int, stop: int) -> Iterator[Share]:
        """Yields this rank's shares of the minibatches ``position .. stop - 1``.

        Raises:
            LostWorker: if a data worker dies.
            RuntimeError: for too many corrupt images, or none of a class that can be read.
        """
        steps = range(position, stop)
        stream: Iterator[Batch | None] = iter([None] * len(steps))
        if self.ranks.rank < self.config.images:  # else it has none of them
            stream = batches(
                self.data.dataset,
                (self.ranks.share(self.sampler.batch(step)) for step in steps),
                self.config.workers,
                self.corrupt,
                pin_memory=self.pin_memory,
                seed=self.config.seed,
                start=position,
                replace_corrupt=True,
            )
        for step, batch in zip(steps, stream, strict=True):
            yield self._share(step, batch)

    def _share(self, position: int, batch: Batch | None) -> Share:
        if self.ranks.alone:
            whole = self._expand(position, batch.indices)
            if self.original is not None:
                whole = replace(whole, original=self.original[batch.indices])
            return Share(batch.images, whole, whole.rows)
        size = self.ranks.size
        whole = self._expand(position, self.sampler.batch(position))
        mine = whole.source % size == self.ranks.rank
        own = ExpandedBatch(
            whole.forget[mine],
            whole.source[mine] // size,
            whole.target[mine],
            int(mine[whole.forget_half].sum()),
            weight=None if whole.weight is None else whole.weight[mine],
        )
        return Share(None if batch is None else batch.images, own, whole.rows)

    def _expand(self, position: int, indices: Tensor) -> ExpandedBatch:
        """Returns the expanded batch of minibatch ``position``, which has these images."""
        config, data = self.config, self.data
        if config.objective == "durable":
            return expand_groups(data.labels[indices], groups_of(config))
        return expand(
            (data.labels if data.multi_hot is None else data.multi_hot)[indices],
            data.num_classes,
            config.label_expansion,
            generator_for(config.seed, 4, position),
            config.share_images,
            rows=data.rows,
            compound=config.compound,
        )
