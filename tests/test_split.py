"""A network in two parts computes what it computes in one."""

import logging

import pytest
import torch
from torch import nn

from wfnet import WFNet, models
from wfnet.split import split_network

CASES = {
    "resnet": ("layer3.*", "layer2_0", "sigmoid"),
    "resnet durable": ("layer3.*", "layer2_0", "durable"),
    "vgg": ("features.1?", "features_10", "sigmoid"),
    "vgg durable": ("features.1?", "features_10", "durable"),
    "vit": ("blocks.3.*", "blocks_2", "sigmoid"),
}


@pytest.mark.parametrize("case", CASES)
def test_both_parts_compute_what_the_network_computes(case):
    targets, at, gate = CASES[case]
    base = models.create(case.split()[0], 5, seed=0, width=32 if case == "vit" else 8).eval()
    net = WFNet(base, 5, targets=targets, gate=gate)
    for matrix in net.filter_parameters():
        nn.init.normal_(matrix)
    images = torch.randn(3, 1, 32, 32).contiguous(memory_format=torch.channels_last)
    split = split_network(net, images)
    assert split.at == at
    assert [*split.net.named_filters()] == [*net.named_filters()]
    assert [*map(id, split.net.filter_parameters())] == [*map(id, net.filter_parameters())]
    forget, source = torch.tensor([4, -1, 0, 2]), torch.tensor([0, 2, 2, 1])
    for fuse in (False, True):
        net.fuse = split.net.fuse = fuse
        assert (split.net.fused_network(split.front(images)) is not None) == fuse
        for labels in (forget, None):
            about = labels, None if labels is None else source
            found, expected = split.net(split.front(images), *about), net(images, *about)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert net.image_shape == (1, 32, 32)


def test_there_is_no_front_where_the_first_layers_are_masked(caplog):
    class Branches(nn.Module):
        """Traced, but its masked branch reads the images themselves."""

        def __init__(self, stop):
            super().__init__()
            self.a, self.b, self.fc = nn.Conv2d(1, 2, 1), nn.Conv2d(1, 2, 1), nn.Linear(2, 3)
            self.stop = stop

        def forward(self, x):
            if self.stop and x.sum() > 1e9:
                return x
            return self.fc((self.a(x) + self.b(x)).mean((2, 3)))

    images = torch.randn(2, 1, 4, 4)
    with caplog.at_level(logging.INFO, "wfnet"):
        assert split_network(WFNet(Branches(False), 3, targets="b"), images) is None
        assert not caplog.records
        assert split_network(WFNet(Branches(True), 3, targets="b"), images) is None
    assert "Branches has no features to keep: torch.fx cannot trace it" in caplog.text
