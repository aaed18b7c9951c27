"""Evaluation of a filtered network: every class in mixed batches, one record per class.

A batch holds (image, row) pairs: the same images under many rows of the filter matrices. The
measures themselves are defined in :mod:`wfnet.evaluation.metrics`.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import safetensors
import torch
from torch import Tensor, nn

from wfnet.data import Batch, CorruptImages, Dataset, batches, classes_of, corrupt_limit, labels_of
from wfnet.evaluation import metrics
from wfnet.evaluation.forward import Progress, as_input, evaluation_mode
from wfnet.evaluation.initialisation import reinitialise
from wfnet.evaluation.pairs import (
    Hits,
    Pairing,
    accuracies,
    check_classes,
    check_settings,
    zrf_per_class,
)
from wfnet.evaluation.partial import check_identity, data_identity, network_identity
from wfnet.evaluation.results import ClassRecord, EvaluationResult, PairCounts
from wfnet.network import WFNet
from wfnet.services.files import fingerprint, read_tensors, write_tensors
from wfnet.services.ranks import Ranks
from wfnet.version import __version__

# Lists of a run that grow by one tensor per chunk of images.
_PER_IMAGE = ("own_class", "divergence", "original_divergence")
_SAVE_EVERY = 30.0  # seconds between two files of counts


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
    zrf_mode: str = "definition",
    records: str | os.PathLike | None = None,
    ranks: Ranks | None = None,
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
        zrf_mode: one of :data:`wfnet.evaluation.metrics.ZRF_MODES`: how other code departs from
        ZRF's
            definition, to compare with its numbers.
        records: safetensors file in which the counts so far are kept: an interrupted call goes on
            there, and one that was finished gives its result again. Several ranks have a file each
            beside it.
        ranks: processes that share the images, each evaluating a part of them
            (:class:`wfnet.services.ranks.Ranks`); all get the result of one process, bit by bit in
            its counts. By default this process evaluates alone.

    Raises:
        ValueError: before work starts for arguments or labels that do not fit, a class without
            images, a row without retained images, or a file of something else in ``records``.
        FloatingPointError: if logits are NaN or infinite.
    """
    labels = labels_of(dataset)
    rows = check_classes(classes, labels, net.num_classes)
    check_settings(batch_size, zrf_base, retained_rows, len(rows))
    if zrf_mode not in metrics.ZRF_MODES:
        raise ValueError(f"zrf_mode={zrf_mode!r} is not one of {', '.join(metrics.ZRF_MODES)}")
    if initialised is not None and isinstance(initialised, WFNet):
        raise ValueError("initialised must be a plain classifier; pass its .bake(None)")
    corrupt = max_corrupt
    if not isinstance(corrupt, CorruptImages):
        corrupt = CorruptImages(corrupt_limit(dataset) if corrupt is None else corrupt)
    pairing = Pairing(rows, labels, retained_rows, seed)
    initial = reinitialise(net, seed) if initialised is None else initialised
    start = time.perf_counter()
    ranks = ranks or Ranks(shared=False)
    run = Run(net, initial, pairing, batch_size, zrf_base, amp_dtype, channels_last, zrf_mode)
    kept = None
    if records is not None:
        identity = {
            **network_identity(net),
            **data_identity(dataset),
            "settings": {
                "classes": rows.tolist(), "zrf_base": zrf_base, "zrf_mode": zrf_mode,
                "seed": seed, "retained_rows": retained_rows, "amp": str(amp_dtype),
                "initialised": "own" if initialised is None else fingerprint(initialised),
            },
        }  # fmt: skip
        kept = Counted(_of_rank(Path(records), ranks), identity, run, corrupt)
    first, last = ranks.range(len(labels))
    position = max(first, 0 if kept is None else kept.load())
    own_pairs = pairing.pairs * (last - first) // len(labels)
    bar = Progress(own_pairs - int(run.filtered.seen.sum()), enabled=progress and ranks.first)
    chunks = [part for part in torch.arange(position, last).split(batch_size) if len(part)]
    with evaluation_mode(net, initial), torch.inference_mode():
        for batch in batches(dataset, chunks, workers, corrupt, pin_memory=run.on_gpu):
            bar.advance(run.chunk(batch))
            if kept is not None:
                kept.save_now_and_then(int(batch.indices[-1]) + 1)
    bar.close()
    if kept is not None:
        kept.save(last)
    net.check_labels()
    run.merge(ranks)
    corrupt.merge(ranks)
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
        "zrf_mode": zrf_mode,
        "dtype": str(amp_dtype or run.dtype).removeprefix("torch."),
        "device": str(run.device),
    }
    return _summarise(run, classes_of(dataset), zrf_base, settings, seconds)


