"""``fuse="compile"``: the plan as one compiled graph, against the unfused network."""

import functools
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import wfnet
from wfnet import fusion
from wfnet.fusion import run as running

timm = pytest.importorskip("timm")

CLASSES = 5
MAKE = torch.compile
BATCH = torch.randn(3, 3, 32, 32, dtype=torch.float64)


@pytest.fixture(autouse=True)
def compiler(request, monkeypatch):
    """Traces, differentiates and partitions; generates code where a test asks for it."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    backend = getattr(request, "param", "aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(MAKE, backend=backend))
    yield
    torch._dynamo.reset()


@pytest.fixture
def compiled_pair(pair_of):
    return functools.partial(pair_of, fuse="compile")


def graphs() -> int:
    """Graphs that were compiled since the last reset."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_equals_the_unfused_network(toy, compiled_pair, check_equal):
    net, compiled = compiled_pair(toy(bias=True, inplace=False))
    check_equal(net, compiled, BATCH)
    assert isinstance(compiled.fused_network(BATCH), fusion.CompiledNetwork)


def test_calls_between_convolutions(compiled_pair, check_equal):
    """Activations behind norms, items of splits, values padded by a call."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3)
            self.norm = timm.layers.BatchNormAct2d(8, act_layer=nn.SiLU, inplace=True)
            self.conv = timm.layers.Conv2dSame(4, 8, 3, stride=2)
            self.small, self.large = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
            self.fc = nn.Linear(8, CLASSES)

        def forward(self, x):
            first, second = self.norm(self.stem(x)).chunk(2, 1)
            parts = self.conv(F.hardswish(first * 2, inplace=True)), self.conv(second)
            x = parts[0] + parts[1].relu_()
            x = self.norm(torch.cat([self.small(x[:, :4]), self.large(x[:, 4:])], 1))
            return self.fc(x.mean((2, 3)))

    net, compiled = compiled_pair(Net())
    check_equal(net, compiled, BATCH)
    assert isinstance(compiled.fused_network(BATCH), fusion.CompiledNetwork)


@pytest.mark.parametrize("compiler", ["inductor"], indirect=True)
def test_generated_code_equals_the_unfused_network(toy, compiled_pair, check_equal):
    net, compiled = compiled_pair(toy(bias=True))
    compiled = compiled.to(memory_format=torch.channels_last)
    images = BATCH.contiguous(memory_format=torch.channels_last)
    check_equal(net, compiled, images)


@pytest.mark.parametrize("channels_last", [False, True])
def test_is_compiled_once(channels_last, toy, compiled_pair, check_equal):
    net, compiled = compiled_pair(toy(bias=True))
    images = BATCH
    if channels_last:
        compiled = compiled.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    check_equal(net, compiled, images)
    assert graphs() == 1
    check_equal(net, compiled, images, torch.tensor([[4, 1], [0, -1], [2, 2], [-1, -1], [0, 0]]))
    check_equal(net, compiled, images, torch.tensor([[0, 1], [1, 1], [2, 1], [3, 1], [4, 1]]))
    assert graphs() == 1, "new labels compiled anew"
    with torch.inference_mode():
        torch.testing.assert_close(compiled(images, 3), net(images, 3), rtol=1e-10, atol=1e-11)
    assert graphs() == 2


def test_a_pooling_that_overlaps_and_is_padded(toy, compiled_pair, check_equal):
    model = toy()
    model.pool = nn.MaxPool2d(3, 2, 1, ceil_mode=True)
    check_equal(*compiled_pair(model), BATCH)


def test_sizes_beyond_the_limit_run_the_plan_uncompiled(
    monkeypatch, toy, compiled_pair, check_equal
):
    monkeypatch.setattr(running, "_MOST_GRAPHS", 1)
    net, compiled = compiled_pair(toy())
    check_equal(net, compiled, BATCH, 1, None)
    for size in (1, 2):
        check_equal(net, compiled, BATCH[:size], 2, None)
    assert graphs() == 1
    check_equal(net, compiled, BATCH, 4, None)
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


def test_gradients_repeat_bit_by_bit(toy, compiled_pair):
    _, compiled = compiled_pair(toy(bias=True))
    found = []
    for _ in range(3):
        compiled.zero_grad()
        compiled(BATCH, torch.tensor([0, 1, 1])).square().sum().backward()
        found.append([p.grad.clone() for p in compiled.filter_parameters()])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_changed_statistics_are_noticed(toy, compiled_pair):
    net, compiled = compiled_pair(toy())
    before = compiled(BATCH, 1)
    for network in (net, compiled):
        network.model.bn1.running_mean.add_(1.0)
    after = compiled(BATCH, 1)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, net(BATCH, 1))


def test_frees_what_it_kept_and_says_so(toy, compiled_pair):
    _, compiled = compiled_pair(toy())
    out = compiled(BATCH, 1).sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        out.backward()


@pytest.mark.parametrize("gate", [1.0, 1e-3])
def test_bfloat16_error_is_at_most_twice_the_unfused_one(gate, bfloat16_errors):
    compiled, error, unfused = bfloat16_errors(gate, "compile")
    assert isinstance(compiled.fused_network(BATCH.float()), fusion.CompiledNetwork)
    assert error <= 2 * unfused


def test_forget_none_is_bitwise_the_original(toy, randomised):
    base = randomised(toy())
    net = wfnet.WFNet(base, CLASSES, fuse="compile")
    assert torch.equal(net(BATCH), base(BATCH))
