"""The one loop of every measure: images under rows of the filters, in mixed batches.

A measure says which (image, row) pairs it needs and takes their logits. What all measures share
is here: reading and corrupt images, device, layout and autocast, the passes through the original
network, mixed batches with ``source``, the check for NaN, progress, unfinished counts, and the
images of each rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from wfnet.data import Batch, CorruptImages, Dataset, batches, corrupt_counter, labels_of
from wfnet.evaluation.forward import Forward, broken_logits
from wfnet.head import first_output
from wfnet.network import WFNet
from wfnet.services import settings
from wfnet.services.device_copies import to_device_async
from wfnet.services.modes import evaluation_mode
from wfnet.services.progress import Progress
from wfnet.services.ranks import Ranks
from wfnet.services.settings import check_value


@dataclass(frozen=True)
class Chunk:
    """Images that were read together.

    Attributes:
        indices: ``[n]`` int64, positions in the data set.
        labels: ``[n]`` int64.
        original: ``[n, K]``, logits of the original network; None if the measure needs none.
        beside: ``[n, K]`` each, logits of the engine's other models.
    """

    indices: Tensor
    labels: Tensor
    original: Tensor | None
    beside: tuple[Tensor, ...]


@dataclass(frozen=True)
class Pairs:
    """Some pairs of a chunk that went through the network together.

    Attributes:
        image: ``[p]`` int64, positions in the chunk.
        row: ``[p]`` int64, positions in the measure's ``rows``.
        logits: ``[p, K]``, on the network's device.
    """

    image: Tensor
    row: Tensor
    logits: Tensor


class Measure:
    """What is made of logits: a subclass overrides what it needs.

    Attributes:
        rows: forget labels by row position: ``[R]``, or ``[R, J]`` for several classes at once.
        needs_original: whether images run through the original network too.
    """

    rows: Tensor
    needs_original = True

    def pairs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Pairs of a batch of images: positions in the batch and row positions, both ``[P]``."""
        return all_pairs(len(batch.labels), len(self.rows))

    def begin(self, chunk: Chunk) -> None:
        """Takes the logits of the original network, before those of the pairs."""

    def add(self, chunk: Chunk, pairs: Pairs) -> None:
        """Takes the logits of one mixed batch."""
        raise NotImplementedError

    def end(self, chunk: Chunk) -> None:
        """Is called after the last pair of a chunk, whose logits are then known to be finite."""


class Keeper(Protocol):
    """Saves the counts of a measure while it is unfinished."""

    def save_now_and_then(self, position: int) -> None:
        """Saves them, if it is time; images before ``position`` are counted."""


def all_pairs(images: int, rows: int) -> tuple[Tensor, Tensor]:
    """Every image under every row, image by image: both ``[images * rows]`` int64."""
    return torch.arange(images).repeat_interleave(rows), torch.arange(rows).repeat(images)


