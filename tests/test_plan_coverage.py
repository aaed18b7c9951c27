"""What a fused plan covers: norms, activations in place, splits, padding, masked layers."""

import copy
import logging
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_fusion import CLASSES, pair_of
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import wfnet
from wfnet import fusion
from wfnet.fusion import rewrite
from wfnet.layers import WFConv2d, register_maskable

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")

IMAGES = torch.randn(3, 3, 12, 12, dtype=torch.float64)
SOURCE = torch.tensor([0, 2, 2, 1, 0])
LABELS = torch.tensor([[0, -1], [4, 1], [-1, -1], [2, 2], [0, 3]])


class Net(nn.Module):
    """A masked stem, then ``body`` (a module or a function of the network), then a head."""

    def __init__(self, body: Callable, channels: int = 8, **modules: nn.Module):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = body
        for name, module in modules.items():
            self.add_module(name, module)
        self.fc = nn.Linear(channels, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        x = self.body(x) if isinstance(self.body, nn.Module) else self.body(self, x)
        return self.fc(x.mean((2, 3)))


def conv(channels: int = 8, **options) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, **{"padding": 1, **options})


def plan_of(model: nn.Module, **options) -> fusion.Plan:
    net, _ = pair_of(model, **options)
    return fusion.make_plan(net.model, IMAGES)


def folded(plan: fusion.Plan) -> tuple[int, int, int, int]:
    """Convolutions, norms, ReLUs and residual sums."""
    convs = plan.convolutions
    return (
        len(convs),
        sum(step.norm is not None for step in convs),
        sum(step.relu for step in convs),
        sum(step.residual is not None for step in convs),
    )


def calls(plan: fusion.Plan) -> list[fusion.CallStep]:
    return [step for step in plan.steps if isinstance(step, fusion.CallStep)]


def check_equal(net: wfnet.WFNet, fused: wfnet.WFNet, images: torch.Tensor = IMAGES) -> None:
    """Outputs and the gradient of every filter matrix, of mixed labels over shared images."""
    expected, found = net(images, LABELS, SOURCE), fused(images, LABELS, SOURCE)
    assert fused._fusion.network is not None, "the network runs unfused"
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
    weights = torch.randn(expected.shape, dtype=torch.float64)
    for network, logits in ((net, expected), (fused, found)):
        network.zero_grad()
        (logits * weights).sum().backward()
    for key, parameter in net.named_filters().items():
        torch.testing.assert_close(
            fused.named_filters()[key].grad, parameter.grad, rtol=1e-8, atol=1e-12, msg=key
        )


# -- norms ----------------------------------------------------------------------------------------


def norm_act(act: type[nn.Module] | None, **options) -> nn.Module:
    return timm.layers.BatchNormAct2d(8, act_layer=act, apply_act=act is not None, **options)


ACTIVATIONS = [
    nn.ReLU, nn.ReLU6, nn.SiLU, nn.LeakyReLU, nn.Hardswish, nn.GELU, nn.ELU, nn.Mish, nn.Sigmoid,
    nn.PReLU,
]  # fmt: skip


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_a_norm_folds_whatever_activates_behind_it(act: type[nn.Module], inplace: bool):
    acts = "relu" if act is nn.ReLU else act
    model = Net(nn.Sequential(norm_act(acts, inplace=inplace), conv(), norm_act(acts)))
    plan = plan_of(model)
    relus = 2 if act is nn.ReLU else 0
    assert folded(plan) == (2, 2, relus, 0)
    assert not any(step.in_place for step in calls(plan))
    check_equal(*pair_of(model))


def test_what_drops_between_norm_and_activation_is_passed_over():
    drop = timm.layers.DropBlock2d
    model = Net(
        nn.Sequential(norm_act("relu", drop_layer=drop), conv(), norm_act("silu", drop_layer=drop))
    )
    assert folded(plan_of(model)) == (2, 2, 1, 0)
    check_equal(*pair_of(model))


def test_a_sum_follows_a_norm_without_activation():
    def body(net, x):
        return F.silu(net.norm(net.conv(x)) + x)

    model = Net(body, conv=conv(), norm=norm_act(None))
    assert folded(plan_of(model)) == (2, 1, 0, 1)
    check_equal(*pair_of(model))


def randomised_buffers(norm: nn.Module) -> nn.Module:
    for name, low, high in (("weight", 0.5, 1.5), ("bias", -0.3, 0.3), ("running_mean", -0.3, 0.3),
                            ("running_var", 0.5, 1.5)):  # fmt: skip
        nn.init.uniform_(getattr(norm, name).data, low, high)
    return norm


