"""``random_labels``: fine-tuned with the images of the class under random other labels, and all
other images under their own (Graves et al., "Amnesiac Machine Learning", AAAI 2021).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from wfnet.baselines.fine_tuned import FineTuned, shuffled
from wfnet.baselines.method import BaselineConfig, Task
from wfnet.data import classes_of
from wfnet.services.seeds import generator_for
from wfnet.untraining.expansion import random_other_rows


class RandomLabels(FineTuned):
    """Every image of the class has one wrong label throughout: noise that changes from epoch to
    epoch would teach uniform outputs, which is another method."""

    name = "random_labels"
    unused = ("retain_weight", "stop_below")
    # Defaults of all methods: chosen on the validation part of the digits, for the small ResNet.
    defaults = BaselineConfig(epochs=5, lr=0.003, batch_norm="frozen")

    def order(self, task: Task, generator: torch.Generator) -> Iterator[Tensor]:
        everything = torch.arange(len(task.labels))
        yield from shuffled(everything, generator).split(task.config.batch_size)

    def targets(self, task: Task) -> Tensor:
        classes = int(max(task.labels.max() + 1, len(classes_of(task.train))))
        generator = generator_for(task.config.seed, 9, task.label)
        targets = task.labels.clone()
        targets[task.own] = random_other_rows(task.labels[task.own], classes, generator)
        return targets

    def loss(self, config: BaselineConfig, logits: Tensor, targets: Tensor, own: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets)
