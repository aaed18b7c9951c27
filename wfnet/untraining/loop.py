"""Untraining: learning filter matrices for all classes in one round, every weight frozen.

Paper, "Multi-class unlearning". A run is a function of its configuration, its data and the base
network alone: every random choice comes from ``(seed, step)``, so runs repeat bit by bit and an
interrupted run ends where an uninterrupted one does.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import importlib
import io
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wfnet.data import Batch, CorruptImages, Dataset, batches, classes_of, corrupt_limit, labels_of
from wfnet.data.loading import LostWorker
from wfnet.data.multi_hot import multi_hot_of
from wfnet.gate_tables import flat_matrix, flatten_filters
from wfnet.network import WFNet
from wfnet.pretrained import assign_filters
from wfnet.services.files import fingerprint, write_atomically, write_json
from wfnet.services.ranks import Ranks
from wfnet.services.seeds import generator_for
from wfnet.untraining.checkpoints import Checkpoints
from wfnet.untraining.distributed import Part, SharedReader, SharedStep
from wfnet.untraining.expansion import (
    ExpandedBatch,
    HalvesSampler,
    RoundRobinSampler,
    Sampler,
    ShuffledSampler,
    expand,
)
from wfnet.untraining.multilabel import MultiLabelObjective, MultiLabelValidator, expand_multi_label
from wfnet.untraining.objectives import (
    BalancedObjective,
    Losses,
    Objective,
    PaperObjective,
    full_precision,
)
from wfnet.untraining.optimizers import RowAdam
from wfnet.untraining.signals import Stopped, StopSignals, lost_workers_wait
from wfnet.untraining.step import UntrainingStep, refuse_capture
from wfnet.untraining.throughput import Throughput
from wfnet.untraining.validation import Validation

logger = logging.getLogger("wfnet")

# On a device, losses are looked at this often: every look waits for it.
_LOOK_EVERY = 25
_LOST_WORKERS = 3  # times that data workers are started anew
_VALIDATION_PAIRS = 512  # (image, row) pairs per forward pass


# -- configuration --------------------------------------------------------------------------------


@dataclass(frozen=True)
class UntrainConfig:
    """Settings of :func:`untrain`; :meth:`recipe` gives the shipped ones.

    Attributes:
        objective: "balanced" or "paper" (see :mod:`wfnet.untraining.objectives`).
        steps, epochs: length of the run, one of the two. An epoch is one pass over as many images
            as the training set has.
        batch_size: images n of a minibatch, even: one half unlearns, one half is retained.
        label_expansion: M, rows that each retained image goes through.
        share_images: the same n / 2 images serve both halves.
        sampler: "round_robin" (every class unlearns equally often) or "shuffled".
        optimizer: "row_adam" or "sgd".
        lr, schedule, lr_final: learning rate; "cosine" takes it to ``lr * lr_final``, "constant"
            leaves it.
        clip: bound on the absolute value of filter entries after each step; None for none.
        lambda0, lambda1, lambda2: weights of the objective's terms.
        distil: balanced: retain by distillation from the original network, else cross entropy.
        seed: decides everything random.
        patience: validations without improvement after which the run stops.
        validations_per_epoch: how often the validation split is looked at.
        stop_on: "accuracy", ``0.5 * ((1 - Acc_f) + Acc_r)``, or "loss", the objective on the
            validation split. Equal accuracies are decided by the loss.
        validation_rows: other rows that each validation image is retained under; with more
            classes than that, Acc_r is an estimate over rows drawn once.
        amp: autocast dtype, "bfloat16" or None.
        channels_last: images and weights in channels-last layout.
        fuse: run the network as one fused plan where it can be (:mod:`wfnet.fusion`); "compile":
            with what lies between the convolutions compiled (:class:`wfnet.WFNet`).
        workers, max_corrupt: as in :func:`wfnet.data.batches`.
        max_nan_steps: steps whose loss is NaN or infinite that may be left out, with a line in the
            log each; the next one ends the run. Above 0 the host waits for every loss.
        grad_accum_steps: minibatches whose mean gradient makes one step.
        capture: run steps as a CUDA graph (:mod:`wfnet.untraining.step`); None: where that is
        possible. checkpoint_every: steps between checkpoints; None: at every validation.
        keep_checkpoints: checkpoints that stay; a damaged newest one falls back to the one before.

    Raises:
        ValueError: for values out of range, before any work starts.
    """

    objective: str = "balanced"
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 32
    label_expansion: int = 3
    share_images: bool = True
    sampler: str = "round_robin"
    optimizer: str = "row_adam"
    lr: float = 0.2
    schedule: str = "cosine"
    lr_final: float = 0.01
    clip: float | None = None
    lambda0: float = 1.0
    lambda1: float = 0.3
    lambda2: float = 1.0
    distil: bool = True
    seed: int = 0
    patience: int = 10
    validations_per_epoch: float = 5
    stop_on: str = "accuracy"
    validation_rows: int = 4
    amp: str | None = None
    channels_last: bool = True
    fuse: bool | str = True
    workers: int = 0
    max_corrupt: int | None = None
    max_nan_steps: int = 0
    grad_accum_steps: int = 1
    capture: bool | None = None
    checkpoint_every: int | None = None
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not one of "
                    f"{', '.join(repr(choice) for choice in allowed)}"
                )
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                f"give the length of the run as steps or as epochs, one of them; got "
                f"steps={self.steps}, epochs={self.epochs}"
            )
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and (not _is_number(value) or value < least):
                raise ValueError(f"{name} must be a number of at least {least}, got {value!r}")
        for name in _ABOVE_ZERO:
            value = getattr(self, name)
            if value is not None and (not _is_number(value) or value <= 0):
                raise ValueError(f"{name} must be a number above 0, got {value!r}")
        for name in _WHOLE:
            value = getattr(self, name)
            if value is not None and value != int(value):
                raise ValueError(f"{name} must be a whole number, got {value!r}")
        if self.batch_size % 2:
            raise ValueError(
                f"batch_size must be even, for two halves of a minibatch; got {self.batch_size}"
            )

    @classmethod
    def recipe(cls, name: str = "balanced", num_classes: int = 10, **changes: Any) -> UntrainConfig:
        """A shipped recipe for a number of classes, with ``changes`` to single settings.

        "balanced" (the default of the package): see
        :class:`wfnet.untraining.objectives.BalancedObjective`.
        "paper": the authors' settings, for a ``WFNet(..., normalize_gate=False)``.

        Raises:
            ValueError: for an unknown name or values out of range.
            TypeError: for changes that are no settings.
        """
        if name == "balanced":
            settings = _balanced_settings(num_classes, changes.get("batch_size"))
        elif name == "paper":
            settings = dict(_PAPER_SETTINGS)
        else:
            raise ValueError(f"there is no recipe {name!r}; recipes are 'balanced' and 'paper'")
        if changes.get("epochs") is not None and "steps" not in changes:
            settings["steps"] = None
        if changes.get("steps") is not None and "epochs" not in changes:
            settings["epochs"] = None
        return cls(**{**settings, **changes})


_CHOICES = {
    "objective": ("balanced", "paper"),
    "sampler": ("round_robin", "shuffled"),
    "optimizer": ("row_adam", "sgd"),
    "schedule": ("cosine", "constant"),
    "stop_on": ("accuracy", "loss"),
    "amp": (None, "bfloat16"),
    "capture": (None, True, False),
    "fuse": (True, False, "compile"),
}
_AT_LEAST = {
    "steps": 1,
    "batch_size": 2,
    "label_expansion": 1,
    "lr_final": 0,
    "lambda0": 0,
    "lambda1": 0,
    "lambda2": 0,
    "patience": 1,
    "validation_rows": 1,
    "workers": 0,
    "max_corrupt": 0,
    "max_nan_steps": 0,
    "grad_accum_steps": 1,
    "checkpoint_every": 1,
    "keep_checkpoints": 1,
}
_WHOLE = (
    "steps", "batch_size", "label_expansion", "patience", "validation_rows", "workers",
    "max_corrupt", "max_nan_steps", "grad_accum_steps", "checkpoint_every", "keep_checkpoints",
    "seed",
)  # fmt: skip
_ABOVE_ZERO = ("epochs", "lr", "clip", "validations_per_epoch")
# Settings that change neither the result nor the order of anything.
_FREE_TO_CHANGE = {
    "workers", "max_corrupt", "max_nan_steps", "checkpoint_every", "keep_checkpoints",
}  # fmt: skip

_PAPER_SETTINGS = {
    "objective": "paper",
    "epochs": 20,
    "label_expansion": 5,
    "share_images": False,
    "sampler": "shuffled",
    "optimizer": "sgd",
    "lr": 100.0,
    "schedule": "constant",
    "clip": 3.0,
    "lambda1": 1.0,
}


def _balanced_settings(num_classes: int, batch_size: int | None) -> dict[str, Any]:
    """Settings of recipe "balanced", chosen on validation images of 10 and 100 classes.

    What a class costs is about constant (some 3,000 samples), so steps grow with classes. More
    classes crowd the same gates: rows move more carefully, a forget sample counts for more because
    its row meets it more rarely, and every image is retained under more rows. The best filters are
    those of the least validation loss: on a small split accuracies jump by whole images, and a
    lucky early one would end the run before the learning rate has decayed.
    """
    crowding = max(num_classes, 10) / 10
    if batch_size is None:
        batch_size = 32 if num_classes <= 200 else 256
    steps = max(600, 30 * num_classes)
    return {
        "steps": max(300, math.ceil(steps * 32 / batch_size)),
        "batch_size": batch_size,
        "label_expansion": 3 if num_classes <= 30 else 5,
        "stop_on": "loss",
        "lr": 0.2 * crowding**-0.3,
        "lambda1": min(1.0, 0.3 * crowding**0.25),
    }


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# -- results --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UntrainResult:
    """What a run of :func:`untrain` came to. The best filters are on the network.

    Attributes:
        score: ``0.5 * ((1 - Acc_f) + Acc_r)`` of the best filters; None without validation.
        best: validation of the best filters; None without validation.
        best_step: step after which they were taken.
        steps: steps that were run, all sessions of a resumed run together.
        stopped_early: whether patience ended the run.
        history: one record per validation (per checkpoint without validation).
        samples: expanded samples that went through the network in training.
        seconds: duration, all sessions together.
        spent: where it went, in seconds: ``start`` (until all is compiled and captured), ``data``
            (waiting for images), ``steps``, ``validation`` and ``checkpoints``.
        filters: the folder with the saved filters; None without output.
        corrupt_images: names of images left out, with reasons.
        config: the settings.
    """

    score: float | None
    best: Validation | None
    best_step: int
    steps: int
    stopped_early: bool
    history: list[dict[str, float]]
    seconds: float
    filters: Path | None
    config: UntrainConfig
    corrupt_images: dict[str, str] = field(default_factory=dict)
    spent: dict[str, float] = field(default_factory=dict)
    samples: int = 0


# -- validation -----------------------------------------------------------------------------------


class Validator:
    """Quick Acc_r, Acc_f and loss on a validation split, in batches that mix rows.

    Every image runs under its own row (Acc_f) and under ``rows`` other rows (Acc_r), chosen once by
    seed: all other rows where there are no more than that.
    """

    def __init__(
        self,
        dataset: Dataset,
        num_classes: int,
        rows: int,
        seed: int,
        objective: Objective,
        amp: torch.dtype | None = None,
        channels_last: bool = False,
        workers: int = 0,
        corrupt: CorruptImages | None = None,
        ranks: Ranks | None = None,
    ):
        self.ranks = ranks or Ranks(shared=False)
        self.dataset = dataset
        self.labels = labels_of(dataset)
        self.num_classes = num_classes
        self.rows = min(rows, num_classes - 1)
        self.objective = objective
        self.amp = amp
        self.channels_last = channels_last
        self.workers = workers
        self.corrupt = corrupt
        # Image i is retained under the rows that follow its own at these distances (modulo K):
        # distinct, and every distance equally often.
        generator = generator_for(seed, 5)
        start = torch.randint(num_classes - 1, (len(self.labels), 1), generator=generator)
        self.distances = 1 + (start + torch.arange(self.rows)) % (num_classes - 1)

    def pairs(self, labels: Tensor, indices: Tensor) -> ExpandedBatch:
        """All (image, row) pairs of some images: labels ``[n]``, positions in the split ``[n]``."""
        n = len(labels)
        others = (labels.unsqueeze(1) + self.distances[indices]) % self.num_classes
        source = torch.cat((torch.arange(n), torch.arange(n).repeat_interleave(self.rows)))
        return ExpandedBatch(torch.cat((labels, others.flatten())), source, labels[source], n)

    @torch.no_grad()
    def __call__(
        self, net: WFNet, interrupted: Callable[[], bool] = lambda: False
    ) -> Validation | None:
        """Scores of ``net``; None if ``interrupted`` said so between two batches."""
        device = net.filter_parameters()[0].device
        per_batch = max(1, _VALIDATION_PAIRS // (self.rows + 1))
        order = self.ranks.share(torch.arange(len(self.labels)).split(per_batch))
        hits, forgotten, retained = {}, {}, {}  # by batch
        pin = device.type == "cuda"
        for batch in batches(self.dataset, order, self.workers, self.corrupt, pin):
            number = int(batch.indices[0]) // per_batch
            pairs = self.pairs(batch.labels, batch.indices)
            moved = pairs.to(device)
            if interrupted():
                return None
            logits, original = _run(
                net, batch.images, moved, self.objective, self.amp, self.channels_last
            )
            half = moved.retain_half
            forgotten[number] = self.objective.forget(
                logits[moved.forget_half], moved.target[moved.forget_half]
            )
            if original is not None:
                original = original[moved.source[half]]
            retained[number] = self.objective.retain(logits[half], moved.target[half], original)
            # Everything stays on the device until the end: reading a number waits for it.
            correct = logits.argmax(1) == moved.target
            hits[number] = torch.stack((moved.forget, moved.target, correct.long()))
        if self.corrupt is not None:
            self.corrupt.merge(self.ranks)
        hits = self.ranks.join(hits, device)
        if not hits:
            raise RuntimeError("no validation image can be read: repair those that the log names")
        row, target, correct = torch.cat(hits, 1).cpu()
        own = row == target
        means = [torch.cat(self.ranks.join(c, device)).mean() for c in (forgotten, retained)]
        losses = self.objective.total(*means, net)
        acc_f = self._per_row(row[own], correct[own])
        acc_r = self._per_row(row[~own], correct[~own])
        return Validation(
            acc_r=float(acc_r.nanmean()),
            acc_f=float(acc_f.nanmean()),
            acc_r_per_class=acc_r.tolist(),
            acc_f_per_class=acc_f.tolist(),
            loss=float(losses.total),
        )

    def _per_row(self, row: Tensor, correct: Tensor) -> Tensor:
        seen = row.bincount(minlength=self.num_classes)
        return row.bincount(correct.double(), self.num_classes) / seen


def _run(
    net: WFNet,
    images: Tensor,
    batch: ExpandedBatch,
    objective: Objective,
    amp: torch.dtype | None,
    channels_last: bool,
) -> tuple[Tensor, Tensor | None]:
    """Logits ``[B, K]`` of an expanded batch, and the original network's for its images ``[n, K]``.

    Both in at least fp32; ``batch`` is on the network's device.
    """
    device = batch.forget.device
    images = images.to(device, non_blocking=True)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    with torch.autocast(device.type, amp, enabled=amp is not None):
        original = None
        if objective.needs_original:
            with torch.no_grad():
                original = net(images, forget=None)
        logits = net(images, forget=batch.forget, source=batch.source)
    return full_precision(logits), None if original is None else full_precision(original)


# -- untraining -----------------------------------------------------------------------------------


def untrain(
    net: WFNet,
    train: Dataset,
    validation: Dataset | None = None,
    config: UntrainConfig | None = None,
    output: str | os.PathLike | None = None,
    resume: bool = False,
    progress: bool = True,
    objective: Objective | None = None,
    log: Callable[[dict[str, float]], None] | None = None,
) -> UntrainResult:
    """Learns the filters of all classes in one round; the best ones end up on ``net``.

    Called on every rank of an initialised ``torch.distributed`` group, all ranks share the run
    (:mod:`wfnet.untraining.distributed`); the first one writes and shows progress.

    Args:
        net: a wrapped classifier on any device; training starts from its present filters.
        train, validation: data sets (see :mod:`wfnet.data`; anything torchvision-like will do).
            Without ``validation`` there is no early stopping, and the last filters are kept.
        config: settings; ``UntrainConfig.recipe("balanced", net.num_classes)`` by default.
        output: folder for filters (``net.save_pretrained``), ``history.csv`` and ``history.json``,
            checkpoints, and TensorBoard events where it is installed.
        resume: continue the interrupted run in ``output``; the result is bitwise that of an
            uninterrupted run. Starts anew if there is none; a finished run is only loaded.
        progress: show losses, Acc_r, Acc_f and samples/s on stderr, if tqdm is installed.
        objective: an objective of your own instead of the configured one.
        log: called with every record of the history as it is made.

    Raises:
        ValueError: before work starts, for data that do not fit the network; for a resumed run
            with other settings, data or base network; for a damaged checkpoint.
        FileExistsError: if ``output`` holds an unfinished run and ``resume`` is False.
        FloatingPointError: if the loss is NaN or infinite; the last good filters are on ``net``
            and saved.
        Stopped: with ``output``, after SIGTERM or SIGINT: a checkpoint of the last whole step is
            written (:mod:`wfnet.untraining.signals`).
        OSError: if checkpoints cannot be written (on a full disk: several in a row).
        RuntimeError: for more corrupt images than ``config.max_corrupt``.
    """
    if config is None:
        config = UntrainConfig.recipe("balanced", net.num_classes)
    run = _Untraining(net, train, validation, config, output, progress, objective)
    if log is not None and run.ranks.first:
        run.log = log
    if output is not None and run.ranks.first_does(run.checkpoints.exist):
        if resume:
            run.load_checkpoint()
        else:
            run.refuse_to_overwrite()
    return run.run()


class _Untraining:
    """One run: everything that :func:`untrain` holds between steps."""

    def __init__(
        self,
        net: WFNet,
        train: Dataset,
        validation: Dataset | None,
        config: UntrainConfig,
        output: str | os.PathLike | None,
        progress: bool,
        objective: Objective | None,
    ):
        self.ranks = Ranks()
        self.net = net
        self.train = train
        self.validation = validation
        self.config = config
        self.output = None if output is None else Path(output)
        if output is not None:
            self.checkpoints = Checkpoints(output, config.keep_checkpoints)
        self.show_progress = progress and self.ranks.first
        self.labels = _checked_labels(train, net.num_classes, "training")
        self.multi_hot = multi_hot_of(train)
        if self.multi_hot is not None and not self.ranks.alone:
            raise ValueError(
                "images with several labels are untrained by one process: start it without torchrun"
            )
        every = self.labels if self.multi_hot is None else self.multi_hot.nonzero()[:, 1]
        _check_every_class(every, train, net.num_classes, config)
        self.objective = objective or _configured_objective(config)
        if self.multi_hot is not None:
            if not self.ranks.alone:
                raise ValueError(
                    "multi-label data are untrained on by one process: run without torchrun"
                )
            self.objective = objective or MultiLabelObjective(self.objective)
        self.amp = None if config.amp is None else getattr(torch, config.amp)
        self.device = net.filter_parameters()[0].device
        if config.channels_last:
            net.to(memory_format=torch.channels_last)
        limit = corrupt_limit(train) if config.max_corrupt is None else config.max_corrupt
        self.corrupt = CorruptImages(limit)
        self.validator = None
        if validation is not None:
            _checked_labels(validation, net.num_classes, "validation")
            self.validator = Validator(
                validation, net.num_classes, config.validation_rows, config.seed, self.objective,
                self.amp, config.channels_last, config.workers, self.corrupt, self.ranks,
            )  # fmt: skip
            if self.multi_hot is not None:
                self.validator = MultiLabelValidator(
                    validation, net.num_classes, config.seed, self.objective, self.amp,
                    config.channels_last, config.workers, self.corrupt,
                )  # fmt: skip
        self.sampler = _configured_sampler(config, self.labels)
        images = config.batch_size // 2 if config.share_images else config.batch_size
        per_epoch = len(self.labels) / (images * config.grad_accum_steps)
        self.steps_per_epoch = per_epoch
        self.steps = config.steps or max(1, round(config.epochs * per_epoch))
        self.validate_every = max(1, round(per_epoch / config.validations_per_epoch))
        self.params = net.filter_parameters()
        if config.optimizer == "sgd":
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(self.params, lr=config.lr)
        else:
            self.optimizer = RowAdam(self.params, lr=config.lr)
        refusal = refuse_capture(net, self.optimizer)
        if refusal is None and not self.ranks.alone:
            refusal = "the shares of several ranks differ in shape"
        if config.capture and refusal is not None:
            raise ValueError(f"capture=True is not possible: {refusal}; leave capture out")
        self.captures = config.capture is not False and refusal is None
        if config.objective == "paper" and objective is None and net.normalize_gate:
            logger.warning(
                "recipe 'paper' is defined for plain sigmoid gates; wrap the network with "
                "WFNet(..., normalize_gate=False) to reproduce it"
            )

        # What a checkpoint holds.
        self.step = 0  # steps that are done
        self.position = 0  # minibatches that were drawn; more than steps if one was all corrupt
        self.best: Validation | None = None
        self.best_filters: list[Tensor] | None = None
        self.best_step = 0
        self.stale = 0  # validations since the best one
        self.history: list[dict[str, float]] = []
        self.seconds = 0.0
        self.samples = 0
        self.finished = False
        self.stopped_early = False
        self.nan_steps = 0  # that were left out
        self.sums: dict[str, float] = {}  # of losses since the last record
        self.summed = 0

        # Seconds, all sessions together; the rest were steps.
        self.spent = {"start": 0.0, "data": 0.0, "validation": 0.0, "checkpoints": 0.0}

        self.signals = StopSignals(output is not None)
        self.throughput = Throughput(self.device)
        self.log: Callable[[dict[str, float]], None] = lambda record: None
        self.good = self._snapshot()  # filters that last gave a finite loss
        self.latest: dict[str, float] = {}  # losses of the step that was last looked at
        self.pending: list[tuple[dict[str, Tensor], int]] = []  # losses not looked at yet

    # -- the loop ---------------------------------------------------------------------------------

    def run(self) -> UntrainResult:
        training, fuse = self.net.training, self.net.fuse
        self.net.train()
        self.net.fuse = self.config.fuse
        begun = time.perf_counter()
        self.started = begun - self.seconds
        self.writer = self._open_tensorboard()
        bar = _Bar(self.steps, self.step, self.show_progress)
        try:
            if not self.finished:
                if self.output is not None and self.ranks.first:
                    self.checkpoints.clear_leftovers()
                with (
                    self.signals,
                    flatten_filters(self.params),
                    contextlib.closing(self._minibatches()) as stream,
                ):
                    self.work = self._make_step()
                    self._go_through(stream, bar, begun)
                self.ranks.wait()  # until the first one has written the filters
                self.seconds = time.perf_counter() - self.started
        finally:
            bar.close()
            if self.writer is not None:
                self.writer.close()
            self.net.train(training)
            self.net.fuse = fuse
        return self._result()

    def _make_step(self) -> UntrainingStep:
        settings = (
            self.net, self.objective, self.optimizer, self.amp, self.config.channels_last,
            self.config.clip,
        )  # fmt: skip
        if self.ranks.alone:
            return UntrainingStep(*settings, self.captures)
        self.ranks.check_same("configuration, network or data", [asdict(self.config),
                                                                 self._identity()])  # fmt: skip
        self.ranks.check_same("starting point", [self.step, self._filter_digest()])
        rows_only = isinstance(self.optimizer, RowAdam)
        return SharedStep(self.ranks, *settings, rows_only=rows_only)

    def _filter_digest(self) -> int:
        """A sum over the bits of all filters, which no order of adding changes."""
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}
        return sum(
            int(p.detach().view(bits[p.element_size()]).sum(dtype=torch.int64)) for p in self.params
        )

    def _go_through(
        self, stream: Iterator[list[Batch] | list[Part]], bar: _Bar, begun: float
    ) -> None:
        if self._validation_is_due():  # the run was stopped before it
            self._after_step(bar)
            if self.finished:
                return
        self.throughput.restart()
        others = self._counted()
        with contextlib.ExitStack() as inside:
            for number, group in enumerate(stream):
                if number == 0:
                    inside.enter_context(lost_workers_wait())
                self._one_step(group)
                if number + 1 == self.work.first_steps:
                    self._look()  # waits for the device
                    others = self._counted() - others
                    self.spent["start"] += time.perf_counter() - begun - others
                    self.throughput.restart()
                self.throughput.images += sum(
                    len(one.labels) if isinstance(one, Batch) else one.read for one in group
                )
                self._after_step(bar)
                if self.finished:
                    return
        raise RuntimeError(
            f"too few minibatches had a readable image: {self.step} of {self.steps} steps were "
            "done; repair the images that the log names"
        )

    def _minibatches(self) -> Iterator[list[Batch] | list[Part]]:
        return self._whole_minibatches() if self.ranks.alone else self._parts()

    def _parts(self) -> Iterator[list[Part]]:
        """This rank's parts of the minibatches of each step; all ranks stop at the same one."""
        reader = SharedReader(
            self.ranks, self.sampler, self.labels, self.train, self._read, self._expand_labels,
            self.corrupt, _LOST_WORKERS,
        )  # fmt: skip
        parts = reader.parts(self.position, self._last_position(), lambda: self.signals.received)
        try:
            for group in _grouped(self.throughput.timed(parts), self.config.grad_accum_steps):
                if group[0].stop:
                    self.signals.received = group[0].stop
                    self._stop()
                yield group
        except Exception:
            self._save_before_leaving()
            raise

    def _whole_minibatches(self) -> Iterator[list[Batch]]:
        """The minibatches of each step until there are no more; after a signal it stops the run.

        A few lost workers are replaced. If reading fails, what was done so far is saved first.
        """
        lost = 0
        while True:
            try:
                with contextlib.closing(self._read(self.position)) as stream:
                    for group in _grouped(
                        self.throughput.timed(stream), self.config.grad_accum_steps
                    ):
                        if self.signals.received:
                            self._stop()
                        yield group
                        if self.signals.received:
                            self._stop()
                return
            except LostWorker as error:
                lost += 1
                if self.signals.received:  # it reached the workers, too
                    self._stop()
                if lost > _LOST_WORKERS:
                    self._save_before_leaving()
                    raise
                logger.warning(
                    "%s; new ones go on from step %d (%d of at most %d times)",
                    error, self.step, lost, _LOST_WORKERS,
                )  # fmt: skip
            except Exception:
                self._save_before_leaving()
                raise

    def _save_before_leaving(self) -> None:
        if self.output is not None and self.step:
            self._look()
            with contextlib.suppress(OSError):
                self.save_checkpoint()

    def _stop(self) -> None:
        self._look()
        self.save_checkpoint()
        raise Stopped(
            self.signals.received,
            f"stopped after step {self.step} of {self.steps}; resume goes on from "
            f"{self.checkpoints.newest}",
        )

    def _last_position(self) -> int:
        """Where reading ends. A minibatch without any readable image never comes, so there are
        some to spare."""
        missing = (self.steps - self.step) * self.config.grad_accum_steps
        return self.position + 2 * missing + 100

    def _read(
        self, position: int, share: Callable[[Tensor], Tensor] = lambda chosen: chosen
    ) -> Iterator[Batch]:
        """Minibatches from number ``position`` on, or a share of each."""
        return batches(
            self.train,
            map(share, self.sampler.batches(position, self._last_position())),
            self.config.workers,
            self.corrupt,
            pin_memory=self.device.type == "cuda",
            seed=self.config.seed,
            start=position,
        )

    def _one_step(self, group: list[Batch] | list[Part]) -> None:
        config = self.config
        if self.ranks.alone:
            minibatches = [(batch.images, self._expand(batch)) for batch in group]
            labels = [batch.forget.flatten() for _, batch in minibatches]
            samples = sum(len(batch) for _, batch in minibatches)
        else:
            minibatches = group
            labels = [part.rows for part in group]
            samples = sum(part.size for part in group)
            self.position = group[-1].position + 1
        losses = self.work.differentiate(minibatches)
        if self.nan_steps < config.max_nan_steps and not math.isfinite(float(losses.total)):
            self.nan_steps += 1
            logger.warning(
                "the loss of step %d is not finite: its images are left out (%d of at most %d)",
                self.step + 1, self.nan_steps, config.max_nan_steps,
            )  # fmt: skip
            return
        self._watch(losses)
        rows = None
        if not self.captures:
            rows = torch.cat(labels).unique()
            rows = rows[rows >= 0]
        self.work.move(self._learning_rate(self.step), rows)
        self.samples += samples
        self.step += 1

    def _expand(self, batch: Batch) -> ExpandedBatch:
        """The expanded batch of the next minibatch, which is ``batch``."""
        whole = len(batch.indices) == len(self._locate(batch))
        self.position += 1
        if self.multi_hot is None:
            return self._expand_labels(batch.labels, self.position - 1, whole)
        config = self.config
        return expand_multi_label(
            self.multi_hot[batch.indices],
            config.label_expansion,
            generator_for(config.seed, 4, self.position - 1),
            config.share_images,
            config.batch_size // 2 if whole and not config.share_images else None,
        )

    def _expand_labels(self, labels: Tensor, position: int, whole: bool) -> ExpandedBatch:
        """The expanded batch of minibatch ``position``; one that lost images is halved anew."""
        config = self.config
        return expand(
            labels,
            self.net.num_classes,
            config.label_expansion,
            generator_for(config.seed, 4, position),
            config.share_images,
            config.batch_size // 2 if whole and not config.share_images else None,
        )

    def _locate(self, batch: Batch) -> Tensor:
        """The minibatch that ``batch`` was read from: one in which all was corrupt never comes."""
        while True:
            chosen = self.sampler.batch(self.position)
            if torch.isin(batch.indices, chosen).all():
                return chosen
            self.position += 1

    def _learning_rate(self, step: int) -> float:
        config = self.config
        if config.schedule == "constant":
            return config.lr
        wave = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return config.lr * (config.lr_final + (1 - config.lr_final) * wave)

    def _validation_is_due(self) -> bool:
        due = self.step > 0 and (self.step % self.validate_every == 0 or self.step == self.steps)
        return due and not (self.history and self.history[-1]["step"] == self.step)

    def _after_step(self, bar: _Bar) -> None:
        last = self.step == self.steps
        validated = False
        if self._validation_is_due():
            self._look()
            with self._timed("validation"):
                whole = self._validate()
            if not whole:
                return  # the run is to stop; the validation comes first when it goes on
            validated = True
            self.stopped_early = not last and self.stale >= self.config.patience
        self.finished = last or self.stopped_early
        every = self.config.checkpoint_every or self.validate_every
        if self.finished:
            self._keep_best()
        if self.output is not None and (self.step % every == 0 or self.finished):
            self._look()
            self.save_checkpoint()
        bar.update(self, validated)

    def _validate(self) -> bool:
        """Appends a record to the history; False if a signal broke it off, with nothing changed."""
        config = self.config
        rates = self.throughput.record()
        self.ranks.check_same("state of the filters", self._filter_digest())
        scores = None
        if self.validator is not None:
            # Several ranks would have to agree on it.
            scores = self.validator(
                self.net, lambda: self.ranks.alone and self.signals.received != 0
            )
            if scores is None:
                return False
        record: dict[str, float] = {
            "step": self.step,
            "epoch": self.step / self.steps_per_epoch,
            "lr": self._learning_rate(self.step - 1),
            **{name: value / self.summed for name, value in self.sums.items()},
        }
        self.sums, self.summed = {}, 0
        if scores is not None:
            record |= {
                "acc_r": scores.acc_r,
                "acc_f": scores.acc_f,
                "score": scores.score,
                "validation_loss": scores.loss,
            }
            if self.best is None or _rank(scores, config) > _rank(self.best, config):
                self.best, self.best_step, self.stale = scores, self.step, 0
                self.best_filters = self._snapshot()
            else:
                self.stale += 1
        self.seconds = time.perf_counter() - self.started
        record |= {"samples_per_second": self.samples / self.seconds, "seconds": self.seconds}
        record |= rates
        self.history.append(record)
        self.log(record)
        if self.writer is not None:
            for name, value in record.items():
                if name not in ("step", "epoch", "seconds"):
                    self.writer.add_scalar(f"untrain/{name}", value, self.step)
        self.throughput.restart()
        return True

    def _snapshot(self) -> list[Tensor]:
        """A copy of all filters; inside of a run one copy for any number of layers."""
        flat = flat_matrix(self.params)
        if flat is None:
            return [p.detach().clone() for p in self.params]
        return list(flat.detach().clone().split([p.shape[1] for p in self.params], 1))

    @contextlib.contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        """Counts the time inside as spent on ``what``."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.spent[what] += time.perf_counter() - started

    def _counted(self) -> float:
        """Seconds that went to something else than steps and the start."""
        return self.spent["validation"] + self.spent["checkpoints"] + self.throughput.total

    def _spent(self) -> dict[str, float]:
        """Seconds by purpose, which add up to the run's."""
        waited = self.throughput.total + self.throughput.waited
        spent = {**self.spent, "data": self.spent["data"] + waited}
        return spent | {"steps": max(0.0, self.seconds - sum(spent.values()))}

    def _keep_best(self) -> None:
        if self.best_filters is not None:
            _copy(self.best_filters, self.params)
        else:
            self.best_step = self.step

    # -- losses that are not finite ---------------------------------------------------------------

    def _watch(self, losses: Losses) -> None:
        """Remembers losses; looks at them now, or on a device every few steps."""
        terms = {"loss": losses.total.detach(), **losses.terms}
        self.pending.append((terms, self.step + 1))
        if self.device.type == "cpu" or len(self.pending) >= _LOOK_EVERY:
            self._look()
            self.good = self._snapshot()

    def _look(self) -> None:
        """Adds pending losses to the sums; stops the run if one of them is not finite.

        All are read at once: every number that is read by itself waits for the device.
        """
        if not self.pending:
            return
        scalars = [
            torch.as_tensor(value, device=self.device).reshape(())  # terms may be plain numbers
            for terms, _ in self.pending
            for value in terms.values()
        ]
        found = iter(torch.stack(scalars).tolist())
        self.throughput.look()
        for terms, step in self.pending:
            values = {name: next(found) for name in terms}
            if not math.isfinite(values["loss"]):
                self._give_up(values, step)
            for name, value in values.items():
                self.sums[name] = self.sums.get(name, 0.0) + value
            self.summed += 1
            self.latest = values
        self.pending.clear()

    def _give_up(self, values: dict[str, float], step: int) -> None:
        _copy(self.best_filters or self.good, self.params)
        kept = "on the network"
        if self.output is not None:
            if self.ranks.first:
                self.net.save_pretrained(self.output)
            kept = f"saved in {self.output}"
        shown = ", ".join(f"{name} {value:g}" for name, value in values.items())
        raise FloatingPointError(
            f"the loss of step {step} is not finite ({shown}); the last good filters are "
            f"{kept}; lower lr (now {self.config.lr:g}), check the images for NaN, or leave out amp"
        )

    # -- storage ----------------------------------------------------------------------------------

    def save_checkpoint(self) -> None:
        """One file holds all that the run needs to go on, so that it is never half a state."""
        if self.ranks.first:
            with self._timed("checkpoints"):
                self._save_checkpoint()

    def _save_checkpoint(self) -> None:
        names = list(self.net.named_filters())
        tensors = {f"filters.{n}": p for n, p in zip(names, self.params, strict=True)}
        if self.best_filters is not None:
            tensors |= {f"best.{n}": p for n, p in zip(names, self.best_filters, strict=True)}
        if isinstance(self.optimizer, RowAdam):
            tensors |= {f"optimizer.{n}": t for n, t in self.optimizer.moments().items()}
        self.seconds = time.perf_counter() - self.started
        state = {
            "config": asdict(self.config),
            "identity": self._identity(),
            "step": self.step,
            "position": self.position,
            "best": None if self.best is None else asdict(self.best),
            "best_step": self.best_step,
            "stale": self.stale,
            "history": self.history,
            "seconds": self.seconds,
            "samples": self.samples,
            "finished": self.finished,
            "stopped_early": self.stopped_early,
            "nan_steps": self.nan_steps,
            "sums": self.sums,
            "summed": self.summed,
            "spent": self._spent(),
        }
        if self.finished:
            self.net.save_pretrained(self.output)
        _write_history(self.output, self.config, self.history)
        self.checkpoints.save(tensors, state, must=self.finished or self.signals.received != 0)

    def load_checkpoint(self) -> None:
        """Continues the run in ``output`` from its newest whole checkpoint.

        Raises:
            ValueError: if none is whole, or for another configuration, data set or network.
        """
        tensors, state, path = self.ranks.first_does(self.checkpoints.load)
        _check_same_run(state, self.config, self._identity(), path)
        part = {
            prefix: {
                name.removeprefix(prefix): tensor
                for name, tensor in tensors.items()
                if name.startswith(prefix)
            }
            for prefix in ("filters.", "best.", "optimizer.")
        }
        if state["best"] is not None:  # through the network, which checks names and shapes
            assign_filters(self.net, part["best."], path)
            self.best = Validation(**state["best"])
            self.best_filters = self._snapshot()
        assign_filters(self.net, part["filters."], path)
        self.good = self._snapshot()
        if isinstance(self.optimizer, RowAdam):
            self.optimizer.load_moments(part["optimizer."])
        for name in _STATE:
            setattr(self, name, state[name])
        self.spent |= {k: v for k, v in state.get("spent", {}).items() if k in self.spent}
        logger.info("resumed %s at step %d of %d", path, self.step, self.steps)

    def refuse_to_overwrite(self) -> None:
        """Raises FileExistsError if the run in ``output`` is unfinished."""
        try:
            _, state, _ = self.ranks.first_does(self.checkpoints.load)
        except ValueError as error:
            raise FileExistsError(
                f"{error}; it is in the way of a new run: move it away or choose another output"
            ) from error
        if not state["finished"]:
            raise FileExistsError(
                f"{self.output} holds an unfinished run (step {state['step']}): pass resume=True "
                "to continue it, choose another output, or delete untraining*.safetensors there"
            )

    def _identity(self) -> dict[str, str]:
        """What a resumed run must have in common with the interrupted one, as digests."""
        filters = {
            name: [list(p.shape), str(p.dtype)] for name, p in self.net.named_filters().items()
        }
        gate = [self.net.alpha_init, self.net.normalize_gate]
        return {
            "base network": fingerprint(self.net.model),
            "filters": _digest(json.dumps([filters, gate])),
            "training data": _data_digest(self.train),
            "validation data": "none" if self.validation is None else _data_digest(self.validation),
            "objective": repr(self.objective),
        }

    def _open_tensorboard(self) -> Any:
        if self.output is None or self.finished or not self.ranks.first:
            return None
        try:
            tensorboard = importlib.import_module("torch.utils.tensorboard")
        except ImportError:
            return None
        return tensorboard.SummaryWriter(str(self.output / "tensorboard"), purge_step=self.step + 1)

    def _result(self) -> UntrainResult:
        return UntrainResult(
            score=None if self.best is None else self.best.score,
            best=self.best,
            best_step=self.best_step,
            steps=self.step,
            stopped_early=self.stopped_early,
            history=self.history,
            seconds=self.seconds,
            filters=self.output,
            config=self.config,
            corrupt_images=dict(self.corrupt.found),
            spent=self._spent(),
            samples=self.samples,
        )


