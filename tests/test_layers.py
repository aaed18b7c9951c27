"""WFConv2d and WFLinear as drop-in layers."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.utils import parametrizations, prune

from wfnet import WFConv2d, forgetting


def randomize(module):
    """``module`` with random filters, its own and those of layers inside."""
    for name, parameter in module.named_parameters():
        if name.rpartition(".")[2].startswith("alpha_"):
            nn.init.normal_(parameter, 2, 1)
    return module


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
@pytest.mark.parametrize(("padding", "kernel"), [((1, 2), 3), ("same", (4, 2)), ("valid", 3)])
def test_all_padding_modes(mode, padding, kernel):
    conv = WFConv2d(
        4, 6, kernel, padding=padding, padding_mode=mode, num_classes=3, dtype=torch.float64
    )
    plain = nn.Conv2d(4, 6, kernel, padding=padding, padding_mode=mode, dtype=torch.float64)
    assert not conv.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    with forgetting(torch.tensor([1, 2])):
        torch.testing.assert_close(conv(x), plain(x), rtol=0, atol=1e-12)  # fresh
        randomize(conv)
        eager = conv(x)
        conv.backend = "reference"
        truth = conv(x)
    torch.testing.assert_close(eager, truth, rtol=0, atol=1e-10)
    torch.testing.assert_close(eager[1:], conv.bake([2])(x[1:]), rtol=0, atol=1e-10)
    inputs = (x, conv.alpha_weight, conv.alpha_bias)
    found, expected = (torch.autograd.grad(y.square().sum(), inputs) for y in (eager, truth))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_from_conv_leaves_the_original_alone():
    conv = nn.Conv2d(4, 6, 3, padding=1)
    masked = WFConv2d.from_conv(conv, num_classes=3)
    assert conv.weight.requires_grad
    assert masked.weight.data_ptr() != conv.weight.data_ptr()
    x = torch.randn(2, 4, 5, 5)
    with forgetting(None):
        assert torch.equal(masked(x), conv(x))
    calls = []
    masked.register_forward_hook(lambda *_: calls.append(1))
    conv(x)
    assert not calls


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Standardised(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


class Named(nn.Conv2d):
    """Changes nothing that matters."""

    def __repr__(self):
        return "Named"


def replaced_forward():
    conv = nn.Conv2d(4, 6, 3)
    conv.forward = lambda x: F.conv2d(x, conv.weight)
    return conv


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Doubled(4, 6, 3), "Doubled"),
        (lambda: Standardised(4, 6, 3), "Standardised"),
        (replaced_forward, "replaced"),
        (lambda: nn.Linear(3, 4), "Linear"),
        (lambda: nn.Conv1d(3, 4, 1), "Conv1d"),
    ],
    ids=["forward", "conv_forward", "instance", "linear", "one_dimensional"],
)
def test_what_computes_something_else_is_refused_by_name(make, says):
    with pytest.raises(TypeError, match=says):
        WFConv2d.from_conv(make(), num_classes=3)


@pytest.mark.parametrize(
    "compute",
    [
        parametrizations.weight_norm,
        torch.nn.utils.spectral_norm,
        lambda conv: prune.random_unstructured(conv, "weight", 0.5),
    ],
    ids=["parametrized", "hook", "pruned"],
)
def test_computed_weights_are_refused(compute):
    with pytest.raises(ValueError, match="is computed; make it a plain parameter"):
        WFConv2d.from_conv(compute(nn.Conv2d(4, 6, 3)), num_classes=3)


def test_a_subclass_that_keeps_forward_is_masked_and_baked_as_itself():
    masked = WFConv2d.from_conv(Named(4, 6, 3), num_classes=3)
    assert type(masked.bake([1])) is Named


@pytest.mark.parametrize(
    ("options", "says"),
    [({"num_classes": n}, f"positive integer; got {n!r}") for n in (0, 2.0, True)]
    + [({"alpha_init": a}, "alpha_init") for a in (float("nan"), -100.0)]
    + [({"backend": "fast"}, "unknown backend 'fast'")],
    ids=str,
)
def test_wrong_options_are_errors_at_once(options, says):
    with pytest.raises(ValueError, match=says):
        WFConv2d(4, 6, 3, **{"num_classes": 2, **options})


@pytest.mark.parametrize("alpha_init", [-20.0, 20.0])
def test_fresh_layer_is_the_original_whatever_the_start(alpha_init):
    conv = WFConv2d(4, 6, 3, bias=False, num_classes=np.int64(2), alpha_init=alpha_init)
    x = torch.randn(2, 4, 5, 5)
    with forgetting(1):
        assert torch.equal(conv(x), F.conv2d(x, conv.weight))
    with pytest.raises(ValueError, match="no bias"):
        conv.gates("bias")


# -- torch.compile --------------------------------------------------------------------------------

FORGET = torch.tensor([0, 3, -1, 6])
SEVERAL = torch.tensor([[1, 2], [3, -1], [0, 0], [-1, -1]])
IMAGES = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _fresh_compiler():
    """Nothing is compiled yet."""
    torch._dynamo.reset()


def gradients(net, y):
    return torch.autograd.grad(y.square().sum(), net.filter_parameters())


def test_inductor():
    conv = randomize(WFConv2d(1, 4, 3, num_classes=7))
    compiled = torch.compile(lambda x: conv(x).relu_(), backend="inductor", fullgraph=True)
    for forget in (FORGET, FORGET.flip(0)):
        with forgetting(forget):
            y, expected = compiled(IMAGES), conv(IMAGES).relu_()
        torch.testing.assert_close(y, expected)
        (found,) = torch.autograd.grad(y.square().sum(), conv.alpha_weight)
        (wanted,) = torch.autograd.grad(expected.square().sum(), conv.alpha_weight)
        torch.testing.assert_close(found, wanted)


def test_compiled_network_equals_eager(make_net):
    net = make_net()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    y = compiled(IMAGES, forget=FORGET)
    torch.testing.assert_close(y, net(IMAGES, FORGET), rtol=1e-5, atol=1e-6)
    for a, b in zip(gradients(net, y), gradients(net, net(IMAGES, FORGET)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert torch.equal(compiled(IMAGES), net(IMAGES))
    source, forget = torch.tensor([0, 0, 1, 3, 3]), torch.tensor([1, 2, 3, 4, -1])
    found = compiled(IMAGES, forget=forget, source=source)
    torch.testing.assert_close(found, net(IMAGES, forget, source))
    wrong = compiled(IMAGES, forget=torch.tensor([0, 7, -1, 6]))
    assert wrong.isnan().all(1).tolist() == [False, True, False, False]
    with pytest.raises(ValueError, match="label 12 is out of range"):
        torch.compile(net, backend="eager")(IMAGES, forget=12)
    exported = torch.export.export(net, (IMAGES, FORGET)).module()
    torch.testing.assert_close(exported(IMAGES, FORGET.flip(0)), net(IMAGES, FORGET.flip(0)))


@pytest.mark.parametrize(
    ("labels", "graphs"),
    [((FORGET, FORGET.flip(0)), 1), ((SEVERAL, SEVERAL.flip(0)), 1), ((3, 4, 5, 6), 2)],
    ids=["vector", "matrix", "integers"],
)
def test_new_labels_do_not_recompile(labels, graphs, make_net):
    net, counter = make_net(), CompileCounter()
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    for forget in labels:
        torch.testing.assert_close(compiled(IMAGES, forget=forget), net(IMAGES, forget))
    assert counter.frame_count <= graphs
    layer, counter = net.masked_layers["0"], CompileCounter()
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for forget in labels:
        with forgetting(forget):  # bound outside
            torch.testing.assert_close(compiled(IMAGES), layer(IMAGES))
    assert counter.frame_count == 1
