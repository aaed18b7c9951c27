"""The paper's equation, written as naively as can be: the truth every backend is tested against.

A Python loop over samples; each sample gets a real masked copy of the weights. Plain
differentiable PyTorch, independent of the gate tables, operators and kernels of this package.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def masked(parameter: Tensor, alpha: Tensor, labels: list[int], gate_scale: float) -> Tensor:
    """``parameter`` with its output channels scaled by the gates of ``labels``.

    Args:
        parameter: ``[O, ...]`` weight or bias.
        alpha: ``[K, O]``.
        labels: the forget labels of one sample; -1 selects none, and repetitions count once.
    """
    for label in sorted(set(labels) - {-1}):
        if not 0 <= label < len(alpha):
            raise IndexError(f"forget label {label} is out of range for {len(alpha)} classes")
        gate = gate_scale * torch.sigmoid(alpha[label])
        parameter = parameter * gate.reshape(-1, *[1] * (parameter.dim() - 1))
    return parameter


def wf_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    alpha_weight: Tensor,
    alpha_bias: Tensor | None,
    forget: Tensor,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    gate_scale: float = 1.0,
    source: Tensor | None = None,
) -> Tensor:
    """Masked convolution; shapes as in :func:`wfnet.functional.wf_conv2d`, ``forget`` is [B, J]."""
    source = torch.arange(len(forget)) if source is None else source
    outputs = []
    for image, labels in zip(source.tolist(), forget.tolist(), strict=True):
        w = masked(weight, alpha_weight, labels, gate_scale)
        b = None if bias is None else masked(bias, alpha_bias, labels, gate_scale)
        outputs.append(
            F.conv2d(
                x[image : image + 1], w.to(x.dtype), _to(b, x), stride, padding, dilation, groups
            )
        )
    if outputs:
        return torch.cat(outputs)
    return F.conv2d(x[:0], weight, bias, stride, padding, dilation, groups)


def wf_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    alpha_weight: Tensor,
    alpha_bias: Tensor | None,
    forget: Tensor,
    gate_scale: float = 1.0,
    source: Tensor | None = None,
) -> Tensor:
    """Masked linear map: ``x`` ``[N, T, C]``, ``forget`` ``[B, J]``, returns ``[B, T, O]``."""
    source = torch.arange(len(forget)) if source is None else source
    outputs = []
    for image, labels in zip(source.tolist(), forget.tolist(), strict=True):
        w = masked(weight, alpha_weight, labels, gate_scale)
        b = None if bias is None else masked(bias, alpha_bias, labels, gate_scale)
        outputs.append(F.linear(x[image : image + 1], w.to(x.dtype), _to(b, x)))
    return torch.cat(outputs) if outputs else F.linear(x[:0], weight, bias)


def _to(bias: Tensor | None, x: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(x.dtype)
