"""Small networks with random statistics and filters, and their comparison with the unfused ones."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import wfnet

CLASSES = 5
SOURCE = torch.tensor([0, 2, 2, 1, 0])
LABELS = torch.tensor([[0, -1], [4, 1], [-1, -1], [2, 2], [0, 3]])


def randomise(model: nn.Module) -> nn.Module:
    """Evaluation mode, fp64, and statistics that a missing or swapped fold would show."""
    generator = torch.Generator().manual_seed(0)

    def uniform(t: torch.Tensor, low: float, high: float) -> None:
        t.data.copy_(low + (high - low) * torch.rand(t.shape, generator=generator))

    for module in model.modules():
        if getattr(module, "running_var", None) is not None:
            uniform(module.running_mean, -0.3, 0.3)
            uniform(module.running_var, 0.5, 1.5)
            if module.weight is not None:
                uniform(module.weight, 0.5, 1.5)
                uniform(module.bias, -0.3, 0.3)
        elif isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            uniform(module.bias, -0.3, 0.3)
    return model.double().eval()


class Toy(nn.Module):
    """Convolutions with everything that can follow them, in a few thousand multiplications."""

    def __init__(self, bias: bool = False, inplace: bool = True):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=bias)
        self.bn1 = nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=bias)
        self.bn2 = nn.BatchNorm2d(8, affine=False)
        self.conv3 = nn.Conv2d(8, 16, (3, 1), stride=(2, 1), padding=(1, 0), bias=bias)
        self.shortcut = nn.Conv2d(8, 16, 1, stride=(2, 1), bias=bias)
        self.act = nn.ReLU(inplace)
        self.stem = nn.Sequential(self.conv1, self.bn1, self.act)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x):
        x = self.pool(self.stem(x))
        x = self.act(self.bn2(self.conv2(x)) + x)  # x is read twice
        x = self.conv3(x) + self.shortcut(x)
        x = self.act(x)
        return self.fc(x.mean((2, 3)))


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


@pytest.fixture
def toy() -> type[Toy]:
    return Toy


@pytest.fixture
def network_of() -> type[Net]:
    return Net


@pytest.fixture
def randomised() -> Callable[[nn.Module], nn.Module]:
    return randomise


@pytest.fixture
def small_vit() -> Callable[..., nn.Module]:
    timm = pytest.importorskip("timm")

    def make(name: str = "vit_tiny_patch16_224", **options) -> nn.Module:
        size = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 3}
        return timm.create_model(name, num_classes=CLASSES, **(size | options)).eval()

    return make


@pytest.fixture
def pair_of() -> Callable[..., tuple[wfnet.WFNet, wfnet.WFNet]]:
    """Makes an unfused and a fused network in fp64, with the same random filters."""

    def make(model: nn.Module, fuse: bool | str = True, **options):
        net = wfnet.WFNet(randomise(model), CLASSES, **options)
        generator = torch.Generator().manual_seed(1)
        for parameter in net.filter_parameters():
            parameter.data.copy_(3 * torch.randn(parameter.shape, generator=generator))
        fused = copy.deepcopy(net)
        fused.fuse = fuse
        return net, fused

    return make


@pytest.fixture
def check_equal() -> Callable[..., None]:
    """Compares outputs and filter gradients of two networks, mixed rows over shared images."""

    def check(net, fused, images, labels=LABELS, source=SOURCE) -> None:
        expected, found = net(images, labels, source), fused(images, labels, source)
        assert fused.fused_network(images) is not None, "the network runs unfused"
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
        weights = torch.randn(expected.shape, dtype=torch.float64)
        for network, logits in ((net, expected), (fused, found)):
            network.zero_grad()
            (logits * weights).sum().backward()
        for key, parameter in net.named_filters().items():
            torch.testing.assert_close(
                fused.named_filters()[key].grad, parameter.grad, rtol=1e-8, atol=1e-12, msg=key
            )

    return check
