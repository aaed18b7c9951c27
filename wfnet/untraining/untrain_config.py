"""The settings of a run of untraining, their ranges, and the shipped recipes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

import torch

from wfnet.services import settings
from wfnet.services.settings import (
    check_settings,
    int_from,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
    setting,
)
from wfnet.targets import MANY_CLASSES

_OBJECTIVES = "balanced", "paper", "durable"
# Of other packages, loaded where they are used: `function(config)` returns an Objective.
OTHER_OBJECTIVES = {
    e.name: e for e in entry_points(group="wfnet.objectives") if e.name not in _OBJECTIVES
}


@dataclass(frozen=True)
class UntrainConfig:
    """Settings of :func:`wfnet.untrain`; :meth:`recipe` returns the shipped ones.

    ``wfnet untrain --help`` explains its options with these texts.

    Attributes:
        objective: "balanced", "paper" (see :mod:`wfnet.untraining.objectives`) or "durable"
            (:mod:`wfnet.untraining.durable`, for a ``WFNet(..., gate="durable")``).
        steps: length of the run in steps ...
        epochs: ... or in epochs; an epoch reads as many images as the training set has
        batch_size: images of a minibatch on all GPUs together, even: one half unlearns, one half
            is retained (durable: the images of some rows)
        label_expansion: rows that each retained image goes through
        share_images: the same images serve the forget and the retain half: a minibatch of 8 reads 4
        compound: weight of samples under two rows at once, of images with one label; 0: there are
            none
        saliency: part of each row's gates that starts half closed: those that carry its class
            alone, by derivatives in one pass over a few training images; 0: all rows start open
        sampler: order of images: every class unlearns equally often, or shuffled
        optimizer: optimiser
        lr: learning rate
        schedule: learning-rate schedule: to lr * lr_final at the end, or constant
        lr_final: share of the learning rate that is left at the end
        clip: bound on the absolute value of filter entries after each step
        shrink: how far, times the learning rate, a step of the first seven tenths draws filters
            that it moves towards their start (row_adam): few gates close, and those wholly
        lambda0: weight of retaining (recipe paper)
        lambda1: weight of forgetting
        lambda2: weight of open gates (recipe paper)
        distil: retain by distillation from the original network, or by cross entropy (recipe
            balanced)
        match: weight of drawing the class's logit to where it lies for other images (recipe
            durable)
        tolerance: divergence from the original network on images of other classes, in nats, above
            which ``match`` weighs less (recipe durable): where classes look alike, it would cost
            them too much
        margin: how far the class is pressed below all others together (recipe durable)
        forget_images: durable: images of the row's class in its group; ``batch_size`` images make
            ``batch_size // (forget_images + retain_images)`` groups
        retain_images: durable: images of other classes in the group of a row
        statistics_images: durable: images from which a row's statistics are measured at the end
        seed: of everything random
        patience: stop after so many validations without improvement
        validations_per_epoch: looks at validation images; 0: ``min_validations`` in all
        stop_on: what validations are compared by: accuracy (0.5 * ((1 - Acc_f) + Acc_r); of equal
            ones the loss decides), or the loss, the objective on validation images
        validation_rows: other rows that each validation image is retained under; with more
            classes than that, Acc_r is an estimate over rows drawn once
        amp: autocast dtype, "bfloat16" or None
        channels_last: images and weights in channels-last layout
        fuse: run the network as one fused plan where it can be (:mod:`wfnet.fusion`); "compile":
            with what lies between the convolutions compiled (:class:`wfnet.WFNet`)
        workers: processes that read images
        max_corrupt: corrupt images that are left out (default: 10, or one in a thousand)
        grad_accum_steps: minibatches whose mean gradient makes one step (default: 1)
        capture: run steps as a CUDA graph (:mod:`wfnet.untraining.step`); None: where that is
            possible
        features: where features are kept (what the network in front of its first mask makes of an
            image): on the device, on the host or on disk, where later runs find them again; auto:
            on the device or the host if they take at most a quarter of what is free there, and
            images are the same each time (default: auto)
        feature_dtype: of kept features (default: that in which they are computed)
        images_per_class: training images of each class that are used at most, drawn by seed
            (default: all)
        views: how often each training image is read, with other random transforms each time, for
            features that are kept (default: once)
        cache_dir: folder of features on disk; None: ``~/.cache/wfnet``
        checkpoint_every: steps between checkpoints (default: at every validation); one is written
            at least every few minutes
        min_validations: validations of a run, at least (default: 10); recipe durable leaves out
            every other one of its first four fifths, when it keeps no filters yet
        validation_images: validation images that are looked at in the run, drawn by seed evenly
            over classes (default: 1000, or ten a class)
        classes: labels whose rows are untrained, two or more; the rows of all others stay as they
            are, and need no images. Images of others serve the retain half alone. None: all

    Raises:
        ValueError: for values out of range, before any work starts.
    """

    objective: str = setting("balanced", (*_OBJECTIVES, *OTHER_OBJECTIVES), metavar="NAME")
    steps: int | None = setting(None, positive_int)
    epochs: float | None = setting(None, positive_float, metavar="N")
    batch_size: int = setting(32, int_from(2, 10**6), flags="-b --batch-size")
    label_expansion: int = setting(3, positive_int, flags="-M --label-expansion", metavar="M")
    share_images: bool = setting(True, bool)
    compound: float = setting(0.0, non_negative_float)
    saliency: float = setting(0.0, settings.below_one)
    sampler: str = setting("round_robin", ("round_robin", "shuffled"))
    optimizer: str = setting("row_adam", ("row_adam", "sgd"), flags="--opt")
    lr: float = setting(0.2, positive_float)
    schedule: str = setting("cosine", ("cosine", "constant"), flags="--sched")
    lr_final: float = setting(0.01, non_negative_float)
    clip: float | None = setting(None, positive_float)
    shrink: float = setting(0.0, non_negative_float)
    lambda0: float = setting(1.0, non_negative_float)
    lambda1: float = setting(0.3, non_negative_float)
    lambda2: float = setting(1.0, non_negative_float)
    distil: bool = setting(True, bool)
    match: float = setting(0.1, non_negative_float)
    tolerance: float = setting(0.05, positive_float)
    margin: float = setting(0.0, non_negative_float)
    forget_images: int = setting(8, positive_int)
    retain_images: int = setting(32, int_from(2))
    statistics_images: int = setting(1024, int_from(2))
    seed: int = setting(0, settings.seed)
    patience: int = setting(10, positive_int)
    validations_per_epoch: float = setting(5, non_negative_float, metavar="N")
    stop_on: str = setting("accuracy", ("accuracy", "loss"))
    validation_rows: int = setting(4, positive_int)
    amp: str | None = setting(None, (None, "bfloat16"))
    channels_last: bool = setting(True, bool)
    fuse: bool | str = setting(True, (True, False, "compile"))
    workers: int = setting(0, settings.workers)
    max_corrupt: int | None = setting(None, non_negative_int)
    grad_accum_steps: int = setting(1, positive_int)
    capture: bool | None = setting(None, (None, True, False))
    features: str = setting("auto", ("auto", "off", "device", "host", "disk"))
    feature_dtype: str | None = setting(None, ("float32", "float16", "bfloat16"))
    images_per_class: int | None = setting(None, positive_int)
    views: int | None = setting(None, positive_int)
    cache_dir: str | None = setting(None)
    checkpoint_every: int | None = setting(None, positive_int)
    min_validations: int = setting(10, positive_int)
    validation_images: int | None = setting(None, positive_int)
    classes: tuple[int, ...] | None = setting(None)

    def __post_init__(self) -> None:
        check_settings(self)
        if not isinstance(self.cache_dir, str | None):
            raise ValueError(f"cache_dir is the name of a folder, got {self.cache_dir!r}")
        if self.classes is not None:
            object.__setattr__(self, "classes", _checked_classes(self.classes))
        durable, group = self.objective == "durable", self.forget_images + self.retain_images
        for wrong, message in (
            (
                (self.steps is None) == (self.epochs is None),
                "give the length of the run as steps or as epochs, one of them; got "
                f"steps={self.steps}, epochs={self.epochs}",
            ),
            (
                self.batch_size % 2,
                f"batch_size must be even, for two halves of a minibatch; got {self.batch_size}",
            ),
            (
                durable and self.batch_size % group,
                f"batch_size={self.batch_size} must be a multiple of forget_images + retain_images "
                f"= {group}, the images of one row (4 rows: {4 * group})",
            ),
            (
                durable
                and self.compound
                and (self.batch_size < 2 * group or self.forget_images % 2),
                "compound rows take a group of their own with images of two classes: set "
                f"compound=0, or batch_size={self.batch_size} to at least {2 * group} and "
                f"forget_images={self.forget_images} to an even number",
            ),
            (
                durable and self.saliency,
                "saliency is of sigmoid gates: leave it out of recipe durable",
            ),
            (
                self.features == "off" and self.views is not None,
                f"views={self.views} are views of features that are kept: leave out features='off'",
            ),
            (
                self.optimizer == "sgd" and self.shrink,
                "shrink is a part of optimizer='row_adam': set shrink=0 for 'sgd'",
            ),
        ):
            if wrong:
                raise ValueError(message)

    @property
    def amp_dtype(self) -> torch.dtype | None:
        """The autocast dtype."""
        return None if self.amp is None else getattr(torch, self.amp)

    @property
    def images(self) -> int:
        """Images that are read for a minibatch."""
        if self.objective == "durable":
            return self.batch_size
        return self.batch_size // 2 if self.share_images else self.batch_size

    @property
    def samples(self) -> int:
        """Samples that a minibatch is expanded to."""
        if self.objective == "durable":
            return self.batch_size
        half = self.batch_size // 2
        return half * (1 + self.label_expansion) + (half + half // 2 if self.compound else 0)

    def lr_at(self, step: int, steps: int) -> float:
        """Returns the learning rate of step ``step`` of a run of ``steps``."""
        if self.schedule == "constant":
            return self.lr
        wave = 0.5 * (1 + math.cos(math.pi * step / steps))
        return self.lr * (self.lr_final + (1 - self.lr_final) * wave)

    def shrink_at(self, step: int, steps: int) -> float:
        """Returns :attr:`shrink` as it is in step ``step`` of a run of ``steps``."""
        return self.shrink if step < _SHRINK_UNTIL * steps else 0.0

    def steps_per_epoch(self, images: int) -> float:
        """Returns how many steps read as many images as the training set has."""
        return images / (self.images * self.grad_accum_steps)

    def total_steps(self, images: int) -> int:
        """Returns the length of the run on a training set of so many images."""
        return self.steps or max(1, round(self.epochs * self.steps_per_epoch(images)))

    def steps_between_validations(self, images: int) -> int:
        """Returns after how many steps the validation split is looked at."""
        most = self.total_steps(images) // self.min_validations
        if self.validations_per_epoch:
            most = min(round(self.steps_per_epoch(images) / self.validations_per_epoch), most)
        return max(1, most)

    @classmethod
    def recipe(
        cls,
        name: str = "balanced",
        num_classes: int = 10,
        transformer: bool = False,
        **changes: Any,
    ) -> UntrainConfig:
        """Returns a shipped recipe for a number of classes, with ``changes`` to single settings.

        "balanced" (the default of the package): see
        :class:`wfnet.untraining.objectives.BalancedObjective`.
        "paper": the authors' settings, for a ``WFNet(..., normalize_gate=False)``.
        "durable": forgetting that outlasts re-estimated statistics and fine-tuning on other
        classes, for a ``WFNet(..., gate="durable")``; with ``classes``, ``num_classes`` is the
        number of classes that there are images of. ``transformer``: all of its gates lie behind
        linear maps (:func:`wfnet.wrapping.masks_linear_maps`).
        "quick": ``balanced`` in a fraction of its time, for a ``WFNet(..., mask_from=0.5)``: few
        images, few and large steps, one validation at the end.

        Raises:
            ValueError: for an unknown name or values out of range.
            TypeError: for changes that are no settings.
        """
        if name == "balanced":
            chosen = _balanced_settings(num_classes, changes.get("batch_size"))
        elif name == "quick":
            chosen = _quick_settings(num_classes, changes)
        elif name == "paper":
            chosen = dict(_PAPER_SETTINGS)
        elif name == "durable":
            chosen = _durable_settings(num_classes, transformer, changes)
        else:
            raise ValueError(f"there is no recipe {name!r}; recipes are {', '.join(RECIPES)}")
        if changes.get("epochs") is not None and "steps" not in changes:
            chosen["steps"] = None
        if changes.get("steps") is not None and "epochs" not in changes:
            chosen["epochs"] = None
        return cls(**{**chosen, **changes})


def _checked_classes(classes: Sequence[int]) -> tuple[int, ...]:
    usable = isinstance(classes, list | tuple | set | range) and len(classes) > 0
    if not usable or any(non_negative_int.violation(label) for label in classes):
        raise ValueError(f"classes must be labels (0, 1, ...), got {classes!r}")
    return tuple(sorted(set(classes)))


# Settings that change neither the result nor the order of anything: a resumed run may change them.
FREE_TO_CHANGE = frozenset(("workers", "max_corrupt", "checkpoint_every", "features", "cache_dir"))

RECIPES = ("balanced", "paper", "durable", "quick")

_SHRINK_UNTIL = 0.7  # of the steps: what is left of them settles the gates that stay open

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
    """Returns the settings of recipe "balanced", chosen on validation images of 10 and 100 classes.

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
        "compound": 0.5 if num_classes > 2 else 0.0,
        "shrink": 0.15,
    }