# Plain attributes of a run that a checkpoint holds by name.
_STATE = (
    "step", "position", "best_step", "stale", "history", "seconds", "samples", "finished",
    "stopped_early", "nan_steps", "sums", "summed",
)  # fmt: skip


def _rank(scores: Validation, config: UntrainConfig) -> tuple[float, ...]:
    """Larger is better. Accuracies of a small split are often equal; then the loss decides."""
    loss = -scores.loss if math.isfinite(scores.loss) else -math.inf
    return (loss,) if config.stop_on == "loss" else (round(scores.score, 9), loss)


@torch.no_grad()
def _copy(values: list[Tensor], params: list[torch.nn.Parameter]) -> None:
    torch._foreach_copy_(params, values)


# -- checks and choices ---------------------------------------------------------------------------


def _configured_objective(config: UntrainConfig) -> Objective:
    if config.objective == "paper":
        return PaperObjective(config.lambda0, config.lambda1, config.lambda2)
    return BalancedObjective(config.lambda1, config.distil)


def _configured_sampler(config: UntrainConfig, labels: Tensor) -> Sampler:
    half, seed = config.batch_size // 2, config.seed
    if config.sampler == "shuffled":
        images = half if config.share_images else config.batch_size
        return ShuffledSampler(len(labels), images, seed)
    forgetting = RoundRobinSampler(labels, half, seed)
    if config.share_images:
        return forgetting
    return HalvesSampler(forgetting, RoundRobinSampler(labels, half, seed, stream=1))


