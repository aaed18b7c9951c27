"""WFConv2d and WFLinear as drop-in layers."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

import wfnet
from wfnet import WFConv2d, WFLinear, forgetting, layers


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def randomize(layer):
    for name, parameter in layer.named_parameters():
        if name.startswith("alpha_"):
            nn.init.normal_(parameter, 2, 1)
    return layer


def by_hand(conv, x, label):
    """The paper's equation on a real masked copy of the weights."""
    twin = copy.deepcopy(conv)
    with torch.no_grad():
        twin.weight.mul_(conv.gates()[label][:, None, None, None])
        if conv.bias is not None:
            twin.bias.mul_(conv.gates("bias")[label])
    with forgetting(None):
        return twin(x)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [0, 2, (1, 2), "same", "valid"])
@pytest.mark.parametrize("kernel", [3, (4, 2)])
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
    torch.testing.assert_close(eager[1:], by_hand(conv, x[1:], 2), rtol=0, atol=1e-10)
    inputs = (x, conv.alpha_weight, conv.alpha_bias)
    found, expected = (torch.autograd.grad(y.square().sum(), inputs) for y in (eager, truth))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_state_dict_keys_of_the_base_keep_their_names():
    conv = WFConv2d(4, 6, 3, num_classes=3)
    assert list(conv.state_dict()) == ["weight", "bias", "alpha_weight", "alpha_bias"]
    assert list(WFLinear(4, 6, bias=False, num_classes=3).state_dict()) == [
        "weight",
        "alpha_weight",
    ]
    other = randomize(WFConv2d(4, 6, 3, num_classes=3))
    conv.load_state_dict(other.state_dict())
    with forgetting(1):
        x = torch.randn(2, 4, 5, 5)
        assert torch.equal(conv(x), other(x))


def test_only_filters_require_grad():
    conv = WFConv2d(4, 6, 3, num_classes=3)
    wanted = {n for n, p in conv.named_parameters() if p.requires_grad}
    assert wanted == {"alpha_weight", "alpha_bias"}
    assert WFConv2d(4, 6, 3, bias=False, num_classes=3).alpha_bias is None
    with pytest.raises(ValueError, match="no bias"):
        WFConv2d(4, 6, 3, bias=False, num_classes=3).gates("bias")


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
    with forgetting(1):
        masked(x)
    assert calls


def test_from_conv_keeps_hooks():
    conv = nn.Conv2d(4, 6, 3)
    conv.register_forward_hook(lambda m, a, y: y * 0)
    with forgetting(None):
        assert not WFConv2d.from_conv(conv, num_classes=3)(torch.randn(1, 4, 5, 5)).any()


def test_from_linear():
    linear = nn.Linear(4, 6, dtype=torch.bfloat16)
    masked = WFLinear.from_linear(linear, num_classes=3)
    assert masked.alpha_weight.dtype == torch.float32
    x = torch.randn(2, 5, 4, dtype=torch.bfloat16)
    with forgetting(None):
        assert torch.equal(masked(x), linear(x))


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


@pytest.mark.parametrize("kind", [Doubled, Standardised])
def test_a_subclass_that_computes_something_else_is_refused_by_name(kind):
    with pytest.raises(TypeError, match=kind.__name__):
        WFConv2d.from_conv(kind(4, 6, 3), num_classes=3)


def test_a_forward_replaced_on_the_instance_is_refused():
    conv = nn.Conv2d(4, 6, 3)
    conv.forward = lambda x: F.conv2d(x, conv.weight)
    with pytest.raises(TypeError, match="replaced"):
        WFConv2d.from_conv(conv, num_classes=3)


def test_a_subclass_that_keeps_forward_is_masked_and_baked_as_itself():
    masked = WFConv2d.from_conv(Named(4, 6, 3), num_classes=3)
    assert type(masked.bake([1])) is Named


def test_other_layers_are_refused():
    with pytest.raises(TypeError, match="Linear"):
        WFConv2d.from_conv(nn.Linear(3, 4), num_classes=3)
    with pytest.raises(TypeError, match="Conv1d"):
        WFConv2d.from_conv(nn.Conv1d(3, 4, 1), num_classes=3)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "compute",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        weight_norm,
        torch.nn.utils.spectral_norm,
        lambda conv: prune.random_unstructured(conv, "weight", 0.5),
    ],
    ids=["weight", "spectral", "old weight", "old spectral", "pruned"],
)
def test_computed_weights_are_refused_with_a_remedy_that_works(compute):
    layer = compute(nn.Conv2d(4, 6, 3))
    with pytest.raises(ValueError, match="is computed; make it a plain parameter") as refusal:
        WFConv2d.from_conv(layer, num_classes=3)
    exec(str(refusal.value).partition("first: ")[2], {"torch": torch, "layer": layer})
    WFConv2d.from_conv(layer, num_classes=3)


def test_lazy_layers_are_refused():
    with pytest.raises(ValueError, match="no weight yet"):
        WFConv2d.from_conv(nn.LazyConv2d(6, 3), num_classes=3)


