"""Modules kept in evaluation mode for a while; whether a network is being exported."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def is_exporting() -> bool:
    """``torch.compiler.is_exporting``, which PyTorch 2.11 takes for true in torch.compile, too."""
    return torch.compiler._is_exporting_flag


@contextmanager
def evaluation_mode(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module has the mode it had."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
