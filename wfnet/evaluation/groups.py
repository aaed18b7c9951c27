"""Several classes forgotten at once: the product of their rows, for pairs and for larger groups."""

from __future__ import annotations

import itertools
import math
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from wfnet.data import CorruptImages, Dataset, classes_of, labels_of
from wfnet.evaluation.pair_engine import Chunk, Measure, PairEngine, Pairs
from wfnet.evaluation.pairs import Hits
from wfnet.evaluation.partial import PartialResults, data_identity, network_identity
from wfnet.network import WFNet
from wfnet.services import settings
from wfnet.services.progress import Progress
from wfnet.services.settings import check_value

_GROUPS_TOGETHER = 64


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


@dataclass(frozen=True)
class GroupResult:
    """Records of all evaluated groups of one size.

    Attributes:
        records: one per group.
        seconds: duration.
    """

    records: list[GroupRecord]
    seconds: float

    @property
    def mean(self) -> dict[str, float]:
        """Means over groups, and the worst accuracy on a forgotten class of any group."""
        names = ("acc_f", "acc_r", "original_acc_f", "original_acc_r")
        means = {n: statistics.fmean(getattr(r, n) for r in self.records) for n in names}
        return {**means, "acc_f_worst": max(r.acc_f_worst for r in self.records)}

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "units": "fractions in [0, 1]",
            "size": len(self.records[0].classes),
            "groups": len(self.records),
            "mean": self.mean,
            "seconds": self.seconds,
            "records": [asdict(record) for record in self.records],
        }


def choose_groups(
    num_classes: int, size: int, count: int | None = None, seed: int = 0
) -> list[tuple[int, ...]]:
    """Groups of ``size`` different classes: all of them, or ``count`` drawn by seed, each once.

    Raises:
        ValueError: for a size that leaves no class to forget together, or none to retain.
    """
    if settings.int_from(2, num_classes - 1).violation(size):
        raise ValueError(
            f"a group must have 2 to {num_classes - 1} of the {num_classes} classes; got {size}"
        )
    if count is not None:
        check_value("count", count, settings.positive_int)
    check_value("seed", seed, settings.seed)
    total = math.comb(num_classes, size)
    if count is None or count >= total:
        if total > 100_000:
            raise ValueError(
                f"there are {total:,} groups of {size} of {num_classes} classes; say how many are "
                "to be drawn"
            )
        return list(itertools.combinations(range(num_classes), size))
    generator = torch.Generator().manual_seed(seed)
    chosen: dict[tuple[int, ...], None] = {}
    while len(chosen) < count:
        drawn = torch.randperm(num_classes, generator=generator)[:size]
        chosen[tuple(sorted(drawn.tolist()))] = None
    return list(chosen)


def evaluate_groups(
    net: WFNet,
    dataset: Dataset,
    groups: Sequence[Sequence[int]],
    batch_size: int = 256,
    records: str | os.PathLike | None = None,
    progress: bool = True,
    workers: int = 0,
    max_corrupt: int | CorruptImages | None = None,
    amp_dtype: torch.dtype | None = None,
    channels_last: bool = False,
) -> GroupResult:
    """Acc_f and Acc_r of groups of classes, each forgotten by the product of its rows.

    Every image runs under every group, in batches that mix groups; the network and the caller's
    random state are not changed.

    Args:
        net: the filtered network.
        dataset: images; every class of a group needs one.
        groups: classes that are forgotten together, each group with the same number of them
            (:func:`choose_groups`).
        batch_size: (image, group) pairs per forward pass.
        records: JSON file in which finished groups are kept: an interrupted call goes on there.
        progress, workers, max_corrupt, amp_dtype, channels_last: as in :func:`wfnet.evaluate`.

    Raises:
        ValueError: before work starts, for groups or labels that do not fit, or a file of
            something else in ``records``.
        FloatingPointError: if logits are NaN or infinite.
    """
    labels = labels_of(dataset)
    names = classes_of(dataset)
    chosen = _check_groups(groups, labels, net.num_classes)
    engine = PairEngine(net, dataset, batch_size, workers, max_corrupt, amp_dtype, channels_last)
    identity = {**network_identity(net), **data_identity(dataset)} if records else {}
    kept = PartialResults(records, identity)
    started = time.perf_counter()
    left = [group for group in chosen.tolist() if _key(group) not in kept]
    total = len(left) * len(labels)
    with Progress(total, "groups", progress, unit="samples") as engine.progress:
        for start in range(0, len(left), _GROUPS_TOGETHER):
            part = left[start : start + _GROUPS_TOGETHER]
            hits = GroupHits(torch.tensor(part), net.num_classes)
            engine.run(hits, engine.chunks())
            for index, group in enumerate(part):
                kept.add(_key(group), asdict(hits.record(index, names)))
    found = [GroupRecord(**kept[_key(group)]) for group in chosen.tolist()]
    return GroupResult(found, time.perf_counter() - started)


