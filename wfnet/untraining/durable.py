"""Recipe ``durable``: forgetting that no repair without the class's images brings back.

A step takes a few rows in round robin. Each has its own group of images, some of its class and
more of the others, whose moments stand for the statistics of a network that never knew the class
(:mod:`wfnet.durable_layers`). Every other step the hard gates must forget alone (design section 7).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from wfnet.backends.eager import sample_moments
from wfnet.data import Batch, Dataset, batches
from wfnet.network import WFNet
from wfnet.services.seeds import generator_for
from wfnet.targets import MANY_CLASSES
from wfnet.untraining.expansion import ExpandedBatch, shuffled_passes
from wfnet.untraining.objectives import (
    Losses,
    Objective,
    class_gap,
    distillation,
    full_precision,
    weighted_sums,
)
from wfnet.untraining.untrain_config import UntrainConfig

_NOISE_STREAM, _ROWS_STREAM, _IMAGES_STREAM, _POOL_STREAM = 21, 22, 23, 24
_PASS = 1024  # samples of a pass that measures statistics, where a row's images are no more
_PAIR_IMAGES = 64  # from which means under two rows are measured
_POOL_BYTES = 256 << 20


class GroupSampler:
    """Rows in round robin, shuffled anew every round, each with a group of images.

    With compound rows, the last group is under two rows at once and has images of both classes.

    Args:
        labels: ``[N]`` int64.
        config: images of a step and of a row, and the seed.
        untrained: ``[R]`` ascending, the rows that are untrained; None: all.
    """

    def __init__(self, labels: Tensor, config: UntrainConfig, untrained: Tensor | None = None):
        self.config = config
        self.untrained = labels.unique() if untrained is None else untrained
        self._own = {c: (labels == c).nonzero().flatten() for c in self.untrained.tolist()}
        self._labels = labels
        groups = config.batch_size // (config.forget_images + config.retain_images)
        self.rows = min(groups - bool(config.compound), len(self.untrained))
        self._next_row = shuffled_passes(self.untrained, 8, config.seed, _ROWS_STREAM)

    def rows_of(self, step: int) -> list[int]:
        """The rows of a step that have a group to themselves."""
        return [int(self._next_row(step * self.rows + i)) for i in range(self.rows)]

    def __call__(self, step: int) -> Tensor:
        """``[R * size]`` positions, group by group, images of the row's class first."""
        draw = generator_for(self.config.seed, _IMAGES_STREAM, step)
        chosen = []
        members = [[row] for row in self.rows_of(step)]
        if self.config.compound:
            pair = torch.randperm(len(self.untrained), generator=draw)[:2]
            members.append(self.untrained[pair].tolist())
        for rows in members:
            for own in (self._own[row] for row in rows):
                count = self.config.forget_images // len(rows)
                chosen.append(own[torch.randint(len(own), (count,), generator=draw)])
            chosen.append(self._others(rows, draw))
        return torch.cat(chosen)

    def _others(self, rows: list[int], draw: torch.Generator) -> Tensor:
        """Distinct images of other classes, each equally likely: drawn and thrown away."""
        wanted = self.config.retain_images
        rows = torch.tensor(rows)
        if len(self._labels) - sum(len(self._own[row]) for row in rows.tolist()) <= 2 * wanted:
            rest = (~torch.isin(self._labels, rows)).nonzero().flatten()
            repeats = math.ceil(wanted / len(rest))
            order = [torch.randperm(len(rest), generator=draw) for _ in range(repeats)]
            return rest[torch.cat(order)[:wanted]]
        found: dict[int, None] = {}
        while len(found) < wanted:
            drawn = torch.randint(len(self._labels), (2 * wanted,), generator=draw)
            for position in drawn[~torch.isin(self._labels[drawn], rows)].tolist():
                found.setdefault(position)
                if len(found) == wanted:
                    break
        return torch.tensor(list(found))


