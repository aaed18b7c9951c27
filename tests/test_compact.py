"""Compact networks: what is closed is gone, and the outputs are the same."""

import pytest
import torch

import wfnet
from wfnet import models

pytest.importorskip("torch_pruning")

IMAGES = torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))


def closed_net(kind, share=3, **options):
    torch.manual_seed(0)
    net = wfnet.WFNet(models.create(kind, 5, seed=0, width=8, **options), 5, gate="durable")
    with torch.no_grad():
        for layer in net.masked_layers.values():
            layer.alpha_hard[2, ::share] = -1
            layer.alpha_soft[2] += torch.randn(layer.alpha_soft.shape[1])
    return net


@pytest.mark.parametrize("kind", ["resnet", "vgg"])
def test_closed_channels_leave_the_network(kind):
    net = closed_net(kind)
    plain, small = net.bake(2), net.bake(2, compact=True)
    torch.testing.assert_close(small(IMAGES), plain(IMAGES), rtol=1e-4, atol=1e-5)
    before, after = (sum(p.numel() for p in model.parameters()) for model in (plain, small))
    assert after < 0.85 * before
    inner = small.layer2[0].conv1 if kind == "resnet" else small.features[4]
    assert inner.weight.shape[0] == 16 - len(range(0, 16, 3))
    assert all(p.requires_grad for p in small.parameters())
    exported = torch.export.export(small, (IMAGES,)).module()
    torch.testing.assert_close(exported(IMAGES), small(IMAGES))


def test_residual_channels_that_one_branch_needs_stay():
    net = closed_net("resnet", share=1)
    with torch.no_grad():
        net.masked_layers["bn1"].alpha_hard[2, 1:] = 1  # the stem feeds the first sum
    small = net.bake(2, compact=True)
    torch.testing.assert_close(small(IMAGES), net.bake(2)(IMAGES))
    assert small.conv1.out_channels == 7  # the first channel is closed in the branch as well
    assert small.layer1[0].conv1.out_channels == 1


def test_pruned_sigmoid_gates_stay_where_nothing_is_behind_batch_norm_alone():
    """Gates in front of BatchNorm leave its bias: such a channel is a constant, and stays."""
    net = wfnet.WFNet(models.create("vgg", 5, seed=0, width=8), 5)
    with torch.no_grad():
        net.filter_parameters()[0][2, 0] = -20
    small = net.bake(2, prune_below=0.5, compact=True)
    torch.testing.assert_close(small(IMAGES), net.bake(2, prune_below=0.5)(IMAGES))
