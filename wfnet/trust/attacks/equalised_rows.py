"""Rows of every masked layer scaled to one norm: undoes gates without knowing the base.

With rows ``w_o`` of a layer's weight, ``w_o <- w_o * m / ||w_o||`` (and the bias alike), where
``m`` is the median norm of the layer's rows that are not 0. Those that are 0 stay.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from wfnet.trust.attacks.attack import Attack, Attacked
from wfnet.trust.subject import Subject


def equalised(model: nn.Module, layers: Sequence[str]) -> nn.Module:
    """Returns a copy in which all rows of a layer that are not 0 have their median norm."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for name in layers:
            layer = changed.get_submodule(name)
            norms = row_norms(layer.weight)
            if (norms > 0).any():
                scale = torch.where(norms > 0, norms[norms > 0].median() / norms, 1)
                layer.weight.mul_(as_rows(scale, layer.weight))
                if layer.bias is not None:
                    layer.bias.mul_(scale.to(layer.bias.dtype))
    return changed


def row_norms(weight: Tensor) -> Tensor:
    """Returns the norm of each row ``[O]`` of ``weight [O, ...]``; of a vector, absolute values."""
    return weight.reshape(len(weight), -1).norm(dim=1)


def as_rows(scale: Tensor, weight: Tensor) -> Tensor:
    """Returns ``scale [O]`` as ``[O, 1, ...]`` in the dtype of ``weight [O, ...]``."""
    return scale.to(weight.dtype).reshape(-1, *[1] * (weight.dim() - 1))


def _apply(model: nn.Module, subject: Subject) -> Attacked:
    return Attacked(equalised(model, subject.layers))


ATTACK = Attack("equalised", "rows scaled to the median norm of their layer", _apply)
