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

import copy
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wfnet.data import Batch, Dataset, labels_of
from wfnet.evaluation import metrics
from wfnet.evaluation.pair_engine import Chunk, Measure, PairEngine, RunOptions, all_pairs
from wfnet.evaluation.pairs import check_classes, names_of, unreadable
from wfnet.evaluation.partial import PartialResults, evaluation_identity
from wfnet.layers import MaskedLayer
from wfnet.network import WFNet
from wfnet.services import settings
from wfnet.services.seeds import generator_for
from wfnet.services.settings import check_value

MOST_STEPS = 1000
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
    """Records of all classes, how they were made, and the duration.

    ``shares [S + 1]`` of changed gates run from 0 to 1: the abscissa of every curve.
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
        content = asdict(self)
        return {
            "units": "areas and curves are fractions in [0, 1]",
            "mean": self.mean,
            "classes": content.pop("records"),
            **content,
        }


def attribution(
    net: WFNet,
    dataset: Dataset,
    classes: Sequence[int] | None = None,
    steps: int = 20,
    seed: int = 0,
    classes_together: int = 16,
    options: RunOptions | None = None,
) -> AttributionResult:
    """Insertion and deletion curves and areas of every class; the network is not changed.

    Args:
        net: the filtered network, on any device.
        dataset: images; of each class only its own are used.
        classes: all by default.
        steps: S; at step s the share s / S of every filter matrix is changed.
        seed: of the random orders.
        classes_together: classes whose rows are in memory at once: each needs ``4 (S + 1)`` rows
            of the filter matrices.
        options: how images are run; ``records`` is a JSON file with finished classes.

    Raises:
        ValueError: before work starts, for arguments or labels that do not fit, or a file of
            something else in ``records``.
        FloatingPointError: if logits are NaN or infinite.
    """
    check_value("steps", steps, settings.int_from(1, MOST_STEPS))
    check_value("seed", seed, settings.seed)
    options = options or RunOptions()
    labels, names = labels_of(dataset), names_of(dataset, net.num_classes)
    rows = check_classes(classes, labels, net.num_classes).tolist()
    engine = PairEngine(net, dataset, options)
    about = {"steps": steps, "order": "lowest", "seed": seed}
    kept = PartialResults(
        options.records, lambda: evaluation_identity(net, dataset, settings=about)
    )
    started = time.perf_counter()

    def make(part: list[int]) -> Iterator[AttributionRecord]:
        chosen = torch.tensor(part)
        engine.net = changed_rows(net, chosen, steps, seed)
        confidences = Confidences(chosen, steps, net.num_classes)
        images = torch.isin(labels, chosen).nonzero().flatten()
        engine.run(confidences, images.split(options.batch_size))
        return confidences.records(names)

    images = int(torch.isin(labels, torch.tensor(kept.left(rows))).sum())
    with engine.show(images * 4 * (steps + 1), "attributing"):
        records = kept.complete(rows, AttributionRecord, make, classes_together)
    seconds = time.perf_counter() - started
    return AttributionResult(_shares(steps).tolist(), records, about, seconds)


def _shares(steps: int) -> Tensor:
    return torch.arange(steps + 1, dtype=torch.float64) / steps


class Confidences(Measure):
    """Confidence kept in the true class, under the ``4 (S + 1)`` rows of every image's own class.

    Attributes:
        tables: ``total [C, 4 (S + 1)]`` fp64, summed over ``seen [C]`` images.
    """

    def __init__(self, classes: Tensor, steps: int, num_classes: int):
        self.classes, self.steps, self.each = classes, steps, 4 * (steps + 1)
        self.rows = torch.arange(len(classes) * self.each)
        self.place = torch.full((num_classes,), -1)
        self.place[classes] = torch.arange(len(classes))
        self.tables = {
            "total": torch.zeros(len(classes), self.each, dtype=torch.float64),
            "seen": torch.zeros(len(classes), dtype=torch.int64),
        }

    def pairs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        image, step = all_pairs(len(batch.labels), self.each)
        return image, self.place[batch.labels][image] * self.each + step

    def add(self, chunk: Chunk) -> None:
        device = chunk.logits.device
        label, before = chunk.labels[chunk.image].to(device), chunk.original[chunk.image.to(device)]
        kept = metrics.confidence_kept(chunk.logits, before, label).cpu()
        place = self.place[chunk.labels]
        self.tables["total"].index_add_(0, place, kept.view(-1, self.each))
        self.tables["seen"] += torch.bincount(place, minlength=len(self.classes))

    def records(self, names: list[str]) -> Iterator[AttributionRecord]:
        """Curves and areas of every class.

        Raises:
            ValueError: for a class without readable images.
        """
        for place, label in enumerate(self.classes.tolist()):
            images = int(self.tables["seen"][place])
            if not images:
                raise unreadable(f"class {label}")
            curves = (self.tables["total"][place] / images).unflatten(0, (4, -1))
            # By trapezoids, as in Petsiuk et al., "RISE", BMVC 2018.
            areas = torch.trapezoid(curves, _shares(self.steps), dim=-1).tolist()
            yield AttributionRecord(
                index=label,
                name=names[label],
                images=images,
                **dict(zip(CURVES, areas, strict=True)),
                curves=dict(zip(CURVES, curves.tolist(), strict=True)),
            )


def changed_rows(net: WFNet, classes: Tensor, steps: int, seed: int) -> WFNet:
    """``net`` with ``4 (S + 1)`` rows for each of ``classes``: curve by curve, step by step.

    Weights are shared. A filter entry of minus infinity is a gate of exactly 0, plus infinity the
    largest gate. Statistics of durable rows move to those of the base along an insertion, as the
    gates do; a deletion, which starts from the original network, keeps those of the base.
    """
    tables, shares = {}, _shares(steps)
    for number, (name, layer, filters, key) in enumerate(_ranked(net, classes)):
        shuffled = [
            torch.randperm(key.shape[1], generator=generator_for(seed, 8, label, number))
            for label in classes.tolist()
        ]
        orders = key.argsort(dim=1, stable=True), torch.stack(shuffled).to(key.device)
        counts = (shares * key.shape[1]).round().long().to(key.device)
        # [C, S + 1, O]: whether an entry has changed, most relevant first or at random.
        changed = [found.argsort(dim=1).unsqueeze(1) < counts.unsqueeze(1) for found in orders]
        for kind, learned in filters.items():
            start = layer.filter_starts()[kind] if layer.normalize_gate else math.inf
            opened = torch.full_like(learned, start)
            closed = torch.full_like(learned, -math.inf)
            curves = [
                torch.where(mask, after.unsqueeze(1), before.unsqueeze(1))
                for mask in changed
                for before, after in ((learned, opened), (opened, closed))
            ]
            tables[f"{name}.{kind}"] = torch.stack(curves, 1).flatten(0, 2)  # [C * 4 * (S + 1), O]
    for name, table in net.named_statistics().items():
        layer_name, _, kind = name.rpartition(".")
        if "pair" in kind:  # curves are of one row each
            continue
        base = getattr(net.masked_layers[layer_name], kind.replace("row", "running"))
        own = table[classes.to(table.device)].unsqueeze(1)  # [C, 1, O]
        insertion = own + shares.to(table)[None, :, None] * (base - own)
        curves = [insertion, base.expand_as(insertion)] * 2
        tables[name] = torch.stack(curves, 1).flatten(0, 2)
    shared = (*net.model.parameters(), *net.model.buffers())
    other = copy.deepcopy(net, {id(tensor): tensor for tensor in shared})
    for name, table in tables.items():
        layer_name, _, kind = name.rpartition(".")
        layer = other.masked_layers[layer_name]
        layer.num_classes = other.num_classes = len(table)
        is_filter = kind in layer._parameters
        setattr(layer, kind, nn.Parameter(table, requires_grad=False) if is_filter else table)
    return other


def _ranked(
    net: WFNet, classes: Tensor
) -> Iterator[tuple[str, MaskedLayer, dict[str, Tensor], Tensor]]:
    """Yields filter matrices that change together, and what ranks their channels, both ``[C, O]``.

    The smallest come first. Both matrices of a durable layer change by their product.
    """
    for name, layer in net.masked_layers.items():
        filters = {
            kind: alpha.detach()[classes.to(alpha.device)]
            for kind, alpha in layer.named_filters().items()
        }
        if net.gate == "durable":
            gate = layer.gates().detach()[classes.to(layer.alpha_hard.device)]
            # Ties are many: channels that are closed. Their filter entries order them.
            closed = filters["alpha_hard"].sigmoid() - 1
            yield name, layer, filters, torch.where(gate == 0, closed, gate)
            continue
        for kind, learned in filters.items():
            # Entries, not gates, are sorted: sigmoid keeps their order, rounding could make ties.
            yield name, layer, {kind: learned}, learned
