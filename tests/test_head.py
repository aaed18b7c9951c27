"""Which layer is taken as the classifier's head, before anything is run."""

import pytest
from torch import nn

from wfnet import WFNet
from wfnet.head import find_head

CLASSES = 10


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ([nn.Flatten(), nn.Linear(192, 1)], "one logit for two classes needs two"),
        ([nn.Flatten()], r"none of its layers has 10 outputs.*if it only computes features"),
        ([nn.Flatten(), nn.Linear(144, 7)], r"'2' with 7: pass num_classes=7 if"),
    ],
)
def test_networks_without_a_fitting_head(layers, says):
    with pytest.raises(ValueError, match=says):
        WFNet(nn.Sequential(nn.Conv2d(3, 4, 3), *layers), CLASSES)


def test_a_projection_behind_the_head_is_not_the_head():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.ReLU(), nn.Linear(4, CLASSES))
    model.projection = nn.Linear(4, 128)
    assert find_head(model, CLASSES)[0] == "3"
