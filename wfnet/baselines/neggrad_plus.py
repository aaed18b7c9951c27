"""``neggrad_plus``: descent on other images and ascent on those of the class in one loss, ``beta *
L_retain - (1 - beta) * L_forget`` (Kurmanji et al., "Towards Unbounded Machine Unlearning",
NeurIPS 2023).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from wfnet.baselines.fine_tuned import FineTuned, shuffled
from wfnet.baselines.method import BaselineConfig, Task


class NegGradPlus(FineTuned):
    """Every minibatch has as many images of the class as of others, again and again."""

    name = "neggrad_plus"
    unused = ("stop_below",)
    defaults = BaselineConfig(epochs=5, lr=0.001, retain_weight=0.9, batch_norm="frozen")

    def order(self, task: Task, generator: torch.Generator) -> Iterator[Tensor]:
        forgotten = shuffled(task.own, generator)
        for start, part in enumerate(
            shuffled(task.others, generator).split(task.config.batch_size)
        ):
            count = min(len(part), len(forgotten))
            at = (start * count + torch.arange(count)) % len(forgotten)
            yield torch.cat((part, forgotten[at]))

    def loss(self, config: BaselineConfig, logits: Tensor, targets: Tensor, own: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, targets, reduction="none")
        beta = config.retain_weight
        return beta * _mean(loss[~own]) - (1 - beta) * _mean(loss[own])


def _mean(values: Tensor) -> Tensor:
    return values.sum() / max(values.numel(), 1)
