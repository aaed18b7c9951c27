"""The one loop of every measure: images under rows of the filters, in mixed batches.

A measure says which (image, row) pairs it needs and takes their logits. What all measures share
is here: how images are run, corrupt images, passes through the original network, mixed batches
with ``source``, the check for NaN, progress, and the images of each rank.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wfnet.data import Batch, CorruptImages, Dataset, batches, corrupt_counter, labels_of
from wfnet.evaluation.forward import Forward, broken_logits
from wfnet.head import first_output
from wfnet.network import WFNet
from wfnet.pretrained import filters_digest
from wfnet.services import settings
from wfnet.services.device_copies import to_device_async
from wfnet.services.files import FilePath
from wfnet.services.modes import evaluation_mode
from wfnet.services.progress import Progress
from wfnet.services.ranks import Ranks
from wfnet.services.settings import check_value
from wfnet.version import __version__

_LOGITS_TOGETHER = 2**26  # that a chunk of images may have: 256 MB in fp32


@dataclass(frozen=True)
class RunOptions:
    """How images are run, as in :func:`wfnet.evaluate`: what every measure takes.

    Attributes:
        batch_size: (image, row) pairs per forward pass; None: all pairs of a chunk in one.
        records: file in which what is finished is kept: an interrupted call goes on there.
        ranks: processes that share the images; None: this one alone.

    Raises:
        ValueError: for values out of range.
    """

    batch_size: int | None = 256
    workers: int = 0
    max_corrupt: int | CorruptImages | None = None
    amp_dtype: torch.dtype | None = None
    channels_last: bool = False
    progress: bool = True
    records: FilePath | None = None
    ranks: Ranks | None = None

    def __post_init__(self) -> None:
        if self.batch_size is not None:
            check_value("batch_size", self.batch_size, settings.batch_size)
        check_value("workers", self.workers, settings.workers)


@dataclass(frozen=True)
class Chunk:
    """Images that were read together, and the logits of all their pairs.

    Attributes:
        indices: ``[n]`` int64, positions in the data set.
        labels: ``[n]`` int64.
        original: ``[n, K]``, logits of the original network; None if the measure needs none.
        initialised: ``[n, K]``, those of the engine's newly initialised network, if it has one.
        image: ``[p]`` int64, positions of the pairs' images in the chunk.
        row: ``[p]`` int64, positions in the measure's ``rows``.
        logits: ``[p, K]``, on the network's device.
    """

    indices: Tensor
    labels: Tensor
    original: Tensor | None
    initialised: Tensor | None
    image: Tensor
    row: Tensor
    logits: Tensor


class Measure:
    """What is made of logits.

    Attributes:
        rows: forget labels by row position: ``[R]``, or ``[R, J]`` for several classes at once.
        needs_original: whether images run through the original network too.
        tables: what was taken so far, where it adds up over images, by name.
    """

    rows: Tensor
    needs_original = True
    tables: dict[str, Tensor]

    def pairs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Pairs of a batch of images: positions in the batch and row positions, both ``[P]``."""
        return all_pairs(len(batch.labels), len(self.rows))

    def add(self, chunk: Chunk) -> None:
        """Takes the logits of some images."""
        raise NotImplementedError


def all_pairs(images: int, rows: int) -> tuple[Tensor, Tensor]:
    """Every image under every row, image by image: both ``[images * rows]`` int64."""
    return torch.arange(images).repeat_interleave(rows), torch.arange(rows).repeat(images)


