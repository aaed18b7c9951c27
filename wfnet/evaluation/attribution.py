"""Insertion and deletion: do the gates that a class's row has closed hold what the class needs?

Paper, section "Measures". *Insertion* starts from the learned row of class c and, step by step,
sets the most relevant gates (lowest learned values first, in every matrix the same share) back to
1. *Deletion* starts from all gates at 1 and sets the same gates to 0. At each step: confidence in
the true class on samples of c, divided by the original network's and capped at 1
(:func:`wfnet.evaluation.metrics.confidence_kept`). The score is the area under that curve; good is
near 1 for insertion and near 0 for deletion. A random order is shown beside it.

All steps of several classes go through the network at once, in mixed batches: every (class, curve,
step) is a row of temporary filter matrices, which hold exactly the learned entry, the entry whose
gate is exactly 1, or minus infinity, whose gate is exactly 0.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wfnet import gates
from wfnet.data import Batch, CorruptImages, Dataset, classes_of, corrupt_counter, labels_of
from wfnet.evaluation import metrics
from wfnet.evaluation.pair_engine import Chunk, Measure, PairEngine, Pairs, all_pairs
from wfnet.evaluation.pairs import check_classes
from wfnet.evaluation.partial import PartialResults, data_identity, network_identity
from wfnet.network import WFNet
from wfnet.services import settings
from wfnet.services.progress import Progress
from wfnet.services.seeds import generator_for
from wfnet.services.settings import check_value

MOST_STEPS = 1000
ORDERS = ("lowest", "farthest")
CURVES = ("insertion", "deletion", "insertion_random", "deletion_random")


@dataclass(frozen=True)
class AttributionRecord:
    """Curves of one class, and their areas.

    Attributes:
        index, name: the class.
        images: samples of the class.
        insertion, deletion: areas under the curves, most relevant gates first.
        insertion_random, deletion_random: the same in a random order.
        curves: by the same names, the mean over samples at each share of changed gates.
    """

    index: int
    name: str
    images: int
    insertion: float
    deletion: float
    insertion_random: float
    deletion_random: float
    curves: dict[str, list[float]]


@dataclass(frozen=True)
class AttributionResult:
    """Records of all classes.

    Attributes:
        shares: ``[S + 1]``, shares of changed gates from 0 to 1: the abscissa of every curve.
        records: one per class.
        settings: steps, seed, images.
        seconds: duration.
    """

    shares: list[float]
    records: list[AttributionRecord]
    settings: dict[str, Any]
    seconds: float

    @property
    def mean(self) -> dict[str, float]:
        """Areas by the names of ``CURVES``, means over classes."""
        count = len(self.records)
        return {name: sum(getattr(r, name) for r in self.records) / count for name in CURVES}

    def curve(self, name: str) -> Tensor:
        """``[classes, S + 1]`` fp64: the curve ``name`` (of ``CURVES``) of every class."""
        return torch.tensor([r.curves[name] for r in self.records], dtype=torch.float64)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "units": "areas and curves are fractions in [0, 1]",
            "mean": self.mean,
            "shares": self.shares,
            "settings": self.settings,
            "seconds": self.seconds,
            "classes": [asdict(record) for record in self.records],
        }


def attribution(
    net: WFNet,
    dataset: Dataset,
    classes: Sequence[int] | None = None,
    steps: int = 20,
    order: str = "lowest",
    seed: int = 0,
    batch_size: int = 256,
    classes_together: int = 16,
    records: str | os.PathLike | None = None,
    progress: bool = True,
    workers: int = 0,
    max_corrupt: int | CorruptImages | None = None,
    amp_dtype: torch.dtype | None = None,
    channels_last: bool = False,
) -> AttributionResult:
    """Insertion and deletion curves and areas of every class; the network is not changed.

    Args:
        net: the filtered network, on any device.
        dataset: images; of each class only its own are used.
        classes: to be attributed; all by default.
        steps: S; at step s the share s / S of every filter matrix is changed.
        order: which gates are the most relevant. "lowest" is the paper's; "farthest" takes those
            farthest from 1, by ``|log gate|``, for filters whose gates may also amplify: where they
            start low (``alpha_init=-1``), a class is forgotten by gates above 1 as well.
        seed: of the random orders.
        batch_size: (image, row) pairs per forward pass.
        classes_together: classes whose rows are in memory at once: each needs ``4 (S + 1)`` rows
            of the filter matrices.
        records: JSON file in which finished classes are kept: an interrupted call goes on there.
        progress: show progress and time left on stderr.
        workers, max_corrupt, amp_dtype, channels_last: as in :func:`wfnet.evaluate`.

    Raises:
        ValueError: before work starts, for arguments or labels that do not fit, or a file of
            something else in ``records``.
        FloatingPointError: if logits are NaN or infinite.
    """
    check_value("steps", steps, settings.int_from(1, MOST_STEPS))
    check_value("batch_size", batch_size, settings.batch_size)
    check_value("classes_together", classes_together, settings.positive_int)
    check_value("seed", seed, settings.seed)
    check_value("order", order, ORDERS)
    labels = labels_of(dataset)
    rows = check_classes(classes, labels, net.num_classes)
    names = classes_of(dataset)
    corrupt = corrupt_counter(dataset, max_corrupt)
    about = {"steps": steps, "order": order, "seed": seed}
    identity = {**network_identity(net), **data_identity(dataset), "settings": about}
    kept = PartialResults(records, identity if records else {})
    started = time.perf_counter()
    left = torch.tensor([row for row in rows.tolist() if row not in kept], dtype=torch.int64)
    total = int(torch.isin(labels, left).sum()) * 4 * (steps + 1)
    with Progress(total, "attributing", progress, unit="samples") as bar:
        for part in left.split(classes_together):
            engine = PairEngine(
                changed_rows(net, part, steps, seed, order),
                dataset,
                batch_size,
                workers,
                corrupt,
                amp_dtype,
                channels_last,
                outputs=net.num_classes,
            )
            engine.progress = bar
            confidences = Confidences(part, steps, net.num_classes)
            engine.run(confidences, torch.isin(labels, part).nonzero().flatten().split(batch_size))
            for label, images, curves in confidences.curves():
                kept.add(label, asdict(_record(label, names[label], images, curves)))
    return AttributionResult(
        shares=_shares(steps).tolist(),
        records=[AttributionRecord(**kept[label]) for label in rows.tolist()],
        settings=about,
        seconds=time.perf_counter() - started,
    )


def _shares(steps: int) -> Tensor:
    return torch.arange(steps + 1, dtype=torch.float64) / steps


def _record(label: int, name: str, images: int, curves: Tensor) -> AttributionRecord:
    areas = metrics.area_under_curve(_shares(curves.shape[1] - 1), curves).tolist()
    return AttributionRecord(
        index=label,
        name=name,
        images=images,
        **dict(zip(CURVES, areas, strict=True)),
        curves=dict(zip(CURVES, curves.tolist(), strict=True)),
    )


class Confidences(Measure):
    """Mean confidence kept in the true class, under the rows of every image's own class.

    Args:
        classes: ``[C]``, whose rows follow each other in the network, ``4 (S + 1)`` each.
        steps: S.
        num_classes: of the labels.
    """

    def __init__(self, classes: Tensor, steps: int, num_classes: int):
        self.classes, self.each = classes, 4 * (steps + 1)
        self.rows = torch.arange(len(classes) * self.each)
        self.place = torch.full((num_classes,), -1)
        self.place[classes] = torch.arange(len(classes))
        self.total = torch.zeros(len(classes), self.each, dtype=torch.float64)
        self.seen = torch.zeros(len(classes), dtype=torch.int64)
        self._found: list[Tensor] = []

    def pairs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        image, step = all_pairs(len(batch.labels), self.each)
        return image, self.place[batch.labels][image] * self.each + step

    def add(self, chunk: Chunk, pairs: Pairs) -> None:
        device = pairs.logits.device
        label, before = chunk.labels[pairs.image].to(device), chunk.original[pairs.image.to(device)]
        self._found.append(metrics.confidence_kept(pairs.logits, before, label).cpu())

    def end(self, chunk: Chunk) -> None:
        place = self.place[chunk.labels]
        self.total.index_add_(0, place, torch.cat(self._found).view(-1, self.each))
        self.seen += torch.bincount(place, minlength=len(self.seen))
        self._found.clear()

    def curves(self) -> Iterator[tuple[int, int, Tensor]]:
        """Of every class its label, its images, and its curves ``[4, S + 1]`` fp64.

        Raises:
            ValueError: for a class without readable images.
        """
        for label, images, total in zip(
            self.classes.tolist(), self.seen.tolist(), self.total, strict=True
        ):
            if not images:
                raise ValueError(
                    f"class {label} has no readable image; repair the images, or leave it out of "
                    "classes="
                )
            yield label, images, (total / images).unflatten(0, (4, -1))


def changed_rows(net: WFNet, classes: Tensor, steps: int, seed: int, order: str) -> WFNet:
    """``net`` with ``4 (S + 1)`` rows for each of ``classes``: curve by curve, step by step."""
    if net.gate == "durable":
        return _changed_durable_rows(net, classes, steps, seed)
    tables = {}
    for number, (name, alpha) in enumerate(net.named_filters().items()):
        layer = net.masked_layers[name.rpartition(".")[0]]
        learned = alpha.detach()[classes.to(alpha.device)]  # [C, O]
        shuffled = torch.stack(
            [
                torch.randperm(alpha.shape[1], generator=generator_for(seed, 8, label, number))
                for label in classes.tolist()
            ]
        ).to(alpha.device)
        # Entries, not gates, are sorted: sigmoid keeps their order, rounding could make ties.
        key = learned
        if order == "farthest":
            key = -gates.gate(learned, layer.gate_scale).log().abs()
        relevant_first = key.argsort(dim=1, stable=True)
        counts = (_shares(steps) * alpha.shape[1]).round().long().to(alpha.device)
        closed = torch.full_like(learned, -math.inf)
        opened = torch.full_like(learned, layer.alpha_init if layer.normalize_gate else math.inf)
        curves = [
            _replaced(start, end, ranking, counts)
            for ranking in (relevant_first, shuffled)
            for start, end in ((learned, opened), (opened, closed))
        ]
        tables[name] = torch.stack(curves, 1).flatten(0, 2)  # [C * 4 * (S + 1), O]
    return network_with_filters(net, tables)


def _changed_durable_rows(net: WFNet, classes: Tensor, steps: int, seed: int) -> WFNet:
    """The same for durable gates: both matrices of a layer change together, by their product.

    A row's statistics move to those of the base along an insertion, as its gates do; a deletion,
    which starts from the original network, keeps those of the base.
    """
    tables = {}
    for number, (name, layer) in enumerate(net.masked_layers.items()):
        rows = classes.to(layer.alpha_hard.device)
        gate = layer.gates().detach()[rows]  # [C, O]
        shuffled = torch.stack(
            [
                torch.randperm(gate.shape[1], generator=generator_for(seed, 8, label, number))
                for label in classes.tolist()
            ]
        ).to(gate.device)
        # Ties are many: channels that are closed. Their filter entries order them.
        order = torch.where(gate == 0, layer.alpha_hard.detach()[rows].sigmoid() - 1, gate)
        relevant_first = order.argsort(dim=1, stable=True)
        counts = (_shares(steps) * gate.shape[1]).round().long().to(gate.device)
        for kind, opened in layer.filter_starts().items():
            learned = getattr(layer, kind).detach()[rows]
            neutral = torch.full_like(learned, opened)
            closed = torch.full_like(learned, -math.inf)
            curves = [
                _replaced(start, end, ranking, counts)
                for ranking in (relevant_first, shuffled)
                for start, end in ((learned, neutral), (neutral, closed))
            ]
            tables[f"{name}.{kind}"] = torch.stack(curves, 1).flatten(0, 2)
        blend = _shares(steps).to(gate)[None, :, None]
        for kind, table in layer.named_statistics().items():
            base = getattr(layer, kind.replace("row", "running"))
            own = table[rows].unsqueeze(1)  # [C, 1, O]
            insertion = own + blend * (base - own)
            deletion = base.expand_as(insertion)
            curves = [insertion, deletion, insertion, deletion]
            tables[f"{name}.{kind}"] = torch.stack(curves, 1).flatten(0, 2)
    return network_with_filters(net, tables)


def _replaced(start: Tensor, end: Tensor, order: Tensor, counts: Tensor) -> Tensor:
    """``[C, S + 1, O]``: ``start [C, O]`` with the first ``counts[s]`` entries of ``end``."""
    rank = order.argsort(dim=1)  # [C, O], position of each entry in the order
    return torch.where(rank.unsqueeze(1) < counts.reshape(1, -1, 1), end[:, None], start[:, None])


def network_with_filters(net: WFNet, filters: dict[str, Tensor]) -> WFNet:
    """The same network with other filter matrices, of any number of rows; weights are shared.

    Args:
        net: not changed.
        filters: ``[R, out_channels]`` by the names of ``net.named_filters()`` (and of
            ``net.named_statistics()``). An entry of minus infinity is a gate of exactly 0; plus
            infinity is the largest gate, ``gate_scale``.

    Returns:
        A network for evaluation whose forget labels are the rows ``0 .. R-1``.

    Raises:
        ValueError: if names or shapes do not fit.
    """
    rows = {table.shape[0] for table in filters.values()}
    wanted = net.named_filters() | net.named_statistics()
    if set(filters) != set(wanted) or len(rows) != 1:
        raise ValueError("filters must have the names of net.named_filters() and equal rows")
    shared = (*net.model.parameters(), *net.model.buffers())
    changed = copy.deepcopy(net, {id(tensor): tensor for tensor in shared})
    changed.num_classes = rows.pop()
    for layer in changed.masked_layers.values():
        layer.num_classes = changed.num_classes
    for name, before in wanted.items():
        table = filters[name].to(before)
        if table.shape[1:] != before.shape[1:]:
            raise ValueError(f"{name} must be [R, {before.shape[1]}]; got {list(table.shape)}")
        layer_name, _, kind = name.rpartition(".")
        layer = changed.masked_layers[layer_name]
        if kind in layer._parameters:
            layer._parameters[kind] = nn.Parameter(table, requires_grad=False)
        else:
            layer._buffers[kind] = table
    return changed