def _key(group: Sequence[int]) -> str:
    return "+".join(str(label) for label in group)


def _check_groups(groups: Sequence[Sequence[int]], labels: Tensor, num_classes: int) -> Tensor:
    """``[G, J]`` int64."""
    sizes = {len(group) for group in groups}
    if len(sizes) != 1 or min(sizes) < 2:
        raise ValueError(
            "groups must be one or more, each of the same number of classes, at least 2; got sizes "
            f"{sorted(sizes)}"
        )
    chosen = torch.tensor([list(group) for group in groups], dtype=torch.int64)
    low, high = (int(value) for value in torch.aminmax(chosen))
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"class {low if low < 0 else high} in groups is out of range: the network's classes "
            f"run from 0 to {num_classes - 1}"
        )
    present = torch.bincount(labels, minlength=num_classes) > 0
    for group in chosen:
        if len(group.unique()) != len(group):
            raise ValueError(f"group {group.tolist()} names a class twice")
        if not present[group].all():
            missing = int(group[~present[group]][0])
            raise ValueError(f"class {missing} of group {group.tolist()} has no image")
        if not present[~torch.isin(torch.arange(num_classes), group)].any():
            raise ValueError(f"group {group.tolist()} leaves no class with images to retain")
    return chosen


class GroupHits(Measure):
    """Hits of every class under every group, and of the original network.

    Args:
        groups: ``[G, J]`` int64, classes that are forgotten together.
        num_classes: outputs of the network.
    """

    def __init__(self, groups: Tensor, num_classes: int):
        self.rows = groups
        self.filtered = Hits(len(groups), num_classes, torch.device("cpu"), top_k=(1,))
        self.original = Hits(1, num_classes, torch.device("cpu"), top_k=(1,))

    def begin(self, chunk: Chunk) -> None:
        self.original.add(chunk.original.cpu(), chunk.labels)

    def add(self, chunk: Chunk, pairs: Pairs) -> None:
        self.filtered.add(pairs.logits.cpu(), chunk.labels[pairs.image], pairs.row)

    def record(self, index: int, names: list[str]) -> GroupRecord:
        """What was found of the group at row position ``index``.

        Raises:
            ValueError: if one of its classes, or all others, have no readable image.
        """
        group = self.rows[index].tolist()
        seen, before = self.original.seen[0], self.original.right[1][0]
        right = self.filtered.right[1][index]
        inside = torch.zeros(len(seen), dtype=torch.bool)
        inside[group] = True
        if not seen[group].all() or not seen[~inside].any():
            raise ValueError(f"group {group} lacks readable images; repair them, or leave it out")
        each = right[group] / seen[group]
        return GroupRecord(
            classes=group,
            names=[names[label] for label in group],
            n_forget=int(seen[group].sum()),
            n_retain=int(seen[~inside].sum()),
            acc_f=each.mean().item(),
            acc_f_worst=each.max().item(),
            acc_r=(right[~inside].sum() / seen[~inside].sum()).item(),
            original_acc_f=(before[group] / seen[group]).mean().item(),
            original_acc_r=(before[~inside].sum() / seen[~inside].sum()).item(),
        )
