"""Evaluation of plain models, one per forgotten class: baselines beside the filtered network."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from wfnet.data import Dataset, batches, classes_of, corrupt_counter, labels_of
from wfnet.evaluation import metrics
from wfnet.evaluation.forward import Forward, broken_logits
from wfnet.evaluation.initialisation import reinitialise
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
) -> EvaluationResult:
    """The measures of :func:`wfnet.evaluate` for one plain model per class; none is changed.

    Args:
        models: gives the plain model that has unlearned a class; asked once for each class.
        original: the plain classifier before unlearning.
        dataset, classes, zrf_base, seed: as in :func:`wfnet.evaluate`.
        options: how images are run.

    Raises:
        ValueError: before work starts, for arguments or labels that do not fit.
        FloatingPointError: if logits are NaN or infinite.
    """
    options = options or RunOptions()
    labels, names = labels_of(dataset), classes_of(dataset)
    rows = check_classes(classes, labels, len(names)).tolist()
    check_value("zrf_base", zrf_base, metrics.LOG_BASE)
    check_value("seed", seed, settings.seed)
    corrupt = corrupt_counter(dataset, options.max_corrupt)
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

    (before, seen), (new, _) = run(original), run(reinitialise(original, seed))
    records = []
    with Progress(len(rows), "evaluating", options.progress, unit="class") as bar:
        for label in rows:
            own, scores = seen == label, {}
            for prefix, logits in (("", run(models(label))[0]), ("original_", before)):
                scores[f"{prefix}zrf"] = metrics.zrf(logits[own], new[own], zrf_base).item()
                for suffix, k in (("", 1), ("_top5", metrics.TOP_K)):
                    hits = metrics.topk_hits(logits, seen, k).double()
                    scores[f"{prefix}acc_f{suffix}"] = hits[own].mean().item()
                    scores[f"{prefix}acc_r{suffix}"] = hits[~own].mean().item()
            counts = {"n_forget": int(own.sum()), "n_retain": int((~own).sum())}
            records.append(ClassRecord(index=label, name=names[label], **counts, **scores))
            bar.update(1)
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
    return EvaluationResult.from_records(records, zrf_base, about, time.perf_counter() - started)
