"""Baselines that fine-tune a copy of the original network with SGD."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from wfnet.baselines.method import BaselineConfig, Method, Task
from wfnet.data import batches, corrupt_counter
from wfnet.head import first_output
from wfnet.services.seeds import generator_for


class FineTuned(Method):
    """Epochs of SGD on a loss that a subclass defines."""

    @abstractmethod
    def order(self, task: Task, generator: torch.Generator) -> Iterator[Tensor]:
        """Yields the minibatches of an epoch, as positions in the training set."""

    @abstractmethod
    def loss(self, config: BaselineConfig, logits: Tensor, targets: Tensor, own: Tensor) -> Tensor:
        """Returns the scalar to be lowered.

        Args:
            config: settings.
            logits: ``[n, K]``.
            targets: ``[n]``, of :meth:`targets`.
            own: ``[n]`` bool, whether an image is of the class to forget.
        """

    def targets(self, task: Task) -> Tensor:
        """Returns the label ``[N]`` that each training image is given: its own."""
        return task.labels

    def finished(self, task: Task, accuracy: float) -> bool:
        """Whether to stop, given the accuracy on images of the class during the last epoch."""
        return False

    def unlearn(self, task: Task) -> nn.Module:
        model = copy.deepcopy(task.original).requires_grad_(True)
        with torch.random.fork_rng([task.device] if task.device.type == "cuda" else []):
            torch.manual_seed(task.config.seed)
            self._fine_tune(model, task)
        return model.eval()

    def _fine_tune(self, model: nn.Module, task: Task) -> None:
        config, device = task.config, task.device
        corrupt = corrupt_counter(task.train, task.max_corrupt)
        optimizer = torch.optim.SGD(
            model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay
        )
        targets = self.targets(task)
        for epoch in range(config.epochs):
            model.train(config.batch_norm == "train")
            order = list(self.order(task, generator_for(config.seed, 10, task.label, epoch)))
            right = seen = 0
            for batch in batches(
                task.train,
                order,
                task.workers,
                corrupt,
                pin_memory=device.type == "cuda",
                seed=config.seed,
                start=epoch * len(order),
                replace_corrupt=True,
            ):
                logits = first_output(model(batch.images.to(device)))
                own = (batch.labels == task.label).to(device)
                right += int((logits.detach().argmax(1) == task.label)[own].sum())
                seen += int(own.sum())
                loss = self.loss(config, logits, targets[batch.indices].to(device), own)
                if not bool(loss.isfinite()):
                    raise FloatingPointError(
                        f"the loss of {self.name} for class {task.label} is {loss.item()} in "
                        f"epoch {epoch + 1}; lower its lr ({config.lr:g})"
                    )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), config.max_norm)
                optimizer.step()
            if seen and self.finished(task, right / seen):
                return


def shuffled(positions: Tensor, generator: torch.Generator) -> Tensor:
    """``positions [n]`` in random order."""
    return positions[torch.randperm(len(positions), generator=generator)]
