"""Several classes forgotten at once: the product of their rows, for pairs and for larger groups."""

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from wfnet.data import Dataset, labels_of, multi_hot_of
from wfnet.evaluation.multilabel_rows import LabelGroupRecord, LabelScores, check_labels
from wfnet.evaluation.pair_engine import PairEngine, RunOptions
from wfnet.evaluation.pairs import HitCounts, check_classes, names_of, unreadable
from wfnet.evaluation.partial import PartialResults, evaluation_identity
from wfnet.evaluation.results import means
from wfnet.network import WFNet
from wfnet.services import settings
from wfnet.services.settings import check_value

_GROUPS_TOGETHER = 64
_LABEL_GROUPS_TOGETHER = 16  # whose logits of all images are in memory


@dataclass(frozen=True)
class GroupRecord:
    """What forgetting a group of classes at once does; accuracies are fractions.

    Attributes:
        classes, names: the group.
        n_forget, n_retain: images of its classes, and of all others.
        acc_f: mean over its classes of the accuracy on each.
        acc_f_worst: the largest accuracy on one of its classes.
        acc_r: accuracy on all images of other classes.
        original_acc_f, original_acc_r: the same of the original network.
    """

    classes: list[int]
    names: list[str]
    n_forget: int
    n_retain: int
    acc_f: float
    acc_f_worst: float
    acc_r: float
    original_acc_f: float
    original_acc_r: float


class GroupHits(HitCounts):
    """Hits under rows ``[R, J]``: groups of classes."""

    def records(self, names: Sequence[str]) -> Iterator[GroupRecord]:
        """What was found of every group.

        Raises:
            ValueError: for a class of a group, or all beside it, without readable images.
        """
        tables = {name: table.cpu() for name, table in self.tables.items()}
        seen, before = tables["original_seen"], tables["original_top1"]
        for group, right in zip(self.rows.tolist(), tables["top1"], strict=True):
            inside = torch.zeros(len(seen), dtype=torch.bool)
            inside[group] = True
            if not seen[inside].all() or not seen[~inside].any():
                raise unreadable(f"a class of group {group}, or all beside it,")
            each = (right / seen)[group]
            n_retain = seen[~inside].sum()
            yield GroupRecord(
                classes=group,
                names=[names[label] for label in group],
                n_forget=int(seen[inside].sum()),
                n_retain=int(n_retain),
                acc_f=each.mean().item(),
                acc_f_worst=each.max().item(),
                acc_r=(right[~inside].sum() / n_retain).item(),
                original_acc_f=(before / seen)[group].mean().item(),
                original_acc_r=(before[~inside].sum() / n_retain).item(),
            )


def group_scores(
    groups: Sequence[Sequence[int]], dataset: Dataset, outputs: int, device: torch.device
) -> GroupHits | LabelScores:
    """What measures groups of classes, or of labels where images have several."""
    rows, multi_hot = torch.tensor(groups), multi_hot_of(dataset)
    if multi_hot is not None:
        return LabelScores(rows, multi_hot)
    return GroupHits(rows, outputs, device)


@dataclass(frozen=True)
class GroupResult:
    """Records of all evaluated groups of one size, and the duration."""

    records: list[GroupRecord] | list[LabelGroupRecord]
    seconds: float

    @property
    def mean(self) -> dict[str, float]:
        """Means over groups, and the worst value of a forgotten class of any group."""
        of_labels = isinstance(self.records[0], LabelGroupRecord)
        kept, forgotten = ("map_r", "ap_f") if of_labels else ("acc_r", "acc_f")
        names = (forgotten, kept, f"original_{forgotten}", f"original_{kept}")
        worst = f"{forgotten}_worst"
        largest = max(getattr(record, worst) for record in self.records)
        return {**means(self.records, names), worst: largest}

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "units": "fractions in [0, 1]",
            "size": len(self.records[0].classes),
            "groups": len(self.records),
            "mean": self.mean,
            **asdict(self),
        }


def choose_groups(
    num_classes: int, size: int, count: int | None = None, seed: int = 0
) -> list[tuple[int, ...]]:
    """Groups of ``size`` different classes: all of them, or ``count`` drawn by seed, each once.

    Raises:
        ValueError: for a size that leaves no class to forget together, or none to retain.
    """
    check_value("size", size, settings.int_from(2, num_classes - 1))
    if count is None or count >= math.comb(num_classes, size):
        return list(itertools.combinations(range(num_classes), size))
    check_value("count", count, settings.positive_int)
    check_value("seed", seed, settings.seed)
    generator = torch.Generator().manual_seed(seed)
    chosen: dict[tuple[int, ...], None] = {}
    while len(chosen) < count:
        drawn = torch.randperm(num_classes, generator=generator)[:size]
        chosen[tuple(sorted(drawn.tolist()))] = None
    return list(chosen)


def evaluate_groups(
    net: WFNet, dataset: Dataset, groups: Sequence[Sequence[int]], options: RunOptions | None = None
) -> GroupResult:
    """Acc_f and Acc_r of groups of classes, each forgotten by the product of its rows; average
    precisions where images have several labels.

    Args:
        net: the filtered network.
        dataset: images; every class of a group needs one.
        groups: classes that are forgotten together, each group with the same number of them
            (:func:`choose_groups`).
        options: how images are run; ``records`` is a JSON file with finished groups.

    Raises:
        ValueError: before work starts, for groups or labels that do not fit, or a file of
            something else in ``records``.
        FloatingPointError: if logits are NaN or infinite.
    """
    options = options or RunOptions()
    labels, names = labels_of(dataset), names_of(dataset, net.num_classes)
    if len({len(group) for group in groups}) != 1:
        raise ValueError("groups must be one or more, each of the same number of classes")
    multi_hot = multi_hot_of(dataset)
    for group in groups:
        if multi_hot is not None:
            check_labels(group, multi_hot)
        elif torch.isin(labels, check_classes(group, labels, net.num_classes)).all():
            raise ValueError(f"group {list(group)} leaves no class with images to retain")
    engine = PairEngine(net, dataset, options)
    kept = PartialResults(options.records, lambda: evaluation_identity(net, dataset))
    started = time.perf_counter()

    def make(part: list[tuple[int, ...]]) -> Iterator[GroupRecord | LabelGroupRecord]:
        scores = group_scores(part, dataset, net.num_classes, engine.device)
        engine.run(scores, engine.chunks(len(part)))
        return scores.records(names)

    kind, together = GroupRecord, _GROUPS_TOGETHER
    if multi_hot is not None:
        kind, together = LabelGroupRecord, _LABEL_GROUPS_TOGETHER
    groups = [tuple(group) for group in groups]
    with engine.show(len(kept.left(groups)) * len(labels), "groups"):
        records = kept.complete(groups, kind, make, together)
    return GroupResult(records, time.perf_counter() - started)
