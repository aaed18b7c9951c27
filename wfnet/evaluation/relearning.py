"""Relearn time RT: how soon ordinary fine-tuning brings a forgotten class back.

Paper, section "Measures": the unlearned model (baked, all weights trainable) is fine-tuned on 500
random training samples an epoch until it regains the original network's accuracy on the class, at
most 100 epochs. The mean over classes is reported, and how many classes never regained it
(:func:`wfnet.evaluation.metrics.relearn_time`). The paper names no optimiser: ours stands in every
result.

Ordinary fine-tuning updates the running statistics of BatchNorm, and for a network with BatchNorm
that alone may bring the class back, at any learning rate: the statistics were frozen when its
filters were learned. ``batch_norm="frozen"`` measures how soon the weights relearn it.
"""

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from wfnet.data import (
    Batch,
    Dataset,
    batches,
    classes_of,
    corrupt_counter,
    label_loss,
    labels_of,
    truth_of,
)
from wfnet.evaluation import metrics
from wfnet.evaluation.pair_engine import RunOptions
from wfnet.evaluation.pairs import check_classes, unreadable
from wfnet.evaluation.partial import PartialResults, data_identity
from wfnet.head import first_output
from wfnet.services import settings
from wfnet.services.files import code_digest
from wfnet.services.layout import safe_layout
from wfnet.services.modes import evaluation_mode
from wfnet.services.progress import Progress
from wfnet.services.seeds import generator_for
from wfnet.services.settings import check_settings, setting

_EVALUATED_TOGETHER = 256


@dataclass(frozen=True)
class RelearnConfig:
    """How the forgotten class is relearned; ``--help`` of the commands has these texts.

    Attributes:
        samples: training images drawn for each epoch, uniformly, without replacement
        max_epochs: epochs after which a class counts as never relearned
        tolerance: for the second figure: the original accuracy less this counts as regained. With
            few test images, one stubborn image decides the exact figure.
        optimizer: optimiser; sgd has a momentum
        lr: learning rate
        momentum, weight_decay, batch_size: of the optimiser.
        batch_norm: train updates running statistics as ordinary fine-tuning does, frozen leaves
            them (and dropout) in evaluation mode
        seed: decides the images of each epoch, and dropout.

    Raises:
        ValueError: for values out of range.
    """

    samples: int = setting(500, settings.int_from(2))
    max_epochs: int = setting(100, settings.positive_int, flags="--epochs")
    tolerance: float = setting(0.03, settings.below_one)
    optimizer: str = setting("sgd", ("sgd", "adam"), flags="--opt")
    lr: float = setting(0.01, settings.positive_float)
    momentum: float = setting(0.9, settings.below_one)
    weight_decay: float = setting(0.0, settings.non_negative_float)
    batch_size: int = setting(50, settings.int_from(2))
    batch_norm: str = setting("train", ("train", "frozen"))
    seed: int = setting(0, settings.seed)

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class RelearnRecord:
    """One class relearned.

    Attributes:
        index, name: the class.
        original: accuracy of the original network on the class (fraction).
        epochs: epochs until that was regained exactly; 0 if it was never lost, None if it was not
            regained within the cap.
        epochs_tolerant: the same for ``original - tolerance``.
        accuracy: accuracy on the class before relearning and after each epoch that was run.
    """

    index: int
    name: str
    original: float
    epochs: int | None
    epochs_tolerant: int | None
    accuracy: list[float]


@dataclass(frozen=True)
class RelearnResult:
    """Records of all relearned classes, how they were relearned, and the duration."""

    records: list[RelearnRecord]
    config: RelearnConfig
    seconds: float

    @property
    def mean(self) -> dict[str, float]:
        """RT: :func:`wfnet.evaluation.metrics.relearn_time`."""
        return metrics.relearn_time([r.epochs for r in self.records], self.config.max_epochs)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        content, cap = asdict(self), self.config.max_epochs
        return {
            "units": "epochs; accuracies are fractions",
            "mean": self.mean,
            "mean_tolerant": metrics.relearn_time([r.epochs_tolerant for r in self.records], cap),
            "classes": content.pop("records"),
            **content,
        }


