import numpy as np
import pytest
import torch
from torch import nn

from wfnet.trust import probing


def test_probe_separates_what_can_be_separated():
    rng = np.random.default_rng(0)
    wanted, truth = np.arange(60) % 3 == 0, np.arange(40) % 4 == 0
    train, test = rng.normal(size=(60, 5)), rng.normal(size=(40, 5))
    train[wanted, 2] += 20
    test[truth, 2] += 20
    assert probing.probe(train, wanted, test, truth, 0) == 1.0
    assert probing.probe(1e-6 * train, wanted, 1e-6 * test, truth, 0) == 1.0  # small gates
    blank = probing.probe(np.zeros((60, 5)), wanted, np.zeros((40, 5)), truth, 0)
    assert blank == 0.5  # nothing to be read from pruned features


@pytest.mark.parametrize(
    ("shape", "width"),
    [((2, 16, 9, 7), 16 * 8 * 7), ((2, 2048, 4, 4), 2048), ((2, 49, 96), 10 * 96), ((2, 33), 33)],
)
def test_features_are_pooled_to_a_bounded_width(shape, width):
    features = torch.randn(shape)
    found = probing.pooled(features)
    assert found.shape == (2, width)
    if width == 2048:
        torch.testing.assert_close(found, features.mean((2, 3)))


def test_features_of_windows_belong_to_their_images():
    class Windows(nn.Module):
        """Halves of the image as windows [2 B, 4, 8], as a window transformer has them."""

        def __init__(self):
            super().__init__()
            self.qkv, self.never, self.fc = nn.Linear(8, 6), nn.Linear(8, 8), nn.Linear(6, 3)

        def forward(self, x):
            self.qkv(torch.zeros(len(x), 8))  # a first run
            y = self.qkv(x.reshape(-1, 4, 8))
            return self.fc(y.reshape(len(x), 8, 6).mean(1))

    model = Windows()
    images = torch.randn(300, 1, 8, 8)  # more than one batch
    found = probing.layer_features(model, ["qkv", "never", "gone"], images, 3)
    assert list(found) == ["qkv", probing.HEAD]
    expected = model.qkv(images.reshape(300, 8, 8)).mT.flatten(1).detach()
    np.testing.assert_allclose(found["qkv"], expected.numpy(), rtol=1e-4, atol=1e-6)


def test_probes_are_reported_by_layer(make_subject):
    subject = make_subject()
    model = subject.forgetful
    values, details = probing.measure(model, subject)
    layers = details["layers"]
    assert list(layers) == ["conv1", "conv2", probing.HEAD]
    assert layers["conv1"] > 0.9  # quarters of the image are plain to see
    assert values == {"probe_best": max(layers.values()), "probe_last": layers[probing.HEAD]}
    assert not any(module._forward_hooks for module in model.modules())
    images = subject.test_forget.images
    hidden = model.bn2(model.conv2(model.bn1(model.conv1(images)).relu())).relu().mean((2, 3))
    features = probing.layer_features(model, (), images, 4)[probing.HEAD]
    np.testing.assert_allclose(features, hidden.detach().numpy(), rtol=1e-5)