def _checked_labels(dataset: Dataset, num_classes: int, what: str) -> Tensor:
    labels = labels_of(dataset)
    if len(labels) == 0:
        raise ValueError(f"the {what} data have no images")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"the {what} data have label {low if low < 0 else high}, but the network has "
            f"{num_classes} classes (0 to {num_classes - 1}); use the data set that it classifies"
        )
    known = len(classes_of(dataset))
    if getattr(dataset, "classes", None) is not None and known != num_classes:
        raise ValueError(
            f"the {what} data have {known} classes, the network has {num_classes}; use the data "
            "set that it classifies"
        )
    return labels


def _check_every_class(
    labels: Tensor, dataset: Dataset, num_classes: int, config: UntrainConfig
) -> None:
    missing = (labels.bincount(minlength=num_classes) == 0).nonzero().flatten().tolist()
    if missing:
        names = classes_of(dataset)
        name = names[missing[0]] if missing[0] < len(names) else str(missing[0])
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(
            f"class {name!r}{more} has no training image, so its row could not learn to forget it; "
            "add images of every class that the network knows"
        )


# -- files ----------------------------------------------------------------------------------------


def _write_history(folder: Path, config: UntrainConfig, history: list[dict[str, float]]) -> None:
    write_json(folder / "history.json", {"config": asdict(config), "history": history})
    text = io.StringIO()
    columns = list(dict.fromkeys(name for record in history for name in record))
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    write_atomically(folder / "history.csv", lambda path: path.write_text(text.getvalue()))


