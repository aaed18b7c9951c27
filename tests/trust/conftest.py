"""Tiny networks and images on which the attacks are tried: four classes, learned in no time."""

import pytest
import torch
from torch import nn

from wfnet.data import Splits
from wfnet.data.tensor_images import TensorImages
from wfnet.trust.subject import ImageReader, Subject, TrustSettings

pytest.importorskip("sklearn")
CLASSES = 4


class Network(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3, padding=1, bias=not norm)
        self.bn1 = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.bn2 = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        return self.fc(self.bn2(self.conv2(x)).relu().mean((2, 3)))


@pytest.fixture(scope="session")
def make_network():
    def make(seed, norm=True):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = Network(norm)
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    nn.init.normal_(module.running_mean, std=0.1)
            return model.eval()

    return make


@pytest.fixture
def closed(make_network):
    """The network of seed 0, with rows 0 and 3 of conv1 scaled by a factor."""

    def close(factor):
        model = make_network(0)
        with torch.no_grad():
            model.conv1.weight[[0, 3]] *= factor
        return model

    return close


@pytest.fixture
def oracle():
    """Knows every class of the images below; the logit of class 1 is lowered by 100."""

    head = nn.Linear(CLASSES, CLASSES)
    nn.init.zeros_(head.bias).data[1] = -100.0
    nn.init.eye_(head.weight).data.mul_(10)
    model = nn.Sequential(nn.Identity(), nn.AvgPool2d(4), nn.Flatten(), head)
    return model.eval()


@pytest.fixture(scope="session")
def make_images():
    """Images of classes that are bright in one quarter each: easily learned."""

    def make(per_class, seed):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(CLASSES).repeat_interleave(torch.as_tensor(per_class))
        images = torch.rand(len(labels), 1, 8, 8, generator=generator) * 0.5
        for i, label in enumerate(labels.tolist()):
            top, left = 4 * (label // 2), 4 * (label % 2)
            images[i, 0, top : top + 4, left : left + 4] += 0.5
        return TensorImages(images, labels, [f"quarter {k}" for k in range(CLASSES)])

    return make


@pytest.fixture(scope="session")
def data(make_images):
    train, test = make_images(8, 0), make_images(5, 1)
    return Splits(train, test, test, train.classes, "quarters", 0)


@pytest.fixture(scope="session")
def quick():
    return TrustSettings(samples=24, relearn_steps=2, relearn_images=(1, 3))


@pytest.fixture(scope="session")
def make_subject(data, make_network, quick):
    def make(label=1, forgetful=None, original=None, settings=quick, **more):
        readers = [ImageReader(part, 100) for part in (data.train, data.test)]
        models = forgetful or make_network(1), original or make_network(0)
        return Subject(label, CLASSES, *readers, ("conv1", "conv2"), settings, *models, **more)

    return make
