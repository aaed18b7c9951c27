"""What weight filtering is compared with: one unlearned model per class, made in the usual ways.

- ``retrained``: trained from scratch without the images of the class; the gold standard.
- ``random_labels``: fine-tuned with the images of the class under random other labels, and all
  other images under their own (Graves et al., "Amnesiac Machine Learning", AAAI 2021).
- ``negative_gradient``: gradient ascent on the images of the class alone (Golatkar et al., "Eternal
  Sunshine of the Spotless Net", CVPR 2020).
- ``neggrad_plus``: descent on other images and ascent on those of the class in one loss, ``beta *
  L_retain - (1 - beta) * L_forget`` (Kurmanji et al., "Towards Unbounded Machine Unlearning",
  NeurIPS 2023).

Each costs a training or fine-tuning run per class, where filters learn all classes in one. The
paper leaves their settings open: ours stand in every result.
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wfnet.data import (
    CorruptImages,
    Dataset,
    batches,
    classes_of,
    corrupt_counter,
    labels_of,
    select,
)
from wfnet.evaluation.initialisation import reinitialise
from wfnet.evaluation.pairs import check_classes
from wfnet.evaluation.partial import check_identity, data_identity
from wfnet.evaluation.plain_models import evaluate_models
from wfnet.evaluation.relearning import RelearnConfig, RelearnResult, relearn_times
from wfnet.evaluation.results import EvaluationResult
from wfnet.services.files import fingerprint, read_tensors, write_tensors
from wfnet.services.seeds import generator_for
from wfnet.training import fit_classifier
from wfnet.untraining.expansion import random_other_rows

METHODS = ("retrained", "random_labels", "negative_gradient", "neggrad_plus")
RECORDS = "evaluation_records.json"
RELEARNED = "relearning_records.json"


@dataclass(frozen=True)
class BaselineConfig:
    """How the original network is fine-tuned into a baseline.

    Attributes:
        epochs: passes over the images: all training images, or those of the class alone for
            ``negative_gradient``.
        lr, momentum, weight_decay, batch_size: of SGD.
        max_norm: bound on the norm of the gradient; ascent would otherwise run away in a few steps.
        retain_weight: beta of ``neggrad_plus``.
        stop_below: ascent alone has no end: ``negative_gradient`` stops after the epoch in which
            the accuracy on training images of the class falls to this or below.
        batch_norm: "train" updates running statistics, "frozen" leaves them, and dropout, in
            evaluation mode: batches of one class alone would give statistics of that class.
        seed: decides order, labels and dropout.

    Raises:
        ValueError: for values out of range.
    """

    epochs: int = 3
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 0.0
    batch_size: int = 64
    max_norm: float = 1.0
    retain_weight: float = 0.9
    stop_below: float = 0.0
    batch_norm: str = "train"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}; got {getattr(self, name)}")
        for name in ("lr", "max_norm"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a number above 0; got {value}")
        for name in ("retain_weight", "stop_below"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1]; got {getattr(self, name)}")
        if self.batch_norm not in ("train", "frozen"):
            raise ValueError(f"batch_norm={self.batch_norm!r} is not one of ('train', 'frozen')")


# Chosen on the validation part of the digits, for the small ResNet.
DEFAULTS: dict[str, BaselineConfig] = {
    "random_labels": BaselineConfig(epochs=5, lr=0.003, batch_norm="frozen"),
    "negative_gradient": BaselineConfig(
        epochs=200, lr=3e-4, momentum=0.0, batch_size=32, batch_norm="frozen"
    ),
    "neggrad_plus": BaselineConfig(epochs=5, lr=0.001, retain_weight=0.9, batch_norm="frozen"),
}


def unlearn(
    method: str,
    original: nn.Module,
    train: Dataset,
    label: int,
    config: BaselineConfig | None = None,
    training: Mapping[str, Any] | None = None,
    fresh: Callable[[], nn.Module] | None = None,
    workers: int = 0,
    max_corrupt: int | CorruptImages | None = None,
) -> nn.Module:
    """One baseline: a plain model that is to have forgotten class ``label``.

    Deterministic given its arguments, the number of threads and the device. ``original`` and the
    caller's random state stay as they are.

    Args:
        method: one of ``METHODS``.
        original: the plain classifier.
        train: the images that it was trained on.
        label: the class to forget.
        config: settings of fine-tuning; ``DEFAULTS[method]`` if None. Not used by ``retrained``,
            but for its seed.
        training: ``retrained``: arguments of :func:`wfnet.training.fit_classifier`, normally those
            that made ``original``.
        fresh: ``retrained``: makes the network with new weights; by default
            :func:`wfnet.evaluation.reinitialise` does.
        workers, max_corrupt: as in :func:`wfnet.data.batches`.

    Returns:
        A classifier in evaluation mode on the device of ``original``.

    Raises:
        ValueError: for an unknown method, or a class without training images or without others.
        FloatingPointError: if the loss is not finite.
    """
    if method not in METHODS:
        raise ValueError(f"there is no baseline {method!r}; choose of {', '.join(METHODS)}")
    labels = labels_of(train)
    own = (labels == label).nonzero().flatten()
    others = (labels != label).nonzero().flatten()
    if not len(own) or len(others) < 2:
        raise ValueError(
            f"class {label} has {len(own)} training images and all others {len(others)}; a "
            "baseline needs images of the class and of others"
        )
    device = next(original.parameters()).device
    if method == "retrained":
        seed = (config or BaselineConfig()).seed
        model = (reinitialise(original, seed) if fresh is None else fresh()).to(device)
        model.requires_grad_(True)
        given = {"seed": seed, "progress": False, "workers": workers, **(training or {})}
        fit_classifier(model, select(train, others), **given)
        return model.eval()
    config = config or DEFAULTS[method]
    corrupt = corrupt_counter(train, max_corrupt)
    model = copy.deepcopy(original).requires_grad_(True)
    tuning = _FineTuning(method, model, train, labels, label, config, workers, corrupt)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        tuning.run()
    return model.eval()


class _FineTuning:
    """Epochs of one baseline on ``model``, in place."""

    def __init__(
        self,
        method: str,
        model: nn.Module,
        train: Dataset,
        labels: Tensor,
        label: int,
        config: BaselineConfig,
        workers: int,
        corrupt: CorruptImages,
    ):
        self.method, self.model, self.train, self.labels = method, model, train, labels
        self.label, self.config, self.workers, self.corrupt = label, config, workers, corrupt
        self.own = (labels == label).nonzero().flatten()
        self.others = (labels != label).nonzero().flatten()
        self.device = next(model.parameters()).device
        # Every image of the class has one wrong label throughout: noise that changes from epoch to
        # epoch would teach uniform outputs, which is another method.
        generator = generator_for(config.seed, 9, label)
        self.targets = labels.clone()
        self.targets[self.own] = random_other_rows(
            labels[self.own], int(max(labels.max() + 1, len(classes_of(train)))), generator
        )
        self.optimizer = torch.optim.SGD(
            model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay
        )

    def run(self) -> None:
        ascends = self.method == "negative_gradient"
        for epoch in range(self.config.epochs):
            right = seen = 0
            self.model.train(self.config.batch_norm == "train")
            order = list(self._order(epoch))
            stream = batches(
                self.train, order, self.workers, self.corrupt, self.device.type == "cuda",
                self.config.seed, epoch * len(order), replace_corrupt=True,
            )  # fmt: skip
            for batch in stream:
                own = (batch.labels == self.label).to(self.device)
                logits = self.model(batch.images.to(self.device))
                right += int((logits.detach().argmax(1) == self.label)[own].sum())
                seen += int(own.sum())
                loss = self._loss(logits, self.targets[batch.indices].to(self.device), own)
                if not bool(loss.isfinite()):
                    raise FloatingPointError(
                        f"the loss of {self.method} for class {self.label} is {loss.item()} in "
                        f"epoch {epoch + 1}; lower its lr ({self.config.lr:g})"
                    )
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_norm)
                self.optimizer.step()
            if ascends and seen and right / seen <= self.config.stop_below:
                return

    def _order(self, epoch: int) -> Iterator[Tensor]:
        generator = generator_for(self.config.seed, 10, self.label, epoch)
        size = self.config.batch_size

        def shuffled(positions: Tensor) -> Tensor:
            return positions[torch.randperm(len(positions), generator=generator)]

        if self.method == "random_labels":
            yield from shuffled(torch.arange(len(self.labels))).split(size)
        elif self.method == "negative_gradient":
            yield from shuffled(self.own).split(size)
        else:  # as many images of the class as of others in every minibatch, again and again
            forgotten = shuffled(self.own)
            for start, part in enumerate(shuffled(self.others).split(size)):
                count = min(len(part), len(forgotten))
                at = (start * count + torch.arange(count)) % len(forgotten)
                yield torch.cat((part, forgotten[at]))

    def _loss(self, logits: Tensor, targets: Tensor, own: Tensor) -> Tensor:
        if self.method == "random_labels":
            return F.cross_entropy(logits, targets)
        labels = torch.where(own, self.label, targets)
        loss = F.cross_entropy(logits, labels, reduction="none")
        if self.method == "negative_gradient":
            return -loss.mean()
        beta = self.config.retain_weight
        return beta * _mean(loss[~own]) - (1 - beta) * _mean(loss[own])


def _mean(values: Tensor) -> Tensor:
    return values.sum() / max(values.numel(), 1)


# -- all classes ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class BaselineResult:
    """One method, all classes.

    Attributes:
        method: one of ``METHODS``.
        evaluation: accuracies and ZRF, as of the filtered network.
        relearning: relearn times; None if not asked for.
        settings: how the models were made.
    """

    method: str
    evaluation: EvaluationResult
    relearning: RelearnResult | None
    settings: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "method": self.method,
            "settings": self.settings,
            "evaluation": self.evaluation.as_dict(),
            "relearning": None if self.relearning is None else self.relearning.as_dict(),
        }


class BaselineModels:
    """The models of one method, kept in a folder: made when first asked for, read after that.

    An interrupted run therefore goes on with the first class that is missing. Call an object with
    a class to get its model.

    Args:
        method: one of ``METHODS``.
        folder: files ``class_<number>.safetensors`` are written here.
        original: the plain classifier.
        train: the images that it was trained on.
        config, training, fresh, workers, max_corrupt: as in :func:`unlearn`.

    Raises:
        ValueError: when called, for a file that is damaged or was made otherwise.
    """

    def __init__(
        self,
        method: str,
        folder: str | os.PathLike,
        original: nn.Module,
        train: Dataset,
        config: BaselineConfig | None = None,
        training: Mapping[str, Any] | None = None,
        fresh: Callable[[], nn.Module] | None = None,
        workers: int = 0,
        max_corrupt: int | CorruptImages | None = None,
    ):
        if method not in METHODS:
            raise ValueError(f"there is no baseline {method!r}; choose of {', '.join(METHODS)}")
        self.method, self.folder, self.original, self.train = method, Path(folder), original, train
        self.config = config or DEFAULTS.get(method, BaselineConfig())
        self.training, self.fresh = training, fresh
        self.workers, self.max_corrupt = workers, max_corrupt
        retrained = method == "retrained"
        self.settings: dict[str, Any] = json.loads(
            json.dumps(
                {"training": dict(training or {}), "seed": self.config.seed}
                if retrained
                else asdict(self.config)
            )
        )
        self.identity = {
            "method": method,
            "original": fingerprint(original),
            **data_identity(train, "training data"),
            "settings": self.settings,
        }

    def path(self, label: int) -> Path:
        return self.folder / f"class_{label}.safetensors"

    def __call__(self, label: int) -> nn.Module:
        path = self.path(label)
        if path.is_file():
            tensors = read_tensors(path)
            with safetensors.safe_open(path, "pt") as file:
                found = json.loads((file.metadata() or {}).get("identity", "{}"))
            check_identity(path, found, self.identity)
            model = copy.deepcopy(self.original)
            model.load_state_dict(tensors)
            return model.requires_grad_(True).eval()
        model = unlearn(
            self.method, self.original, self.train, label, self.config, self.training, self.fresh,
            self.workers, self.max_corrupt,
        )  # fmt: skip
        metadata = {"format": "pt", "identity": json.dumps(self.identity), "class": str(label)}
        write_tensors(path, model.state_dict(), metadata)
        return model

    def remove(self) -> None:
        """Deletes the files of all classes."""
        for path in self.folder.glob("class_*.safetensors"):
            path.unlink()


def run_baseline(
    models: BaselineModels,
    test: Dataset,
    classes: Sequence[int] | None = None,
    relearn: RelearnConfig | None = None,
    zrf_base: float = math.e,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = True,
) -> BaselineResult:
    """Makes and evaluates one baseline for every class; goes on where it was interrupted.

    Args:
        models: of one method; its folder also keeps the records of finished classes.
        test: images for the measures.
        classes: all by default.
        relearn: relearn times with these settings; None for none.
        zrf_base, batch_size, seed, progress: as in :func:`wfnet.evaluate`.

    Raises:
        As :func:`unlearn`, :func:`wfnet.evaluation.evaluate_models` and
        :func:`wfnet.evaluation.relearning.relearn_times`.
    """
    labels = labels_of(models.train)
    rows = check_classes(classes, labels, len(classes_of(models.train))).tolist()
    shared = {
        "classes": rows, "original": models.original, "identity": models.identity,
        "progress": progress, "workers": models.workers, "max_corrupt": models.max_corrupt,
    }  # fmt: skip
    evaluation = evaluate_models(
        models, dataset=test, batch_size=batch_size, zrf_base=zrf_base, seed=seed,
        records=models.folder / RECORDS, **shared,
    )  # fmt: skip
    relearning = None
    if relearn is not None:
        relearning = relearn_times(
            models, models.train, test, config=relearn, records=models.folder / RELEARNED, **shared
        )
    return BaselineResult(models.method, evaluation, relearning, models.settings)
