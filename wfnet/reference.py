"""The paper's equation, written as naively as can be: the truth every backend is tested against.

A Python loop over samples; each sample gets a real masked copy of the weights. Plain
differentiable PyTorch, independent of the gate tables, operators and kernels of this package.
"""

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


def masked_layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    alpha_weight: Tensor,
    alpha_bias: Tensor | None,
    forget: Tensor,
    geometry: tuple = (),
    gate_scale: float = 1.0,
    source: Tensor | None = None,
) -> Tensor:
    """Masked convolution or linear map; shapes as in :mod:`wfnet.functional`.

    Args:
        forget: ``[B, J]``.
        geometry: stride, padding, dilation and groups of a convolution; empty for a linear map.
    """
    compute = F.conv2d if geometry else F.linear
    source = torch.arange(len(forget)) if source is None else source
    outputs = [compute(x[:0], weight, bias, *geometry)]  # of no samples, the shape
    for image, labels in zip(source.tolist(), forget.tolist(), strict=True):
        w = masked(weight, alpha_weight, labels, gate_scale).to(x.dtype)
        b = None if bias is None else masked(bias, alpha_bias, labels, gate_scale).to(x.dtype)
        outputs.append(compute(x[image : image + 1], w, b, *geometry))
    return torch.cat(outputs)
