"""`bake(..., prune_below=)`: gates below a threshold become exactly zero in the export."""

import math

import pytest
import torch
from torch import nn

import wfnet


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(6, 4)
    )
    net = wfnet.WFNet(model, 4)
    with torch.no_grad():
        for alpha in net.filter_parameters():
            alpha.copy_(4 * torch.randn(alpha.shape))
    return net


@pytest.mark.parametrize("forget", [1, [0, 2]])
def test_gates_below_become_zero_and_others_stay(net, forget):
    threshold = 0.3
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
    assert closed > 4
    assert torch.equal(pruned[4].weight, whole[4].weight)  # the head is not masked


def test_nothing_is_pruned_by_default_and_never_in_the_original(net):
    assert all((p != 0).all() for p in net.bake(1).parameters())
    original = net.bake(None, prune_below=10.0)
    for name, value in net.bake(None).state_dict().items():
        assert torch.equal(original.state_dict()[name], value)


def test_pruning_leaves_the_network_alone(net):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net.bake(3, prune_below=1e9)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


@pytest.mark.parametrize("threshold", [-0.1, math.nan, math.inf])
def test_a_threshold_that_makes_no_sense_is_refused(net, threshold):
    with pytest.raises(ValueError, match="must be a finite number of at least 0"):
        net.bake(1, prune_below=threshold)