def relearn_times(
    models: Callable[[int], nn.Module],
    train: Dataset,
    test: Dataset,
    original: nn.Module,
    classes: Sequence[int] | None = None,
    config: RelearnConfig | None = None,
    options: RunOptions | None = None,
    identity: Mapping[str, Any] | None = None,
) -> RelearnResult:
    """Relearns every class from a copy of its own unlearned model; nothing that is given changes.

    Args:
        models: gives the plain model that has unlearned a class, as ``net.bake`` does.
        train: images to relearn from.
        test: images on which the accuracy on the class is measured.
        original: the original network, a plain classifier.
        classes: all by default.
        options: of them workers, ``max_corrupt``, progress, and ``records`` as a JSON file.
        identity: what ``records`` depends on besides data and settings.

    Raises:
        ValueError: before work starts, for data or classes that do not fit, or a file of something
            else in ``records``.
    """
    config, options = config or RelearnConfig(), options or RunOptions()
    labels, names = labels_of(test), classes_of(test)
    rows = check_classes(classes, labels, len(names)).tolist()
    check_classes(rows, labels_of(train), len(names))
    options = replace(options, max_corrupt=corrupt_counter(train, options.max_corrupt))
    kept = PartialResults(
        options.records,
        lambda: {
            **(identity or {}),
            **data_identity(train, "training data"),
            **data_identity(test, "test data"),
            "settings": asdict(config),
            "code": code_digest([__name__]),
        },
    )
    started = time.perf_counter()

    def make(part: list[int]) -> Iterator[RelearnRecord]:
        for label in part:
            positions = (labels == label).nonzero().flatten().split(_EVALUATED_TOGETHER)
            stream = batches(test, positions, options.workers, options.max_corrupt)
            readable = [batch.images for batch in stream]
            if not readable:
                raise unreadable(f"class {label}")
            images = torch.cat(readable)
            score = partial(_accuracy, images=images, label=label)
            wanted = score(original)
            course = relearn(models(label), train, score, label, wanted, config, options)
            # Accuracies are fractions of whole images: rounding must not cost one.
            close = wanted - config.tolerance - 1e-9
            epochs, epochs_tolerant = (
                next((epoch for epoch, found in enumerate(course) if found >= least), None)
                for least in (wanted, close)
            )
            yield RelearnRecord(label, names[label], wanted, epochs, epochs_tolerant, course)
            bar.update(1)

    done = len(rows) - len(kept.left(rows))
    with Progress(len(rows), "relearning", options.progress, done=done, unit="class") as bar:
        records = kept.complete(rows, RelearnRecord, make)
    return RelearnResult(records, config, time.perf_counter() - started)


def relearn(
    model: nn.Module,
    train: Dataset,
    score: Callable[[nn.Module], float],
    label: int,
    original: float,
    config: RelearnConfig,
    options: RunOptions | None = None,
) -> list[float]:
    """Fine-tunes a copy of ``model`` until it knows class ``label`` as well as before.

    Args:
        model: a plain classifier that has unlearned the class; not changed.
        train: images to relearn from.
        score: how well a model knows the class: the accuracy on test images of it.
        original: score that is to be regained.
        options: workers and ``max_corrupt``.

    Returns:
        The score at the start and after each epoch.
    """
    options = options or RunOptions()
    model = copy.deepcopy(model).requires_grad_(True)
    device = next(model.parameters()).device
    kind, more = torch.optim.SGD, {"momentum": config.momentum}
    if config.optimizer == "adam":
        kind, more = torch.optim.AdamW, {}
    optimizer = kind(model.parameters(), config.lr, weight_decay=config.weight_decay, **more)
    scores, truth = [score(model)], truth_of(train)
    with safe_layout(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        while scores[-1] < original and len(scores) <= config.max_epochs:
            epoch = len(scores) - 1
            generator = generator_for(config.seed, 7, label, epoch + 1)
            drawn = torch.randperm(len(train), generator=generator)[: config.samples]
            order = [part for part in drawn.split(config.batch_size) if len(part) > 1]
            model.train(config.batch_norm == "train")
            for batch, logits in epoch_logits(model, train, order, options, config.seed, epoch):
                loss = label_loss(logits, truth[batch.indices].to(device))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
            scores.append(score(model))
    return scores


def epoch_logits(
    model: nn.Module,
    train: Dataset,
    order: list[Tensor],
    options: RunOptions,
    seed: int,
    epoch: int,
) -> Iterator[tuple[Batch, Tensor]]:
    """Yields minibatches, and their logits with a graph; unreadable images are replaced."""
    device, start = next(model.parameters()).device, epoch * len(order)
    pin, workers, corrupt = device.type == "cuda", options.workers, options.max_corrupt
    for batch in batches(train, order, workers, corrupt, pin, seed, start, replace_corrupt=True):
        yield batch, first_output(model(batch.images.to(device)))


@torch.no_grad()
def _accuracy(model: nn.Module, images: Tensor, label: int) -> float:
    """The fraction of ``images``, all of class ``label``, that ``model`` classifies so."""
    device = next(model.parameters()).device
    with evaluation_mode(model):
        hits = sum(
            int((first_output(model(part.to(device))).argmax(1) == label).sum())
            for part in images.split(_EVALUATED_TOGETHER)
        )
    return hits / len(images)
