"""Evaluation on images with several labels each: average precision, forgotten and retained."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from wfnet.data import CorruptImages, Dataset, classes_of
from wfnet.data.multi_hot import multi_hot_of
from wfnet.evaluation.metrics import average_precision
from wfnet.evaluation.pair_engine import Chunk, Measure, PairEngine, Pairs
from wfnet.evaluation.partial import PartialResults, data_identity, network_identity
from wfnet.network import WFNet
from wfnet.pretrained import filters_digest
from wfnet.services import settings
from wfnet.services.files import write_json
from wfnet.services.progress import Progress
from wfnet.services.ranks import Ranks
from wfnet.services.records import write_csv
from wfnet.services.settings import check_value
from wfnet.version import __version__

FORMAT = 1


@dataclass(frozen=True)
class MultiLabelRecord:
    """What forgetting one label does; fractions in [0, 1].

    Attributes:
        index, name: the label.
        images: images that have it.
        share: their share of all images: the average precision of an output that says nothing.
        ap_f: average precision of the label's own output under its row (low is good).
        map_r: mean average precision of all other outputs under that row.
        original_ap_f, original_map_r: the same of the original network.
    """

    index: int
    name: str
    images: int
    share: float
    ap_f: float
    map_r: float
    original_ap_f: float
    original_map_r: float


@dataclass(frozen=True)
class MultiLabelResult:
    """Records per label.

    Attributes:
        records: one per evaluated label.
        settings: what was evaluated and how.
        seconds: duration.
    """

    records: list[MultiLabelRecord]
    settings: dict[str, Any]
    seconds: float

    @property
    def mean(self) -> dict[str, float]:
        """Means over labels: mAP forgotten (``ap_f``) and retained (``map_r``), and before."""
        names = ("ap_f", "map_r", "original_ap_f", "original_map_r", "share")
        return {n: statistics.fmean(getattr(r, n) for r in self.records) for n in names}

    def to_json(self, path: str | os.PathLike) -> None:
        """Writes everything, atomically."""
        content = {
            "format": FORMAT,
            "kind": "multi-label",
            "units": "average precisions are fractions in [0, 1]",
            "mean": self.mean,
            "settings": self.settings,
            "seconds": self.seconds,
            "classes": [asdict(record) for record in self.records],
        }
        write_json(path, content)

    def to_csv(self, path: str | os.PathLike) -> None:
        """Writes one line per label, then the means, atomically."""
        rows = [asdict(record) for record in self.records] + [{"name": "mean", **self.mean}]
        write_csv(path, rows, [field.name for field in fields(MultiLabelRecord)])

    def table(self, max_rows: int = 40) -> str:
        """An aligned table in %; of many labels those that were forgotten worst."""
        records = self.records
        if len(records) > max_rows:
            records = sorted(records, key=lambda record: -record.ap_f)[:max_rows]
        width = max(len("mean"), *(len(record.name) for record in records))
        lines = [f"{'label':<{width}}  images  share  AP_f  before  mAP_r  before"]
        for record in records:
            lines.append(
                f"{record.name:<{width}}  {record.images:6d}  {100 * record.share:5.1f}  "
                f"{100 * record.ap_f:4.1f}  {100 * record.original_ap_f:6.1f}  "
                f"{100 * record.map_r:5.1f}  {100 * record.original_map_r:6.1f}"
            )
        mean = {name: 100 * value for name, value in self.mean.items()}
        lines.append(
            f"{'mean':<{width}}          {mean['share']:5.1f}  {mean['ap_f']:4.1f}  "
            f"{mean['original_ap_f']:6.1f}  {mean['map_r']:5.1f}  {mean['original_map_r']:6.1f}"
        )
        lines.append(
            "in %; AP_f: average precision of the forgotten label (its share of the images is "
            "chance), mAP_r: of all others"
        )
        return "\n".join(lines)


def evaluate_multi_label(
    net: WFNet,
    dataset: Dataset,
    classes: Sequence[int] | None = None,
    batch_size: int = 256,
    rows_together: int = 16,
    records: str | os.PathLike | None = None,
    progress: bool = True,
    workers: int = 0,
    max_corrupt: int | CorruptImages | None = None,
    amp_dtype: torch.dtype | None = None,
    channels_last: bool = False,
    ranks: Ranks | None = None,
) -> MultiLabelResult:
    """Average precisions of every label under its row, and of all others; nothing is changed.

    Every image runs under every row, in batches that mix rows.

    Args:
        net: the filtered network.
        dataset: with ``multi_hot`` (:mod:`wfnet.data.multi_hot`).
        classes: labels to forget; by default all that some image has.
        rows_together: rows whose scores are in memory at once, ``[N, K]`` each.
        records: JSON file in which finished labels are kept: an interrupted call goes on there.
        batch_size, progress, workers, max_corrupt, amp_dtype, channels_last, ranks: as in
            :func:`wfnet.evaluate`.

    Raises:
        ValueError: before work starts, for data or labels that do not fit, or a file of something
            else in ``records``.
        FloatingPointError: if logits are NaN or infinite.
    """
    multi_hot = multi_hot_of(dataset)
    if multi_hot is None or multi_hot.shape[1] != net.num_classes:
        found = "one label per image" if multi_hot is None else f"{multi_hot.shape[1]} labels"
        raise ValueError(
            f"multi-label evaluation of a network with {net.num_classes} classes needs multi_hot "
            f"[N, {net.num_classes}]; the data have {found}"
        )
    present = multi_hot.any(0)
    chosen = present.nonzero().flatten().tolist() if classes is None else list(classes)
    for label in chosen:
        if not 0 <= label < net.num_classes or not present[label]:
            raise ValueError(f"no image has label {label}, so it cannot be evaluated")
    check_value("rows_together", rows_together, settings.positive_int)
    engine = PairEngine(
        net, dataset, batch_size, workers, max_corrupt, amp_dtype, channels_last, ranks=ranks
    )
    ranks = engine.ranks
    identity = {**network_identity(net), **data_identity(dataset)} if records else {}
    kept = PartialResults(records if ranks.first else None, identity)
    kept.records = ranks.first_does(lambda: kept.records)
    names = classes_of(dataset)
    started = time.perf_counter()
    left = torch.tensor([label for label in chosen if label not in kept], dtype=torch.int64)
    total = len(left) * len(multi_hot) // ranks.size
    with Progress(total, "evaluating", progress and ranks.first, unit="samples") as engine.progress:
        for part in left.split(rows_together) if len(left) else ():
            scores = LabelScores(part, multi_hot)
            engine.run(scores, engine.chunks(max(1, batch_size // len(part))))
            scores.merge(ranks)
            for record in scores.records(names):
                kept.add(record.index, asdict(record))
    engine.corrupt.merge(ranks)
    about = {
        "wfnet_version": __version__,
        "model": type(net.model).__name__,
        "filters_digest": filters_digest(net),
        "num_classes": net.num_classes,
        "classes": "all" if classes is None else chosen,
        "images": len(multi_hot),
        "corrupt_images": len(engine.corrupt.found),
    }
    found = [MultiLabelRecord(**kept[label]) for label in chosen]
    return MultiLabelResult(found, about, time.perf_counter() - started)


class LabelScores(Measure):
    """Logits of all images, of the original network and under each row: rankings need all.

    Args:
        rows: ``[R]`` int64, labels that are forgotten.
        multi_hot: ``[N, K]`` bool, true labels of the data set.
    """

    def __init__(self, rows: Tensor, multi_hot: Tensor):
        self.rows, self.multi_hot = rows, multi_hot
        classes = multi_hot.shape[1]
        # Parts in the order of the images: [n, K], [n * R, K] and [n, K].
        self.original = [torch.zeros(0, classes)]
        self.filtered = [torch.zeros(0, classes)]
        self.truth = [torch.zeros(0, classes, dtype=torch.bool)]

    def begin(self, chunk: Chunk) -> None:
        self.original.append(chunk.original.float().cpu())
        self.truth.append(self.multi_hot[chunk.indices])

    def add(self, chunk: Chunk, pairs: Pairs) -> None:
        self.filtered.append(pairs.logits.float().cpu())

    def merge(self, ranks: Ranks) -> None:
        """Gathers the logits of every rank; the images of lower ranks come first."""
        if not ranks.alone:
            for name in ("original", "filtered", "truth"):
                parts = ranks.gather(torch.cat(getattr(self, name)).numpy())
                setattr(self, name, [torch.from_numpy(part) for part in parts])

    def records(self, names: list[str]) -> Iterator[MultiLabelRecord]:
        """What was found of every row.

        Raises:
            ValueError: for a label that no readable image has.
        """
        truth = torch.cat(self.truth)
        original = average_precision(torch.cat(self.original), truth)
        scores = torch.cat(self.filtered).unflatten(0, (len(truth), len(self.rows)))
        for index, label in enumerate(self.rows.tolist()):
            images = int(truth[:, label].sum())
            if not images:
                raise ValueError(
                    f"label {label} has no readable image; repair the images, or leave it out of "
                    "classes="
                )
            found = average_precision(scores[:, index], truth)
            others = torch.arange(truth.shape[1]) != label
            yield MultiLabelRecord(
                index=label,
                name=names[label],
                images=images,
                share=images / len(truth),
                ap_f=found[label].item(),
                map_r=found[others].nanmean().item(),
                original_ap_f=original[label].item(),
                original_map_r=original[others].nanmean().item(),
            )
