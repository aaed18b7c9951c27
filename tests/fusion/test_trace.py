"""Tracing: the order of layers, and what a trace would lose."""

import pytest
import torch
from torch import nn

import wfnet
from wfnet import fusion, models
from wfnet.fusion import trace


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.second, self.first = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)

    def forward(self, x):
        return self.second(self.first(x)) if x.sum() > 0 else x


def test_layers_in_the_order_of_the_forward_pass():
    net = wfnet.WFNet(models.create("resnet", 3, width=8), 3)
    names = list(net.masked_layers)
    assert names[-1] == "layer3.0.downsample.0"
    order = trace.execution_order(net.model, names)
    assert order[-3:] == ["layer3.0.downsample.0", "layer3.0.conv1", "layer3.0.conv2"]
    assert sorted(order) == sorted(names)
    assert trace.execution_order(net.bake(0), names) == order  # plain models, too
    assert trace.execution_order(Branching(), ["second", "first"]) == ["second", "first"]


def test_an_example_that_fails_and_checkpoints_are_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    graph, *_ = trace.trace(model)
    with pytest.raises(fusion.NotFusable, match=r"^running its graph failed \(.*\)$"):
        trace.run_example(model, graph, torch.zeros(7, 3, 9, 9))
    model.grad_checkpointing = True
    with pytest.raises(fusion.NotFusable, match="checkpoints its activations"):
        trace.check_traceable(model, [])