class PairEngine:
    """Runs images of a data set through a filtered network; neither is changed.

    Args:
        net: the filtered network, on any device.
        dataset: images and labels.
        batch_size: pairs per forward pass; None: all pairs of a chunk in one.
        workers, max_corrupt: as in :func:`wfnet.data.batches`; all runs of an engine count
            together.
        amp_dtype: autocast dtype; None for none.
        channels_last: images in channels-last layout.
        beside: other models through which every image runs: plain classifiers on the same device,
            by the names that errors give them.
        ranks: processes that share the images; this one alone by default.
        outputs: K; that of ``net`` by default.
        refuse_broken: raise FloatingPointError for logits that are NaN or infinite.

    Attributes:
        device: of the network.
        corrupt: images that were left out.
        progress: counts pairs; set it before :meth:`run` to show them.
    """

    def __init__(
        self,
        net: WFNet,
        dataset: Dataset,
        batch_size: int | None = 256,
        workers: int = 0,
        max_corrupt: int | CorruptImages | None = None,
        amp_dtype: torch.dtype | None = None,
        channels_last: bool = False,
        beside: dict[str, nn.Module] | None = None,
        ranks: Ranks | None = None,
        outputs: int | None = None,
        refuse_broken: bool = True,
    ):
        if batch_size is not None:
            check_value("batch_size", batch_size, settings.batch_size)
        check_value("workers", workers, settings.workers)
        self.net, self.dataset, self.batch_size = net, dataset, batch_size
        self.workers = workers
        self.outputs = outputs or net.num_classes
        self.corrupt = corrupt_counter(dataset, max_corrupt)
        self.forward = Forward.of(net, amp_dtype, channels_last)
        self.device = self.forward.device
        self.beside = dict(beside or {})
        self.ranks = ranks or Ranks(shared=False)
        self.refuse_broken = refuse_broken
        self.progress: Progress | None = None
        for name, model in self.beside.items():
            found = next((p.device for p in model.parameters()), self.device)
            if found != self.device:
                raise ValueError(
                    f"{name} is on {found}, the network on {self.device}; move one to the other"
                )

    def chunks(self, images_together: int | None = None, start: int = 0) -> list[Tensor]:
        """This rank's images from position ``start`` on, in parts that are read together.

        Args:
            images_together: images of a part; ``batch_size`` by default.
        """
        first, last = self.ranks.range(len(labels_of(self.dataset)))
        own = torch.arange(max(first, start), max(last, start))
        return [part for part in own.split(images_together or self.batch_size) if len(part)]

    def run(
        self,
        measure: Measure,
        chunks: Iterable[Tensor],
        kept: Keeper | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Hands the measure the logits of all pairs of the images in ``chunks``.

        Args:
            chunks: positions ``[n]`` in the data set, read together each.
            kept: counts of an unfinished evaluation, saved now and then.
            stopped: is asked before every chunk.

        Returns:
            False if ``stopped`` said so; the measure is incomplete then.

        Raises:
            ValueError: for logits that are not ``[n, K]``.
            FloatingPointError: for logits that are NaN or infinite, if they are refused.
        """
        on_gpu = self.device.type == "cuda"
        stream = batches(self.dataset, chunks, self.workers, self.corrupt, on_gpu)
        with evaluation_mode(self.net, *self.beside.values()), torch.no_grad():
            for batch in stream:
                if stopped():
                    return False
                count = self._run_chunk(measure, batch)
                if self.progress is not None:
                    self.progress.update(count)
                if kept is not None:
                    kept.save_now_and_then(int(batch.indices[-1]) + 1)
        self.net.check_labels()
        return True

    def _run_chunk(self, measure: Measure, batch: Batch) -> int:
        """Runs some images under all their rows; returns the number of pairs."""
        images = self.forward.images(batch.images)
        with self.forward.autocast():
            original = self.net(images, forget=None) if measure.needs_original else None
            beside = tuple(first_output(model(images)) for model in self.beside.values())
        plain = {"the original network": original, **dict(zip(self.beside, beside, strict=True))}
        plain = {name: logits for name, logits in plain.items() if logits is not None}
        for name, logits in plain.items():
            self._check_shape(logits, name)
        broken = {name: [broken_logits(logits)] for name, logits in plain.items()}
        broken["the filtered network"] = []
        chunk = Chunk(batch.indices, batch.labels, original, beside)
        measure.begin(chunk)
        image, row = measure.pairs(batch)
        for part in torch.arange(len(image)).split(self.batch_size or len(image)):
            pairs = self._run_pairs(images, image[part], row[part], measure.rows)
            broken["the filtered network"].append(broken_logits(pairs.logits))
            measure.add(chunk, pairs)
        if self.refuse_broken:
            self._check_finite(broken, batch)
        measure.end(chunk)
        return len(image)

    def _run_pairs(self, images: Tensor, image: Tensor, row: Tensor, rows: Tensor) -> Pairs:
        # Only the images that occur are sent: they are neighbours.
        first, last = int(image.min()), int(image.max())
        forget = to_device_async(rows[row], self.device)
        source = to_device_async(image - first, self.device)
        with self.forward.autocast():
            logits = self.net(images[first : last + 1], forget=forget, source=source)
        return Pairs(image, row, logits)

    def _check_shape(self, logits: Tensor, name: str) -> None:
        expected = [len(logits), self.outputs]
        if list(logits.shape) != expected:
            raise ValueError(
                f"{name} gave outputs of shape {list(logits.shape)}; expected {expected}"
            )

    @staticmethod
    def _check_finite(broken: dict[str, list[Tensor]], batch: Batch) -> None:
        # One look for all: on a device every look waits for it.
        if not bool(torch.stack([flag for flags in broken.values() for flag in flags]).any()):
            return
        finite = batch.images.flatten(1).isfinite().all(1)
        if not finite.all():
            raise FloatingPointError(
                f"image {int(batch.indices[~finite.cpu()][0])} of the data has values that are NaN "
                "or infinite: repair it, or leave it out"
            )
        name = next(name for name, flags in broken.items() if any(flags))
        raise FloatingPointError(
            f"logits of {name} are NaN or infinite for images {int(batch.indices[0])} to "
            f"{int(batch.indices[-1])}; check the images and the filters, or evaluate without "
            "16-bit autocast"
        )