def _check_same_run(
    state: dict[str, Any], config: UntrainConfig, identity: dict[str, str], path: Path
) -> None:
    for name, value in asdict(config).items():
        before = state["config"].get(name, getattr(UntrainConfig, name, None))
        if name not in _FREE_TO_CHANGE and before != value:
            raise ValueError(
                f"{path} was written with {name}={before!r}, now it is {value!r}; resume with the "
                "same settings, or start anew in another folder"
            )
    for name, value in identity.items():
        if state["identity"].get(name) != value:
            raise ValueError(
                f"{path} was written with another {name}; resume with the same one, or start anew "
                "in another folder"
            )


def _grouped(stream: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    """``size`` minibatches at a time; what is left over at the end does not come."""
    group: list[Batch] = []
    for batch in stream:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()


def _data_digest(dataset: Dataset) -> str:
    """Labels and class names; of in-memory images also the first, the middle and the last one.

    Images in files may be transformed at random, so their content is no mark of the data set.
    """
    labels = labels_of(dataset)
    content = b""
    if hasattr(dataset, "batch"):
        images = dataset.batch(torch.tensor([0, len(labels) // 2, len(labels) - 1])).images
        content = images.float().contiguous().numpy().tobytes()
    return _digest(json.dumps(classes_of(dataset)), labels.numpy().tobytes(), content)


# -- progress -------------------------------------------------------------------------------------


class _Bar:
    """Steps on stderr with losses, accuracies and samples per second; nothing without tqdm."""

    def __init__(self, steps: int, done: int, enabled: bool):
        self.bar = None
        if enabled:
            with contextlib.suppress(ImportError):
                tqdm = importlib.import_module("tqdm").tqdm
                self.bar = tqdm(total=steps, initial=done, desc="untraining", unit="step")

    def update(self, run: _Untraining, validated: bool) -> None:
        if self.bar is None:
            return
        shown = {name: f"{value:.3f}" for name, value in run.latest.items()}
        if run.history and "acc_r" in run.history[-1]:
            shown["Acc_r"] = f"{100 * run.history[-1]['acc_r']:.1f}"
            shown["Acc_f"] = f"{100 * run.history[-1]['acc_f']:.1f}"
        seconds = time.perf_counter() - run.started
        shown["samples/s"] = f"{run.samples / seconds:,.0f}"
        self.bar.set_postfix(shown, refresh=validated)
        self.bar.update()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
