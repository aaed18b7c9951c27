"""Memory of an untraining run before it starts: filters, optimiser, and a step of any batch size.

What the filters need is counted. What a step needs is measured on two small batches of the network
itself - forward and backward, with the backend and layout that will run - and continued linearly:
everything in a step is proportional to its samples or its images, or constant.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch

from wfnet.gate_tables import flatten_filters
from wfnet.network import WFNet
from wfnet.services.peak_memory import peak_bytes
from wfnet.services.seeds import generator_for
from wfnet.untraining.expansion import expand
from wfnet.untraining.objectives import BalancedObjective
from wfnet.untraining.optimizers import RowAdam
from wfnet.untraining.step import UntrainingStep
from wfnet.untraining.untrain_config import UntrainConfig


class FilterMemory(NamedTuple):
    """Bytes that the filters of a network take while they are learned.

    Attributes:
        filters, moments: of the matrix, and of RowAdam's two moments (0 for SGD).
        total: with the gradient, and copies of the best and of the last good filters.
    """

    filters: int
    moments: int
    total: int


def filter_memory(net: WFNet, optimizer: str = "row_adam") -> FilterMemory:
    """What the filters of ``net`` take, from their number and dtype."""
    size = sum(p.numel() * p.element_size() for p in net.filter_parameters())
    moments = 2 * size if optimizer == "row_adam" else 0
    return FilterMemory(size, moments, moments + 4 * size)


class StepMemory(NamedTuple):
    """Peak bytes of a step beside weights, filters and optimiser: of all, and of another image."""

    total: int
    per_image: int


def step_memory(
    net: WFNet, image_shape: tuple[int, int, int], config: UntrainConfig, images: int
) -> StepMemory:
    """Measures two small steps on the network's device; its filters stay as they are.

    Args:
        net: as it will run (backend, ``fuse``, device, dtype).
        image_shape: ``(C, H, W)``.
        config: settings of the run.
        images: of a step on one device; no more are run, so that measuring takes no more memory.
    """
    least = 1 if config.share_images else 2  # each half has an image
    most = max(least, min(images, 16 * least))  # of fewer than eight a step is not cut into parts
    few = max(least, most // 2)
    peaks = []
    with flatten_filters(net.filter_parameters()):
        optimizer = RowAdam(net.filter_parameters())
        about = BalancedObjective(), optimizer, config.amp_dtype, config.channels_last
        step = UntrainingStep(net, *about)
        for count in (few, few, most):  # the first one fills caches
            labels = torch.arange(count) % net.num_classes
            sizes = net.num_classes, config.label_expansion
            options = {"share_images": config.share_images, "compound": config.compound}
            batch = expand(labels, *sizes, generator_for(0), **options)
            minibatches = [(torch.zeros(count, *image_shape), batch)]
            peaks.append(peak_bytes(partial(step.differentiate, minibatches), step.device))
        for parameter in net.filter_parameters():
            parameter.grad = None
    per_image = peaks[2] // most if most == few else max(0, peaks[2] - peaks[1]) // (most - few)
    return StepMemory(max(0, peaks[2] + per_image * (images - most)), per_image)
