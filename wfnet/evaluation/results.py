"""Results of an evaluation: one record per class, their means, files and the terminal's table."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

from torch import Tensor

from wfnet.evaluation import metrics
from wfnet.services.files import FilePath, write_json
from wfnet.services.records import check_format, read_json, write_csv
from wfnet.services.tables import aligned

FORMAT = 1
_LABEL_WIDTH = 28


@dataclass(frozen=True)
class Scores:
    """The measures of one row, or their means over rows; all are fractions in [0, 1].

    Attributes:
        acc_r, acc_f: :func:`wfnet.evaluation.metrics.accuracies`.
        acc_r_top5, acc_f_top5: the same with the true class among the five largest logits.
        zrf: :class:`wfnet.evaluation.rows.RowScores`, in the log base that stands in the result.
    """

    acc_r: float
    acc_f: float
    acc_r_top5: float
    acc_f_top5: float
    zrf: float


@dataclass(frozen=True)
class ClassRecord(Scores):
    """What forgetting one class does: the measures of its row, and of the original network.

    Attributes:
        index, name: the class.
        n_forget, n_retain: images of the class, and of others, that were evaluated under its row.
        original_acc_f, original_acc_r, ...: the same measures of the original network, over the
            same class and all images of other classes.
    """

    index: int
    name: str
    n_forget: int
    n_retain: int
    original_acc_r: float
    original_acc_f: float
    original_acc_r_top5: float
    original_acc_f_top5: float
    original_zrf: float


@dataclass(frozen=True)
class PairCounts:
    """How often each class was right under each row: what the accuracies are made of.

    Attributes:
        classes: ``[R]`` int64, the class that each row forgets.
        seen, top1, top5: ``[R, K]`` int64: samples of class k under row r, and hits among them.
        original_seen, original_top1, original_top5: ``[K]``, the same for the original network.
    """

    classes: Tensor
    seen: Tensor
    top1: Tensor
    top5: Tensor
    original_seen: Tensor
    original_top1: Tensor
    original_top5: Tensor


@dataclass(frozen=True)
class EvaluationResult:
    """Records per class, their means, and the original network beside them.

    Attributes:
        records: one per evaluated class, in the order of ``classes``.
        mean: means over ``records``.
        original: means over the same classes of the original network's measures (no row).
        zrf_base: base of the logarithm in every ``zrf``.
        settings: what was evaluated and how (classes, images, rows, seed, versions).
        seconds: duration.
        counts: counts behind the accuracies; None for a result read from a file.
        score, forget, retain: what is measured of the class and of the others, in words, and the
            names of these measures.
    """

    score: ClassVar[str] = "accuracy"
    forget: ClassVar[str] = "acc_f"
    retain: ClassVar[str] = "acc_r"

    records: list[ClassRecord]
    mean: Scores
    original: Scores
    zrf_base: float
    settings: dict
    seconds: float
    counts: PairCounts | None = field(default=None, compare=False, repr=False)

    @classmethod
    def from_records(
        cls,
        records: list[ClassRecord],
        zrf_base: float,
        settings: dict,
        seconds: float,
        counts: PairCounts | None = None,
    ) -> "EvaluationResult":
        """The result whose means are those of ``records``, which are one or more."""
        names = [f.name for f in fields(Scores)]
        mean, original = (
            Scores(*means(records, [prefix + name for name in names]).values())
            for prefix in ("", "original_")
        )
        return cls(records, mean, original, zrf_base, settings, seconds, counts)

    def as_dict(self) -> dict:
        """Everything but ``counts``, for JSON."""
        return {
            "format": FORMAT,
            "units": "acc_* and zrf are fractions in [0, 1]; seconds",
            "zrf_base": self.zrf_base,
            "mean": asdict(self.mean),
            "original": asdict(self.original),
            "settings": self.settings,
            "seconds": self.seconds,
            "classes": [asdict(record) for record in self.records],
        }

    def to_json(self, path: FilePath) -> None:
        """Writes everything but ``counts``, atomically; :meth:`from_json` reads it again."""
        write_json(path, self.as_dict())

    @classmethod
    def from_json(cls, path: FilePath) -> "EvaluationResult":
        """Reads what :meth:`to_json` wrote.

        Raises:
            FileNotFoundError, ValueError: if the file is missing, damaged or something else.
        """
        what = "a result of wfnet's evaluation"
        return read_json(path, cls.from_dict, what, "run `wfnet evaluate` again")

    @classmethod
    def from_dict(cls, content: dict) -> "EvaluationResult":
        """Reads what :meth:`as_dict` gave.

        Raises:
            ValueError, TypeError, KeyError: if it is something else.
        """
        check_format(content, FORMAT)
        records = [ClassRecord(**record) for record in content["classes"]]
        about = (content[name] for name in ("zrf_base", "settings", "seconds"))
        return cls.from_records(records, *about)

    def to_csv(self, path: FilePath) -> None:
        """Writes one line per class, then the lines ``mean`` and ``original``, atomically.

        Column ``kind`` is class, mean or original; values are fractions; ``zrf_base`` stands
        beside every ``zrf``.
        """
        first = ["kind", "index", "name", "n_forget", "n_retain"]
        columns = first + [f.name for f in fields(ClassRecord) if f.name not in first]
        columns.insert(columns.index("zrf") + 1, "zrf_base")
        lines = [("class", record) for record in self.records]
        lines += [("mean", self.mean), ("original", self.original)]
        rows = [{"kind": kind, "zrf_base": self.zrf_base, **asdict(row)} for kind, row in lines]
        write_csv(path, rows, columns)

    def table(self, max_rows: int = 40) -> str:
        """An aligned table in %; of many classes those that were forgotten worst."""
        columns = {"acc_r": "Acc_r", "acc_f": "Acc_f"}
        if self.settings["num_classes"] > metrics.TOP_K:
            columns |= {"acc_r_top5": "Acc_r@5", "acc_f_top5": "Acc_f@5"}
        columns["zrf"] = "ZRF"

        def line(label: str, images: int, scores: Scores, *before: float) -> list[str]:
            values = [*(getattr(scores, name) for name in columns), *before]
            return [label, str(images), *(f"{100 * value:.2f}" for value in values)]

        parts = [["class", "images", *columns.values(), "Acc_r before", "Acc_f before"], "-"]
        records, left_out = self.records, len(self.records) - max_rows
        if left_out > 0:
            records = sorted(records, key=lambda r: (-r.acc_f, r.acc_r - r.original_acc_r))
        for record in records[:max_rows]:
            before = (record.original_acc_r, record.original_acc_f)
            parts.append(line(_label(record), record.n_forget, record, *before))
        if left_out > 0:
            parts.append(f"... forgotten worst; {left_out:,} more classes are in the CSV ...")
        images, original = sum(record.n_forget for record in records), self.original
        parts += [
            "-",
            line("mean of rows", images, self.mean, original.acc_r, original.acc_f),
            [*line("original network", images, original), "", ""],
            "in %; each line is the network that forgets that class; ZRF with log base "
            f"{base_name(self.zrf_base)}",
        ]
        return aligned(parts)


def means(records: Sequence[Any], names: Sequence[str]) -> dict[str, float]:
    """Means over records of the fields ``names``."""
    return {name: statistics.fmean(getattr(r, name) for r in records) for name in names}


def _label(record: ClassRecord) -> str:
    text = record.name if record.name == str(record.index) else f"{record.index} {record.name}"
    return text if len(text) <= _LABEL_WIDTH else text[: _LABEL_WIDTH - 3] + "..."


def base_name(base: float) -> str:
    """The base of a logarithm as text: "e" or its digits."""
    return "e" if base == math.e else f"{base:g}"
