"""Evaluation of a filtered network: every class in mixed batches, one record per class.

A batch holds (image, row) pairs: the same images under many rows of the filter matrices. The
measures themselves are defined in :mod:`wfnet.metrics`.
"""

from __future__ import annotations

import copy
import csv
import inspect
import io
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor, nn

from wfnet import metrics
from wfnet.data import Batch, CorruptImages, Dataset, batches, classes_of, corrupt_limit, labels_of
from wfnet.network import WFNet
from wfnet.pretrained import write_atomically, write_json
from wfnet.version import __version__

logger = logging.getLogger("wfnet")

FORMAT = 1
# Images whose rows are drawn together: bounds the memory of the random keys (images x rows).
_DRAWN_TOGETHER = 1024


# -- results --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """The measures of one row, or their means over rows; all are fractions in [0, 1].

    Attributes:
        acc_r, acc_f: :func:`wfnet.metrics.accuracy_retain` and ``accuracy_forget``.
        acc_r_top5, acc_f_top5: the same with the true class among the five largest logits.
        zrf: :func:`wfnet.metrics.zrf`, in the log base that stands in the result.
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
        n_forget: images of the class that were evaluated.
        n_retain: images of other classes that were evaluated under this row.
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
    """

    records: list[ClassRecord]
    mean: Scores
    original: Scores
    zrf_base: float
    settings: dict
    seconds: float
    counts: PairCounts | None = field(default=None, compare=False, repr=False)

    def to_json(self, path: str | os.PathLike) -> None:
        """Writes everything but ``counts``, atomically; :meth:`from_json` reads it again."""
        write_json(
            path,
            {
                "format": FORMAT,
                "units": "acc_* and zrf are fractions in [0, 1]; seconds",
                "zrf_base": self.zrf_base,
                "mean": asdict(self.mean),
                "original": asdict(self.original),
                "settings": self.settings,
                "seconds": self.seconds,
                "classes": [asdict(record) for record in self.records],
            },
        )

    @classmethod
    def from_json(cls, path: str | os.PathLike) -> EvaluationResult:
        """Reads what :meth:`to_json` wrote.

        Raises:
            FileNotFoundError, ValueError: if the file is missing, damaged or something else.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; `wfnet evaluate` writes such a file")
        try:
            content = json.loads(path.read_text())
            if content["format"] != FORMAT:
                raise ValueError(f"its format is {content['format']}, this version reads {FORMAT}")
            return cls(
                records=[ClassRecord(**record) for record in content["classes"]],
                mean=Scores(**content["mean"]),
                original=Scores(**content["original"]),
                zrf_base=content["zrf_base"],
                settings=content["settings"],
                seconds=content["seconds"],
            )
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path} is damaged or not a result of wfnet's evaluation ({error}); run the "
                "evaluation again"
            ) from error

    def to_csv(self, path: str | os.PathLike) -> None:
        """Writes one line per class, then the lines ``mean`` and ``original``, atomically.

        Column ``kind`` is class, mean or original; values are fractions; ``zrf_base`` stands
        beside every ``zrf``.
        """
        columns = [f.name for f in fields(ClassRecord)]
        columns = ["kind", "index", "name", "n_forget", "n_retain"] + [
            c for c in columns if c not in ("index", "name", "n_forget", "n_retain")
        ]
        columns.insert(columns.index("zrf") + 1, "zrf_base")
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        for record in self.records:
            writer.writerow({"kind": "class", "zrf_base": self.zrf_base, **asdict(record)})
        for kind, scores in (("mean", self.mean), ("original", self.original)):
            writer.writerow({"kind": kind, "zrf_base": self.zrf_base, **asdict(scores)})
        write_atomically(path, lambda temporary: temporary.write_text(text.getvalue()))

    def table(self, max_rows: int = 40) -> str:
        """An aligned table in % for the terminal: classes, mean, original network.

        Args:
            max_rows: with more classes than that, the middle is left out and the classes that
                came out worst and best are listed below.
        """
        return _table(self, max_rows)


