"""A memory layout in which narrow convolutions can be trained on a CPU."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def safe_layout(model: nn.Module) -> Iterator[None]:
    """Strided 1x1 convolutions of fewer than 16 channels get contiguous images and weights inside.

    On CPUs with AVX-512, oneDNN (as of PyTorch 2.14) writes past the end of their weight gradients
    in channels-last layout, and the process dies.
    """
    with ExitStack() as hooks:
        for module in model.modules():
            if _is_unsafe(module):
                # `contiguous` leaves the strides of a 1x1 weight as they are.
                module.weight.data = module.weight.data.clone(memory_format=torch.contiguous_format)
                hooks.callback(module.register_forward_pre_hook(_contiguous).remove)
        yield


def _is_unsafe(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and max(module.stride) > 1
        and module.in_channels < 16
        and module.weight.device.type == "cpu"
    )


def _contiguous(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return inputs[0].contiguous(), *inputs[1:]
