"""Evaluation of plain models, one per forgotten class: baselines beside the filtered network."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from wfnet.data import (
    CorruptImages,
    Dataset,
    batches,
    classes_of,
    corrupt_counter,
    labels_of,
    multi_hot_of,
    truth_of,
)
from wfnet.evaluation import metrics
from wfnet.evaluation.forward import Forward, broken_logits
from wfnet.evaluation.groups import GroupRecord, GroupResult, LabelGroupRecord
from wfnet.evaluation.initialisation import reinitialise
from wfnet.evaluation.multilabel_rows import MultiLabelRecord, MultiLabelResult, check_labels
from wfnet.evaluation.pair_engine import RunOptions
from wfnet.evaluation.pairs import check_classes
from wfnet.evaluation.results import ClassRecord, EvaluationResult
from wfnet.head import first_output
from wfnet.services import settings
from wfnet.services.modes import evaluation_mode
from wfnet.services.progress import Progress
from wfnet.services.settings import check_value
from wfnet.version import __version__


def evaluate_models(
    models: Callable[[int], nn.Module],
    original: nn.Module,
    dataset: Dataset,
    classes: Sequence[int] | None = None,
    zrf_base: float = math.e,
    seed: int = 0,
    options: RunOptions | None = None,
) -> EvaluationResult | MultiLabelResult:
    """The measures of :func:`wfnet.evaluate` for one plain model per class; none is changed.

    Args:
        models: gives the plain model that has unlearned a class; asked once for each class.
        original: the plain classifier before unlearning.
        dataset, classes, zrf_base, seed: as in :func:`wfnet.evaluate`. Of images with several
            labels each, measures are those of :func:`wfnet.evaluation.evaluate_multi_label`.
        options: how images are run.

    Raises:
        ValueError: before work starts, for arguments or labels that do not fit.
        FloatingPointError: if logits are NaN or infinite.
    """
    options = options or RunOptions()
    labels, names = labels_of(dataset), classes_of(dataset)
    several = multi_hot_of(dataset) is not None
    if several:
        rows = list(range(len(names))) if classes is None else list(classes)
        check_labels(rows, truth_of(dataset))
    else:
        rows = check_classes(classes, labels, len(names)).tolist()
    check_value("zrf_base", zrf_base, metrics.LOG_BASE)
    check_value("seed", seed, settings.seed)
    corrupt = corrupt_counter(dataset, options.max_corrupt)
    started = time.perf_counter()
    run = partial(_run, dataset=dataset, options=options, corrupt=corrupt)
    before, seen = run(original)
    about = {
        "wfnet_version": __version__,
        "model": type(original).__name__,
        "num_classes": len(names),
        "classes": "all" if classes is None else rows,
        "images": len(labels),
    }
    if several:
        precisions = metrics.average_precision(before, seen)

        def measure(label: int) -> MultiLabelRecord:
            found = metrics.average_precision(run(models(label))[0], seen)
            return MultiLabelRecord.of(label, names[label], seen, precisions, found)

    else:
        new, _ = run(reinitialise(original, seed))
        about |= {"seed": seed, "initialised": "reinitialise(original, seed)"}

        def measure(label: int) -> ClassRecord:
            own, scores = seen == label, {}
            for prefix, logits in (("", run(models(label))[0]), ("original_", before)):
                scores[f"{prefix}zrf"] = metrics.zrf(logits[own], new[own], zrf_base).item()
                for suffix, k in (("", 1), ("_top5", metrics.TOP_K)):
                    hits = metrics.topk_hits(logits, seen, k).double()
                    scores[f"{prefix}acc_f{suffix}"] = hits[own].mean().item()
                    scores[f"{prefix}acc_r{suffix}"] = hits[~own].mean().item()
            counts = {"n_forget": int(own.sum()), "n_retain": int((~own).sum())}
            return ClassRecord(index=label, name=names[label], **counts, **scores)

    with Progress(len(rows), "evaluating", options.progress, unit="class") as bar:
        records = []
        for label in rows:
            records.append(measure(label))
            bar.update(1)
    about["corrupt_images"] = len(corrupt.found)
    seconds = time.perf_counter() - started
    if several:
        return MultiLabelResult(records, about, seconds)
    return EvaluationResult.from_records(records, zrf_base, about, seconds)


def evaluate_group_models(
    models: Callable[[tuple[int, ...]], nn.Module],
    original: nn.Module,
    dataset: Dataset,
    groups: Sequence[tuple[int, ...]],
    options: RunOptions | None = None,
) -> GroupResult:
    """The measures of :func:`wfnet.evaluation.evaluate_groups` for one plain model per group.

    Arguments and errors are those of :func:`evaluate_models`.
    """
    options, names = options or RunOptions(), classes_of(dataset)
    corrupt = corrupt_counter(dataset, options.max_corrupt)
    started = time.perf_counter()
    run = partial(_run, dataset=dataset, options=options, corrupt=corrupt)
    before, truth = run(original)

    def scores(logits: Tensor) -> Tensor:
        if truth.dim() == 2:
            return metrics.average_precision(logits, truth)
        return truth[logits.argmax(1) == truth].bincount(minlength=len(names))

    known, records = scores(before), []
    for group in groups:
        found = scores(run(models(group))[0])
        if truth.dim() == 2:
            records.append(LabelGroupRecord.of(group, names, known, found))
        else:
            seen = truth.bincount(minlength=len(names))
            records.append(GroupRecord.of(group, names, seen, known, found))
    return GroupResult(records, time.perf_counter() - started)


def _run(
    model: nn.Module, dataset: Dataset, options: RunOptions, corrupt: CorruptImages
) -> tuple[Tensor, Tensor]:
    """Returns logits ``[n, K]`` and labels of all readable images, on the CPU."""
    forward, found, read = Forward.of(model, options.amp_dtype), [], []
    chunks = torch.arange(len(labels_of(dataset))).split(options.batch_size)
    with evaluation_mode(model), torch.no_grad(), forward.autocast():
        for batch in batches(dataset, chunks, options.workers, corrupt):
            logits = first_output(model(forward.images(batch.images)))
            if bool(broken_logits(logits)):
                raise FloatingPointError(
                    f"logits are NaN or infinite for images {int(batch.indices[0])} to "
                    f"{int(batch.indices[-1])}; lower the learning rate of this baseline"
                )
            found.append(logits.float().cpu())
            read.append(batch.indices)
    return torch.cat(found), truth_of(dataset)[torch.cat(read)]