NORMS = {
    "torchvision frozen": (lambda: torchvision.ops.FrozenBatchNorm2d(8, eps=1e-3), True),
    "timm frozen": (lambda: timm.layers.FrozenBatchNormAct2d(8, act_layer="silu"), True),
    "synchronised": (lambda: nn.SyncBatchNorm(8), True),
    "groups": (lambda: timm.layers.GroupNormAct(8, 2, act_layer=nn.ReLU), False),
    "evolved": (lambda: timm.layers.EvoNorm2dS0(8, groups=2), False),
}


@pytest.mark.parametrize("name", NORMS)
def test_which_norms_fold(name: str):
    make, folds = NORMS[name]
    norm = make()
    if folds:
        randomised_buffers(norm)
    model = Net(nn.Sequential(norm, conv()))
    plan = plan_of(model)
    assert folded(plan)[:2] == (2, int(folds))
    assert not any(step.in_place for step in calls(plan)), "a norm's own activation needs no copy"
    check_equal(*pair_of(model))


def test_norms_over_the_batch_do_not_fold():
    assert rewrite.is_frozen_norm(nn.BatchNorm2d(8).eval())
    assert not rewrite.is_frozen_norm(nn.BatchNorm2d(8))
    assert not rewrite.is_frozen_norm(nn.BatchNorm2d(8, track_running_stats=False).eval())


def test_a_norm_whose_forward_is_another_does_not_fold():
    class Doubled(timm.layers.BatchNormAct2d):
        def forward(self, x):
            return 2 * super().forward(x)

    model = Net(nn.Sequential(Doubled(8), conv()))
    assert folded(plan_of(model))[:2] == (2, 0)
    check_equal(*pair_of(model))


def test_a_norm_behind_several_convolutions_folds_into_each():
    """A mixed convolution: parts of the channels, kernels of several sizes, one norm."""

    def body(net, x):
        parts = x.split([3, 5], 1)
        return net.norm(torch.cat([net.small(parts[0]), net.large(parts[1])], 1))

    small, large = nn.Conv2d(3, 2, 1), nn.Conv2d(5, 6, 5, padding=2, bias=False)
    model = Net(body, small=small, large=large, norm=norm_act("silu"))
    plan = plan_of(model)
    assert folded(plan) == (3, 2, 0, 0)
    assert [step.output.target for step in calls(plan) if step.output.op == "call_module"] == [
        "norm.act", "fc"
    ]  # fmt: skip
    check_equal(*pair_of(model))
    net, fused = pair_of(model)
    before = fused(IMAGES, 1)
    for network in (net, fused):
        network.model.norm.running_mean.add_(1.0)
    assert not torch.allclose(fused(IMAGES, 1), before)
    check_equal(net, fused)


def test_a_norm_behind_anything_else_joined_stays():
    def body(net, x):
        y = net.small(x)
        return net.norm(torch.cat([y, x[:, :2]], 1)) + net.second(torch.cat([y, net.large(x)], 1))

    small, large = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 2, 1)
    model = Net(body, small=small, large=large, norm=norm_act("silu"), second=norm_act("silu"))
    assert folded(plan_of(model)) == (3, 0, 0, 0)
    check_equal(*pair_of(model))


def test_a_norm_in_front_of_a_convolution_stays():
    model = Net(nn.Sequential(nn.ReLU(), norm_act("silu"), conv(bias=False)))
    assert folded(plan_of(model)) == (2, 0, 1, 0)
    check_equal(*pair_of(model))


# -- what is computed in place --------------------------------------------------------------------


class Live(TorchDispatchMode):
    """How many bytes of what was made inside are still alive."""

    def __init__(self):
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, torch.Tensor) and result.device.type != "meta":
                storage = result.untyped_storage()
                reference = StorageWeakRef(storage)
                self.made[reference.cdata] = (reference, storage.nbytes())
        return results

    def bytes(self) -> int:
        return sum(size for reference, size in self.made.values() if not reference.expired())


def kept_by(net: wfnet.WFNet, images: torch.Tensor) -> int:
    net(images, 1)
    with Live() as live:
        out = net(images, 1).sum()
        kept = live.bytes()
    out.backward()
    return kept


