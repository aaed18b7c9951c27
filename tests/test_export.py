"""Baking: a plain network of one row, or several; what is refused; how it exports."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from wfnet import WFNet

CLASSES = 10
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def trainable():
    torch.manual_seed(0)
    body = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
    net = WFNet(
        nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES)), CLASSES
    )
    for parameter in net.filter_parameters():
        nn.init.normal_(parameter, 2, 1)
    return net


@pytest.mark.parametrize("forget", [None, [3], torch.tensor([5, 3]), np.int64(3)])
def test_bake(forget):
    net = trainable()
    baked = net.bake(forget)
    assert not baked.training
    assert all(p.requires_grad for p in baked.parameters())
    labels = torch.as_tensor(-1 if forget is None else forget).reshape(1, -1).expand(2, -1)
    torch.testing.assert_close(baked(X), net(X, labels))
    if forget is None:
        assert torch.equal(baked(X), net(X))
    baked[0].weight.data.zero_()
    assert net.model[0].weight.any()


@pytest.mark.parametrize(
    ("forget", "error"),
    [(wrong, ValueError) for wrong in ([1, 99], [], -1, torch.tensor([]).long())]
    + [(wrong, TypeError) for wrong in (True, "1", [1, 2.0])],
)
def test_bake_refuses_wrong_labels(forget, error):
    with pytest.raises(error, match="forget"):
        trainable().bake(forget)


def test_a_baked_network_exports():
    baked = trainable().bake(3)
    exported = torch.export.export(baked, (X,)).module()
    torch.testing.assert_close(exported(X), baked(X))


@pytest.mark.parametrize("forget", [1, [0, 2]])
def test_gates_below_become_zero_and_others_stay(forget):
    net, threshold = trainable(), 0.9
    whole, pruned = net.bake(forget), net.bake(forget, prune_below=threshold)
    rows = torch.tensor([forget]).reshape(-1)
    closed = 0
    for name, layer in net.masked_layers.items():
        for kind in ("weight", "bias"):
            gate = layer.gates(kind)[rows].prod(0)
            before = getattr(whole.get_submodule(name), kind)
            after = getattr(pruned.get_submodule(name), kind)
            below = gate < threshold
            closed += int(below.sum())
            assert not after[below].any()
            assert torch.equal(after[~below], before[~below])
    assert closed > 2
    assert torch.equal(pruned[6].weight, whole[6].weight)  # the head is not masked
    original = net.bake(None, prune_below=1.0).state_dict()  # has no gates to prune
    assert all(torch.equal(original[n], v) for n, v in net.bake(None).state_dict().items())


@pytest.mark.parametrize("threshold", [-0.1, math.nan, 1.5])
def test_a_threshold_that_makes_no_sense_is_refused(threshold):
    with pytest.raises(ValueError, match="must be a number from 0 to 1"):
        trainable().bake(1, prune_below=threshold)


@pytest.mark.parametrize("filters", [0, 1])
def test_filters_that_are_nan_are_not_baked(filters):
    net = trainable()
    with torch.no_grad():
        net.filter_parameters()[filters][1, 0] = math.nan
    with pytest.raises(ValueError, match="are NaN for what is to be forgotten"):
        net.bake([0, 1])
    assert net.bake(0)[0].weight.isfinite().all()
