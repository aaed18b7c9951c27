"""Tracing: the order of layers, an example's shapes, and what a trace would lose."""

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


def test_a_network_that_cannot_be_traced_keeps_its_order():
    assert trace.execution_order(Branching(), ["second", "first"]) == ["second", "first"]
    graph, failure = trace.trace_around(nn.Sequential(Branching()))
    assert [node.target for node in graph.nodes if node.op == "call_module"] == ["0"]
    assert failure is None, "a leaf without masked layers may do what it likes"


def test_an_example_leaves_shapes_of_one_image_twice():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    graph = trace.trace(model)
    trace.run_example(model, graph, torch.zeros(7, 3, 6, 6))
    shapes = [tuple(node.meta["shape"]) for node in graph.nodes if "shape" in node.meta]
    assert shapes == [(2, 3, 6, 6), (2, 4, 4, 4), (2, 64), (2, 2), (2, 2)]
    with pytest.raises(fusion.NotFusable, match=r"^running its graph failed \(.*\)$"):
        trace.run_example(model, graph, torch.zeros(7, 3, 9, 9))


def test_checkpointed_activations_are_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    model.grad_checkpointing = True
    with pytest.raises(fusion.NotFusable, match="checkpoints its activations"):
        trace.check_traceable(model, [])
