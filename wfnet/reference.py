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
    parts = _samples(x, weight, bias, alpha_weight, alpha_bias, forget, gate_scale, source)
    geometry = stride, padding, dilation, groups
    outputs = [F.conv2d(*sample, *geometry) for sample in parts]
    return torch.cat(outputs) if outputs else F.conv2d(x[:0], weight, bias, *geometry)


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
    parts = _samples(x, weight, bias, alpha_weight, alpha_bias, forget, gate_scale, source)
    outputs = [F.linear(*sample) for sample in parts]
    return torch.cat(outputs) if outputs else F.linear(x[:0], weight, bias)


def _samples(x, weight, bias, alpha_weight, alpha_bias, forget, gate_scale, source):
    """Yields every sample with its masked copies of weight and bias."""
    source = torch.arange(len(forget)) if source is None else source
    for image, labels in zip(source.tolist(), forget.tolist(), strict=True):
        w = masked(weight, alpha_weight, labels, gate_scale).to(x.dtype)
        b = None if bias is None else masked(bias, alpha_bias, labels, gate_scale).to(x.dtype)
        yield x[image : image + 1], w, b
