"""Operations in place, and operations with several results, against the unfused network."""

import logging
import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from wfnet import fusion

IMAGES = torch.randn(3, 3, 12, 12, dtype=torch.float64)


class OwnInPlace(nn.Module):
    """An activation of one's own that we cannot ask not to overwrite its input."""

    inplace = True

    def forward(self, x):
        return x.mul_(2).tanh_()


def parts(net, x):
    """Several results: unpacked, by index, as a whole; slices; the first of two."""
    a, b = x.chunk(2, dim=1)
    x = torch.cat([net.four(a) * b.sigmoid(), b], 1)
    pieces = torch.split(x, [2, 2, 4], 1)
    x = torch.cat([net.four(pieces[-1]), pieces[0] + pieces[1], pieces[1]], 1)
    x = net.conv(torch.cat(x.split(2, 1)[::-1], 1)) + torch.stack(x.unbind(1), 1)
    x = torch.cat([net.four(x[:, :4]), x[:, 4:] * 2], 1)[..., None, 1:-1].squeeze(3)
    return net.conv(x - x.max(1, keepdim=True)[0])


BODIES = {
    "function": lambda net, x: net.conv(F.leaky_relu(net.conv(x), 0.2, inplace=True)),
    "module": lambda net, x: net.conv(net.act(net.conv(x))),
    "methods": lambda net, x: net.conv(net.conv(x).mul_(0.5).tanh_()),
    "operators": lambda net, x: net.conv(operator.imul(net.conv(x), 2)),
    "read before": lambda net, x: net.conv(x) + F.silu(x, inplace=True),
    "module of one's own": lambda net, x: net.conv(net.own(net.conv(x))),
    "parts": parts,
}


@pytest.mark.parametrize("name", BODIES)
def test_equals_the_unfused_network(name, network_of, pair_of, check_equal):
    conv, four = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
    modules = {"act": nn.SiLU(inplace=True), "own": OwnInPlace(), "four": four}
    net, fused = pair_of(network_of(BODIES[name], conv=conv, **modules), targets=nn.Conv2d)
    if name in ("function", "module"):
        steps = fusion.make_plan(net.model, IMAGES).steps
        assert not any(getattr(step, "in_place", False) for step in steps), "a copy nobody needs"
    check_equal(net, fused, IMAGES)


def change_a_view(net, x):
    x = net.conv(x)
    x[:, :4].relu_()
    return net.conv(x)


def change_what_is_read(net, x):
    x = net.conv(x)
    y = F.silu(x, inplace=True)
    return net.conv(x) + y


def assign(net, x):
    x = net.conv(x)
    x[:, 0] = 0.0
    return net.conv(x)


@pytest.mark.parametrize(
    "body", [change_a_view, change_what_is_read, assign], ids=lambda body: body.__name__
)
def test_what_would_change_values_of_others_runs_unfused(body, network_of, pair_of, caplog):
    net, fused = pair_of(network_of(body, conv=nn.Conv2d(8, 8, 3, padding=1)))
    with caplog.at_level(logging.WARNING, logger="wfnet"):
        torch.testing.assert_close(fused(IMAGES, 1), net(IMAGES, 1))
    assert caplog.records[0].getMessage().startswith("Net runs unfused: ")
