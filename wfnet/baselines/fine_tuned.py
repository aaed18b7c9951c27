"""The loop of all baselines that fine-tune a network with SGD, and the three plainest of them."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from wfnet.baselines.method import BaselineConfig, Method, Origin
from wfnet.data import classes_of, labels_of
from wfnet.evaluation.relearning import epoch_logits
from wfnet.head import first_output
from wfnet.services import settings
from wfnet.services.layout import safe_layout
from wfnet.services.seeds import generator_for
from wfnet.services.settings import setting
from wfnet.untraining.expansion import random_other_rows


@dataclass(frozen=True)
class FineTuneConfig(BaselineConfig):
    """How a network is fine-tuned into a baseline.

    Attributes:
        epochs: passes over the images of :meth:`FineTuned.order`.
        lr, momentum, weight_decay, batch_size: of SGD.
        max_norm: bound on the norm of the gradient; ascent would otherwise run away in a few steps.
        batch_norm: "train" updates running statistics, "frozen" leaves them, and dropout, in
            evaluation mode: batches of one class alone would give statistics of that class.
        seed: decides order, labels, noise and dropout.
    """

    epochs: int = setting(3, settings.positive_int)
    lr: float = setting(0.01, settings.positive_float)
    momentum: float = setting(0.9, settings.below_one)
    weight_decay: float = setting(0.0, settings.non_negative_float)
    batch_size: int = setting(64, settings.int_from(2))
    max_norm: float = setting(1.0, settings.positive_float)
    batch_norm: str = setting("frozen", ("train", "frozen"))


class Minibatch(NamedTuple):
    """What a loss is computed from.

    Attributes:
        model: the network that unlearns.
        images, logits: ``[n, C, H, W]`` and ``[n, K]`` of the model, on its device.
        targets: ``[n]`` int64, labels as :meth:`FineTuned.targets` gives them.
        own: ``[n]`` bool, whether an image is of the class to forget.
        epoch: number of the epoch, from 0.
        prepared: of :meth:`FineTuned.prepare`.
    """

    model: nn.Module
    images: Tensor
    logits: Tensor
    targets: Tensor
    own: Tensor
    epoch: int
    prepared: Any


class FineTuned(Method):
    """Epochs of SGD on a loss that a subclass defines."""

    defaults = FineTuneConfig()

    def order(
        self, config: FineTuneConfig, own: Tensor, others: Tensor, epoch: int, seed: Generator
    ) -> Iterable[Tensor]:
        """Returns the minibatches of an epoch, of the images of the class and of all others.

        By default all images in random order.
        """
        everything = torch.cat((own, others)).sort().values
        return shuffled(everything, seed).split(config.batch_size)

    @abstractmethod
    def loss(self, config: FineTuneConfig, batch: Minibatch) -> Tensor:
        """Returns the scalar to be lowered."""

    def prepare(self, origin: Origin, label: int, config: FineTuneConfig) -> Any:
        """Returns what all losses of a class share: teachers, masks, noise."""
        return None

    def start(self, origin: Origin, config: FineTuneConfig, prepared: Any) -> nn.Module:
        """Returns a new network, which is then fine-tuned: a copy of the original."""
        return copy.deepcopy(origin.original)

    def change_gradients(self, model: nn.Module, prepared: Any) -> None:
        """Changes the gradients of ``model`` before a step."""

    def targets(self, origin: Origin, label: int, seed: int) -> Tensor:
        """Returns the label ``[N]`` that each training image is given: its own."""
        return labels_of(origin.train)

    def finished(self, accuracy: float) -> bool:
        """Whether to stop, given the accuracy on images of the class during the last epoch."""
        return False

    def unlearn(self, origin: Origin, label: int, config: FineTuneConfig) -> nn.Module:
        device = origin.device
        own, others = origin.images(label)
        options = origin.options()
        targets = self.targets(origin, label, config.seed)
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
            torch.manual_seed(config.seed)
            prepared = self.prepare(origin, label, config)
            model = self.start(origin, config, prepared).requires_grad_(True)
            stack.enter_context(safe_layout(model))
            optimizer = torch.optim.SGD(
                model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay
            )
            for epoch in range(config.epochs):
                model.train(config.batch_norm == "train")
                generator = generator_for(config.seed, 10, label, epoch)
                order = list(self.order(config, own, others, epoch, generator))
                right = seen = 0
                for batch, logits in epoch_logits(
                    model, origin.train, order, options, config.seed, epoch
                ):
                    is_own = (batch.labels == label).to(device)
                    right += int((logits.detach().argmax(1) == label)[is_own].sum())
                    seen += int(is_own.sum())
                    images, wanted = batch.images.to(device), targets[batch.indices].to(device)
                    about = model, images, logits, wanted, is_own, epoch, prepared
                    loss = self.loss(config, Minibatch(*about))
                    if not bool(loss.isfinite()):
                        raise FloatingPointError(
                            f"the loss of {self.name} for class {label} is {loss.item()} in epoch "
                            f"{epoch + 1}; lower its lr ({config.lr:g})"
                        )
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    self.change_gradients(model, prepared)
                    nn.utils.clip_grad_norm_(model.parameters(), config.max_norm)
                    optimizer.step()
                if seen and self.finished(right / seen):
                    break
        return model.eval()


# Defaults of all methods: chosen on the validation part of the digits, for the small ResNet.


class RandomLabels(FineTuned):
    """Images of the class under random other labels, all other images under their own.

    Graves et al., "Amnesiac Machine Learning", AAAI 2021. Every image of the class has one wrong
    label throughout: noise that changes from epoch to epoch would teach uniform outputs, which is
    another method.
    """

    name = "random_labels"
    defaults = FineTuneConfig(epochs=5, lr=0.003)
    grid = tuple({"lr": lr} for lr in (0.003, 0.001, 0.01, 0.03))

    def targets(self, origin: Origin, label: int, seed: int) -> Tensor:
        targets = labels_of(origin.train).clone()
        classes = int(max(targets.max() + 1, len(classes_of(origin.train))))
        own = targets == label
        targets[own] = random_other_rows(targets[own], classes, generator_for(seed, 9, label))
        return targets

    def loss(self, config: FineTuneConfig, batch: Minibatch) -> Tensor:
        return F.cross_entropy(batch.logits, batch.targets)


class NegativeGradient(FineTuned):
    """Ascent on the images of the class alone, until an epoch in which none is right.

    Golatkar et al., "Eternal Sunshine of the Spotless Net", CVPR 2020.
    """

    name = "negative_gradient"
    defaults = FineTuneConfig(epochs=200, lr=3e-4, momentum=0.0, batch_size=32)
    grid = tuple({"lr": lr} for lr in (3e-4, 1e-4, 1e-3))

    def order(
        self, config: FineTuneConfig, own: Tensor, others: Tensor, epoch: int, seed: Generator
    ) -> Iterable[Tensor]:
        return shuffled(own, seed).split(config.batch_size)

    def loss(self, config: FineTuneConfig, batch: Minibatch) -> Tensor:
        return -F.cross_entropy(batch.logits, batch.targets, reduction="none").mean()

    def finished(self, accuracy: float) -> bool:
        return accuracy == 0


@dataclass(frozen=True)
class NegGradPlusConfig(FineTuneConfig):
    """``retain_weight``: beta, the weight of the images of other classes."""

    retain_weight: float = setting(0.9, settings.Number(0.0, 1.0))


class NegGradPlus(FineTuned):
    """Descent on others and ascent on the class: ``beta * L_retain - (1 - beta) * L_forget``.

    Kurmanji et al., "Towards Unbounded Machine Unlearning", NeurIPS 2023. Every minibatch has as
    many images of the class as of others, again and again.
    """

    name = "neggrad_plus"
    defaults = NegGradPlusConfig(epochs=5, lr=0.001)
    grid = tuple(
        {"retain_weight": beta, "lr": lr} for beta in (0.9, 0.95, 0.8) for lr in (0.001, 0.003)
    )

    def order(
        self, config: NegGradPlusConfig, own: Tensor, others: Tensor, epoch: int, seed: Generator
    ) -> Iterable[Tensor]:
        forgotten = shuffled(own, seed)
        for number, part in enumerate(shuffled(others, seed).split(config.batch_size)):
            count = min(len(part), len(forgotten))
            at = (number * count + torch.arange(count)) % len(forgotten)
            yield torch.cat((part, forgotten[at]))

    def loss(self, config: NegGradPlusConfig, batch: Minibatch) -> Tensor:
        loss = F.cross_entropy(batch.logits, batch.targets, reduction="none")
        beta = config.retain_weight
        return beta * mean(loss[~batch.own]) - (1 - beta) * mean(loss[batch.own])


@torch.no_grad()
def taught(teacher: nn.Module, batch: Minibatch) -> Tensor:
    """Returns the logits ``[n, K]`` of a teacher for a minibatch."""
    return first_output(teacher(batch.images))


def mean(values: Tensor) -> Tensor:
    """Returns the mean; 0 of no values."""
    return values.sum() / max(values.numel(), 1)


def shuffled(positions: Tensor, seed: Generator) -> Tensor:
    """Returns ``positions`` in random order."""
    return positions[torch.randperm(len(positions), generator=seed)]
