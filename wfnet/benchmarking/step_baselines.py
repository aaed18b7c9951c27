"""The same masked network as others would write it: baselines of the step benchmark.

Every baseline is a copy of a WFNet's model whose masked layers compute differently; weights and
filters are equal. Gates are rows of ``gate_scale * sigmoid(alpha)``, one per sample, in the dtype
of the products: under autocast a gate in fp32 would take all that follows to fp32.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import wfnet
from wfnet.layers import MaskedLayer


class Baseline(nn.Module):
    """A masked convolution or linear map that is computed as ``kind`` says."""

    kind: str
    labels: Tensor  # [B]

    def forward(self, x: Tensor) -> Tensor:
        return KINDS[self.kind](self, x)

    @property
    def convolves(self) -> bool:
        return self.weight.dim() == 4

    def product(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, groups: int = 1
    ) -> Tensor:
        """Computes the ordinary layer."""
        if not self.convolves:
            return F.linear(x, weight, bias)
        groups *= self.groups
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, groups)

    def cast(self, table: Tensor) -> Tensor:
        """Returns ``table`` in the dtype that products have here."""
        device = table.device.type
        if not torch.is_autocast_enabled(device):
            return table.to(self.weight.dtype)
        return table.to(torch.get_autocast_dtype(device))

    def gate(self, alpha: Tensor) -> Tensor:
        """Returns ``[B, O]``."""
        return self.cast(self.gate_scale * torch.sigmoid(alpha[self.labels]))

    def masked_bias(self) -> Tensor | None:
        """Returns ``[B, O]``."""
        return None if self.bias is None else self.gate(self.alpha_bias) * self.cast(self.bias)

    def masked_copies(self) -> Tensor:
        """Returns ``[B, *weight.shape]``."""
        gate = self.gate(self.alpha_weight)
        return self.cast(self.weight) * gate.view(*gate.shape, *(1,) * (self.weight.dim() - 1))

    def per_output(self, table: Tensor) -> Tensor:
        """Returns ``[B, O]`` in a shape that multiplies the layer's result."""
        return table[:, :, None, None] if self.convolves else table[:, None]


def _eager(layer: Baseline, x: Tensor) -> Tensor:
    """The ordinary layer, then broadcast multiplies."""
    y = layer.product(x, layer.weight) * layer.per_output(layer.gate(layer.alpha_weight))
    bias = layer.masked_bias()
    return y if bias is None else y + layer.per_output(bias)


def _loop(layer: Baseline, x: Tensor) -> Tensor:
    """A masked weight copy and a convolution or product per sample."""
    gate, bias = layer.gate(layer.alpha_weight), layer.masked_bias()
    ones = (1,) * (layer.weight.dim() - 1)
    parts = []
    frozen = layer.cast(layer.weight)
    for b, sample in enumerate(x.split(1)):
        weight = frozen * gate[b].view(-1, *ones)
        parts.append(layer.product(sample, weight, None if bias is None else bias[b]))
    return torch.cat(parts)


def _grouped(layer: Baseline, x: Tensor) -> Tensor:
    """The batch folded into the groups of one convolution; a batched product of linear maps."""
    weight, bias = layer.masked_copies(), layer.masked_bias()
    if not layer.convolves:
        y = torch.bmm(x, weight.transpose(1, 2))
        return y if bias is None else y + bias[:, None]
    batch, folded = x.shape[0], x.reshape(1, -1, *x.shape[2:])
    bias = None if bias is None else bias.flatten()
    y = layer.product(folded, weight.flatten(0, 1), bias, batch)
    return y.reshape(batch, -1, *y.shape[2:])


def _vmap(layer: Baseline, x: Tensor) -> Tensor:
    """torch.func.vmap over samples with masked copies."""

    def one(sample: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return layer.product(sample[None], weight, bias)[0]

    operands = [layer.cast(x), layer.masked_copies(), layer.masked_bias()]
    return torch.vmap(one)(*(t for t in operands if t is not None))


def _unmasked(layer: Baseline, x: Tensor) -> Tensor:
    """The frozen layer. ``offset`` (a scalar 0) on the first one starts the gradient there."""
    y = layer.product(x, layer.weight, layer.bias)
    return y + layer.offset if hasattr(layer, "offset") else y


KINDS = {"eager": _eager, "loop": _loop, "grouped": _grouped, "vmap": _vmap, "unmasked": _unmasked}
# These hold a masked copy of every masked weight per sample until backward.
COPYING = ("loop", "grouped", "vmap")


def baseline(net: wfnet.WFNet, kind: str, labels: Tensor) -> nn.Module:
    """Returns a copy of the network of ``net`` with its masked layers computed as ``kind`` says.

    Args:
        kind: one of :data:`KINDS`.
        labels: ``[B]`` int64, one forget label per sample.
    """
    model = copy.deepcopy(net.model)
    first = True
    for module in model.modules():
        if not isinstance(module, MaskedLayer):
            continue
        module.__class__, module.kind, module.labels = Baseline, kind, labels
        if kind == "unmasked":
            for name in [n for n in module._parameters if n.startswith("alpha_")]:
                del module._parameters[name]
            if first:
                module.offset = nn.Parameter(torch.zeros((), device=module.weight.device))
        first = False
    return model


def copied_bytes(net: wfnet.WFNet, samples: int) -> int:
    """Returns the memory of one masked weight copy per sample."""
    return samples * sum(
        layer.weight.numel() * layer.weight.element_size() for layer in net.masked_layers.values()
    )