def test_calls_keep_no_more_than_autograd_needs():
    """A branch and what the activation keeps, per layer: neither the clone of an activation in
    place, nor results that nobody needs."""
    layers = 6
    blocks = [nn.Sequential(conv(bias=False), norm_act("silu")) for _ in range(layers)]
    net, fused = pair_of(Net(nn.Sequential(*blocks)))
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    activation = 4 * 8 * 32 * 32 * 8
    assert kept_by(fused, images) < (2 * layers + 1.5) * activation
    assert kept_by(fused, images) < kept_by(net, images)


def test_sums_concatenations_and_views_keep_nothing():
    def body(net, x):
        y = torch.cat([net.first(x), x + 1], 1)
        y = F.pad(y, [1, 1, 1, 1])[:, :, 1:-1, 1:-1]
        return net.second(y[:, :8] - y[:, 8:])

    model = Net(body, first=conv(bias=False), second=conv(bias=False))
    _, fused = pair_of(model)
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    activation = 4 * 8 * 32 * 32 * 8
    assert kept_by(fused, images) < 3.5 * activation  # the branches of three convolutions
    check_equal(*pair_of(model))


class OwnInPlace(nn.Module):
    """An activation of one's own that we cannot ask not to overwrite its input."""

    def __init__(self):
        super().__init__()
        self.inplace = True

    def forward(self, x):
        return x.mul_(2).tanh_()


IN_PLACE = {
    "function": lambda net, x: net.conv(F.leaky_relu(net.conv(x), 0.2, inplace=True)),
    "functions of torch": lambda net, x: net.conv(
        torch.sigmoid_(net.conv(x)) + F.elu_(net.conv(x))
    ),
    "methods": lambda net, x: net.conv(net.conv(x).mul_(0.5).tanh_()),
    "operators": lambda net, x: net.conv(iadded(net.conv(x), 1.0, x)),
    "read before": lambda net, x: net.conv(x) + F.silu(x, inplace=True),
    "module of one's own": lambda net, x: net.conv(net.own(net.conv(x))),
}


def iadded(x, *others):
    for other in others:
        x += other
    x *= 2
    return x


@pytest.mark.parametrize("name", IN_PLACE)
def test_what_is_computed_in_place_gets_a_result_of_its_own(name: str):
    model = Net(IN_PLACE[name], conv=conv(), own=OwnInPlace())
    plan = plan_of(model)
    copied = [step.output.target for step in calls(plan) if step.in_place]
    assert copied == (["own"] if name == "module of one's own" else [])
    check_equal(*pair_of(model))


def test_parts_changed_in_place_are_told_apart():
    """Autograd refuses it in the unfused network, so that one computes the same out of place."""

    def body(net, x):
        a, b = net.conv(x).chunk(2, 1)
        return torch.cat([F.silu(a, inplace=True), b.tanh_()], 1)

    def out_of_place(net, x):
        a, b = net.conv(x).chunk(2, 1)
        return torch.cat([F.silu(a), b.tanh()], 1)

    net, fused = pair_of(Net(body, conv=conv()))
    assert fused.fused_network(IMAGES) is not None
    net.model.body = out_of_place
    check_equal(net, fused)


def change_a_view(net, x):
    x = net.conv(x)
    x[:, :4].relu_()
    return net.conv(x)


def change_the_whole(net, x):
    x = net.conv(x)
    part = x[:, :8]
    return net.conv(F.silu(x, inplace=True)) + part


def change_what_is_read(net, x):
    x = net.conv(x)
    y = F.silu(x, inplace=True)
    return net.conv(x) + y


def change_what_is_summed(net, x):
    x += net.conv(x)
    return net.conv(x)


def assign(net, x):
    x = net.conv(x)
    x[:, 0] = 0.0
    return net.conv(x)


@pytest.mark.parametrize(
    "body", [change_a_view, change_the_whole, change_what_is_read, assign], ids=lambda f: f.__name__
)
def test_values_that_are_changed_and_read_run_unfused(body, caplog):
    net, fused = pair_of(Net(body, conv=conv()))
    with pytest.raises(
        fusion.NotFusable, match=r"changes a value in place|writes into|cannot trace"
    ):
        fusion.make_plan(net.model, IMAGES)
    with caplog.at_level(logging.WARNING, logger="wfnet"):
        torch.testing.assert_close(fused(IMAGES, 1), net(IMAGES, 1))
    assert "runs unfused" in caplog.text


def test_a_sum_in_place_folds_into_its_convolution():
    model = Net(change_what_is_summed, conv=conv())
    assert folded(plan_of(model)) == (3, 0, 0, 1)
    check_equal(*pair_of(model))


