"""Evaluation of a filtered network: every class in mixed batches, one record per class.

The measures themselves are defined in :mod:`wfnet.evaluation.metrics`.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wfnet.data import Batch, CorruptImages, Dataset, classes_of, labels_of
from wfnet.evaluation import metrics
from wfnet.evaluation.initialisation import reinitialise
from wfnet.evaluation.pair_engine import Chunk, Measure, PairEngine, Pairs
from wfnet.evaluation.pairs import (
    Hits,
    Pairing,
    accuracies,
    check_classes,
    check_settings,
    zrf_per_class,
)
from wfnet.evaluation.partial import PartialCounts, data_identity, network_identity
from wfnet.evaluation.results import ClassRecord, EvaluationResult, PairCounts
from wfnet.network import WFNet
from wfnet.pretrained import filters_digest
from wfnet.services.files import fingerprint
from wfnet.services.progress import Progress
from wfnet.services.ranks import Ranks
from wfnet.version import __version__


def evaluate(
    net: WFNet,
    dataset: Dataset,
    classes: Sequence[int] | None = None,
    batch_size: int = 256,
    zrf_base: float = math.e,
    initialised: nn.Module | None = None,
    seed: int = 0,
    retained_rows: int | None = None,
    progress: bool = True,
    workers: int = 0,
    max_corrupt: int | CorruptImages | None = None,
    amp_dtype: torch.dtype | None = None,
    channels_last: bool = False,
    zrf_mode: str = "definition",
    records: str | os.PathLike | None = None,
    ranks: Ranks | None = None,
) -> EvaluationResult:
    """Acc_r, Acc_f, top-5 variants and ZRF of every class, and the same of the original network.

    Each image is read once and run under all rows: ``len(dataset) * len(classes)`` forward passes
    of one image, in batches that mix rows, plus one pass each through the original network and a
    newly initialised one. The model under evaluation is not changed, and neither is the caller's
    random state.

    Args:
        net: the filtered network, on any device.
        dataset: images and labels (see :mod:`wfnet.data`); normally a test set.
        classes: rows to evaluate; all classes by default. Images of every class serve as
            retained images in any case.
        batch_size: (image, row) pairs per forward pass.
        zrf_base: base of the logarithm in ZRF.
        initialised: the same network newly initialised, a plain classifier on the same device;
            by default :func:`reinitialise` makes it from ``net``.
        seed: seeds the initialisation and the draw of ``retained_rows``.
        retained_rows: for many classes: run each image under its own row and this many random
            other rows instead of all. Acc_f and ZRF stay exact, Acc_r becomes an estimate from
            about ``len(dataset) * retained_rows / len(classes)`` images per row.
        progress: show progress and time left on stderr.
        workers, max_corrupt: as in :func:`wfnet.data.batches`; corrupt images are left out and
            counted in ``settings["corrupt_images"]``.
        amp_dtype: autocast dtype, for example torch.bfloat16; None for none.
        channels_last: send images in channels-last layout.
        zrf_mode: one of :data:`wfnet.evaluation.metrics.ZRF_MODES`: how other code departs from
        ZRF's
            definition, to compare with its numbers.
        records: safetensors file in which the counts so far are kept: an interrupted call goes on
            there, and one that was finished gives its result again. Several ranks have a file each
            beside it.
        ranks: processes that share the images, each evaluating a part of them
            (:class:`wfnet.services.ranks.Ranks`); all get the result of one process, bit by bit in
            its counts. By default this process evaluates alone.

    Raises:
        ValueError: before work starts for arguments or labels that do not fit, a class without
            images, a row without retained images, or a file of something else in ``records``.
        FloatingPointError: if logits are NaN or infinite.
    """
    labels = labels_of(dataset)
    rows = check_classes(classes, labels, net.num_classes)
    check_settings(seed, zrf_base, retained_rows, len(rows))
    if zrf_mode not in metrics.ZRF_MODES:
        raise ValueError(f"zrf_mode={zrf_mode!r} is not one of {', '.join(metrics.ZRF_MODES)}")
    if initialised is not None and isinstance(initialised, WFNet):
        raise ValueError("initialised must be a plain classifier; pass its .bake(None)")
    pairing = Pairing(rows, labels, retained_rows, seed)
    initial = reinitialise(net, seed) if initialised is None else initialised
    start = time.perf_counter()
    engine = PairEngine(
        net,
        dataset,
        batch_size,
        workers,
        max_corrupt,
        amp_dtype,
        channels_last,
        beside={"initialised": initial},
        ranks=ranks,
    )
    ranks = engine.ranks
    scores = RowScores(pairing, net.num_classes, engine.device, zrf_base, zrf_mode)
    kept, position = None, 0
    if records is not None:
        identity = {
            **network_identity(net),
            **data_identity(dataset),
            "settings": {
                "classes": rows.tolist(),
                "zrf_base": zrf_base,
                "zrf_mode": zrf_mode,
                "seed": seed,
                "retained_rows": retained_rows,
                "amp": str(amp_dtype),
                "initialised": "own" if initialised is None else fingerprint(initialised),
            },
        }
        kept = PartialCounts(records, identity, scores, engine.corrupt, ranks)
        position = kept.load()
    first, last = ranks.range(len(labels))
    engine.progress = Progress(
        pairing.pairs * (last - first) // len(labels),
        "evaluating",
        progress and ranks.first,
        done=int(scores.filtered.seen.sum()),
        unit="samples",
    )
    with engine.progress:
        engine.run(scores, engine.chunks(start=position), kept)
    if kept is not None:
        kept.save(last)
    scores.merge(ranks)
    engine.corrupt.merge(ranks)
    settings = {
        "wfnet_version": __version__,
        "model": type(net.model).__name__,
        "filters_digest": filters_digest(net),
        "num_classes": net.num_classes,
        "classes": "all" if classes is None else rows.tolist(),
        "images": int(scores.original.seen.sum()),
        "corrupt_images": len(engine.corrupt.found),
        "pairs": int(scores.filtered.seen.sum()),
        "retained_rows": "all" if retained_rows is None else retained_rows,
        "seed": seed,
        "initialised": "reinitialise(net, seed)" if initialised is None else "given by the caller",
        "batch_size": batch_size,
        "zrf_mode": zrf_mode,
        "dtype": str(amp_dtype or engine.forward.dtype).removeprefix("torch."),
        "device": str(engine.device),
    }
    counts, values = scores.values()
    return _result(rows, classes_of(dataset), counts, values, zrf_base, settings, start)


class RowScores(Measure):
    """Hits of every row, and divergences from a new network under each image's own row.

    Args:
        pairing: under which rows each image is run.
        num_classes: outputs of the network.
        device: of the network.
        zrf_base, zrf_mode: as in :func:`evaluate`.
    """

    # Lists that grow by one tensor per chunk, in the order of the images.
    _PER_IMAGE = ("own_class", "divergence", "original_divergence")

    def __init__(
        self,
        pairing: Pairing,
        num_classes: int,
        device: torch.device,
        zrf_base: float,
        zrf_mode: str,
    ):
        self.pairing, self.rows = pairing, pairing.classes
        self.zrf_base, self.zrf_mode = zrf_base, zrf_mode
        self.filtered = Hits(len(self.rows), num_classes, device)
        self.original = Hits(1, num_classes, device)
        self.own_class: list[Tensor] = []
        self.divergence: list[Tensor] = []
        self.original_divergence: list[Tensor] = []
        # Of the chunk that is run: labels on the device, logits of each image under its own row.
        self._labels = self._own = torch.empty(0)

    def pairs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.pairing.of(batch.indices)

    def begin(self, chunk: Chunk) -> None:
        self._labels = chunk.labels.to(chunk.original.device, non_blocking=True)
        self._own = torch.full_like(chunk.original, torch.nan)
        self.original.add(chunk.original, self._labels)

    def add(self, chunk: Chunk, pairs: Pairs) -> None:
        device = pairs.logits.device
        image, row = pairs.image.to(device), pairs.row.to(device)
        self.filtered.add(pairs.logits, self._labels[image], row)
        # Found on the host, where the labels are: a device would have to be waited for.
        is_own = self.rows[pairs.row] == chunk.labels[pairs.image]
        at = is_own.nonzero().squeeze(1).to(device)
        self._own[image[at]] = pairs.logits[at].to(self._own.dtype)

    def end(self, chunk: Chunk) -> None:
        has_row = self.pairing.position[chunk.labels] >= 0
        chosen = has_row.to(self._own.device)
        (new,) = chunk.beside
        self.own_class.append(chunk.labels[has_row])
        for kept, logits in (
            (self.divergence, self._own),
            (self.original_divergence, chunk.original),
        ):
            divergence = metrics.zrf_divergence(
                logits[chosen], new[chosen], self.zrf_base, self.zrf_mode
            )
            kept.append(divergence.cpu())

    def state(self) -> dict[str, Tensor]:
        """Everything that was counted, by name."""
        state = {name: torch.cat(getattr(self, name)) for name in self._PER_IMAGE if self.own_class}
        for prefix in ("filtered", "original"):
            tables = getattr(self, prefix).tables()
            state |= {f"{prefix}.{name}": table for name, table in tables.items()}
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Takes what :meth:`state` gave."""
        for prefix in ("filtered", "original"):
            for name, table in getattr(self, prefix).tables().items():
                table.copy_(state[f"{prefix}.{name}"])
        for name in self._PER_IMAGE:
            setattr(self, name, [state[name]])

    def merge(self, ranks: Ranks) -> None:
        """Adds up what every rank has counted; the images of lower ranks come first."""
        if ranks.alone:
            return
        for hits in (self.filtered, self.original):
            for table in hits.tables().values():
                ranks.add(table)
        for name in self._PER_IMAGE:
            own = getattr(self, name)
            parts = ranks.gather(torch.cat(own).numpy() if own else None)
            setattr(self, name, [torch.from_numpy(part) for part in parts if part is not None])

    def values(self) -> tuple[PairCounts, dict[str, Tensor]]:
        """The counts, and ``[R]`` fp64 by name of :class:`ClassRecord`'s measures."""
        filtered = [table.cpu() for table in self.filtered.tables().values()]
        original = [table.cpu() for table in self.original.tables().values()]
        own_class = torch.cat(self.own_class)
        # The original network has the same counts under every row.
        before = [table.expand(len(self.rows), -1) for table in original]
        values = {
            **accuracies(*filtered, self.rows),
            "zrf": zrf_per_class(self.divergence, own_class, self.rows),
            **{f"original_{k}": v for k, v in accuracies(*before, self.rows).items()},
            "original_zrf": zrf_per_class(self.original_divergence, own_class, self.rows),
        }
        return PairCounts(self.rows, *filtered, *(table[0] for table in original)), values


def _result(
    classes: Tensor,
    names: list[str],
    counts: PairCounts,
    values: dict[str, Tensor],
    zrf_base: float,
    settings: dict[str, Any],
    start: float,
) -> EvaluationResult:
    lost = values["acc_f"].isnan() | values["acc_r"].isnan()
    if lost.any():
        raise ValueError(
            f"class {int(classes[lost][0])} has no readable image, or no readable retained image; "
            "repair the images, or leave it out of classes="
        )
    n_forget = counts.seen.gather(1, classes.unsqueeze(1)).squeeze(1)
    n_retain = counts.seen.sum(1) - n_forget
    columns = {name: column.tolist() for name, column in values.items()}
    records = [
        ClassRecord(
            index=index,
            name=names[index] if index < len(names) else str(index),
            n_forget=int(n_forget[i]),
            n_retain=int(n_retain[i]),
            **{name: column[i] for name, column in columns.items()},
        )
        for i, index in enumerate(classes.tolist())
    ]
    seconds = time.perf_counter() - start
    return EvaluationResult.from_records(records, zrf_base, settings, seconds, counts)
