"""What a step is said to take is about what it takes."""

import pytest
import torch

from wfnet.untraining.memory import bytes_per_image


@pytest.mark.parametrize("fuse", [True, False])
def test_the_estimate_grows_with_the_images(runs, fuse):
    net = runs.network(fuse=fuse)
    settings = (1, 16, 16), runs.config(compound=0.5)
    few, many = (bytes_per_image(net, *settings, images) for images in (8, 64))
    assert few == pytest.approx(many, rel=0.3)
    assert many > 20 * 16 * 16 * 4  # more than the logits and the images
    assert all(torch.all(p == 3) and p.grad is None for p in net.filter_parameters())