def test_an_operation_in_place_keeps_the_dtype():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_method("add_", (x, 1.0))
    call = rewrite.out_of_place(node, rewrite.Method("add_"))
    value = torch.ones(2, dtype=torch.bfloat16)
    assert call(value, torch.ones(2)).dtype is torch.bfloat16
    assert value.tolist() == [1, 1]


# -- operations with several results --------------------------------------------------------------


def by_hand(net, x):
    parts = torch.split(x, [2, 2, 4], 1)
    return torch.cat([net.two(parts[0]) + parts[1], net.two(parts[1]), parts[-1]], 1)


def unpacked(net, x):
    a, b = x.chunk(2, dim=1)
    return torch.cat([net.four(a) * b.sigmoid(), b], 1)


def looped(net, x):
    return torch.cat([net.two(part) for part in x.tensor_split(4, dim=1)], 1)


def sliced(net, x):
    first = x.split(2, 1)[1:3][0]
    later = x.split(2, 1)[1:][1:]
    return torch.cat([net.two(first), later[0], later[-1], first], 1)


def as_a_whole(net, x):
    return net.eight(torch.cat(x.split(2, 1)[::-1], 1)) + torch.stack(x.unbind(1), 1)


def nested(net, x):
    a, b = x.chunk(2, 1)
    c, d = a.chunk(2, 1)
    return torch.cat([b, net.two(c), d + c], 1)


def with_slices(net, x):
    return torch.cat([net.four(x[:, :4]), x[:, 4:] * 2], 1)[..., None, 1:-1].squeeze(3)


SPLITS = [by_hand, unpacked, looped, sliced, as_a_whole, nested, with_slices]


@pytest.mark.parametrize("body", SPLITS, ids=lambda f: f.__name__)
def test_splits_become_items(body):
    model = Net(
        body, two=conv(2, groups=2), four=conv(4, padding="same"), eight=conv(8, bias=False)
    )
    plan = plan_of(model, targets=nn.Conv2d)
    assert any(step.part for step in calls(plan))
    check_equal(*pair_of(model, targets=nn.Conv2d))


def test_items_read_as_a_whole_need_an_example():
    net, _ = pair_of(Net(as_a_whole, eight=conv()))
    with pytest.raises(fusion.NotFusable, match="reads all results of 'split'"):
        fusion.make_plan(net.model)


def test_other_operations_with_several_results_run_unfused(caplog):
    net, fused = pair_of(Net(lambda net, x: net.conv(x - x.max(1, keepdim=True)[0]), conv=conv()))
    with caplog.at_level(logging.WARNING, logger="wfnet"):
        torch.testing.assert_close(fused(IMAGES, 1), net(IMAGES, 1))
    assert "returns several tensors" in caplog.text


def test_sums_that_broadcast_are_not_folded():
    def body(net, x):
        return net.conv(x + net.conv(x.mean((2, 3), keepdim=True)))

    model = Net(body, conv=conv())
    assert folded(plan_of(model)) == (3, 0, 0, 0)
    check_equal(*pair_of(model))


def test_stochastic_depth_in_evaluation_mode_is_passed_over():
    depth = torchvision.ops.StochasticDepth(0.5, "row")

    def body(net, x):
        return net.drop(net.norm(net.conv(x))) + net.path(x)

    model = Net(
        body, conv=conv(), norm=nn.BatchNorm2d(8), drop=depth, path=timm.layers.DropPath(0.5)
    )
    assert folded(plan_of(model)) == (2, 1, 0, 1)
    assert [type(step.call).__name__ for step in calls(plan_of(model))][-1] == "Linear"
    check_equal(*pair_of(model))


# -- padding --------------------------------------------------------------------------------------

PADDING = {
    "same": lambda: conv(padding="same"),
    "same, lopsided": lambda: nn.Conv2d(8, 8, (2, 4), padding="same", dilation=(1, 3)),
    "valid": lambda: conv(padding="valid"),
    "reflect": lambda: conv(padding_mode="reflect"),
    "circular": lambda: nn.Conv2d(8, 8, (1, 3), padding=(0, 1), stride=2, padding_mode="circular"),
    "replicate, same": lambda: conv(padding="same", padding_mode="replicate"),
    "timm same": lambda: timm.layers.Conv2dSame(8, 8, 3, stride=2),
}


