"""Rooflines of the step benchmark: the counted numbers, and that less traffic is never slower."""

import pytest
import torch
from torch import nn

import wfnet
from wfnet.benchmarking import roofline

timm = pytest.importorskip("timm")

# Rates of one H200 in bf16; 256 images, half of them under three rows each: 512 samples.
H200 = roofline.Rates(flops=790e12, bandwidth=4.3e12, element=2)
# Expanded samples per second.
PUBLISHED = {
    "resnet18": 80_600,
    "resnet50": 21_600,
    "vgg16": 11_000,
    "vit_small_patch16_224": 30_800,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_rooflines(name: str):
    with torch.device("meta"):
        net = wfnet.WFNet(timm.create_model(name), 1000)
    operations = roofline.operations_of(net, 224)
    found = 512 / roofline.least_seconds(operations, 512, 256, H200)
    assert found == pytest.approx(PUBLISHED[name], rel=0.02)


def test_counts_of_one_convolution_by_hand():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 4, 3, padding=1, bias=False)
            self.second = nn.Conv2d(4, 8, 1, bias=False)
            self.fc = nn.Linear(8, 5)

        def forward(self, x):
            return self.fc(self.second(self.first(x).relu()).mean((2, 3)))

    net = wfnet.WFNet(Net().eval(), 5)
    first, second, gradient = roofline.operations_of(net, 8)
    assert first == roofline.Operation(2 * 256 * 27, 2 * 256, 108, source_elements=192)
    assert second == roofline.Operation(2 * 512 * 4, 256 + 2 * 512, 32)
    assert gradient == roofline.Operation(2 * 512 * 4, 512 + 2 * 256, 32)
    rates = roofline.Rates(1e12, 1e3, 4)  # bandwidth decides
    seconds = roofline.least_seconds([first], 10, 2, rates)
    assert seconds == pytest.approx((108 + 2 * 256 * 10 + 192 * 2) * 4 / 1e3)


def test_what_has_no_roofline_says_so():
    mixer = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Linear(8, 5))
    net = wfnet.WFNet(mixer, 5, targets="1")
    with pytest.raises(ValueError, match="no roofline is counted"):
        roofline.operations_of(net, 2)
