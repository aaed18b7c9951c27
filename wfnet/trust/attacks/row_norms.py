"""Rows of every masked layer scaled to other norms: undoes gates that are not exactly 0.

- ``equalised``: with rows ``w_o`` of a layer's weight, ``w_o <- w_o * m / ||w_o||`` (and the bias
  alike), where ``m`` is the median norm of the layer's rows that are not 0.
- ``base_norms``, for holders of the base weights: ``w_o <- w_o * ||base row|| / ||w_o||``. If rows
  are multiples of the base's, this restores the base exactly. That such rows exist also shows which
  model an export was made from. It says how much the file alone leaks: who has the base has the
  class anyway.
"""

import torch
from torch import Tensor, nn

from wfnet.attention_layers import weight_and_bias
from wfnet.trust.attacks.attack import attack
from wfnet.trust.subject import Subject


@attack("equalised", "rows scaled to the median norm of their layer")
def equalised(model: nn.Module, subject: Subject) -> nn.Module:
    for name in subject.layers:
        weight, bias = weight_and_bias(model.get_submodule(name))
        norms = _row_norms(weight)
        if (norms > 0).any():
            scale = _scale_rows(weight, norms, norms[norms > 0].median())
            if bias is not None:
                bias.mul_(scale.to(bias.dtype))
    return model


@attack("base_norms", "rows scaled to the norms of the public base", needs_base=True)
def base_norms(model: nn.Module, subject: Subject) -> nn.Module | None:
    for name in subject.layers:
        weight, bias = weight_and_bias(model.get_submodule(name))
        public, public_bias = weight_and_bias(subject.original.get_submodule(name))
        if weight.shape != public.shape:
            return None
        wanted = _row_norms(public.to(weight))
        _scale_rows(weight, _row_norms(weight), wanted)
        if bias is not None and public_bias is not None:  # a bias has gates of its own
            bias.copy_(bias.sign() * public_bias.abs().to(bias))
    return model


def _row_norms(weight: Tensor) -> Tensor:
    """Returns the norm of each row ``[O]`` of ``weight [O, ...]``; of a vector, absolute values."""
    return weight.reshape(len(weight), -1).norm(dim=1)


def _scale_rows(weight: Tensor, norms: Tensor, wanted: Tensor) -> Tensor:
    """Scales rows of ``weight [O, ...]`` from ``norms [O]`` to ``wanted``; returns the scales."""
    scale = torch.where(norms > 0, wanted / norms, 1)
    weight.mul_(scale.to(weight.dtype).reshape(-1, *[1] * (weight.dim() - 1)))
    return scale
