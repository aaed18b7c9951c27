"""Evaluation of plain models, one per forgotten class: baselines beside the filtered network."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from wfnet.data import Dataset, batches, classes_of, corrupt_counter, labels_of, multi_hot_of
from wfnet.evaluation import metrics
from wfnet.evaluation.forward import Forward, broken_logits
from wfnet.evaluation.groups import GroupHits, GroupResult, group_scores
from wfnet.evaluation.initialisation import reinitialise
from wfnet.evaluation.multilabel_rows import LabelScores, MultiLabelResult, check_labels
from wfnet.evaluation.pair_engine import Chunk, Measure, RunOptions
from wfnet.evaluation.pairs import Pairing, check_classes
from wfnet.evaluation.results import EvaluationResult
from wfnet.evaluation.rows import RowScores
from wfnet.head import first_output
from wfnet.services import settings
from wfnet.services.modes import evaluation_mode
from wfnet.services.progress import Progress
from wfnet.services.settings import check_value
from wfnet.version import __version__

Row = TypeVar("Row")  # a class, or several


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
    names, labels, multi_hot = classes_of(dataset), labels_of(dataset), multi_hot_of(dataset)
    if multi_hot is not None:
        rows = list(range(len(names))) if classes is None else list(classes)
        check_labels(rows, multi_hot)
    else:
        rows = check_classes(classes, labels, len(names)).tolist()
    check_value("zrf_base", zrf_base, metrics.LOG_BASE)
    check_value("seed", seed, settings.seed)
    started = time.perf_counter()
    plain = _PlainModels(original, dataset, options or RunOptions())
    about = {
        "wfnet_version": __version__,
        "model": type(original).__name__,
        "num_classes": len(names),
        "classes": "all" if classes is None else rows,
        "images": len(labels),
    }
    new = None
    if multi_hot is None:
        new = plain.logits(reinitialise(original, seed))
        about |= {"seed": seed, "initialised": "reinitialise(original, seed)"}

    def scores(label: int) -> RowScores | LabelScores:
        row = torch.tensor([label])
        if multi_hot is not None:
            return LabelScores(row, multi_hot)
        return RowScores(Pairing(row, labels, None, seed), len(names), row.device, zrf_base)

    records = plain.records(models, rows, scores, new)
    about["corrupt_images"] = len(plain.corrupt.found)
    seconds = time.perf_counter() - started
    if multi_hot is not None:
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
    started = time.perf_counter()
    plain = _PlainModels(original, dataset, options or RunOptions())

    def scores(group: tuple[int, ...]) -> GroupHits | LabelScores:
        return group_scores([group], dataset, len(plain.names), plain.original.device)

    return GroupResult(plain.records(models, groups, scores), time.perf_counter() - started)


class _PlainModels:
    """Plain models, each run over all images of a data set, as measures of rows take them.

    Attributes:
        names: of the classes.
        corrupt: counts images that were left out.
        indices: ``[n]``, positions of the others.
        original: ``[n, K]``, the original's logits.
    """

    def __init__(self, original: nn.Module, dataset: Dataset, options: RunOptions):
        self.dataset, self.options, self.names = dataset, options, classes_of(dataset)
        self.corrupt = corrupt_counter(dataset, options.max_corrupt)
        self.original = self.logits(original)

    def logits(self, model: nn.Module) -> Tensor:
        """Returns logits ``[n, K]`` of all readable images, on the CPU."""
        forward, found, read = Forward.of(model, self.options.amp_dtype), [], []
        chunks = torch.arange(len(labels_of(self.dataset))).split(self.options.batch_size)
        with evaluation_mode(model), torch.no_grad(), forward.autocast():
            for batch in batches(self.dataset, chunks, self.options.workers, self.corrupt):
                logits = first_output(model(forward.images(batch.images)))
                if bool(broken_logits(logits)):
                    raise FloatingPointError(
                        f"logits are NaN or infinite for images {int(batch.indices[0])} to "
                        f"{int(batch.indices[-1])}; lower the learning rate of this baseline"
                    )
                found.append(logits.float().cpu())
                read.append(batch.indices)
        self.indices = torch.cat(read)
        return torch.cat(found)

    def records(
        self,
        models: Callable[[Row], nn.Module],
        rows: Sequence[Row],
        scores: Callable[[Row], Measure],
        initialised: Tensor | None = None,
    ) -> list[Any]:
        """Returns what ``scores(row)`` records of the model of every row."""
        found, labels = [], labels_of(self.dataset)[self.indices]
        image = torch.arange(len(labels))
        with Progress(len(rows), "evaluating", self.options.progress, unit="class") as bar:
            for row in rows:
                measure, logits = scores(row), self.logits(models(row))
                plain = self.original, initialised
                measure.add(Chunk(self.indices, labels, *plain, image, 0 * image, logits))
                found += measure.records(self.names)
                bar.update(1)
        return found
