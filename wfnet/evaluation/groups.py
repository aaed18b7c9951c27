"""Several classes forgotten at once: the product of their rows, for pairs and for larger groups."""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from wfnet.data import CorruptImages, Dataset, batches, classes_of, corrupt_limit, labels_of
from wfnet.evaluation import metrics
from wfnet.evaluation.forward import Progress, as_input, evaluation_mode
from wfnet.evaluation.partial import PartialResults, data_identity, network_identity
from wfnet.evaluation.rows import broken_logits
from wfnet.network import WFNet

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
    if not 2 <= size < num_classes:
        raise ValueError(
            f"a group must have 2 to {num_classes - 1} of the {num_classes} classes; got {size}"
        )
    total = 1
    for i in range(size):
        total = total * (num_classes - i) // (i + 1)
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
    corrupt = max_corrupt
    if not isinstance(corrupt, CorruptImages):
        corrupt = CorruptImages(corrupt_limit(dataset) if corrupt is None else corrupt)
    identity = {**network_identity(net), **data_identity(dataset)} if records else {}
    kept = PartialResults(records, identity)
    started = time.perf_counter()
    left = [group for group in chosen.tolist() if _key(group) not in kept]
    bar = Progress(len(left) * len(labels), progress, "groups")
    for part in torch.tensor(left, dtype=torch.int64).split(_GROUPS_TOGETHER) if left else ():
        seen, right, before = _count(
            net, dataset, part, batch_size, bar, workers, corrupt, amp_dtype, channels_last
        )
        for index, group in enumerate(part.tolist()):
            record = _record(group, names, seen, right[index], before)
            kept.add(_key(group), asdict(record))
    bar.close()
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


def _count(
    net: WFNet,
    dataset: Dataset,
    groups: Tensor,
    batch_size: int,
    bar: Progress,
    workers: int,
    corrupt: CorruptImages,
    amp_dtype: torch.dtype | None,
    channels_last: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Images per class ``[K]``, hits per group and class ``[G, K]``, the original's ``[K]``."""
    weight = next(iter(net.masked_layers.values())).weight
    device = weight.device
    count = len(groups)
    seen = torch.zeros(net.num_classes, dtype=torch.int64)
    before = torch.zeros_like(seen)
    right = torch.zeros(count, net.num_classes, dtype=torch.int64)
    order = torch.arange(len(labels_of(dataset))).split(batch_size)
    with (
        evaluation_mode(net),
        torch.inference_mode(),
        torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None),
    ):
        for batch in batches(dataset, order, workers, corrupt):
            images = as_input(batch.images, weight, channels_last)
            plain = net(images, forget=None)
            broken = broken_logits(plain)
            seen += torch.bincount(batch.labels, minlength=len(seen))
            before.index_add_(0, batch.labels, _hits(plain, batch.labels))
            image = torch.arange(len(batch.labels)).repeat_interleave(count)
            group = torch.arange(count).repeat(len(batch.labels))
            for pairs in torch.arange(len(image)).split(batch_size):
                first, last = int(image[pairs[0]]), int(image[pairs[-1]])
                source = (image[pairs] - first).to(device)
                forget = groups[group[pairs]].to(device)
                logits = net(images[first : last + 1], forget, source)
                broken = broken | broken_logits(logits)
                label = batch.labels[image[pairs]]
                cell = group[pairs] * net.num_classes + label
                right.view(-1).index_add_(0, cell, _hits(logits, label))
            if bool(broken):
                raise FloatingPointError(
                    f"logits are NaN or infinite for images {int(batch.indices[0])} to "
                    f"{int(batch.indices[-1])}; check the images and the filters"
                )
            bar.advance(len(image))
    return seen, right, before


def _hits(logits: Tensor, labels: Tensor) -> Tensor:
    return metrics.topk_hits(logits.cpu(), labels).long()


def _record(
    group: list[int], names: list[str], seen: Tensor, right: Tensor, before: Tensor
) -> GroupRecord:
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