@pytest.mark.parametrize("size", [12, 11])
@pytest.mark.parametrize("name", PADDING)
def test_padded_convolutions_fold(name: str, size: int):
    model = Net(nn.Sequential(nn.ReLU(), PADDING[name](), nn.BatchNorm2d(8), nn.ReLU()))
    plan = plan_of(model)
    assert folded(plan) == (2, 1, 2, 0)
    apart = any(isinstance(step.call, rewrite.Padded) for step in calls(plan))
    assert apart == (name not in ("same", "valid"))
    check_equal(*pair_of(model), images=IMAGES[..., :size])


def test_a_padded_first_layer_runs_once_per_source_image():
    model = Net(conv())
    model.stem = timm.layers.Conv2dSame(3, 8, 3, stride=2)
    plan = plan_of(model)
    assert plan.convolutions[0].at_source
    check_equal(*pair_of(model))


# -- masked layers that do not fold ---------------------------------------------------------------


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
        self.conv = conv(channels)

    def forward(self, x):
        return F.relu(self.conv(x) if x.shape[0] > 0 and x.abs().sum() > 0 else x, inplace=True)


def mixed(net, x):
    x = net.norm(x).relu()
    x = net.deciding(x) + net.own(x)
    return net.conv(net.linear(x.movedim(1, -1)).movedim(-1, 1)) + x


def mixed_network() -> Net:
    return Net(
        mixed, norm=nn.BatchNorm2d(8), deciding=Deciding(), own=Doubling(8, 8, 1), conv=conv(),
        linear=nn.Linear(8, 8),
    )  # fmt: skip


MIXED = {"targets": [nn.Conv2d, "linear"]}


def test_other_masked_layers_run_by_themselves():
    plan = plan_of(mixed_network(), **MIXED)
    assert folded(plan) == (2, 1, 1, 1)
    assert [step.output.name for step in calls(plan) if step.layers] == [
        "deciding",
        "own",
        "linear",
    ]
    assert "masked layers in deciding, own, linear" in plan.describe()
    check_equal(*pair_of(mixed_network(), **MIXED))


def test_a_norm_behind_layers_that_do_not_fold_stays():
    def body(net, x):
        return net.norm(torch.cat([net.first(x), net.second(x)], 1))

    model = Net(body, first=conv(), second=Doubling(8, 8, 1), norm=nn.BatchNorm2d(16))
    model.fc = nn.Linear(16, CLASSES)
    assert folded(plan_of(model)) == (2, 0, 0, 0)
    check_equal(*pair_of(model))


HOOKED = {  # module: what still folds
    "conv": (1, 0, 0, 0),
    "norm": (2, 0, 0, 0),
    "relu": (2, 1, 0, 0),
    "pool": (2, 1, 1, 0),
    "rest": (2, 1, 1, 0),
    "block": (1, 0, 0, 0),
}


@pytest.mark.parametrize("name", HOOKED)
def test_modules_with_hooks_are_called(name: str):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.relu = conv(), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
            self.pool, self.rest = nn.MaxPool2d(2), nn.Identity()

        def forward(self, x):
            return self.rest(self.pool(self.relu(self.norm(self.conv(x)))))

    model = Net(Block())
    module = model.body if name == "block" else getattr(model.body, name)
    module.register_forward_hook(lambda module, inputs, output: 3 * output)
    assert folded(plan_of(model)) == HOOKED[name]
    check_equal(*pair_of(model))


def test_the_first_masked_layer_may_be_one_of_them():
    model = Net(nn.Sequential(conv(), nn.ReLU()))
    model.stem = Doubling(3, 8, 1)
    assert folded(plan_of(model)) == (1, 0, 1, 0)
    check_equal(*pair_of(model))


@pytest.mark.parametrize("several", [False, True], ids=["at once", "one by one"])
def test_gradients_of_a_step_are_written_in_the_order_of_the_filters(several: bool):
    """What an untraining step does, with one matrix for all gradients."""
    net, fused = pair_of(mixed_network(), **MIXED)
    images, labels = IMAGES, torch.tensor([1, 0, 4])
    net(images, labels).square().sum().backward()
    network = fused.fused_network(images)
    assert all(a is b for a, b in zip(network.filters(), fused.filter_parameters(), strict=True))
    run = network.start(images, labels[:, None], None)
    logits = run.forward()
    into = None if several else torch.empty(CLASSES, sum(f.shape[1] for f in network.filters()))
    into = None if into is None else into.double()
    found = run.backward(2 * logits, into)
    for gradient, parameter in zip(found, net.filter_parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-8, atol=1e-12)
        assert into is None or gradient.untyped_storage().data_ptr() == into.data_ptr()
    with pytest.raises(RuntimeError, match="second time"):
        run.backward(logits)


