"""What folds into a plan, as a table; every network in it also equals its unfused self."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import wfnet
from wfnet import fusion
from wfnet.fusion import rewrite
from wfnet.layers import WFConv2d, register_maskable

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")

CLASSES = 5
IMAGES = torch.randn(3, 3, 12, 12, dtype=torch.float64)


def conv(channels: int = 8, **options) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, **{"padding": 1, **options})


def norm_act(act: type[nn.Module] | str | None, **options) -> nn.Module:
    return timm.layers.BatchNormAct2d(8, act_layer=act, apply_act=act is not None, **options)


def randomised_buffers(norm: nn.Module) -> nn.Module:
    for name, low, high in (("weight", 0.5, 1.5), ("bias", -0.3, 0.3)):
        for tensor in (getattr(norm, name), getattr(norm, f"running_{name}", None)):
            if tensor is not None:
                nn.init.uniform_(tensor.data, low, high)
    nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return norm


def folded(plan: fusion.Plan) -> tuple[int, int, int, int]:
    """Convolutions, norms, ReLUs and residual sums."""
    convs = plan.convolutions
    norms = sum(step.norm is not None for step in convs)
    sums = sum(step.residual is not None for step in convs)
    return len(convs), norms, sum(step.relu for step in convs), sums


def calls(plan: fusion.Plan) -> list[fusion.CallStep]:
    return [step for step in plan.steps if isinstance(step, fusion.CallStep)]


class Doubling(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


@register_maskable(Doubling)
class WFDoubling(WFConv2d):
    _base_type = Doubling

    def forward(self, x):
        return 2 * super().forward(x)


class DoublingNorm(timm.layers.BatchNormAct2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Deciding(nn.Module):
    """Control flow that torch.fx cannot follow, around a masked layer."""

    def __init__(self, channels: int = 8):
        super().__init__()
        self.conv = conv(channels)

    def forward(self, x):
        return F.relu(self.conv(x) if x.shape[0] > 0 and x.abs().sum() > 0 else x, inplace=True)


def mixed(net, x):
    x = net.norm(x).relu()
    x = net.deciding(x) + net.own(x)
    return net.conv(net.linear(x.movedim(1, -1)).movedim(-1, 1)) + x


def mixed_network(network_of) -> nn.Module:
    modules = {"norm": nn.BatchNorm2d(8), "deciding": Deciding(), "own": Doubling(8, 8, 1)}
    return network_of(mixed, **modules, conv=conv(), linear=nn.Linear(8, 8))


MIXED = {"targets": [nn.Conv2d, "linear"]}


def mixed_convolution(net, x):
    """Kernels of several sizes over parts of the channels, with one norm behind them."""
    parts = x.split([3, 5], 1)
    return net.norm(torch.cat([net.small(parts[0]), net.large(parts[1])], 1))


def joined_with_others(net, x):
    y = net.small(x)
    return net.norm(torch.cat([y, x[:, :2]], 1)) + net.second(torch.cat([y, net.large(x)], 1))


def summed_in_place(net, x):
    x += net.conv(x)
    return net.conv(x)


def sequence(*modules: nn.Module):
    return lambda net: net(nn.Sequential(*modules))


def first_layer(stem: nn.Module, *rest: nn.Module):
    def make(network_of):
        net = network_of(nn.Sequential(*rest))
        net.stem = stem
        return net

    return make


DROP = timm.layers.DropBlock2d
BN = nn.BatchNorm2d
# A network and (convolutions, norms, ReLUs, residual sums) that fold. Beside a stem without a norm.
FOLDED = {
    "norm with ReLU": (
        sequence(norm_act("relu", inplace=True), conv(), norm_act("relu")),
        (2, 2, 2, 0),
    ),
    "norm with SiLU": (
        sequence(norm_act(nn.SiLU, inplace=True), conv(), norm_act(nn.SiLU)),
        (2, 2, 0, 0),
    ),
    "norm with Hardswish": (sequence(norm_act(nn.Hardswish), conv()), (2, 1, 0, 0)),
    "norm with PReLU": (sequence(norm_act(nn.PReLU), conv(), norm_act(nn.PReLU)), (2, 2, 0, 0)),
    "dropping norm": (sequence(norm_act("relu", drop_layer=DROP), conv()), (2, 1, 1, 0)),
    "torchvision frozen norm": (
        sequence(randomised_buffers(torchvision.ops.FrozenBatchNorm2d(8, eps=1e-3)), conv()),
        (2, 1, 0, 0),
    ),
    "timm frozen norm": (
        sequence(randomised_buffers(timm.layers.FrozenBatchNormAct2d(8, act_layer="silu")), conv()),
        (2, 1, 0, 0),
    ),
    "synchronised norm": (sequence(randomised_buffers(nn.SyncBatchNorm(8)), conv()), (2, 1, 0, 0)),
    "group norm": (
        sequence(timm.layers.GroupNormAct(8, 2, act_layer=nn.ReLU), conv()),
        (2, 0, 0, 0),
    ),
    "evolved norm": (sequence(timm.layers.EvoNorm2dS0(8, groups=2), conv()), (2, 0, 0, 0)),
    "norm of another forward": (sequence(DoublingNorm(8), conv()), (2, 0, 0, 0)),
    "norm before a convolution": (
        sequence(nn.ReLU(), norm_act("silu"), conv(bias=False)),
        (2, 0, 1, 0),
    ),
    "norm behind layers that do not fold": (
        lambda net: net(lambda net, x: net.norm(net.own(x)), own=Doubling(8, 8, 1), norm=BN(8)),
        (1, 0, 0, 0),
    ),
    "sum behind a norm": (
        lambda net: net(
            lambda net, x: F.silu(net.norm(net.conv(x)) + x), conv=conv(), norm=norm_act(None)
        ),
        (2, 1, 0, 1),
    ),
    "sum that broadcasts": (
        lambda net: net(
            lambda net, x: net.conv(x + net.conv(x.mean((2, 3), keepdim=True))), conv=conv()
        ),
        (3, 0, 0, 0),
    ),
    "sum in place": (lambda net: net(summed_in_place, conv=conv()), (3, 0, 0, 1)),
    "mixed convolution": (
        lambda net: net(
            mixed_convolution,
            small=nn.Conv2d(3, 2, 1),
            large=nn.Conv2d(5, 6, 5, padding=2, bias=False),
            norm=norm_act("silu"),
        ),
        (3, 2, 0, 0),
    ),
    "joined with others": (
        lambda net: net(
            joined_with_others,
            small=nn.Conv2d(8, 6, 1),
            large=nn.Conv2d(8, 2, 1),
            norm=norm_act("silu"),
            second=norm_act("silu"),
        ),
        (3, 0, 0, 0),
    ),
    "stochastic depth": (
        lambda net: net(
            lambda net, x: net.drop(net.norm(net.conv(x))) + net.path(x),
            conv=conv(),
            norm=BN(8),
            drop=torchvision.ops.StochasticDepth(0.5, "row"),
            path=timm.layers.DropPath(0.5),
        ),
        (2, 1, 0, 1),
    ),
    "called twice": (
        lambda net: net(lambda net, x: net.conv(F.silu(net.conv(x))), conv=conv()),
        (3, 0, 0, 0),
    ),
    "first layer of another kind": (
        first_layer(Doubling(3, 8, 1), conv(), nn.ReLU()),
        (1, 0, 1, 0),
    ),
    "padded first layer": (
        first_layer(timm.layers.Conv2dSame(3, 8, 3, stride=2), conv()),
        (2, 0, 0, 0),
    ),
}


@pytest.mark.parametrize("name", FOLDED)
def test_what_folds(name, network_of, pair_of, check_equal):
    make, expected = FOLDED[name]
    net, fused = pair_of(make(network_of))
    plan = fusion.make_plan(net.model, IMAGES)
    assert folded(plan) == expected
    assert not any(step.in_place for step in calls(plan)), "a copy that nobody needs"
    check_equal(net, fused, IMAGES)


PADDING = {
    "same": (conv(padding="same"), False),
    "lopsided": (nn.Conv2d(8, 8, (2, 4), padding="same", dilation=(1, 3)), True),
    "valid": (conv(padding="valid"), False),
    "reflect": (conv(padding_mode="reflect"), True),
    "circular": (
        nn.Conv2d(8, 8, (1, 3), padding=(0, 1), stride=2, padding_mode="circular"),
        True,
    ),
    "replicate": (conv(padding="same", padding_mode="replicate"), True),
    "timm": (timm.layers.Conv2dSame(8, 8, 3, stride=2), True),
}


@pytest.mark.parametrize("name", PADDING)
def test_padded_convolutions_fold(name, network_of, pair_of, check_equal):
    layer, apart = PADDING[name]
    net, fused = pair_of(network_of(nn.Sequential(nn.ReLU(), layer, BN(8), nn.ReLU())))
    plan = fusion.make_plan(net.model, IMAGES)
    assert folded(plan) == (2, 1, 2, 0)
    assert apart == any(isinstance(step.call, rewrite.Padded) for step in calls(plan))
    for size in (12, 11):
        check_equal(net, fused, IMAGES[..., :size])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("conv", (1, 0, 0, 0)),
        ("norm", (2, 0, 0, 0)),
        ("relu", (2, 1, 0, 0)),
        ("pool", (2, 1, 1, 0)),
        ("rest", (2, 1, 1, 0)),
        ("", (1, 0, 0, 0)),
    ],
)
def test_modules_with_hooks_are_called(name, expected, network_of, pair_of, check_equal):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.relu = conv(), BN(8), nn.ReLU(inplace=True)
            self.pool, self.rest = nn.MaxPool2d(2), nn.Identity()

        def forward(self, x):
            return self.rest(self.pool(self.relu(self.norm(self.conv(x)))))

    model = network_of(Block())
    module = model.body.get_submodule(name)
    module.register_forward_hook(lambda module, inputs, output: 3 * output)
    net, fused = pair_of(model)
    assert folded(fusion.make_plan(net.model, IMAGES)) == expected
    check_equal(net, fused, IMAGES)


def test_other_masked_layers_run_by_themselves(network_of, pair_of, check_equal):
    net, fused = pair_of(mixed_network(network_of), **MIXED)
    plan = fusion.make_plan(net.model, IMAGES)
    assert folded(plan) == (2, 1, 1, 1)
    apart = [step.output.name for step in calls(plan) if step.layers]
    assert apart == ["deciding", "own", "linear"]
    assert "masked layers in deciding, own, linear" in plan.describe()
    check_equal(net, fused, IMAGES)


def test_masked_layers_that_run_by_themselves_run_uncompiled(
    caplog, network_of, pair_of, check_equal
):
    net, fused = pair_of(mixed_network(network_of), "compile", **MIXED)
    with caplog.at_level(logging.WARNING, logger="wfnet"):
        check_equal(net, fused, IMAGES)
    assert "runs uncompiled" in caplog.text
    assert not isinstance(fused.fused_network(IMAGES), fusion.CompiledNetwork)


def test_untraining_moves_filters_of_all_kinds(network_of, pair_of):
    pair = pair_of(mixed_network(network_of), **MIXED)
    images = torch.rand(CLASSES, 3, 12, 12)
    data = wfnet.data.TensorImages(images, torch.arange(CLASSES), list("abcde"))
    options = {"steps": 2, "batch_size": 4, "label_expansion": 2}
    config = wfnet.UntrainConfig.recipe("balanced", CLASSES, **options)
    for network in pair:
        wfnet.untrain(network.float(), data, None, config, progress=False)
    assert pair[1].fused_network(images) is not None
    for expected, found in zip(*(net.filter_parameters() for net in pair), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_nothing_to_fold_is_refused(network_of, pair_of):
    net, _ = pair_of(first_layer(Doubling(3, 8, 1))(network_of))
    with pytest.raises(fusion.NotFusable, match="no masked convolution that folds"):
        fusion.make_plan(net.model, IMAGES)
    net, _ = pair_of(nn.Sequential(Deciding(3), nn.Flatten(), nn.Linear(432, CLASSES)))
    with pytest.raises(fusion.NotFusable, match="cannot trace"):
        fusion.make_plan(net.model, IMAGES)


# -- whose epilogue runs where --------------------------------------------------------------------


def test_sums_belong_to_the_first_of_two_convolutions(toy, pair_of):
    net, _ = pair_of(toy())
    steps = fusion.make_plan(net.model).convolutions
    found = {s.name: (s.norm is not None, s.residual is not None, s.relu) for s in steps}
    assert found == {
        "conv1": (True, False, True),
        "conv2": (True, True, True),
        "shortcut": (False, False, False),
        "conv3": (False, True, True),
    }


def test_the_backward_chain_of_a_bottleneck_network():
    """Only what a pooling or the head sends down takes a pass of its own."""
    with torch.device("meta"):
        model = torchvision.models.resnet50(num_classes=CLASSES)
        convs = fusion.make_plan(wfnet.WFNet(model, CLASSES).model).convolutions
    in_chain = {step.below.name for step in convs if step.below is not None}
    shortcuts = {step.shortcut.name for step in convs if step.shortcut is not None}
    assert shortcuts == {f"layer{i}.0.downsample.0" for i in range(1, 5)}
    assert {step.name for step in convs} - in_chain - shortcuts == {"conv1", "layer4.2.conv3"}
    by_name = {step.name: step for step in convs}
    assert by_name["layer2.0.conv1"].below is by_name["layer1.2.conv3"]
    assert by_name["layer2.0.downsample.0"].below is None  # its gradient is not the last one
    assert [step.name for step in convs if step.at_source] == ["conv1"]


# -- networks: what folds, and how many epilogues run in the pass of another layer ----------------

WHOLE = {
    "torchvision resnet18": ((20, 20, 17, 8), 15),
    "torchvision resnet50": ((53, 53, 49, 16), 47),
    "torchvision vgg16": ((13, 0, 13, 0), 8),
    "torchvision vgg16_bn": ((13, 13, 13, 0), 8),
    "timm resnet18": ((20, 20, 17, 8), 15),
    "timm resnet50": ((53, 53, 49, 16), 47),
    "timm vgg16_bn": ((13, 13, 13, 0), 8),
    "timm darknet53": ((52, 52, 0, 0), None),
    "timm efficientnet_b0": ((81, 49, 0, 9), None),
    "timm mobilenetv2_100": ((52, 52, 0, 10), None),
    "timm cspresnet50": ((55, 55, 0, 13), None),
    "timm rexnet_100": ((75, 62, 13, 0), None),
    "timm skresnet18": ((44, 36, 33, 8), None),
    "timm res2net50_26w_4s": ((85, 85, 81, 16), None),
    "timm mixnet_s": ((123, 97, 5, 1), None),
}


@pytest.mark.parametrize("title", WHOLE)
def test_how_much_of_a_network_folds(title):
    package, name = title.split()
    make = timm.create_model if package == "timm" else torchvision.models.get_model
    with torch.device("meta"):
        plan = fusion.make_plan(wfnet.WFNet(make(name, num_classes=CLASSES), CLASSES).model)
    expected, in_chain = WHOLE[title]
    assert folded(plan) == expected
    if in_chain is None:
        assert not any(step.in_place for step in calls(plan))
    else:
        assert sum(step.below is not None for step in plan.convolutions) == in_chain
        rest = {getattr(step.call, "__name__", type(step.call).__name__) for step in calls(plan)}
        assert not {"Conv2d", "WFConv2d", "BatchNorm2d", "add", "iadd"} & rest
