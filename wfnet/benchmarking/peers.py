"""The same masked network as others would write it: peers of the step benchmark.

Every peer is a copy of a WFNet's model whose masked layers compute differently; weights and filters
are equal. Gates are rows of ``gate_scale * sigmoid(alpha)``, one per sample.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import wfnet
from wfnet.layers import MaskedLayer


class _Gated:
    """Gates of the samples' labels, for a masked layer of any kind."""

    labels: Tensor  # [B]

    def gate(self, alpha: Tensor) -> Tensor:
        return self.gate_scale * torch.sigmoid(alpha[self.labels])  # [B, O]

    def masked_bias(self) -> Tensor | None:
        """``[B, O]``"""
        return None if self.bias is None else self.gate(self.alpha_bias) * self.bias

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, groups: int = 1):
        groups *= self.groups
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, groups)


class EagerConv(_Gated, nn.Conv2d):
    """One convolution, then broadcast multiplies."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.convolve(x, self.weight) * self.gate(self.alpha_weight)[:, :, None, None]
        bias = self.masked_bias()
        return y if bias is None else y + bias[:, :, None, None]


class EagerLinear(_Gated, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight) * self.gate(self.alpha_weight)[:, None]
        bias = self.masked_bias()
        return y if bias is None else y + bias[:, None]


class LoopConv(_Gated, nn.Conv2d):
    """A masked weight copy and a convolution per sample."""

    def forward(self, x: Tensor) -> Tensor:
        gate, bias = self.gate(self.alpha_weight), self.masked_bias()
        outputs = [
            self.convolve(
                sample,
                self.weight * gate[b, :, None, None, None],
                None if bias is None else bias[b],
            )
            for b, sample in enumerate(x.split(1))
        ]
        return torch.cat(outputs)


class LoopLinear(_Gated, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        gate, bias = self.gate(self.alpha_weight), self.masked_bias()
        outputs = [
            F.linear(sample, self.weight * gate[b, :, None], None if bias is None else bias[b])
            for b, sample in enumerate(x.split(1))
        ]
        return torch.cat(outputs)


class GroupedConv(_Gated, nn.Conv2d):
    """The batch folded into the groups of one convolution with masked copies."""

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        weight = self.weight * self.gate(self.alpha_weight)[:, :, None, None, None]
        bias = self.masked_bias()
        y = self.convolve(
            x.reshape(1, -1, *x.shape[2:]),
            weight.flatten(0, 1),
            None if bias is None else bias.flatten(),
            batch,
        )
        return y.reshape(batch, -1, *y.shape[2:])


class GroupedLinear(_Gated, nn.Linear):
    """A batched matrix product with masked copies."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * self.gate(self.alpha_weight)[:, :, None]  # [B, O, C]
        y = torch.bmm(x, weight.transpose(1, 2))
        bias = self.masked_bias()
        return y if bias is None else y + bias[:, None]


class VmapConv(_Gated, nn.Conv2d):
    """torch.func.vmap over samples with masked copies."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * self.gate(self.alpha_weight)[:, :, None, None, None]
        bias = self.masked_bias()
        if bias is None:
            return torch.vmap(lambda x, w: self.convolve(x[None], w)[0])(x, weight)
        return torch.vmap(lambda x, w, b: self.convolve(x[None], w, b)[0])(x, weight, bias)


class VmapLinear(_Gated, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * self.gate(self.alpha_weight)[:, :, None]
        bias = self.masked_bias()
        if bias is None:
            return torch.vmap(F.linear)(x, weight)
        return torch.vmap(F.linear)(x, weight, bias)


class UnmaskedConv(nn.Conv2d):
    """The frozen layer. ``offset`` (a scalar 0) on the first one starts the gradient there."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + self.offset if hasattr(self, "offset") else y


class UnmaskedLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + self.offset if hasattr(self, "offset") else y


KINDS = {
    "eager": (EagerConv, EagerLinear),
    "loop": (LoopConv, LoopLinear),
    "grouped": (GroupedConv, GroupedLinear),
    "vmap": (VmapConv, VmapLinear),
    "unmasked": (UnmaskedConv, UnmaskedLinear),
}
# These hold a masked copy of every masked weight per sample until backward.
COPYING = ("loop", "grouped", "vmap")


def peer(net: wfnet.WFNet, kind: str, labels: Tensor) -> nn.Module:
    """A copy of the network of ``net`` with its masked layers computed as ``kind`` says.

    Args:
        kind: one of :data:`KINDS`.
        labels: ``[B]`` int64, one forget label per sample.
    """
    model = copy.deepcopy(net.model)
    conv, linear = KINDS[kind]
    first = True
    for module in model.modules():
        if not isinstance(module, MaskedLayer):
            continue
        module.__class__ = conv if isinstance(module, nn.Conv2d) else linear
        module.labels = labels
        if kind == "unmasked":
            for name in [n for n in module._parameters if n.startswith("alpha_")]:
                del module._parameters[name]
            if first:
                module.offset = nn.Parameter(torch.zeros((), device=module.weight.device))
        first = False
    return model


def copied_bytes(net: wfnet.WFNet, samples: int) -> int:
    """Memory of one masked weight copy per sample."""
    return samples * sum(
        layer.weight.numel() * layer.weight.element_size() for layer in net.masked_layers.values()
    )
