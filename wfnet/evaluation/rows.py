"""Evaluation of a filtered network: every class in mixed batches, one record per class.

The measures themselves are defined in :mod:`wfnet.evaluation.metrics`.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from wfnet.data import Batch, CorruptImages, Dataset, as_dataset, labels_of
from wfnet.evaluation import metrics
from wfnet.evaluation.initialisation import reinitialise
from wfnet.evaluation.pair_engine import Chunk, PairEngine, RunOptions
from wfnet.evaluation.pairs import HitCounts, Pairing, check_classes, names_of, unreadable
from wfnet.evaluation.partial import PartialCounts, evaluation_identity
from wfnet.evaluation.results import ClassRecord, EvaluationResult, PairCounts
from wfnet.network import WFNet
from wfnet.services.files import FilePath, fingerprint
from wfnet.services.ranks import Ranks
from wfnet.services.settings import check_value


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
    records: FilePath | None = None,
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
    dataset = as_dataset(dataset, net.num_classes)
    labels = labels_of(dataset)
    rows = check_classes(classes, labels, net.num_classes)
    check_value("zrf_base", zrf_base, metrics.LOG_BASE)
    pairing = Pairing(rows, labels, retained_rows, seed)
    options = RunOptions(
        batch_size, workers, max_corrupt, amp_dtype, channels_last, progress, records, ranks
    )
    start = time.perf_counter()
    initial = reinitialise(net, seed) if initialised is None else initialised
    engine = PairEngine(net, dataset, options, initial)
    ranks = engine.ranks
    scores = RowScores(pairing, engine.outputs, engine.device, zrf_base)

    def identity() -> dict[str, Any]:
        settings = {
            "classes": rows.tolist(),
            "zrf_base": zrf_base,
            "seed": seed,
            "retained_rows": retained_rows,
            "amp": str(amp_dtype),
            "initialised": "own" if initialised is None else fingerprint(initialised),
        }
        return evaluation_identity(net, dataset, settings=settings)

    kept = PartialCounts(records, identity, scores.tables, engine.corrupt, ranks)
    chunks = engine.chunks(len(rows), kept.load())
    first, last = ranks.range(len(labels))
    total = pairing.pairs * (last - first) // len(labels)
    with engine.show(total, "evaluating", done=int(scores.tables["seen"].sum())):
        engine.run(scores, chunks, counted=kept.save)
    kept.save(last, now=True)
    engine.merge(scores)
    counts = scores.counts()
    found = list(scores.records(names_of(dataset, net.num_classes)))
    settings = {
        **engine.about(None if classes is None else rows),
        "images": int(counts.original_seen.sum()),
        "pairs": int(counts.seen.sum()),
        "retained_rows": "all" if retained_rows is None else retained_rows,
        "seed": seed,
        "initialised": "reinitialise(net, seed)" if initialised is None else "given by the caller",
        "batch_size": batch_size,
        "dtype": str(amp_dtype or engine.forward.dtype).removeprefix("torch."),
        "device": str(engine.device),
    }
    seconds = time.perf_counter() - start
    return EvaluationResult.from_records(found, zrf_base, settings, seconds, counts)


class RowScores(HitCounts):
    """Hits of every row, and divergences from a new network under each image's own row.

    Zero Retrain Forgetting is 1 - mean JS divergence from a network that knows nothing, ``1 - 1/n *
    sum_i JS(softmax(logits_i), softmax(initial_logits_i))`` over the forget samples, between the
    unlearned network and the same network newly initialised (paper; Chundawat et al., "Can Bad
    Teaching Induce Forgetting?", AAAI 2023). 1: as clueless as a new one. The papers do not state
    the base of the logarithm. The natural one fits the values published for original models
    (confident against uniform gives 0.474 for 10 classes and 0.311 for 1,000), so it is the
    default; write the base beside every value.

    Attributes:
        tables: those of :class:`HitCounts`; ``divergence`` and ``original_divergence [N]`` fp64,
            0 for images that were not run; ``measured [N]``, 1 for those that were.
    """

    def __init__(self, pairing: Pairing, outputs: int, device: torch.device, zrf_base: float):
        super().__init__(pairing.classes, outputs, device)
        self.pairing, self.zrf_base = pairing, zrf_base
        for name in ("divergence", "original_divergence", "measured"):
            self.tables[name] = torch.zeros(len(pairing.labels), dtype=torch.float64)

    def pairs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.pairing.of(batch.indices)

    def add(self, chunk: Chunk) -> None:
        super().add(chunk)
        device, has_row = chunk.logits.device, self.pairing.has_row[chunk.indices]
        # Found on the host, where the labels are: a device would have to be waited for. One pair
        # of each image that has a row, in the order of the images.
        is_own = self.rows[chunk.row] == chunk.labels[chunk.image]
        own = chunk.logits[is_own.nonzero().squeeze(1).to(device)]
        chosen, place = has_row.nonzero().squeeze(1).to(device), chunk.indices[has_row]
        new, original = chunk.initialised[chosen], chunk.original[chosen]
        self.tables["measured"][place] = 1.0
        for name, logits in (("divergence", own), ("original_divergence", original)):
            self.tables[name][place] = metrics.jensen_shannon(logits, new, self.zrf_base).cpu()

    def counts(self) -> PairCounts:
        """What the accuracies are made of, on the CPU."""
        names = [field.name for field in fields(PairCounts)[1:]]
        return PairCounts(self.rows, *(self.tables[name].cpu() for name in names))

    def records(self, names: list[str]) -> Iterator[ClassRecord]:
        """What was found of every row.

        Raises:
            ValueError: for a class without readable images, or without retained ones.
        """
        columns, counts = {}, self.counts()
        for prefix in ("", "original_"):
            # The original network has the same counts under every row.
            seen, top1, top5 = (
                getattr(counts, prefix + name).expand(len(self.rows), -1)
                for name in ("seen", "top1", "top5")
            )
            for suffix, right in (("", top1), ("_top5", top5)):
                acc_r, acc_f = metrics.accuracies(right, seen, self.rows)
                columns |= {f"{prefix}acc_r{suffix}": acc_r, f"{prefix}acc_f{suffix}": acc_f}
            total, count = (
                self.pairing.labels.bincount(self.tables[name], seen.shape[1])
                for name in (f"{prefix}divergence", "measured")
            )
            columns[f"{prefix}zrf"] = 1 - (total / count)[self.rows]
        columns["n_forget"] = counts.seen.gather(1, self.rows.unsqueeze(1)).squeeze(1)
        columns["n_retain"] = counts.seen.sum(1) - columns["n_forget"]
        lost = columns["acc_f"].isnan() | columns["acc_r"].isnan()
        if lost.any():
            raise unreadable(f"class {int(self.rows[lost][0])}, or all classes beside it,")
        values = {name: column.tolist() for name, column in columns.items()}
        for i, label in enumerate(self.rows.tolist()):
            found = {name: column[i] for name, column in values.items()}
            yield ClassRecord(index=label, name=names[label], **found)