@pytest.mark.parametrize("wrong", [0, -1, 2.0, True, "3", None])
def test_wrong_num_classes(wrong):
    with pytest.raises(ValueError, match="num_classes must be a positive integer; got"):
        WFConv2d(4, 6, 3, num_classes=wrong)


def test_numpy_num_classes():
    conv = WFConv2d(4, 6, 3, num_classes=np.int64(3))
    assert type(conv.num_classes) is int


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -100.0])
def test_wrong_alpha_init(wrong):
    with pytest.raises(ValueError, match="alpha_init"):
        WFConv2d(4, 6, 3, num_classes=2, alpha_init=wrong)


def test_unknown_backend_is_an_error_at_once():
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        WFConv2d(4, 6, 3, num_classes=2, backend="fast")


@pytest.mark.parametrize("alpha_init", [-20.0, 0.3, 20.0])
def test_fresh_layer_is_the_original_whatever_the_start(alpha_init):
    conv = WFConv2d(4, 6, 3, bias=False, num_classes=2, alpha_init=alpha_init)
    x = torch.randn(2, 4, 5, 5)
    with forgetting(1):
        assert torch.equal(conv(x), F.conv2d(x, conv.weight))


def test_paper_gates_are_not_normalised():
    conv = WFConv2d(4, 6, 3, num_classes=2, normalize_gate=False)
    torch.testing.assert_close(conv.gates(), torch.full((2, 6), 3.0).sigmoid())


@pytest.mark.parametrize("labels", [[], [1], [1, 2], [2, 1, 2, -1]])
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_bake_equals_the_masked_layer(labels, kind):
    if kind == "conv":
        layer, x = WFConv2d(4, 6, 3, num_classes=3), torch.randn(2, 4, 5, 5)
    else:
        layer, x = WFLinear(4, 6, num_classes=3), torch.randn(2, 5, 4)
    randomize(layer)
    baked = layer.bake(labels)
    assert type(baked) in (nn.Conv2d, nn.Linear)
    assert list(baked.state_dict()) == ["weight", "bias"]
    with forgetting(torch.tensor([labels or [-1]] * 2)):
        torch.testing.assert_close(baked(x), layer(x))
    if not labels:
        assert torch.equal(baked.weight, layer.weight)
    with torch.no_grad():
        baked.weight.zero_()
    assert layer.weight.any()
    calls = []
    baked.register_forward_hook(lambda *_: calls.append(1))
    with forgetting(0):
        layer(x)
    assert not calls


def test_bake_checks_the_range():
    with pytest.raises(ValueError, match="label 3 is out of range"):
        WFConv2d(4, 6, 3, num_classes=3).bake([3])


def test_copies_pickles_and_saved_layers_compute_the_same():
    conv = randomize(WFConv2d.from_conv(nn.Conv2d(4, 6, 3), num_classes=3))
    file = io.BytesIO()
    torch.save(conv, file)
    file.seek(0)
    x = torch.randn(2, 4, 5, 5)
    twins = (
        copy.deepcopy(conv),
        pickle.loads(pickle.dumps(conv)),
        torch.load(file, weights_only=False),
    )
    for twin in twins:
        with forgetting(torch.tensor([0, 2])):
            assert torch.equal(twin(x), conv(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_conversion_of_the_whole_layer(dtype):
    conv = WFConv2d(4, 6, 3, num_classes=3).to(dtype)
    x = torch.randn(2, 4, 5, 5, dtype=dtype)
    with forgetting(1):
        y = conv(x)
        assert y.dtype == dtype
        y.sum().backward()
        assert conv.alpha_weight.grad.dtype == dtype
        plain = F.conv2d(x, conv.weight, conv.bias)
        torch.testing.assert_close(y, plain, rtol=0.02, atol=0.005)
        with pytest.raises(TypeError, match=r"float32.*must have the same"):
            conv(torch.randn(2, 4, 5, 5))


def test_meta_device():
    conv = WFConv2d(4, 6, 3, num_classes=3, device="meta")
    with forgetting(torch.tensor([0, 1], device="meta")):
        assert conv(torch.randn(2, 4, 5, 5, device="meta")).shape == (2, 6, 3, 3)


def test_layer_names_itself():
    assert "num_classes=3, backend='auto'" in repr(WFConv2d(4, 6, 3, num_classes=3))


def test_register_maskable():
    try:

        @layers.register_maskable(Doubled)
        class WFDoubled(WFConv2d):
            def forward(self, x):
                return 2 * super().forward(x)

        conv = Doubled(4, 6, 3)
        masked = WFConv2d.from_conv(conv, num_classes=3)
        assert type(masked) is WFDoubled
        with wfnet.forgetting(None):
            x = torch.randn(1, 4, 5, 5)
            assert torch.equal(masked(x), conv(x))
    finally:
        layers._MASKABLE.pop(Doubled, None)
