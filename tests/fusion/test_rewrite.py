"""Rewriting a trace: activations in place, splits, and what must not be rewritten."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from wfnet import fusion
from wfnet.fusion import rewrite

IMAGES = torch.randn(3, 3, 12, 12, dtype=torch.float64)


def conv(channels: int = 8, **options) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, **{"padding": 1, **options})


def calls(net, **options) -> list[fusion.CallStep]:
    steps = fusion.make_plan(net.model, IMAGES, **options).steps
    return [step for step in steps if isinstance(step, fusion.CallStep)]


# -- what is computed in place --------------------------------------------------------------------


class OwnInPlace(nn.Module):
    """An activation of one's own that we cannot ask not to overwrite its input."""

    def __init__(self):
        super().__init__()
        self.inplace = True

    def forward(self, x):
        return x.mul_(2).tanh_()


def with_operators(net, x):
    y = net.conv(x)
    y += 1.0
    y += x
    y *= 2
    return net.conv(y)


IN_PLACE = {
    "function": lambda net, x: net.conv(F.leaky_relu(net.conv(x), 0.2, inplace=True)),
    "functions of torch": lambda net, x: net.conv(
        torch.sigmoid_(net.conv(x)) + F.elu_(net.conv(x))
    ),
    "methods": lambda net, x: net.conv(net.conv(x).mul_(0.5).tanh_()),
    "operators": with_operators,
    "read before": lambda net, x: net.conv(x) + F.silu(x, inplace=True),
    "module of one's own": lambda net, x: net.conv(net.own(net.conv(x))),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_what_is_computed_in_place_gets_a_result_of_its_own(name, network_of, pair_of, check_equal):
    net, fused = pair_of(network_of(IN_PLACE[name], conv=conv(), own=OwnInPlace()))
    copied = [step.output.target for step in calls(net) if step.in_place]
    assert copied == (["own"] if name == "module of one's own" else [])
    check_equal(net, fused, IMAGES)


def test_parts_changed_in_place_are_told_apart(network_of, pair_of, check_equal):
    """Autograd refuses it in the unfused network, so that one computes the same out of place."""

    def body(net, x):
        a, b = net.conv(x).chunk(2, 1)
        return torch.cat([F.silu(a, inplace=True), b.tanh_()], 1)

    def out_of_place(net, x):
        a, b = net.conv(x).chunk(2, 1)
        return torch.cat([F.silu(a), b.tanh()], 1)

    net, fused = pair_of(network_of(body, conv=conv()))
    net.model.body = out_of_place
    check_equal(net, fused, IMAGES)


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


def assign(net, x):
    x = net.conv(x)
    x[:, 0] = 0.0
    return net.conv(x)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (change_a_view, "changes a value in place"),
        (change_the_whole, "changes a value in place"),
        (change_what_is_read, "changes a value in place"),
        (assign, "writes into|cannot trace"),
        (lambda net, x: net.conv(x - x.max(1, keepdim=True)[0]), "returns several tensors"),
    ],
    ids=["view", "whole", "read", "assigned", "several"],
)
def test_what_cannot_be_rewritten_runs_unfused(body, reason, network_of, pair_of, caplog):
    net, fused = pair_of(network_of(body, conv=conv()))
    with caplog.at_level(logging.WARNING, logger="wfnet"):
        torch.testing.assert_close(fused(IMAGES, 1), net(IMAGES, 1))
    assert caplog.records[0].getMessage().startswith("Net runs unfused: ")
    assert any(part in caplog.text for part in reason.split("|"))


def test_an_operation_in_place_keeps_the_dtype():
    graph = torch.fx.Graph()
    node = graph.call_method("add_", (graph.placeholder("x"), 1.0))
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
def test_splits_become_items(body, network_of, pair_of, check_equal):
    layers = {"two": conv(2, groups=2), "four": conv(4, padding="same"), "eight": conv(bias=False)}
    net, fused = pair_of(network_of(body, **layers), targets=nn.Conv2d)
    assert any(step.part for step in calls(net))
    check_equal(net, fused, IMAGES)


def test_items_read_as_a_whole_need_an_example(network_of, pair_of):
    net, _ = pair_of(network_of(as_a_whole, eight=conv()))
    with pytest.raises(fusion.NotFusable, match="reads all results of 'split'"):
        fusion.make_plan(net.model)


# -- norms ----------------------------------------------------------------------------------------


def test_norms_over_the_batch_are_not_frozen():
    assert rewrite.is_frozen_norm(nn.BatchNorm2d(8).eval())
    assert not rewrite.is_frozen_norm(nn.BatchNorm2d(8))
    assert not rewrite.is_frozen_norm(nn.BatchNorm2d(8, track_running_stats=False).eval())
