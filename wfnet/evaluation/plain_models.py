"""Evaluation of plain models, one per forgotten class: baselines beside the filtered network."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from wfnet.data import CorruptImages, Dataset, batches, classes_of, corrupt_counter, labels_of
from wfnet.evaluation import metrics
from wfnet.evaluation.forward import Forward, broken_logits
from wfnet.evaluation.initialisation import reinitialise
from wfnet.evaluation.pairs import Hits, accuracies, check_classes
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
    batch_size: int = 256,
    zrf_base: float = math.e,
    initialised: nn.Module | None = None,
    seed: int = 0,
    records: str | os.PathLike | None = None,
    identity: dict[str, Any] | None = None,
    progress: bool = True,
    workers: int = 0,
    max_corrupt: int | CorruptImages | None = None,
    amp_dtype: torch.dtype | None = None,
) -> EvaluationResult:
    """The measures of :func:`wfnet.evaluate` for one plain model per class; none is changed.

    Args:
        models: gives the plain model that has unlearned a class; asked once for each class.
        original: the plain classifier before unlearning.
        dataset, classes, batch_size, zrf_base, seed, progress, workers, max_corrupt, amp_dtype: as
            in :func:`wfnet.evaluate`.
        initialised: the same network newly initialised; by default :func:`reinitialise` makes it
            from ``original``.
        records: JSON file in which finished classes are kept: an interrupted call goes on there.
        identity: what ``records`` depends on besides data and settings: how ``models`` were made.

    Raises:
        ValueError: before work starts, for arguments or labels that do not fit, or a file of
            something else in ``records``.
        FloatingPointError: if logits are NaN or infinite.
    """
    labels = labels_of(dataset)
    names = classes_of(dataset)
    rows = check_classes(classes, labels, len(names)).tolist()
    metrics.check_base(zrf_base)
    check_value("batch_size", batch_size, settings.batch_size)
    check_value("seed", seed, settings.seed)
    corrupt = corrupt_counter(dataset, max_corrupt)
    if records:
        identity = {
            **(identity or {}),
            **data_identity(dataset),
            "original": fingerprint(original),
            "settings": {"zrf_base": zrf_base, "seed": seed, "amp": str(amp_dtype)},
        }
    kept = PartialResults(records, identity if records else {})
    started = time.perf_counter()

    def run(model: nn.Module) -> tuple[Tensor, Tensor]:
        """Logits ``[n, K]`` and labels ``[n]`` of all readable images, on the CPU."""
        forward, found, seen = Forward.of(model, amp_dtype), [], []
        chunks = torch.arange(len(labels)).split(batch_size)
        with evaluation_mode(model), torch.no_grad(), forward.autocast():
            for batch in batches(dataset, chunks, workers, corrupt):
                logits = first_output(model(forward.images(batch.images)))
                if bool(broken_logits(logits)):
                    raise FloatingPointError(
                        f"logits are NaN or infinite for images {int(batch.indices[0])} to "
                        f"{int(batch.indices[-1])}; lower the learning rate of this baseline"
                    )
                found.append(logits.float().cpu())
                seen.append(batch.labels)
        return torch.cat(found), torch.cat(seen)

    left = [label for label in rows if label not in kept]
    if left:
        before, seen = run(original)
        new, _ = run(reinitialise(original, seed) if initialised is None else initialised)
    bar = Progress(len(rows), "evaluating", progress, done=len(rows) - len(left), unit="class")
    for label in left:
        after, _ = run(models(label))
        scores = _scores(after, new, seen, label, zrf_base)
        scores |= {
            f"original_{name}": value
            for name, value in _scores(before, new, seen, label, zrf_base).items()
        }
        count = int((seen == label).sum())
        record = ClassRecord(
            index=label, name=names[label], n_forget=count, n_retain=len(seen) - count, **scores
        )
        kept.add(label, asdict(record))
        bar.update(1)
    bar.close()
    about = {
        "wfnet_version": __version__,
        "model": type(original).__name__,
        "num_classes": len(names),
        "classes": "all" if classes is None else rows,
        "images": len(labels),
        "corrupt_images": len(corrupt.found),
        "seed": seed,
        "initialised": "reinitialise(original, seed)" if initialised is None else "given",
    }
    found = [ClassRecord(**kept[label]) for label in rows]
    return EvaluationResult.from_records(found, zrf_base, about, time.perf_counter() - started)


def _scores(
    logits: Tensor, new: Tensor, labels: Tensor, label: int, zrf_base: float
) -> dict[str, float]:
    hits = Hits(1, logits.shape[1], logits.device)
    hits.add(logits, labels)
    row = torch.tensor([label])
    own = labels == label
    return {
        **{k: v.item() for k, v in accuracies(*hits.tables().values(), row).items()},
        "zrf": metrics.zrf(logits[own], new[own], zrf_base).item(),
    }