def _table(result: EvaluationResult, max_rows: int) -> str:
    records = result.records
    top5 = result.settings["num_classes"] > metrics.TOP_K
    columns = ["Acc_r", "Acc_f", *(["Acc_r@5", "Acc_f@5"] if top5 else []), "ZRF"]
    header = ["class", "images", *columns, "Acc_r before", "Acc_f before"]
    width = min(28, max([len("original network"), *(len(_label(r)) for r in records)]))

    def line(label: str, images: str, scores: Scores, before: tuple[str, str]) -> list[str]:
        shown = [scores.acc_r, scores.acc_f]
        shown += [scores.acc_r_top5, scores.acc_f_top5] if top5 else []
        cells = [f"{100 * value:.2f}" for value in (*shown, scores.zrf)]
        return [_shorten(label, width), images, *cells, *before]

    def class_line(record: ClassRecord) -> list[str]:
        before = (f"{100 * record.original_acc_r:.2f}", f"{100 * record.original_acc_f:.2f}")
        return line(_label(record), str(record.n_forget), record, before)

    def gap(record: ClassRecord) -> float:
        return record.acc_r - record.original_acc_r

    elided = len(records) > max_rows
    shown = max(1, max_rows // 4)
    sections: list[list[str] | str] = [header, "-"]
    if not elided:
        sections += [class_line(record) for record in records]
    else:
        sections += [class_line(record) for record in records[:shown]]
        sections.append(f"... {len(records) - 2 * shown:,} more classes (all are in the CSV) ...")
        sections += [class_line(record) for record in records[-shown:]]
        listed = max(1, shown // 2)
        by_gap = sorted(records, key=gap)
        by_forget = sorted(records, key=lambda r: (-r.acc_f, gap(r)))
        sections += ["-", "forgotten worst (highest Acc_f):"]
        sections += [class_line(record) for record in by_forget[:listed]]
        sections.append("retained worst (largest drop of Acc_r):")
        sections += [class_line(record) for record in by_gap[:listed]]
        sections.append("best (lowest Acc_f, then least drop of Acc_r):")
        best = sorted(records, key=lambda r: (r.acc_f, -gap(r)))
        sections += [class_line(record) for record in best[:listed]]
    images = str(sum(record.n_forget for record in records))
    before = (f"{100 * result.original.acc_r:.2f}", f"{100 * result.original.acc_f:.2f}")
    sections += ["-", line("mean of rows", images, result.mean, before)]
    sections.append(line("original network", images, result.original, ("", "")))

    rows = [section for section in sections if isinstance(section, list)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = []
    for section in sections:
        if section == "-":
            lines.append("-" * (sum(widths) + 2 * (len(widths) - 1)))
        elif isinstance(section, str):
            lines.append(section)
        else:
            cells = [section[0].ljust(widths[0])]
            cells += [cell.rjust(w) for cell, w in zip(section[1:], widths[1:], strict=True)]
            lines.append("  ".join(cells).rstrip())
    lines.append(
        f"in %; each line is the network that forgets that class; ZRF with log base "
        f"{_base_name(result.zrf_base)}"
    )
    return "\n".join(lines)


def _label(record: ClassRecord) -> str:
    return record.name if record.name == str(record.index) else f"{record.index} {record.name}"


def _shorten(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def _base_name(base: float) -> str:
    return "e" if base == math.e else f"{base:g}"


# -- evaluation -----------------------------------------------------------------------------------


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

    Raises:
        ValueError: before work starts for arguments or labels that do not fit, a class without
            images, or a row without retained images.
        FloatingPointError: if logits are NaN or infinite.
    """
    labels = labels_of(dataset)
    rows = _check_classes(classes, labels, net.num_classes)
    _check_settings(batch_size, zrf_base, retained_rows, len(rows))
    if initialised is not None and isinstance(initialised, WFNet):
        raise ValueError("initialised must be a plain classifier; pass its .bake(None)")
    corrupt = max_corrupt
    if not isinstance(corrupt, CorruptImages):
        corrupt = CorruptImages(corrupt_limit(dataset) if corrupt is None else corrupt)
    pairing = _Pairing(rows, labels, retained_rows, seed)
    initial = reinitialise(net, seed) if initialised is None else initialised
    start = time.perf_counter()
    run = _Run(net, initial, pairing, batch_size, zrf_base, amp_dtype, channels_last)
    bar = _Progress(pairing.pairs, enabled=progress)
    chunks = torch.arange(len(labels)).split(batch_size)
    with _evaluation_mode(net, initial), torch.inference_mode():
        for batch in batches(dataset, chunks, workers, corrupt, pin_memory=run.on_gpu):
            bar.advance(run.chunk(batch))
    bar.close()
    net.check_labels()
    seconds = time.perf_counter() - start
    settings = {
        "wfnet_version": __version__,
        "model": type(net.model).__name__,
        "num_classes": net.num_classes,
        "classes": "all" if classes is None else rows.tolist(),
        "images": int(run.original.seen.sum()),
        "corrupt_images": len(corrupt.found),
        "pairs": int(run.filtered.seen.sum()),
        "retained_rows": "all" if retained_rows is None else retained_rows,
        "seed": seed,
        "initialised": "reinitialise(net, seed)" if initialised is None else "given by the caller",
        "batch_size": batch_size,
        "dtype": str(amp_dtype or run.dtype).removeprefix("torch."),
        "device": str(run.device),
    }
    return _summarise(run, classes_of(dataset), zrf_base, settings, seconds)


def _check_classes(classes: Sequence[int] | None, labels: Tensor, num_classes: int) -> Tensor:
    """The rows to evaluate, ``[R]`` int64."""
    if num_classes < 2:
        raise ValueError(
            f"the network has {num_classes} class; unlearning needs one to forget and one to retain"
        )
    if not len(labels):
        raise ValueError("the data set is empty; evaluation needs images")
    low, high = (int(value) for value in torch.aminmax(labels))
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"the data set has label {low if low < 0 else high}, but the network's {num_classes} "
            f"classes run from 0 to {num_classes - 1}; evaluate on the data it was made for"
        )
    rows = torch.arange(num_classes) if classes is None else torch.as_tensor(classes)
    if rows.dim() != 1 or not rows.numel() or rows.is_floating_point() or rows.dtype == torch.bool:
        raise ValueError(
            f"classes must be one or more integers, or None for all classes; got {classes!r}"
        )
    rows = rows.to(device="cpu", dtype=torch.int64)
    outside = rows[(rows < 0) | (rows >= num_classes)]
    if len(outside):
        raise ValueError(
            f"class {int(outside[0])} in classes is out of range: the network's classes run from "
            f"0 to {num_classes - 1}"
        )
    if len(rows.unique()) != len(rows):
        raise ValueError(f"classes must name each class once; got {rows.tolist()}")
    count = torch.bincount(labels, minlength=num_classes)
    empty = rows[count[rows] == 0]
    if len(empty):
        more = f" (and {len(empty) - 1} more)" if len(empty) > 1 else ""
        raise ValueError(
            f"class {int(empty[0])}{more} has no image in the data set; name the classes to "
            "evaluate in classes="
        )
    if int((count > 0).sum()) < 2:
        raise ValueError(
            f"all images of the data set are of class {low}; Acc_r needs images of other classes"
        )
    return rows


def _check_settings(batch_size: int, zrf_base: float, retained_rows: int | None, rows: int) -> None:
    metrics.check_base(zrf_base)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}")
    if retained_rows is not None and not 1 <= retained_rows < rows:
        raise ValueError(
            f"retained_rows must lie in 1 .. {rows - 1} (the other rows of {rows}), or be None for "
            f"all; got {retained_rows}"
        )


class _Pairing:
    """Under which rows each image is run.

    Args:
        classes: ``[R]``, the class of each row; positions in it are called row positions.
        labels: ``[N]``, labels of the data set.
        retained_rows: random rows per image besides its own; None for all rows.
    """

    def __init__(self, classes: Tensor, labels: Tensor, retained_rows: int | None, seed: int):
        self.classes = classes
        self.position = torch.full((int(max(classes.max(), labels.max())) + 1,), -1)
        self.position[classes] = torch.arange(len(classes))
        self.drawn: Tensor | None = None  # [N, 1 + r] row positions; own row first, or -1
        if retained_rows is None:
            self.pairs = len(labels) * len(classes)
            return
        generator = torch.Generator().manual_seed(seed)
        self.drawn = torch.cat(
            [self._draw(part, retained_rows, generator) for part in labels.split(_DRAWN_TOGETHER)]
        )
        self.pairs = int((self.drawn >= 0).sum())
        retained = torch.bincount(self.drawn[:, 1:].flatten(), minlength=len(classes))
        if not retained.all():
            row = int(classes[retained.argmin()])
            raise ValueError(
                f"retained_rows={retained_rows} leaves row {row} without a retained image; use "
                "more retained rows or another seed"
            )

    def _draw(self, labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
        own = self.position[labels].unsqueeze(1)
        keys = torch.rand(len(labels), len(self.classes), generator=generator)
        has_row = own.squeeze(1) >= 0
        keys[has_row] = keys[has_row].scatter(1, own[has_row], -1.0)  # never drawn as another row
        return torch.cat((own, keys.topk(count, dim=1).indices), 1)

    def of(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs of the images ``indices [n]``, image by image.

        Returns:
            Positions in ``indices`` and row positions, both ``[P]``.
        """
        if self.drawn is None:
            count = len(self.classes)
            image = torch.arange(len(indices)).repeat_interleave(count)
            return image, torch.arange(count).repeat(len(indices))
        drawn = self.drawn[indices]
        image, column = (drawn >= 0).nonzero(as_tuple=True)
        return image, drawn[image, column]


class _Hits:
    """Counts of samples and of top-1 and top-5 hits per (row position, image class)."""

    def __init__(self, rows: int, num_classes: int, device: torch.device):
        self.seen, self.top1, self.top5 = (
            torch.zeros(rows, num_classes, dtype=torch.int64, device=device) for _ in range(3)
        )

    def add(self, logits: Tensor, labels: Tensor, row: Tensor) -> None:
        cell = row * self.seen.shape[1] + labels
        for counts, hits in (
            (self.seen, torch.ones_like(labels)),
            (self.top1, metrics.topk_hits(logits, labels, 1).long()),
            (self.top5, metrics.topk_hits(logits, labels, metrics.TOP_K).long()),
        ):
            counts.view(-1).index_add_(0, cell, hits)


class _Run:
    """One evaluation in progress."""

    def __init__(
        self,
        net: WFNet,
        initial: nn.Module,
        pairing: _Pairing,
        batch_size: int,
        zrf_base: float,
        amp_dtype: torch.dtype | None,
        channels_last: bool,
    ):
        weight = next(iter(net.masked_layers.values())).weight
        self.device, self.dtype = weight.device, weight.dtype
        self.on_gpu = self.device.type == "cuda"
        found = next((p.device for p in initial.parameters()), self.device)
        if found != self.device:
            raise ValueError(
                f"initialised is on {found}, the network on {self.device}; move one to the other"
            )
        self.net, self.initial, self.pairing = net, initial, pairing
        self.batch_size, self.zrf_base = batch_size, zrf_base
        self.amp_dtype, self.channels_last = amp_dtype, channels_last
        classes = len(pairing.classes)
        self.filtered = _Hits(classes, net.num_classes, self.device)
        self.original = _Hits(1, net.num_classes, self.device)
        # Divergences of own rows from the new network, in the order of the images: parts of [n].
        self.own_class: list[Tensor] = []
        self.divergence: list[Tensor] = []
        self.original_divergence: list[Tensor] = []

    def chunk(self, batch: Batch) -> int:
        """Runs some images under all their rows; returns the number of pairs."""
        memory_format = torch.channels_last if self.channels_last else torch.preserve_format
        images = batch.images.to(
            self.device, self.dtype, non_blocking=True, memory_format=memory_format
        )
        labels = batch.labels.to(self.device, non_blocking=True)
        autocast = nullcontext()
        if self.amp_dtype is not None:
            autocast = torch.autocast(self.device.type, self.amp_dtype)
        image, row = self.pairing.of(batch.indices)
        with autocast:
            plain = self.net(images, forget=None)
            new = self.initial(images)
            self._check_shape(plain, "the network")
            self._check_shape(new, "initialised")
            broken = torch.stack((_broken(plain), _broken(new)))
            self.original.add(plain, labels, torch.zeros_like(labels))
            own = torch.full_like(plain, torch.nan)  # logits of each image under its own row
            for pairs in torch.arange(len(image)).split(self.batch_size):
                part, part_row = image[pairs], row[pairs]
                first, last = int(part[0]), int(part[-1])
                position = part_row.to(self.device)
                forget = self.pairing.classes[part_row].to(self.device)
                source = (part - first).to(self.device)
                logits = self.net(images[first : last + 1], forget=forget, source=source)
                label = labels[first : last + 1][source]
                broken = torch.cat((broken, _broken(logits).reshape(1)))
                self.filtered.add(logits, label, position)
                # Found on the host, where the labels are: a device would have to be waited for.
                is_own = self.pairing.classes[part_row] == batch.labels[part]
                at = is_own.nonzero().squeeze(1)
                own[part[at].to(self.device)] = logits[at.to(self.device)].to(own.dtype)
        if bool(broken.any()):
            which = ["the original network", "the newly initialised network"]
            which += ["the filtered network"] * (len(broken) - 2)
            raise FloatingPointError(
                f"logits of {which[int(broken.int().argmax())]} are NaN or infinite for images "
                f"{int(batch.indices[0])} to {int(batch.indices[-1])}; check the images and the "
                "filters, or evaluate without 16-bit autocast"
            )
        has_row = self.pairing.position[batch.labels] >= 0
        chosen = has_row.to(self.device)
        self.own_class.append(batch.labels[has_row])
        for kept, logits in ((self.divergence, own), (self.original_divergence, plain)):
            divergence = metrics.jensen_shannon(logits[chosen], new[chosen], self.zrf_base)
            kept.append(divergence.cpu())
        return len(image)

    def _check_shape(self, logits: Tensor, what: str) -> None:
        if logits.dim() != 2 or logits.shape[1] != self.net.num_classes:
            raise ValueError(
                f"{what} gave outputs of shape {list(logits.shape)}; expected "
                f"[{len(logits)}, {self.net.num_classes}]"
            )


def _broken(logits: Tensor) -> Tensor:
    """Whether a sample has NaN or +inf among its logits, or nothing but -inf: scalar bool."""
    return ~logits.amax(1).isfinite().all()


def _summarise(
    run: _Run, names: list[str], zrf_base: float, settings: dict, seconds: float
) -> EvaluationResult:
    classes = run.pairing.classes
    filtered = [t.cpu() for t in (run.filtered.seen, run.filtered.top1, run.filtered.top5)]
    original = [t.cpu() for t in (run.original.seen, run.original.top1, run.original.top5)]
    own_class = torch.cat(run.own_class)
    counts = PairCounts(classes, *filtered, *(t[0] for t in original))
    # The original network has the same counts under every row.
    before = [t.expand(len(classes), -1) for t in original]
    columns = {
        **_accuracies(*filtered, classes),
        "zrf": _zrf_per_class(run.divergence, own_class, classes),
        **{f"original_{k}": v for k, v in _accuracies(*before, classes).items()},
        "original_zrf": _zrf_per_class(run.original_divergence, own_class, classes),
    }
    lost = columns["acc_f"].isnan() | columns["acc_r"].isnan()
    if lost.any():
        raise ValueError(
            f"class {int(classes[lost][0])} has no readable image, or no readable retained image; "
            "repair the images, or leave it out of classes="
        )
    n_forget = filtered[0].gather(1, classes.unsqueeze(1)).squeeze(1)
    n_retain = filtered[0].sum(1) - n_forget
    values = {name: column.tolist() for name, column in columns.items()}
    records = [
        ClassRecord(
            index=index,
            name=names[index] if index < len(names) else str(index),
            n_forget=int(n_forget[i]),
            n_retain=int(n_retain[i]),
            **{name: column[i] for name, column in values.items()},
        )
        for i, index in enumerate(classes.tolist())
    ]
    means = {name: column.mean().item() for name, column in columns.items()}
    scores = [f.name for f in fields(Scores)]
    return EvaluationResult(
        records=records,
        mean=Scores(**{name: means[name] for name in scores}),
        original=Scores(**{name: means[f"original_{name}"] for name in scores}),
        zrf_base=zrf_base,
        settings=settings,
        seconds=seconds,
        counts=counts,
    )


def _accuracies(seen: Tensor, top1: Tensor, top5: Tensor, classes: Tensor) -> dict[str, Tensor]:
    return {
        "acc_r": metrics.accuracy_retain(top1, seen, classes),
        "acc_f": metrics.accuracy_forget(top1, seen, classes),
        "acc_r_top5": metrics.accuracy_retain(top5, seen, classes),
        "acc_f_top5": metrics.accuracy_forget(top5, seen, classes),
    }


def _zrf_per_class(divergence: list[Tensor], own_class: Tensor, classes: Tensor) -> Tensor:
    """1 - mean divergence over the samples of each class, ``[R]``."""
    size = int(classes.max()) + 1
    total = torch.zeros(size, dtype=torch.float64).index_add_(0, own_class, torch.cat(divergence))
    return 1 - (total / torch.bincount(own_class, minlength=size))[classes]


@contextmanager
def _evaluation_mode(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module has the mode it had."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class _Progress:
    """One line on stderr: share done, pairs per second, time left.

    A terminal's line is rewritten; a log file gets a line every half minute.
    """

    def __init__(self, total: int, enabled: bool):
        self.total, self.done, self.enabled = total, 0, enabled
        self.live = sys.stderr.isatty()
        self.interval = 0.2 if self.live else 30.0
        self.start = self.shown = time.perf_counter()

    def advance(self, count: int) -> None:
        self.done += count
        now = time.perf_counter()
        if self.enabled and now - self.shown >= self.interval:
            self.shown = now
            rate = self.done / (now - self.start)
            left = max(0, round((self.total - self.done) / rate))
            text = (
                f"evaluating {self.done / self.total:4.0%}  {self.done:,}/{self.total:,} samples  "
                f"{rate:,.0f}/s  {left // 60}:{left % 60:02d} left"
            )
            print(f"\r{text:<78}" if self.live else text, end="" if self.live else "\n",
                  file=sys.stderr, flush=True)  # fmt: skip

    def close(self) -> None:
        if self.enabled and self.live and self.shown > self.start:
            print(f"\r{'':<78}\r", end="", file=sys.stderr, flush=True)


# -- the newly initialised network ----------------------------------------------------------------


# Raw parameters (owned by a module that has no way to reset them) by the last part of their name,
# as timm and torchvision initialise them.
_TOKENS = {
    "cls_token", "class_token", "dist_token", "reg_token", "mask_token", "pos_embed",
    "pos_embedding", "position_embedding", "relative_position_bias_table",
}  # fmt: skip
_TOKEN_STD = 0.02
_LAYER_SCALES = {"gamma", "gamma1", "gamma2", "gamma_1", "gamma_2", "layer_scale", "ls1", "ls2"}
_LAYER_SCALE = 1e-6


def reinitialise(model: nn.Module, seed: int = 0) -> nn.Module:
    """The same network newly initialised: a copy without filters, in evaluation mode.

    Every parameter is drawn anew by ``reset_parameters`` of its module and by the initialisation
    of the modules above it where they have one (``init_weights`` in timm). Tokens, position
    embeddings and layer scales that nothing resets get the distributions of timm; any other raw
    parameter keeps its values in random order, and the log says so. Running statistics start again.
    The result depends on the architecture and the seed, never on the learned weights (but for those
    raw parameters). The caller's random state is left as it is.

    Args:
        model: a classifier or a :class:`wfnet.WFNet`; not changed.
        seed: of the initialisation.

    Returns:
        A frozen module on the same device.
    """
    new = model.bake(None) if isinstance(model, WFNet) else copy.deepcopy(model)
    new.requires_grad_(False).eval()
    old = {name: p.detach().clone() for name, p in new.named_parameters()}
    devices = sorted({p.device.index for p in new.parameters() if p.device.type == "cuda"})
    with torch.no_grad(), torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        # What nothing initialises is recognised by the NaN it keeps.
        for parameter in new.parameters():
            if parameter.is_floating_point():
                parameter.fill_(torch.nan)
        for module in reversed(list(new.modules())):  # a parent's own initialisation comes last
            for method in ("reset_parameters", "_reset_parameters", "init_weights",
                           "_initialize_weights"):  # fmt: skip
                _call_without_arguments(module, method)
            _reset_running_statistics(module)
        _initialise_raw(new, old)
    return new.requires_grad_(False).eval()


def _call_without_arguments(module: nn.Module, method: str) -> None:
    """Calls ``module.<method>()`` if it exists and needs no argument."""
    function = getattr(module, method, None)
    if not callable(function):
        return
    try:
        inspect.signature(function).bind()
    except TypeError:
        return
    function()


def _reset_running_statistics(module: nn.Module) -> None:
    for name, value in (("running_mean", 0), ("running_var", 1), ("num_batches_tracked", 0)):
        buffer = module._buffers.get(name)
        if buffer is not None:
            buffer.fill_(value)


def _initialise_raw(model: nn.Module, old: Mapping[str, Tensor]) -> None:
    unknown = []
    for name, parameter in model.named_parameters():
        if not parameter.isnan().any():
            continue
        last = name.rpartition(".")[2]
        if last in _TOKENS:
            nn.init.trunc_normal_(parameter, std=_TOKEN_STD)
        elif last in _LAYER_SCALES:
            parameter.fill_(_LAYER_SCALE)
        else:
            values = old[name].flatten()
            order = torch.randperm(values.numel()).to(values.device)
            parameter.copy_(values[order].view_as(parameter))
            unknown.append(name)
    if unknown:
        logger.warning(
            "%s cannot initialise %s%s anew; for ZRF its values were put in random order (pass a "
            "newly built network as `initialised` to avoid this)",
            type(model).__name__,
            unknown[0],
            f" and {len(unknown) - 1} more parameters" if len(unknown) > 1 else "",
        )
