"""Evaluation of plain models, one per forgotten class: baselines beside the filtered network."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wfnet.data import Dataset, batches, classes_of, corrupt_counter, labels_of
from wfnet.evaluation import metrics
from wfnet.evaluation.forward import Forward, broken_logits
from wfnet.evaluation.initialisation import reinitialise
from wfnet.evaluation.pair_engine import RunOptions
from wfnet.evaluation.pairs import check_classes
from wfnet.evaluation.partial import PartialResults, data_identity
from wfnet.evaluation.results import ClassRecord, EvaluationResult
from wfnet.head import first_output
from wfnet.services import settings
from wfnet.services.files import fingerprint
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
    identity: Mapping[str, Any] | None = None,
) -> EvaluationResult:
    """The measures of :func:`wfnet.evaluate` for one plain model per class; none is changed.

    Args:
        models: gives the plain model that has unlearned a class; asked once for each class.
        original: the plain classifier before unlearning.
        dataset, classes, zrf_base, seed: as in :func:`wfnet.evaluate`.
        options: how images are run; ``records`` is a JSON file with finished classes.
        identity: what ``records`` depends on besides data and settings: how ``models`` were made.

    Raises:
        ValueError: before work starts, for arguments or labels that do not fit, or a file of
            something else in ``records``.
        FloatingPointError: if logits are NaN or infinite.
    """
    options = options or RunOptions()
    labels, names = labels_of(dataset), classes_of(dataset)
    rows = check_classes(classes, labels, len(names)).tolist()
    metrics.check_base(zrf_base)
    check_value("seed", seed, settings.seed)
    corrupt = corrupt_counter(dataset, options.max_corrupt)
    kept = PartialResults(
        options.records,
        lambda: {
            **(identity or {}),
            **data_identity(dataset),
            "original": fingerprint(original),
            "settings": {"zrf_base": zrf_base, "seed": seed, "amp": str(options.amp_dtype)},
        },
    )
    started = time.perf_counter()

    def run(model: nn.Module) -> tuple[Tensor, Tensor]:
        """Logits ``[n, K]`` and labels ``[n]`` of all readable images, on the CPU."""
        forward, found, seen = Forward.of(model, options.amp_dtype), [], []
        chunks = torch.arange(len(labels)).split(options.batch_size)
        with evaluation_mode(model), torch.no_grad(), forward.autocast():
            for batch in batches(dataset, chunks, options.workers, corrupt):
                logits = first_output(model(forward.images(batch.images)))
                if bool(broken_logits(logits)):
                    raise FloatingPointError(
                        f"logits are NaN or infinite for images {int(batch.indices[0])} to "
                        f"{int(batch.indices[-1])}; lower the learning rate of this baseline"
                    )
                found.append(logits.float().cpu())
                seen.append(batch.labels)
        return torch.cat(found), torch.cat(seen)

    left = kept.left(rows)
    if left:
        (before, seen), (new, _) = run(original), run(reinitialise(original, seed))

    def make(part: list[int]) -> Iterator[ClassRecord]:
        for label in part:
            after, _ = run(models(label))
            own = seen == label
            scores = {
                **_scores("", after, new, seen, own, zrf_base),
                **_scores("original_", before, new, seen, own, zrf_base),
            }
            count = int(own.sum())
            yield ClassRecord(
                index=label, name=names[label], n_forget=count, n_retain=len(seen) - count, **scores
            )
            bar.update(1)

    done = len(rows) - len(left)
    with Progress(len(rows), "evaluating", options.progress, done=done, unit="class") as bar:
        found = kept.complete(rows, ClassRecord, make)
    about = {
        "wfnet_version": __version__,
        "model": type(original).__name__,
        "num_classes": len(names),
        "classes": "all" if classes is None else rows,
        "images": len(labels),
        "corrupt_images": len(corrupt.found),
        "seed": seed,
        "initialised": "reinitialise(original, seed)",
    }
    return EvaluationResult.from_records(found, zrf_base, about, time.perf_counter() - started)


def _scores(
    prefix: str, logits: Tensor, new: Tensor, labels: Tensor, own: Tensor, zrf_base: float
) -> dict[str, float]:
    scores = {"zrf": metrics.zrf(logits[own], new[own], zrf_base)}
    for suffix, k in (("", 1), ("_top5", metrics.TOP_K)):
        hits = metrics.topk_hits(logits, labels, k).double()
        scores |= {f"acc_f{suffix}": hits[own].mean(), f"acc_r{suffix}": hits[~own].mean()}
    return {prefix + name: value.item() for name, value in scores.items()}
