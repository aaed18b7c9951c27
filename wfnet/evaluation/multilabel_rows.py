"""Evaluation on images with several labels each: average precision, forgotten and retained."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from wfnet.data import Dataset
from wfnet.data.multi_hot import multi_hot_of
from wfnet.evaluation.metrics import average_precision
from wfnet.evaluation.pair_engine import Chunk, Measure, PairEngine, RunOptions
from wfnet.evaluation.pairs import names_of, unreadable
from wfnet.evaluation.partial import PartialResults, evaluation_identity
from wfnet.evaluation.results import EvaluationResult, means
from wfnet.network import WFNet
from wfnet.services.files import FilePath, write_json
from wfnet.services.records import check_format, write_csv
from wfnet.services.tables import aligned

FORMAT = 1
KIND = "multi-label"


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
class LabelGroupRecord:
    """What forgetting a group of labels at once does.

    Attributes:
        classes, names: the group.
        ap_f, ap_f_worst: mean and largest average precision of its own outputs.
        map_r: mean average precision of all other outputs.
        original_ap_f, original_map_r: the same of the original network.
    """

    classes: list[int]
    names: list[str]
    ap_f: float
    ap_f_worst: float
    map_r: float
    original_ap_f: float
    original_map_r: float


@dataclass(frozen=True)
class MultiLabelResult:
    """Records of all evaluated labels, what was evaluated and how, and the duration.

    Attributes are those of :class:`wfnet.evaluation.EvaluationResult`.
    """

    score: ClassVar[str] = "average precision"
    forget: ClassVar[str] = "ap_f"
    retain: ClassVar[str] = "map_r"

    records: list[MultiLabelRecord]
    settings: dict[str, Any]
    seconds: float

    @property
    def mean(self) -> dict[str, float]:
        """Means over labels: mAP forgotten (``ap_f``) and retained (``map_r``), and before."""
        return means(self.records, ("ap_f", "map_r", "original_ap_f", "original_map_r", "share"))

    def as_dict(self) -> dict[str, Any]:
        """For JSON; :func:`evaluation_from_dict` reads it."""
        content = asdict(self)
        about = {"format": FORMAT, "kind": KIND, "mean": self.mean}
        about["units"] = "average precisions are fractions in [0, 1]"
        return {**about, "classes": content.pop("records"), **content}

    def to_json(self, path: FilePath) -> None:
        """Writes everything, atomically."""
        write_json(path, self.as_dict())

    def to_csv(self, path: FilePath) -> None:
        """Writes one line per label, then the means, atomically."""
        rows = [asdict(record) for record in self.records] + [{"name": "mean", **self.mean}]
        write_csv(path, rows, [field.name for field in fields(MultiLabelRecord)])

    def table(self, max_rows: int = 40) -> str:
        """An aligned table in %; of many labels those that were forgotten worst."""
        records = self.records
        if len(records) > max_rows:
            records = sorted(records, key=lambda record: -record.ap_f)[:max_rows]
        columns = ("share", "ap_f", "original_ap_f", "map_r", "original_map_r")
        parts = [["label", "images", "share", "AP_f", "before", "mAP_r", "before"]]
        for row in (*map(vars, records), {"name": "mean", "images": "", **self.mean}):
            values = (f"{100 * row[column]:.1f}" for column in columns)
            parts.append([row["name"], str(row["images"]), *values])
        parts.append(
            "in %; AP_f: average precision of the forgotten label (its share of the images is "
            "chance), mAP_r: of all others"
        )
        return aligned(parts)


def evaluation_from_dict(content: Mapping[str, Any]) -> EvaluationResult | MultiLabelResult:
    """Reads an evaluation of either kind.

    Raises:
        ValueError, TypeError, KeyError: if it is something else.
    """
    if content.get("kind") != KIND:
        return EvaluationResult.from_dict(content)
    check_format(content, FORMAT)
    records = [MultiLabelRecord(**record) for record in content["classes"]]
    return MultiLabelResult(records, content["settings"], content["seconds"])


def evaluate_multi_label(
    net: WFNet,
    dataset: Dataset,
    classes: Sequence[int] | None = None,
    rows_together: int = 16,
    options: RunOptions | None = None,
) -> MultiLabelResult:
    """Average precision of each label under its row, and of all others; the network stays as it is.

    Args:
        net: the filtered network.
        dataset: images with several labels each (``multi_hot``).
        classes: labels to evaluate; by default all that an image has.
        rows_together: rows whose logits are in memory at once, ``[N, K]`` each.
        options: how images are run; ``records`` is a JSON file with finished labels.

    Raises:
        ValueError: before work starts, for data or labels that do not fit, or a file of something
            else in ``records``.
        FloatingPointError: if logits are NaN or infinite.
    """
    options = options or RunOptions()
    multi_hot = multi_hot_of(dataset)
    if multi_hot is None or multi_hot.shape[1] != net.num_classes:
        found = "one label per image" if multi_hot is None else f"{multi_hot.shape[1]} labels"
        raise ValueError(f"multi_hot must be [N, {net.num_classes}]; the data have {found}")
    chosen = multi_hot.any(0).nonzero().flatten().tolist() if classes is None else list(classes)
    check_labels(chosen, multi_hot)
    engine = PairEngine(net, dataset, options)
    ranks, names = engine.ranks, names_of(dataset, net.num_classes)
    path = options.records if ranks.first else None
    kept = PartialResults(path, lambda: evaluation_identity(net, dataset))
    kept.records = ranks.first_does(lambda: kept.records)
    started = time.perf_counter()

    def make(part: list[int]) -> Iterator[MultiLabelRecord]:
        scores = LabelScores(torch.tensor(part), multi_hot)
        engine.run(scores, engine.chunks(len(part)))
        engine.merge(scores)
        return scores.records(names)

    with engine.show(len(kept.left(chosen)) * len(multi_hot) // ranks.size, "evaluating"):
        records = kept.complete(chosen, MultiLabelRecord, make, rows_together)
    about = engine.about(None if classes is None else torch.tensor(chosen))
    about["images"] = len(multi_hot)
    return MultiLabelResult(records, about, time.perf_counter() - started)


def check_labels(chosen: Sequence[int], multi_hot: Tensor) -> None:
    """Raises ValueError unless every label of ``chosen`` has images in ``multi_hot [N, K]``."""
    for label in chosen:
        if not 0 <= label < multi_hot.shape[1] or not multi_hot[:, label].any():
            raise ValueError(f"no image has label {label}, so it cannot be evaluated")


class LabelScores(Measure):
    """Logits of all images, of the original network and under each row: rankings need all.

    Args:
        rows: labels ``[R]``, or groups of them ``[R, J]``.
        multi_hot: ``[N, K]``.

    Attributes:
        tables: ``original [N, K]``, ``filtered [N, R, K]``; ``read [N]``, 1 for images that were.
    """

    def __init__(self, rows: Tensor, multi_hot: Tensor):
        self.rows, self.multi_hot = rows, multi_hot
        count, classes = multi_hot.shape
        self.tables = {
            "original": torch.zeros(count, classes),
            "filtered": torch.zeros(count, len(rows), classes),
            "read": torch.zeros(count, dtype=torch.int64),
        }

    def add(self, chunk: Chunk) -> None:
        self.tables["original"][chunk.indices] = chunk.original.float().cpu()
        self.tables["read"][chunk.indices] = 1
        place = chunk.indices[chunk.image], chunk.row
        self.tables["filtered"][place] = chunk.logits.float().cpu()

    def records(self, names: list[str]) -> Iterator[MultiLabelRecord | LabelGroupRecord]:
        """What was found of every row, over the readable images.

        Raises:
            ValueError: for a label of a row that none of them has.
        """
        read = self.tables["read"].bool()
        truth, filtered = self.multi_hot[read], self.tables["filtered"][read]
        for label in self.rows.flatten().tolist():
            if not truth[:, label].any():
                raise unreadable(f"label {label}")
        original = average_precision(self.tables["original"][read], truth)  # [K]
        for row, scores in zip(self.rows, filtered.unbind(1), strict=True):
            found, inside = average_precision(scores, truth), torch.zeros_like(truth[0])
            inside[row] = True
            values = {}
            for prefix, each in (("", found), ("original_", original)):
                values[f"{prefix}ap_f"] = each[inside].mean().item()
                values[f"{prefix}map_r"] = each[~inside].nanmean().item()
            if row.dim() == 1:
                group = row.tolist()
                about = {"classes": group, "names": [names[label] for label in group]}
                yield LabelGroupRecord(**about, ap_f_worst=found[inside].max().item(), **values)
            else:
                images = int(truth[:, row].sum())
                about = {"index": int(row), "name": names[row], "images": images}
                yield MultiLabelRecord(**about, share=images / len(truth), **values)