def test_a_layer_called_twice_adds_its_gradients():
    model = Net(lambda net, x: net.conv(F.silu(net.conv(x))), conv=conv())
    _, fused = pair_of(model)
    network = fused.fused_network(IMAGES)
    assert all(a is b for a, b in zip(network.filters(), fused.filter_parameters(), strict=True))
    check_equal(*pair_of(model))


def test_masked_layers_run_by_themselves_run_uncompiled(caplog):
    net, fused = pair_of(mixed_network(), **MIXED)
    fused.fuse = "compile"
    with caplog.at_level(logging.WARNING, logger="wfnet"):
        check_equal(net, fused)
    assert "runs uncompiled" in caplog.text
    assert not isinstance(fused._fusion.network, fusion.CompiledNetwork)


def test_untraining_moves_filters_of_all_kinds():
    net, fused = pair_of(mixed_network(), **MIXED)
    for network in (net, fused):
        network.float()
    data = wfnet.data.TensorImages(
        torch.rand(CLASSES, 3, 12, 12), torch.arange(CLASSES), list("abcde")
    )
    config = wfnet.UntrainConfig.recipe(
        "balanced", CLASSES, steps=2, batch_size=4, label_expansion=2
    )
    for network in (net, fused):
        wfnet.untrain(network, data, None, config, progress=False)
    assert fused._fusion.network is not None
    for expected, found in zip(net.filter_parameters(), fused.filter_parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_nothing_to_fold_runs_unfused():
    model = Net(nn.ReLU())
    model.stem = Doubling(3, 8, 1)
    net, _ = pair_of(model)
    with pytest.raises(fusion.NotFusable, match="no masked convolution that folds"):
        fusion.make_plan(net.model, IMAGES)
    net, _ = pair_of(nn.Sequential(Deciding(3), nn.Flatten(), nn.Linear(432, CLASSES)))
    with pytest.raises(fusion.NotFusable, match="cannot trace"):
        fusion.make_plan(net.model, IMAGES)


def test_a_plan_whose_backward_fails_is_never_used(caplog):
    class NoBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            raise ValueError("no backward")

    class Layer(nn.Module):
        def forward(self, x):
            return NoBackward.apply(x)

    net, fused = pair_of(Net(nn.Sequential(Layer(), conv())))
    with caplog.at_level(logging.WARNING, logger="wfnet"):
        torch.testing.assert_close(fused(IMAGES, 1), net(IMAGES, 1))
    assert "running the plan failed (no backward)" in caplog.text


def test_a_plan_made_while_evaluating_can_be_trained():
    net, fused = pair_of(Net(nn.Sequential(norm_act("silu"), conv())))
    with torch.inference_mode():
        fused(IMAGES, 1)
    check_equal(net, fused)


# -- networks -------------------------------------------------------------------------------------


def timm_model(name: str, **options) -> nn.Module:
    return timm.create_model(name, num_classes=CLASSES, **options)


WHOLE = {
    "darknet53": (52, 52, 0, 0),
    "efficientnet_b0": (81, 49, 0, 9),
    "tf_efficientnet_b0": (81, 49, 0, 9),
    "mobilenetv2_100": (52, 52, 0, 10),
    "lcnet_050": (32, 27, 2, 0),
    "cspresnet50": (55, 55, 0, 13),
    "rexnet_100": (75, 62, 13, 0),
    "skresnet18": (44, 36, 33, 8),
    "res2net50_26w_4s": (85, 85, 81, 16),
    "mixnet_s": (123, 97, 5, 1),
}


@pytest.mark.parametrize("name", WHOLE)
def test_how_much_of_a_network_folds(name: str):
    with torch.device("meta"):
        plan = fusion.make_plan(wfnet.WFNet(timm_model(name), CLASSES).model)
    assert folded(plan) == WHOLE[name]
    assert not any(step.in_place for step in calls(plan))


SMALL = {
    "efficientnet": lambda: timm_model("tf_mobilenetv3_small_075"),
    "res2net": lambda: timm_model("res2net50_26w_4s", layers=(1, 1, 1, 1), base_width=8),
    "shufflenet": lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=CLASSES),
    "gcresnet": lambda: timm_model("gcresnet33ts"),
}


@pytest.mark.parametrize("name", SMALL)
def test_networks_equal_the_unfused(name: str):
    torch.manual_seed(0)
    net, fused = pair_of(SMALL[name]())
    check_equal(net, fused, torch.randn(3, 3, 32, 32, dtype=torch.float64))
    copy.deepcopy(fused)
