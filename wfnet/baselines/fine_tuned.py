"""Baselines that fine-tune a copy of the original network with SGD."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterable

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from wfnet.baselines.method import BaselineConfig, Method, Origin
from wfnet.data import classes_of, corrupt_counter, labels_of
from wfnet.evaluation.pair_engine import RunOptions
from wfnet.evaluation.relearning import epoch_logits
from wfnet.services.layout import safe_layout
from wfnet.services.seeds import generator_for
from wfnet.untraining.expansion import random_other_rows


class FineTuned(Method):
    """Epochs of SGD on a loss that a subclass defines."""

    @abstractmethod
    def order(self, own: Tensor, others: Tensor, size: int, seed: Generator) -> Iterable[Tensor]:
        """Returns the minibatches of an epoch, of the images of the class and of all others."""

    @abstractmethod
    def loss(self, config: BaselineConfig, logits: Tensor, targets: Tensor, own: Tensor) -> Tensor:
        """Returns the scalar to be lowered, of ``logits [n, K]`` and ``targets [n]``.

        ``own [n]`` says whether an image is of the class to forget.
        """

    def targets(self, origin: Origin, label: int, seed: int) -> Tensor:
        """Returns the label ``[N]`` that each training image is given: its own."""
        return labels_of(origin.train)

    def finished(self, config: BaselineConfig, accuracy: float) -> bool:
        """Whether to stop, given the accuracy on images of the class during the last epoch."""
        return False

    def unlearn(self, origin: Origin, label: int, config: BaselineConfig) -> nn.Module:
        model, device = copy.deepcopy(origin.original).requires_grad_(True), origin.device
        own, others = origin.images(label)
        corrupt = corrupt_counter(origin.train, origin.max_corrupt)
        options = RunOptions(workers=origin.workers, max_corrupt=corrupt)
        targets = self.targets(origin, label, config.seed)
        optimizer = torch.optim.SGD(
            model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay
        )
        with safe_layout(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(config.seed)
            for epoch in range(config.epochs):
                model.train(config.batch_norm == "train")
                generator = generator_for(config.seed, 10, label, epoch)
                order = list(self.order(own, others, config.batch_size, generator))
                right = seen = 0
                for batch, logits in epoch_logits(
                    model, origin.train, order, options, config.seed, epoch
                ):
                    is_own = (batch.labels == label).to(device)
                    right += int((logits.detach().argmax(1) == label)[is_own].sum())
                    seen += int(is_own.sum())
                    loss = self.loss(config, logits, targets[batch.indices].to(device), is_own)
                    if not bool(loss.isfinite()):
                        raise FloatingPointError(
                            f"the loss of {self.name} for class {label} is {loss.item()} in epoch "
                            f"{epoch + 1}; lower its lr ({config.lr:g})"
                        )
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    nn.utils.clip_grad_norm_(model.parameters(), config.max_norm)
                    optimizer.step()
                if seen and self.finished(config, right / seen):
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
    unused = ("retain_weight", "stop_below")
    defaults = BaselineConfig(epochs=5, lr=0.003, batch_norm="frozen")

    def order(self, own: Tensor, others: Tensor, size: int, seed: Generator) -> Iterable[Tensor]:
        everything = torch.cat((own, others)).sort().values
        return _shuffled(everything, seed).split(size)

    def targets(self, origin: Origin, label: int, seed: int) -> Tensor:
        targets = labels_of(origin.train).clone()
        classes = int(max(targets.max() + 1, len(classes_of(origin.train))))
        own = targets == label
        targets[own] = random_other_rows(targets[own], classes, generator_for(seed, 9, label))
        return targets

    def loss(self, config: BaselineConfig, logits: Tensor, targets: Tensor, own: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets)


class NegativeGradient(FineTuned):
    """Ascent on the images of the class alone, until it is forgotten (``stop_below``).

    Golatkar et al., "Eternal Sunshine of the Spotless Net", CVPR 2020.
    """

    name = "negative_gradient"
    unused = ("retain_weight",)
    defaults = BaselineConfig(epochs=200, lr=3e-4, momentum=0.0, batch_size=32, batch_norm="frozen")

    def order(self, own: Tensor, others: Tensor, size: int, seed: Generator) -> Iterable[Tensor]:
        return _shuffled(own, seed).split(size)

    def loss(self, config: BaselineConfig, logits: Tensor, targets: Tensor, own: Tensor) -> Tensor:
        return -F.cross_entropy(logits, targets, reduction="none").mean()

    def finished(self, config: BaselineConfig, accuracy: float) -> bool:
        return accuracy <= config.stop_below


class NegGradPlus(FineTuned):
    """Descent on others and ascent on the class: ``beta * L_retain - (1 - beta) * L_forget``.

    Kurmanji et al., "Towards Unbounded Machine Unlearning", NeurIPS 2023. Every minibatch has as
    many images of the class as of others, again and again.
    """

    name = "neggrad_plus"
    unused = ("stop_below",)
    defaults = BaselineConfig(epochs=5, lr=0.001, retain_weight=0.9, batch_norm="frozen")

    def order(self, own: Tensor, others: Tensor, size: int, seed: Generator) -> Iterable[Tensor]:
        forgotten = _shuffled(own, seed)
        for number, part in enumerate(_shuffled(others, seed).split(size)):
            count = min(len(part), len(forgotten))
            at = (number * count + torch.arange(count)) % len(forgotten)
            yield torch.cat((part, forgotten[at]))

    def loss(self, config: BaselineConfig, logits: Tensor, targets: Tensor, own: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, targets, reduction="none")
        beta = config.retain_weight
        return beta * _mean(loss[~own]) - (1 - beta) * _mean(loss[own])


def _mean(values: Tensor) -> Tensor:
    return values.sum() / max(values.numel(), 1)


def _shuffled(positions: Tensor, seed: Generator) -> Tensor:
    return positions[torch.randperm(len(positions), generator=seed)]
