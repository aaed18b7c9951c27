"""Memory of an untraining run before it starts: filters, optimiser, and a step of any batch size.

What the filters need is counted. What a step needs is measured on two small batches of the network
itself - forward and backward, with the backend and layout that will run - and continued linearly:
everything in a step is proportional to its samples or its images, or constant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from wfnet.gate_tables import flatten_filters
from wfnet.network import WFNet
from wfnet.services.quiet import silent_stderr
from wfnet.services.seeds import generator_for
from wfnet.untraining.expansion import expand
from wfnet.untraining.objectives import BalancedObjective, Objective
from wfnet.untraining.optimizers import RowAdam
from wfnet.untraining.step import UntrainingStep


@dataclass(frozen=True)
class FilterMemory:
    """Bytes that the filters of a network take while they are learned.

    Attributes:
        entries: number of filter entries, classes x gates of a class.
        filters, moments, gradient: of the matrix, of RowAdam's two moments (0 for SGD), and of the
            gradient.
        copies: of the best filters so far, and of the last that gave a finite loss.
    """

    entries: int
    filters: int
    moments: int
    gradient: int
    copies: int

    @property
    def total(self) -> int:
        return self.filters + self.moments + self.gradient + self.copies


def filter_memory(net: WFNet, optimizer: str = "row_adam") -> FilterMemory:
    """What the filters of ``net`` take, from their number and dtype."""
    params = net.filter_parameters()
    size = sum(p.numel() * p.element_size() for p in params)
    moments = 2 * size if optimizer == "row_adam" else 0
    return FilterMemory(sum(p.numel() for p in params), size, moments, size, 2 * size)


@dataclass(frozen=True)
class StepMemory:
    """Peak bytes of a step beside weights, filters and optimiser, linear in the batch.

    Attributes:
        constant, per_image: of ``constant + per_image * images``, for the images of a minibatch,
            each with all of its samples.
    """

    constant: int
    per_image: int

    def of(self, images: int) -> int:
        """Bytes for a minibatch of so many images on one device."""
        return self.constant + self.per_image * images


def step_memory(
    net: WFNet,
    image_shape: tuple[int, int, int],
    label_expansion: int,
    share_images: bool = True,
    amp: torch.dtype | None = None,
    channels_last: bool = True,
    objective: Objective | None = None,
    most_images: int | None = None,
    compound: float = 0.0,
) -> StepMemory:
    """Measures two small steps on the network's device; its filters stay as they are.

    Args:
        net: as it will run (backend, ``fuse``, device, dtype).
        image_shape: ``(C, H, W)``.
        most_images: images of a step, at most: those of the run, so that measuring it takes no
            more memory than the run.
        others: as in :class:`wfnet.UntrainConfig`.
    """
    objective = objective or BalancedObjective()
    least = 1 if share_images else 2  # each half has an image
    more = 16 * least  # of fewer than eight a step is not cut into parts
    if most_images is not None:
        more = min(more, max(least, most_images))
    few = max(least, more // 2)
    peaks = []
    with flatten_filters(net.filter_parameters()):
        optimizer = RowAdam(net.filter_parameters())
        step = UntrainingStep(net, objective, optimizer, amp, channels_last)
        for images in (few, few, more):  # the first one fills caches
            labels = torch.arange(images) % net.num_classes
            batch = expand(
                labels,
                net.num_classes,
                label_expansion,
                generator_for(0),
                share_images,
                compound=compound,
            )
            pixels = torch.zeros(images, *image_shape)
            minibatches = [(pixels, batch)]
            peaks.append(peak_bytes(partial(step.differentiate, minibatches), step.device))
        for parameter in net.filter_parameters():
            parameter.grad = None
    if more == few:
        return StepMemory(0, peaks[2] // more)
    per_image = max(0, peaks[2] - peaks[1]) // (more - few)
    return StepMemory(max(0, peaks[1] - few * per_image), per_image)


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Most bytes that were allocated at a time during ``work()``, beyond those at its start.

    On a CUDA device by the allocator's count; elsewhere from PyTorch's profiler. Scratch memory
    that libraries take without PyTorch (oneDNN's weights in its own layout, for example) is not
    seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        silent_stderr(),
        torch.profiler.profile(activities=activities, profile_memory=True) as profile,
    ):
        work()
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak
