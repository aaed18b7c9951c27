"""Rows of every masked layer scaled to one norm: undoes gates without knowing the base.

With rows ``w_o`` of a layer's weight, ``w_o <- w_o * m / ||w_o||`` (and the bias alike), where
``m`` is the median norm of the layer's rows that are not 0. Those that are 0 stay.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wfnet.trust.attacks.attack import attack
from wfnet.trust.subject import Subject


@attack("equalised", "rows scaled to the median norm of their layer")
def equalised(model: nn.Module, subject: Subject) -> nn.Module:
    for name in subject.layers:
        layer = model.get_submodule(name)
        norms = row_norms(layer.weight)
        if (norms > 0).any():
            scale = scale_rows(layer.weight, norms, norms[norms > 0].median())
            if layer.bias is not None:
                layer.bias.mul_(scale.to(layer.bias.dtype))
    return model


def row_norms(weight: Tensor) -> Tensor:
    """Returns the norm of each row ``[O]`` of ``weight [O, ...]``; of a vector, absolute values."""
    return weight.reshape(len(weight), -1).norm(dim=1)


def scale_rows(weight: Tensor, norms: Tensor, wanted: Tensor) -> Tensor:
    """Scales rows of ``weight [O, ...]`` from ``norms [O]`` to ``wanted``; returns the scales."""
    scale = torch.where(norms > 0, wanted / norms, 1)
    weight.mul_(scale.to(weight.dtype).reshape(-1, *[1] * (weight.dim() - 1)))
    return scale