class PairEngine:
    """Runs images of a data set through a filtered network, which is not changed.

    Args:
        net: on any device. Another network with as many outputs may take its place between runs.
        dataset: images and labels.
        options: how images are run.
        initialised: a plain classifier on the same device, through which every image runs too.
        refuse_broken: raise FloatingPointError for logits that are NaN or infinite.

    Attributes:
        device: of the network.
        corrupt: images that were left out, of all runs together.
        progress: is moved by the number of pairs.
    """

    def __init__(
        self,
        net: WFNet,
        dataset: Dataset,
        options: RunOptions,
        initialised: nn.Module | None = None,
        refuse_broken: bool = True,
    ):
        self.net, self.dataset, self.options = net, dataset, options
        self.outputs = net.num_classes
        self.corrupt = corrupt_counter(dataset, options.max_corrupt)
        self.forward = Forward.of(net, options.amp_dtype, options.channels_last)
        self.device = self.forward.device
        self.initialised = initialised
        self.ranks = options.ranks or Ranks(shared=False)
        self.refuse_broken = refuse_broken
        self.progress: Progress | None = None

    def show(self, pairs: int, title: str, done: int = 0) -> Progress:
        """Returns a bar of all ``pairs``, which :meth:`run` moves; a context manager."""
        wanted = self.options.progress and self.ranks.first
        self.progress = Progress(pairs, title, wanted, done=done, unit="samples")
        return self.progress

    def chunks(self, rows: int, start: int = 0) -> list[Tensor]:
        """This rank's images from position ``start`` on, in parts that are read together.

        ``batch_size`` images each, or fewer where the logits under ``rows`` rows are many.
        """
        first, last = self.ranks.range(len(labels_of(self.dataset)))
        own = torch.arange(max(first, start), max(last, start))
        most = max(1, _LOGITS_TOGETHER // (rows * self.outputs))
        return [part for part in own.split(min(self.options.batch_size, most)) if len(part)]

    def run(
        self,
        measure: Measure,
        chunks: Iterable[Tensor],
        counted: Callable[[int], None] | None = None,
    ) -> None:
        """Hands the measure the logits of all pairs of the images in ``chunks``.

        Args:
            chunks: positions ``[n]`` in the data set, read together each.
            counted: is told after every chunk how far it reached: the position behind it.

        Raises:
            ValueError, FloatingPointError: for logits of another shape, or that are not finite.
        """
        on_gpu = self.device.type == "cuda"
        stream = batches(self.dataset, chunks, self.options.workers, self.corrupt, on_gpu)
        models = [self.net] if self.initialised is None else [self.net, self.initialised]
        with evaluation_mode(*models), torch.no_grad():
            for batch in stream:
                count = self._run_chunk(measure, batch)
                if self.progress is not None:
                    self.progress.update(count)
                if counted is not None:
                    counted(int(batch.indices[-1]) + 1)
        self.net.check_labels()

    def merge(self, measure: Measure) -> None:
        """Adds up what every rank has taken, and the images that each has left out."""
        for table in measure.tables.values():
            self.ranks.add(table)
        self.corrupt.merge(self.ranks)

    def about(self, classes: Tensor | None) -> dict[str, Any]:
        """What was evaluated, for a result's settings; ``classes``: None for all."""
        return {
            "wfnet_version": __version__,
            "model": type(self.net.model).__name__,
            "filters_digest": filters_digest(self.net),
            "num_classes": self.net.num_classes,
            "classes": "all" if classes is None else classes.tolist(),
            "corrupt_images": len(self.corrupt.found),
        }

    def _run_chunk(self, measure: Measure, batch: Batch) -> int:
        """Runs some images under all their rows; returns the number of pairs."""
        images = self.forward.images(batch.images)
        original = initialised = None
        with self.forward.autocast():
            if measure.needs_original:
                original = self.net(images, forget=None)
            if self.initialised is not None:
                initialised = first_output(self.initialised(images))
        image, row = measure.pairs(batch)
        parts = torch.arange(len(image)).split(self.options.batch_size or len(image))
        found = [self._run_pairs(images, image[part], measure.rows[row[part]]) for part in parts]
        logits = torch.cat(found) if found else images.new_zeros(0, self.outputs)
        networks = {"original": original, "initialised": initialised, "filtered": logits}
        self._check({name: part for name, part in networks.items() if part is not None}, batch)
        plain = original, initialised
        measure.add(Chunk(batch.indices, batch.labels, *plain, image, row, logits))
        return len(image)

    def _run_pairs(self, images: Tensor, image: Tensor, forget: Tensor) -> Tensor:
        # Only the images that occur are sent: they are neighbours.
        first, last = int(image.min()), int(image.max())
        forget = to_device_async(forget, self.device)
        source = to_device_async(image - first, self.device)
        with self.forward.autocast():
            return self.net(images[first : last + 1], forget=forget, source=source)

    def _check(self, networks: dict[str, Tensor], batch: Batch) -> None:
        """Raises an error for logits of another shape, or that are NaN or infinite."""
        for name, logits in networks.items():
            shape = list(logits.shape)
            if shape != [len(logits), self.outputs]:
                raise ValueError(
                    f"the {name} network gave outputs of shape {shape}; expected "
                    f"{[len(logits), self.outputs]}"
                )
        if not self.refuse_broken:
            return
        # One look for all: on a device every look waits for it.
        broken = torch.stack([broken_logits(logits) for logits in networks.values()]).tolist()
        if not any(broken):
            return
        finite = batch.images.flatten(1).isfinite().all(1).cpu()
        if not finite.all():
            raise FloatingPointError(
                f"image {int(batch.indices[~finite][0])} of the data has values that are NaN or "
                "infinite: repair it, or leave it out"
            )
        name = list(networks)[broken.index(True)]
        raise FloatingPointError(
            f"logits of the {name} network are NaN or infinite for images {int(batch.indices[0])} "
            f"to {int(batch.indices[-1])}; check the images and the filters, or evaluate without "
            "16-bit autocast"
        )
