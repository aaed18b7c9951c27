"""``unsir``: noise that the class is hardest on takes its place, then the others are repaired.

Tarun et al., "Fast Yet Effective Machine Unlearning", IEEE TNNLS 2023. A batch of noise images
``N`` is learned on the original network, which lowers

    -cross_entropy(original(N), class) + penalty * mean of ||n||^2

(5 epochs of 8 steps of Adam at 0.1 there, 40 steps here). *Impair*: the network learns the noise
under the label of the class, together with images of the others; *repair*: those images alone. The
authors take one epoch of each, of 1,000 images a class; here the first epoch impairs, all images
are used, and both have one learning rate.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from wfnet.baselines.fine_tuned import FineTuneConfig, FineTuned, Minibatch, shuffled
from wfnet.baselines.method import Origin
from wfnet.head import first_output
from wfnet.services import settings
from wfnet.services.modes import evaluation_mode
from wfnet.services.settings import setting

_NOISE_LR = 0.1


@dataclass(frozen=True)
class UnsirConfig(FineTuneConfig):
    """``noise_share``: noise images for each image of another class in the first epoch."""

    noise_steps: int = setting(40, settings.positive_int)
    penalty: float = setting(0.1, settings.non_negative_float)
    noise_share: float = setting(0.5, settings.fraction)


class Unsir(FineTuned):
    """Unlearning by impairing and repairing."""

    name = "unsir"
    defaults = UnsirConfig(epochs=3, lr=0.05, batch_norm="train")
    grid = tuple(
        {"lr": lr, "batch_norm": norm} for norm in ("train", "frozen") for lr in (0.05, 0.02, 0.1)
    )

    def prepare(self, origin: Origin, label: int, config: UnsirConfig) -> tuple[Tensor, int]:
        """Returns the noise ``[n, C, H, W]``, and the class."""
        count = max(1, round(config.noise_share * config.batch_size))
        noise = torch.randn(count, *origin.image_shape()).to(origin.device).requires_grad_(True)
        wanted = torch.full((count,), label, device=origin.device)
        optimizer = torch.optim.Adam([noise], _NOISE_LR)
        with evaluation_mode(origin.original):
            for _ in range(config.noise_steps):
                error = F.cross_entropy(first_output(origin.original(noise)), wanted)
                size = noise.square().sum((1, 2, 3)).mean()
                noise.grad = torch.autograd.grad(config.penalty * size - error, noise)[0]
                optimizer.step()
        return noise.detach(), label

    def order(
        self, config: UnsirConfig, own: Tensor, others: Tensor, epoch: int, seed: Generator
    ) -> Iterable[Tensor]:
        return shuffled(others, seed).split(config.batch_size)

    def loss(self, config: UnsirConfig, batch: Minibatch) -> Tensor:
        if batch.epoch > 0:
            return F.cross_entropy(batch.logits, batch.targets)
        noise, label = batch.prepared
        logits = torch.cat((batch.logits, first_output(batch.model(noise))))
        return F.cross_entropy(logits, F.pad(batch.targets, (0, len(noise)), value=label))
