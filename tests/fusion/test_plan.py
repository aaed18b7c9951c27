"""What folds into a plan, as tables; every small network in them also equals its unfused self."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import wfnet
from wfnet import fusion
from wfnet.layers import WFConv2d, register_maskable

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")

CLASSES = 5
IMAGES = torch.randn(3, 3, 12, 12, dtype=torch.float64)
BN = nn.BatchNorm2d


def conv(kernel: int | tuple[int, int] = 3, **options) -> nn.Conv2d:
    return nn.Conv2d(8, 8, kernel, **{"padding": 1, **options})


def norm_act(act: str, **options) -> nn.Module:
    return timm.layers.BatchNormAct2d(8, act_layer=act, **options)


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


class Deciding(nn.Module):
    """Control flow that torch.fx cannot follow, around a masked layer."""

    def __init__(self, channels: int = 8):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return F.relu(self.conv(x) if x.shape[0] > 0 and x.abs().sum() > 0 else x, inplace=True)


def summed_in_place(net, x):
    x += net.conv(x)
    return net.conv(x)


def summed_behind_a_norm(net, x):
    return F.silu(net.drop(net.norm(net.conv(x))) + net.path(x))


# Modules behind a stem without a norm, or a function of x; convolutions, norms, ReLUs, sums.
FOLDED = {
    "norm with ReLU": ((norm_act("relu", inplace=True), conv(), norm_act("relu")), (2, 2, 2, 0)),
    "dropping norm": ((norm_act("relu", drop_layer=timm.layers.DropBlock2d),), (1, 1, 1, 0)),
    "torchvision frozen": ((torchvision.ops.FrozenBatchNorm2d(8, eps=1e-3),), (1, 1, 0, 0)),
    "timm frozen": ((timm.layers.FrozenBatchNormAct2d(8, act_layer="silu"),), (1, 1, 0, 0)),
    "synchronised norm": ((nn.SyncBatchNorm(8), conv()), (2, 1, 0, 0)),
    "group norm": ((timm.layers.GroupNormAct(8, 2, act_layer=nn.ReLU), conv()), (2, 0, 0, 0)),
    "norm before a convolution": ((nn.ReLU(), norm_act("silu"), conv(bias=False)), (2, 0, 1, 0)),
    "norm behind another layer": ((Doubling(8, 8, 1), BN(8)), (1, 0, 0, 0)),
    "sum behind a norm": (summed_behind_a_norm, (2, 1, 0, 1)),
    "sum that broadcasts": (
        lambda net, x: net.conv(x + net.conv(x.mean((2, 3), keepdim=True))),
        (3, 0, 0, 0),
    ),
    "sum in place": (summed_in_place, (3, 0, 0, 1)),
    "called twice": (lambda net, x: net.conv(F.silu(net.conv(x))), (3, 0, 0, 0)),
    "same": ((nn.ReLU(), conv(padding="same"), BN(8), nn.ReLU()), (2, 1, 2, 0)),
    "lopsided": ((conv((2, 4), padding="same", dilation=(1, 3)), BN(8)), (2, 1, 0, 0)),
    "circular": ((conv((1, 3), padding=(0, 1), stride=2, padding_mode="circular"),), (2, 0, 0, 0)),
    "timm same": ((timm.layers.Conv2dSame(8, 8, 3, stride=2), BN(8)), (2, 1, 0, 0)),
}


@pytest.mark.parametrize("name", FOLDED)
def test_what_folds(name, network_of, pair_of, check_equal):
    body, expected = FOLDED[name]
    if isinstance(body, tuple):
        body = nn.Sequential(*body)
    drop, path = torchvision.ops.StochasticDepth(0.5, "row"), timm.layers.DropPath(0.5)
    net, fused = pair_of(network_of(body, conv=conv(), norm=BN(8), drop=drop, path=path))
    plan = fusion.make_plan(net.model, IMAGES)
    assert folded(plan) == expected
    assert not any(step.in_place for step in calls(plan)), "a copy that nobody needs"
    check_equal(net, fused, IMAGES)
    check_equal(net, fused, IMAGES[..., :11])


def mixed(net, x):
    x = net.norm(x).relu()
    x = net.deciding(x) + net.own(x)
    return net.conv(net.linear(x.movedim(1, -1)).movedim(-1, 1)) + x


def test_other_masked_layers_run_by_themselves_and_uncompiled(
    caplog, network_of, pair_of, check_equal
):
    modules = {"norm": BN(8), "deciding": Deciding(), "own": Doubling(8, 8, 1)}
    model = network_of(mixed, **modules, conv=conv(), linear=nn.Linear(8, 8))
    net, fused = pair_of(model, "compile", targets=[nn.Conv2d, "linear"])
    plan = fusion.make_plan(net.model, IMAGES)
    assert folded(plan) == (2, 1, 1, 1)
    assert "masked layers in deciding, own, linear" in plan.describe()
    with caplog.at_level(logging.WARNING, logger="wfnet"):
        check_equal(net, fused, IMAGES)
    assert "runs uncompiled" in caplog.text


@pytest.mark.parametrize(
    ("first", "reason"),
    [(Doubling(3, 3, 1), "no masked convolution that folds"), (Deciding(3), "cannot trace")],
)
def test_nothing_to_fold_is_refused(first, reason, pair_of):
    net, _ = pair_of(nn.Sequential(first, nn.Flatten(), nn.Linear(432, CLASSES)))
    with pytest.raises(fusion.NotFusable, match=reason):
        fusion.make_plan(net.model, IMAGES)


# -- whose epilogue runs where --------------------------------------------------------------------


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
