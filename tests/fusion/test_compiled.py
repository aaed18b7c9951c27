"""``fuse="compile"``: the plan as one compiled graph, against the unfused network."""

import functools
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from wfnet import fusion
from wfnet.fusion import compiled as compiling

timm = pytest.importorskip("timm")

CLASSES = 5
MAKE = torch.compile
BATCH = torch.randn(3, 3, 32, 32, dtype=torch.float64)


@pytest.fixture(autouse=True)
def compiler(monkeypatch):
    """Traces, differentiates and partitions, but generates no code."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(MAKE, backend="aot_eager"))
    yield
    torch._dynamo.reset()


@pytest.fixture
def compiled_pair(pair_of):
    return functools.partial(pair_of, fuse="compile")


def graphs() -> int:
    """Graphs that were compiled since the last reset."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


class Calls(nn.Module):
    """Activations behind norms, items of splits, padding by a call, a pooling that overlaps."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.pool = nn.MaxPool2d(3, 2, 1, ceil_mode=True)
        self.norm = timm.layers.BatchNormAct2d(8, act_layer=nn.SiLU, inplace=True)
        self.conv = timm.layers.Conv2dSame(4, 8, 3, stride=2)
        self.small, self.large = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x):
        first, second = self.pool(self.norm(self.stem(x))).chunk(2, 1)
        parts = self.conv(F.hardswish(first * 2, inplace=True)), self.conv(second)
        x = parts[0] + parts[1].relu_()
        x = self.norm(torch.cat([self.small(x[:, :4]), self.large(x[:, 4:])], 1))
        return self.fc(x.mean((2, 3)))


def test_calls_between_convolutions(monkeypatch, compiled_pair, check_equal):
    monkeypatch.setattr(torch, "compile", MAKE)  # with generated code
    net, compiled = compiled_pair(Calls())
    compiled = compiled.to(memory_format=torch.channels_last)
    check_equal(net, compiled, BATCH.contiguous(memory_format=torch.channels_last))
    assert isinstance(compiled.fused_network(BATCH), fusion.CompiledNetwork)


def test_is_compiled_once_and_repeats_bit_by_bit(toy, compiled_pair, check_equal):
    net, compiled = compiled_pair(toy(bias=True))
    check_equal(net, compiled, BATCH)
    check_equal(net, compiled, BATCH, torch.tensor([[4, 1], [0, -1], [2, 2], [-1, -1], [0, 0]]))
    assert graphs() == 1, "new labels compiled anew"
    with torch.inference_mode():
        torch.testing.assert_close(compiled(BATCH, 3), net(BATCH, 3), rtol=1e-10, atol=1e-11)
    assert graphs() == 2
    found = []
    for _ in range(2):
        compiled.zero_grad()
        compiled(BATCH, torch.tensor([0, 1, 1])).square().sum().backward()
        found.append([p.grad.clone() for p in compiled.filter_parameters()])
    assert all(map(torch.equal, *found))


def test_sizes_beyond_the_limit_run_the_plan_uncompiled(
    monkeypatch, toy, compiled_pair, check_equal
):
    monkeypatch.setattr(compiling, "_MOST_GRAPHS", 1)
    net, compiled = compiled_pair(toy())
    for size in (3, 1, 2, 3):
        check_equal(net, compiled, BATCH[:size], 1, None)
    assert graphs() == 1


def test_runs_uncompiled_with_a_line_in_the_log(
    monkeypatch, caplog, toy, compiled_pair, check_equal
):
    def fails(graph, inputs):
        raise OSError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", functools.partial(MAKE, backend=fails))
    net, compiled = compiled_pair(toy())
    with caplog.at_level(logging.WARNING, logger="wfnet"):
        check_equal(net, compiled, BATCH, 1, None)
        check_equal(net, compiled, BATCH, 2, None)
    assert caplog.text.count("runs uncompiled") == 1
    assert "no C++ compiler" in caplog.text