def expand_groups(labels: Tensor, config: UntrainConfig) -> ExpandedBatch:
    """The samples of a step: every image once, under the row of its group.

    With a compound group the labels are ``[B, 2]``, padded with -1.

    Args:
        labels: ``[R * size]`` int64, in the order of :class:`GroupSampler`.
        config: images of a row, and the weight of samples under two rows, beside 1 for others.
    """
    cut = config.forget_images
    by_group = labels.unflatten(0, (-1, cut + config.retain_images))
    rows = by_group[:, :1].expand_as(by_group)
    weight = None
    if config.compound:
        second = torch.full_like(rows, -1)
        second[-1] = by_group[-1, cut // 2]
        weight = torch.where(second >= 0, config.compound, 1.0)
        rows = torch.stack((rows, second), 2)
    position = torch.arange(len(labels)).view_as(by_group)
    source = torch.cat((position[:, :cut].flatten(), position[:, cut:].flatten()))
    return ExpandedBatch(
        forget=rows.flatten(0, 1)[source],
        source=source,
        target=labels[source],
        forget_size=len(by_group) * cut,
        weight=None if weight is None else weight.flatten()[source],
    )


@dataclass(frozen=True)
class DurableObjective(Objective):
    """Loss of recipe ``durable``, with ``gap = z_c - logsumexp(other logits)`` for a row c::

        L = w * mean_others KL(original || row) + lambda1 * mean_c softplus(gap + margin)
            + match * s * relu((mean gap of c - mean gap of others) / max(std of others, 0.5) - 0.5)
        s = min(1, tolerance / mean_others KL(original || row))

    w is 1 with soft gates and ``retain_hard`` without. The last term is a mean over the rows that
    have a group to themselves, with s and the moments of the others taken as constants: it draws
    the class's logit to where it lies for images of other classes, and gives way where that costs
    the others more than they should pay: where classes look alike, a fixed weight costs too much.

    Args:
        lambda1: weight of the forget term.
        match: weight of the matching term; 0 leaves it out.
        tolerance: divergence from the original network, in nats, up to which it has that weight.
        margin: how far the class is pressed below all others together; one of a hundred classes
            may have the largest logit and a small probability.
        retain_hard: weight of retaining in steps of hard gates alone.
    """

    lambda1: float = 0.3
    match: float = 0.1
    tolerance: float = 0.05
    margin: float = 0.0
    retain_hard: float = 0.5
    slack: float = 0.5
    least_deviation: float = 0.5

    needs_original = True

    def forget(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.softplus(class_gap(logits, target) + self.margin)

    def retain(self, logits: Tensor, target: Tensor, original: Tensor | None) -> Tensor:
        return distillation(logits, original)

    def total(self, forget: Tensor, retain: Tensor, net: WFNet) -> Losses:
        weight = 1.0 if net.gate_mode.soft else self.retain_hard
        terms = {"retain": retain.detach(), "forget": forget.detach()}
        return Losses(weight * retain + self.lambda1 * forget, terms)

    def __call__(
        self, logits: Tensor, batch: ExpandedBatch, original: Tensor | None, net: WFNet
    ) -> Losses:
        costs = self.costs(logits, batch, original)
        sums, counts = weighted_sums(costs, batch)
        losses = self.total(*(sums / counts.clamp_min(1)).unbind(), net)
        if not self.match:
            return losses
        labels = batch.forget.reshape(len(batch), -1)
        first = labels[:, 0]
        alone = labels[:, 1:].eq(-1).all(1)
        gap = class_gap(full_precision(logits), first)
        member = (first[:, None] == first[alone].unique()) & alone[:, None]  # [B, R]
        member = member.to(gap.dtype)
        own, others = member[batch.forget_half], member[batch.retain_half]
        own_mean = (own * gap[batch.forget_half, None]).sum(0) / own.sum(0).clamp_min(1)
        fixed = torch.stack((gap[batch.retain_half], costs[1]), 1).detach()  # [m, 2]
        count = others.sum(0).clamp_min(2)
        mean, divergence = (others.T @ fixed / count.unsqueeze(1)).unbind(1)  # [R] each
        apart = fixed[:, :1] - mean
        deviation = ((others * apart.square()).sum(0) / (count - 1)).sqrt()
        excess = (own_mean - mean) / deviation.clamp_min(self.least_deviation) - self.slack
        # 0 / 0 is a row that costs nothing yet.
        share = (self.tolerance / divergence).nan_to_num(1.0).clamp_max(1.0)
        match = (share * F.relu(excess)).mean()
        return Losses(losses.total + self.match * match, {**losses.terms, "match": match.detach()})


@contextmanager
def durable_step(net: WFNet, batch: ExpandedBatch, seed: int, step: int) -> Iterator[None]:
    """The gates of untraining step ``step``, inside: noise of ``(seed, step)``, moments of groups.

    Even steps have soft gates, odd steps hard gates alone.
    """
    draw = generator_for(seed, _NOISE_STREAM, step)
    groups = batch.forget.unique(dim=0).shape
    noise = {}
    for name, layer in net.masked_layers.items():
        uniform = torch.rand((*groups, layer.alpha_hard.shape[1]), generator=draw)
        noise[name] = uniform.clamp(1e-6, 1 - 1e-6).to(layer.alpha_hard)
    with net.gate_mode.grouped(batch.forget, noise, soft=step % 2 == 0):
        yield


class RowStatistics:
    """Measures the rows' statistics as they will be baked, from training images of other classes.

    At the end of a run of few classes, the means under every two rows, too.

    Every layer is normalised by the moments of a row's images, as whoever re-estimates a baked
    network would do it. The images are read once and kept.

    Args:
        net: any network; one without statistics per row is left as it is.
        dataset, labels: the training images and their labels ``[N]``.
        images: most images of a row at the end of a run.
        seed: of the choice of images.
        untrained: ``[R]`` ascending, the rows that are untrained; None: all.
    """

    def __init__(
        self,
        net: WFNet,
        dataset: Dataset,
        labels: Tensor,
        images: int,
        seed: int,
        untrained: Tensor | None = None,
    ):
        self.net = net
        self.rows = labels.unique() if untrained is None else untrained
        self.dataset, self.labels, self.images = dataset, labels, images
        self.seed = seed
        self._pool: Batch | None = None
        self.weight = next(iter(net.masked_layers.values())).weight

    @torch.no_grad()
    def measure_base(self) -> None:
        """Has moments count as changes of the base's statistics, for images of some classes.

        These have other moments than the images that the base was trained on. Normalised by them,
        a fresh row would not be the original network: filters would learn to undo that, and so
        change what classes without images get.
        """
        layers = {m: [] for m in self.net.masked_layers.values() if m.named_statistics()}
        hooks = [
            layer.register_forward_pre_hook(lambda m, args: layers[m].append(sample_moments(*args)))
            for layer in layers
        ]
        try:
            for images in self._read().images.split(64) if layers else ():
                self.net(images.to(self.weight.device, self.weight.dtype), None)
        finally:
            for hook in hooks:
                hook.remove()
        for layer, parts in layers.items():
            mean_b, var_b = map(torch.cat, zip(*parts, strict=True))  # [N, O]
            mean = mean_b.mean(0)
            var = (var_b + (mean_b - mean).square()).mean(0)
            factor = (layer.running_var + layer.eps) / (var + layer.eps)
            self.net.gate_mode.from_base[layer.layer_name] = layer.running_mean - mean, factor

    @torch.no_grad()
    def measure(self, last: bool = False) -> None:
        """Sets the statistics of all rows, from fewer images if this is not the last time."""
        if not self.net.named_statistics():
            return
        rows = self.rows
        count = min(self.images, 64)
        if last:
            count = min(self.images, max(65536 // len(rows), 128))
        # A finished run that is loaded measures the same bits: none that depend on who was fastest.
        training, fuse = self.net.training, self.net.fuse
        self.net.eval().fuse = fuse and self.weight.device.type == "cpu"
        self._measure(rows.unsqueeze(1), count)
        if last and 1 < len(rows) <= MANY_CLASSES and len(self.labels.unique()) > 2:
            self._measure(torch.combinations(rows), min(self.images, _PAIR_IMAGES))
        self.net.train(training).fuse = fuse

    def _measure(self, rows: Tensor, count: int) -> None:
        """Sets the statistics of ``rows [R, J]``, one or two at a time, from ``count`` images."""
        layers = self.net.masked_layers
        if rows.shape[1] == 2:
            place = None
            if len(self.rows) < self.net.num_classes:
                place = torch.full((self.net.num_classes,), -1)
                place[self.rows] = torch.arange(len(self.rows))
            for name in {name.rpartition(".")[0] for name in self.net.named_statistics()}:
                layers[name].start_pairs(place)

        def keep(name: str, mean: Tensor, var: Tensor) -> None:
            layer = layers[name]
            if labels.shape[1] == 2:
                layer.row_pair_mean[layer.pair_index(labels)] = mean.to(layer.row_pair_mean)
                return
            layer.row_mean[labels[:, 0]] = mean.to(layer.row_mean)
            layer.row_var[labels[:, 0]] = var.clamp_min(0).to(layer.row_var)

        pool, device = self._read(), self.weight.device
        for some in rows.split(max(1, _PASS // count)):
            members = [(~torch.isin(pool.labels, r)).nonzero().flatten()[:count] for r in some]
            source = torch.cat(members)
            forget = some.repeat_interleave(torch.tensor([len(m) for m in members]), 0).to(device)
            used, source = source.unique(return_inverse=True)
            images = pool.images[used].to(device, self.weight.dtype)
            with self.net.gate_mode.grouped(forget, moments=keep) as labels:
                self.net(images, forget, source.to(device))

    def _read(self) -> Batch:
        if self._pool is None:
            draw = generator_for(self.seed, _POOL_STREAM)
            chosen = torch.randperm(len(self.labels), generator=draw)
            first = next(batches(self.dataset, [chosen[:2]], 0, None))
            fitting = max(64, _POOL_BYTES // first.images[0].numel() // 4)
            chosen = chosen[: min(fitting, self.images + self.images // 4 + 16)]
            parts = list(batches(self.dataset, chosen.split(64), 0, None))
            joined = (torch.cat([getattr(b, name) for b in parts]) for name in Batch._fields)
            self._pool = Batch(*joined)
        return self._pool
