"""Takes closed channels out of a baked network: what carried the class is not in the file.

Channels whose BatchNorm has weight and bias 0 compute nothing. Which layers a channel runs through
is found by torch-pruning's dependency graph (Fang et al., "DepGraph: Towards Any Structural
Pruning", CVPR 2023); one that is closed in all of them is removed, others stay as zeros.
"""

import copy
from collections.abc import Sequence

import torch
from torch import nn

from wfnet.head import check_same_logits, example_images, first_output
from wfnet.services.extras import require
from wfnet.services.modes import evaluation_mode


def compact(plain: nn.Module, image_shape: Sequence[int] | None = None) -> nn.Module:
    """A copy of ``plain`` without the channels that are closed wherever they run.

    Args:
        plain: a baked network, for example ``net.bake(3)`` of durable filters.
        image_shape: ``(C, H, W)`` of its images where the model does not say it.

    Returns:
        A network of the same type with smaller layers, in evaluation mode; its outputs are those
        of ``plain`` within rounding. Without closed channels it is a plain copy.

    Raises:
        ImportError: if torch-pruning is not installed.
        ValueError: if the model takes no image of a usual size.
        RuntimeError: if the smaller network computes something else: nothing is returned then.
    """
    pruning = require("torch_pruning", "compact")
    images = example_images(plain, image_shape or ())
    small = copy.deepcopy(plain).eval()
    frozen = [p.requires_grad for p in small.parameters()]
    small.requires_grad_(True)  # the graph is traced through autograd
    graph = pruning.DependencyGraph().build_dependency(small, example_inputs=images[:1])
    convolutions = [m for m in small.modules() if type(m) is nn.Conv2d and m.groups == 1]
    for convolution in convolutions:
        channels = list(range(convolution.out_channels))
        group = graph.get_pruning_group(convolution, pruning.prune_conv_out_channels, channels)
        closed = _closed_everywhere(group, convolution)
        if not closed:
            continue
        if len(closed) == len(channels):
            closed = closed[1:]  # a layer of no channels is none: one zero stays
        group = graph.get_pruning_group(convolution, pruning.prune_conv_out_channels, closed)
        if closed and graph.check_pruning_group(group):
            group.prune()
    for parameter, requires_grad in zip(small.parameters(), frozen, strict=True):
        parameter.requires_grad_(requires_grad)
        parameter.grad = None
    with evaluation_mode(plain, small), torch.no_grad():
        logits = first_output(small(images)), first_output(plain(images))
    check_same_logits(*logits, 1e-4, f"the compact {type(plain).__name__}")
    return small


def _closed_everywhere(group: object, convolution: nn.Conv2d) -> list[int]:
    """Output channels of ``convolution`` that every layer of their group gives as exactly 0."""
    closed = torch.ones(convolution.out_channels, dtype=torch.bool)
    norms = 0
    for dependency, indices in group:
        module = dependency.target.module
        norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if not dependency.handler.__name__.endswith("out_channels") or not (
            norm or isinstance(module, nn.Conv2d)
        ):
            continue
        if len(indices) != len(closed):
            return []
        zero = module.weight.eq(0) if norm else module.weight.flatten(1).eq(0).all(1)
        if module.bias is not None:
            zero = zero & module.bias.eq(0)
        closed &= zero.detach().cpu()[list(indices)]
        norms += norm
    return closed.nonzero().flatten().tolist() if norms else []
