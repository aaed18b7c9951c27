"""Evaluation on images with several labels each: average precision, forgotten and retained."""

from __future__ import annotations

import csv
import io
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from wfnet.data import CorruptImages, Dataset, batches, classes_of, corrupt_limit
from wfnet.data.multi_hot import multi_hot_of
from wfnet.evaluation.forward import Progress, as_input, evaluation_mode
from wfnet.evaluation.partial import PartialResults, data_identity, network_identity
from wfnet.evaluation.rows import broken_logits
from wfnet.network import WFNet
from wfnet.services.extras import require
from wfnet.services.files import write_atomically, write_json
from wfnet.version import __version__

FORMAT = 1


def average_precision(scores: Tensor, truth: Tensor) -> Tensor:
    """Average precision of each label: mean precision at the ranks of its images.

    scikit-learn's ``average_precision_score``, the step-wise area under the curve of precision over
    recall, without interpolation.

    Args:
        scores: ``[N, K]``, larger is more likely; logits will do.
        truth: ``[N, K]`` bool.

    Returns:
        ``[K]`` fp64; NaN for a label that no image has. A label whose scores say nothing has its
        share of the images.
    """
    score = require("sklearn.metrics", "eval").average_precision_score
    values = [
        score(truth[:, k].numpy(), scores[:, k].float().numpy()) if truth[:, k].any() else torch.nan
        for k in range(truth.shape[1])
    ]
    return torch.tensor(values, dtype=torch.float64)


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
        text = io.StringIO()
        columns = [field.name for field in fields(MultiLabelRecord)]
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(record) for record in self.records)
        writer.writerow({"name": "mean", **self.mean})
        write_atomically(path, lambda temporary: temporary.write_text(text.getvalue()))

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
) -> MultiLabelResult:
    """Average precisions of every label under its row, and of all others; nothing is changed.

    Every image runs under every row, in batches that mix rows.

    Args:
        net: the filtered network.
        dataset: with ``multi_hot`` (:mod:`wfnet.data.multi_hot`).
        classes: labels to forget; by default all that some image has.
        rows_together: rows whose scores are in memory at once, ``[N, K]`` each.
        batch_size, records, progress, workers, max_corrupt, amp_dtype, channels_last: as in
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
    if batch_size < 1 or rows_together < 1:
        raise ValueError(f"batch_size and rows_together must be 1 or more; got {batch_size}")
    corrupt = max_corrupt
    if not isinstance(corrupt, CorruptImages):
        corrupt = CorruptImages(corrupt_limit(dataset) if corrupt is None else corrupt)
    identity = {**network_identity(net), **data_identity(dataset)} if records else {}
    kept = PartialResults(records, identity)
    names = classes_of(dataset)
    started = time.perf_counter()
    left = [label for label in chosen if label not in kept]
    bar = Progress(len(left) * len(multi_hot), progress)
    for part in torch.tensor(left, dtype=torch.int64).split(rows_together) if left else ():
        scores, before, truth = _scores(
            net, dataset, part, batch_size, bar, workers, corrupt, amp_dtype, channels_last
        )
        original = average_precision(before, truth)
        for index, label in enumerate(part.tolist()):
            found = average_precision(scores[:, index], truth)
            others = torch.arange(net.num_classes) != label
            images = int(truth[:, label].sum())
            record = MultiLabelRecord(
                index=label,
                name=names[label],
                images=images,
                share=images / len(truth),
                ap_f=found[label].item(),
                map_r=found[others].nanmean().item(),
                original_ap_f=original[label].item(),
                original_map_r=original[others].nanmean().item(),
            )
            kept.add(label, asdict(record))
    bar.close()
    settings = {
        "wfnet_version": __version__,
        "model": type(net.model).__name__,
        "num_classes": net.num_classes,
        "classes": "all" if classes is None else chosen,
        "images": len(multi_hot),
        "corrupt_images": len(corrupt.found),
    }
    found = [MultiLabelRecord(**kept[label]) for label in chosen]
    return MultiLabelResult(found, settings, time.perf_counter() - started)


def _scores(
    net: WFNet,
    dataset: Dataset,
    rows: Tensor,
    batch_size: int,
    bar: Progress,
    workers: int,
    corrupt: CorruptImages,
    amp_dtype: torch.dtype | None,
    channels_last: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits ``[N, R, K]`` under each of ``rows``, the original's ``[N, K]``, truth ``[N, K]``."""
    weight = next(iter(net.masked_layers.values())).weight
    device = weight.device
    multi_hot = multi_hot_of(dataset)
    count = len(rows)
    filtered, before, truth = [], [], []
    with (
        evaluation_mode(net),
        torch.inference_mode(),
        torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None),
    ):
        order = torch.arange(len(multi_hot)).split(max(1, batch_size // count))
        for batch in batches(dataset, order, workers, corrupt):
            images = as_input(batch.images, weight, channels_last)
            plain = net(images, forget=None)
            source = torch.arange(len(images)).repeat_interleave(count).to(device)
            logits = net(images, rows.repeat(len(images)).to(device), source)
            if bool(broken_logits(plain) | broken_logits(logits)):
                raise FloatingPointError(
                    f"logits are NaN or infinite for images {int(batch.indices[0])} to "
                    f"{int(batch.indices[-1])}; check the images and the filters"
                )
            filtered.append(logits.float().cpu().unflatten(0, (len(images), count)))
            before.append(plain.float().cpu())
            truth.append(multi_hot[batch.indices])
            bar.advance(len(source))
    return torch.cat(filtered), torch.cat(before), torch.cat(truth)