class Run:
    """One evaluation in progress."""

    def __init__(
        self,
        net: WFNet,
        initial: nn.Module,
        pairing: Pairing,
        batch_size: int,
        zrf_base: float,
        amp_dtype: torch.dtype | None,
        channels_last: bool,
        zrf_mode: str,
    ):
        weight = next(iter(net.masked_layers.values())).weight
        self.weight, self.device, self.dtype = weight, weight.device, weight.dtype
        self.on_gpu = self.device.type == "cuda"
        found = next((p.device for p in initial.parameters()), self.device)
        if found != self.device:
            raise ValueError(
                f"initialised is on {found}, the network on {self.device}; move one to the other"
            )
        self.net, self.initial, self.pairing = net, initial, pairing
        self.batch_size, self.zrf_base = batch_size, zrf_base
        self.amp_dtype, self.channels_last, self.zrf_mode = amp_dtype, channels_last, zrf_mode
        classes = len(pairing.classes)
        self.filtered = Hits(classes, net.num_classes, self.device)
        self.original = Hits(1, net.num_classes, self.device)
        # Divergences of own rows from the new network, in the order of the images: parts of [n].
        self.own_class: list[Tensor] = []
        self.divergence: list[Tensor] = []
        self.original_divergence: list[Tensor] = []

    def chunk(self, batch: Batch) -> int:
        """Runs some images under all their rows; returns the number of pairs."""
        images = as_input(batch.images, self.weight, self.channels_last)
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
            broken = torch.stack((broken_logits(plain), broken_logits(new)))
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
                broken = torch.cat((broken, broken_logits(logits).reshape(1)))
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
            divergence = metrics.zrf_divergence(
                logits[chosen], new[chosen], self.zrf_base, self.zrf_mode
            )
            kept.append(divergence.cpu())
        return len(image)

    def merge(self, ranks: Ranks) -> None:
        """Adds up what every rank has counted; the images of lower ranks come first."""
        if ranks.alone:
            return
        for hits in (self.filtered, self.original):
            for counts in (hits.seen, hits.top1, hits.top5):
                ranks.add(counts)
        for name in _PER_IMAGE:
            own = getattr(self, name)
            parts = ranks.gather(torch.cat(own).numpy() if own else None)
            setattr(self, name, [torch.from_numpy(part) for part in parts if part is not None])

    def _check_shape(self, logits: Tensor, what: str) -> None:
        if logits.dim() != 2 or logits.shape[1] != self.net.num_classes:
            raise ValueError(
                f"{what} gave outputs of shape {list(logits.shape)}; expected "
                f"[{len(logits)}, {self.net.num_classes}]"
            )


def _of_rank(path: Path, ranks: Ranks) -> Path:
    """Where a rank keeps its counts."""
    if ranks.alone:
        return path
    return path.with_name(f"{path.stem}-{ranks.rank}-of-{ranks.size}{path.suffix}")


class Counted:
    """The counts of an unfinished evaluation, in one file that is replaced atomically.

    Args:
        path: the file.
        identity: what the counts depend on; a file of another identity is refused.
        run: the evaluation that is filled and saved.
        corrupt: images that were left out, saved with the counts.
    """

    def __init__(self, path: str | os.PathLike, identity: dict, run: Run, corrupt: CorruptImages):
        self.path, self.run, self.corrupt = Path(path), run, corrupt
        self.identity = json.loads(json.dumps(identity))
        self.saved = time.perf_counter()

    def load(self) -> int:
        """Fills the run; returns the position of the first image that it has not seen.

        Raises:
            ValueError: if the file is damaged or of something else.
        """
        if not self.path.is_file():
            return 0
        tensors = read_tensors(self.path)
        with safetensors.safe_open(self.path, "pt") as file:
            metadata = file.metadata() or {}
        try:
            state = json.loads(metadata["state"])
            position, found = int(state["position"]), dict(state["corrupt"])
            check_identity(self.path, dict(state["identity"]), self.identity)
            run = self.run
            for prefix, hits in (("filtered", run.filtered), ("original", run.original)):
                for name in ("seen", "top1", "top5"):
                    getattr(hits, name).copy_(tensors[f"{prefix}.{name}"])
            for name in _PER_IMAGE:
                setattr(run, name, [tensors[name]])
        except (KeyError, TypeError, RuntimeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{self.path} is damaged ({error}); delete it to evaluate anew"
            ) from error
        self.corrupt.found.update(found)
        return position

    def save_now_and_then(self, position: int) -> None:
        if time.perf_counter() - self.saved >= _SAVE_EVERY:
            self.save(position)

    def save(self, position: int) -> None:
        """Writes the counts of the images before ``position``."""
        run = self.run
        tensors = {name: torch.cat(getattr(run, name)) for name in _PER_IMAGE if run.own_class}
        for prefix, hits in (("filtered", run.filtered), ("original", run.original)):
            for name in ("seen", "top1", "top5"):
                tensors[f"{prefix}.{name}"] = getattr(hits, name)
        state = {
            "identity": self.identity,
            "position": position,
            "corrupt": self.corrupt.found,
        }
        write_tensors(self.path, tensors, {"state": json.dumps(state)})
        self.saved = time.perf_counter()


def broken_logits(logits: Tensor) -> Tensor:
    """Whether a sample has NaN or +inf among its logits, or nothing but -inf: scalar bool."""
    return ~logits.amax(1).isfinite().all()


def _summarise(
    run: Run, names: list[str], zrf_base: float, settings: dict, seconds: float
) -> EvaluationResult:
    classes = run.pairing.classes
    filtered = [t.cpu() for t in (run.filtered.seen, run.filtered.top1, run.filtered.top5)]
    original = [t.cpu() for t in (run.original.seen, run.original.top1, run.original.top5)]
    own_class = torch.cat(run.own_class)
    counts = PairCounts(classes, *filtered, *(t[0] for t in original))
    # The original network has the same counts under every row.
    before = [t.expand(len(classes), -1) for t in original]
    columns = {
        **accuracies(*filtered, classes),
        "zrf": zrf_per_class(run.divergence, own_class, classes),
        **{f"original_{k}": v for k, v in accuracies(*before, classes).items()},
        "original_zrf": zrf_per_class(run.original_divergence, own_class, classes),
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
    return EvaluationResult.from_records(records, zrf_base, settings, seconds, counts)