def _quick_settings(num_classes: int, changes: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings of recipe "quick", chosen on validation images of 10 and 100 classes.

    Rows start at 3 and must come below 0 to close a gate: steps of 0.2 take longer for that than
    all the rest. With 0.5 a row needs some 100 visits instead of 1,000, of few classes half of that
    where a tenth of the gates starts half closed (measured on 10 classes alone), and few images of
    its class: where they are so few, the forget term counts for more, so that it holds for others.
    Validation images are as many as cost a tenth of the steps.
    """
    visits, saliency = (48, 0.1) if num_classes <= 30 else (96, 0.0)
    batch_size = changes.get("batch_size") or (32 if num_classes <= 200 else 256)
    expansion = changes.get("label_expansion") or (3 if num_classes <= 30 else 5)
    steps = max(1, math.ceil(visits * num_classes / (batch_size // 2)))
    samples = steps * batch_size // 2 * (1 + expansion)
    return {
        "steps": steps,
        "batch_size": batch_size,
        "label_expansion": expansion,
        "lr": 0.5,
        "lambda1": 0.6,
        "saliency": saliency,
        "images_per_class": 20,
        "validations_per_epoch": 0,
        "min_validations": 1,
        "validation_images": max(2 * num_classes, samples // 20),
    }


def _durable_settings(
    num_classes: int, transformer: bool, changes: dict[str, Any]
) -> dict[str, Any]:
    """Returns the settings of recipe "durable" (design section 7).

    What counts is how often a row is visited: 180 times for ten classes. Many classes crowd the
    channels: the forget term weighs more there and has a margin, and the matching term is left out.
    Of ``classes`` alone the run is as long as these need; how many classes crowd the channels is
    how many are retained. Of a transformer few gates close, and those wholly; its rows gain by 250
    visits. One more group is under two rows at once: without it, forgetting two classes costs the
    others three times as much.
    """
    forget_images = changes.get("forget_images", 8)
    group = forget_images + changes.get("retain_images", 32)
    many, untrained = num_classes > MANY_CLASSES, len(changes.get("classes") or range(num_classes))
    batch_size = changes.get("batch_size")
    pairs = not many and num_classes > 2 and untrained > 1 and forget_images % 2 == 0
    pairs = pairs and (batch_size is None or batch_size >= 2 * group)
    compound = changes.get("compound", float(pairs))
    batch_size = batch_size or (min(4, untrained) + (compound > 0)) * group
    rows = max(1, batch_size // group - (compound > 0))
    visits, lambda1, match, margin = 180, 0.3, 0.1, 0.0
    if many:
        visits, lambda1, match, margin = 160, 0.5, 0.0, 1.5
    elif transformer:  # it costs insertion and pairs more than it takes out of the logit
        visits, match = 252, 0.0
    return {
        "objective": "durable",
        "steps": math.ceil(visits * untrained / rows),
        "batch_size": batch_size,
        "stop_on": "loss",
        "lr": 0.2,
        "lambda1": lambda1,
        "match": match,
        "margin": margin,
        "compound": compound,
        "shrink": 0.07 if transformer else 0.0,
    }
