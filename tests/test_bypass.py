"""Models that compute with a masked layer's weight past the mask are found and named."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from wfnet import WFNet

CLASSES = 10


X = torch.randn(2, 3, 8, 8)


class Bypass(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.unused = nn.Conv2d(3, 4, 3)


class Helper(Bypass):
    def forward(self, x):
        return self.helper(x)

    def helper(self, x):
        return F.conv2d(x, self.conv.weight, self.conv.bias)


class Alias(Bypass):
    def forward(self, x):
        conv = self.conv
        return F.conv2d(x, conv.weight)


class Harmless(Bypass):
    """Uses the weight's dtype, an unused layer, and a layer's forward directly."""

    def forward(self, x):
        x = x.to(self.conv.weight.dtype).type_as(self.conv.weight).to(self.conv.weight.device)
        x = x + torch.zeros_like(self.conv.weight).sum()
        return self.conv.forward(x)


def wrap(body):
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES)
    return WFNet(nn.Sequential(body, *head), CLASSES)


def test_a_bypass_in_a_helper_method_is_found_before_work_starts():
    with pytest.raises(ValueError, match=r"layer '0\.conv' cannot be masked.*Helper"):
        wrap(Helper())


def test_a_hidden_bypass_is_found_on_the_first_forward():
    net = wrap(Alias())
    for _ in range(2):
        with pytest.raises(ValueError, match=r"layer '0\.conv' cannot be masked"):
            net(X, 1)


def test_what_bypasses_nothing_is_not_refused():
    net = wrap(Harmless())
    net(X, 1)
    net(X, 2)


class Block(nn.Module):
    """Attention and a linear map of a transformer with tokens before samples, or behind them."""

    def __init__(self, samples_first):
        super().__init__()
        self.samples_first = samples_first
        self.qkv, self.proj = nn.Linear(4, 12), nn.Linear(4, 4)

    def forward(self, x):  # [B, T, C]
        y = x if self.samples_first else x.transpose(0, 1)
        y = self.qkv(y)
        y = y if self.samples_first else y.transpose(0, 1)
        x = x + F.scaled_dot_product_attention(*y.chunk(3, 2))
        return x + self.proj(x)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("tokens", [2, 8])
@pytest.mark.parametrize("pooled", [slice(None), slice(0, 1), slice(-1, None)])
def test_a_layer_whose_tokens_come_before_samples_is_refused_by_name(tokens, pooled, backend):
    class Encoder(nn.Module):
        def __init__(self, samples_first):
            super().__init__()
            self.blocks = nn.ModuleList([Block(True), Block(samples_first)])
            self.head = nn.Linear(4, CLASSES)

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return self.head(x[:, pooled].mean(1))

    x, labels = torch.randn(2, tokens, 4), torch.tensor([1, 2])
    net = WFNet(Encoder(False), CLASSES, backend=backend)
    net(x, 1)  # one label for all is right in any layout
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"layer 'blocks\.1\.qkv' .* tokens .* batch_first=True"
        ):
            net(x, labels)
    assert {layer.backend for layer in net.masked_layers.values()} == {backend}
    WFNet(Encoder(True), CLASSES, backend=backend)(x, labels)
