"""``negative_gradient``: gradient ascent on the images of the class alone (Golatkar et al.,
"Eternal Sunshine of the Spotless Net", CVPR 2020).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from wfnet.baselines.fine_tuned import FineTuned, shuffled
from wfnet.baselines.method import BaselineConfig, Task


class NegativeGradient(FineTuned):
    """Ascends until the class is forgotten (``stop_below``)."""

    name = "negative_gradient"
    unused = ("retain_weight",)
    defaults = BaselineConfig(epochs=200, lr=3e-4, momentum=0.0, batch_size=32, batch_norm="frozen")

    def order(self, task: Task, generator: torch.Generator) -> Iterator[Tensor]:
        yield from shuffled(task.own, generator).split(task.config.batch_size)

    def loss(self, config: BaselineConfig, logits: Tensor, targets: Tensor, own: Tensor) -> Tensor:
        return -F.cross_entropy(logits, targets, reduction="none").mean()

    def finished(self, task: Task, accuracy: float) -> bool:
        return accuracy <= task.config.stop_below
