"""What several rooms test with: small networks, images, and folders of files in real formats."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import CLASS_NAMES, write_idx, write_image
from torch import nn

import wfnet
from wfnet.data import TensorImages


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """`train/` with 6 and `val/` with 2 images for each of three classes, in five formats."""
    root = tmp_path / "images"
    suffixes = ("jpg", "png", "jpeg", "webp", "bmp", "JPEG")
    for label, name in enumerate(CLASS_NAMES):
        for number in range(6):
            write_image(root / "train" / name / f"{number}.{suffixes[number]}", 10 * label + number)
        for number in range(2):
            write_image(root / "val" / name / f"{number}.jpg", 100 + 10 * label + number)
    return root


@pytest.fixture
def mnist_folder(tmp_path: Path) -> Path:
    """40 training and 20 test images in IDX files, the training files compressed."""
    rng = np.random.default_rng(0)
    root = tmp_path / "idx"
    for part, count, suffix in (("train", 40, ".gz"), ("t10k", 20, "")):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        write_idx(root / f"{part}-images-idx3-ubyte{suffix}", images)
        write_idx(root / f"{part}-labels-idx1-ubyte{suffix}", np.arange(count) % 10)
    return root


# -- small random networks with filters, and images for them --------------------------------------

_CLASSES = 7


@pytest.fixture(scope="session")
def make_model() -> Callable[..., nn.Module]:
    """Makes a classifier with BatchNorm, of 7 classes unless told otherwise."""

    def make(classes: int = _CLASSES, channels: int = 1) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(channels, 6, 3, bias=True),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Conv2d(6, 8, 3, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, classes),
        )
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2)
        return model

    return make


@pytest.fixture(scope="session")
def make_net(make_model) -> Callable[..., wfnet.WFNet]:
    """Makes that classifier with random filters, whose rows differ."""

    def make(classes: int = _CLASSES, seed: int = 1, spread: float = 3.0) -> wfnet.WFNet:
        net = wfnet.WFNet(make_model(classes), classes)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for alpha in net.filter_parameters():
                alpha.copy_(spread * torch.randn(alpha.shape, generator=generator))
        return net

    return make


@pytest.fixture(scope="session")
def make_dataset() -> Callable[..., TensorImages]:
    """Makes random images with given labels; classes are called name0, name1, ..."""

    def make(labels, classes: int = _CLASSES, seed: int = 2) -> TensorImages:
        generator = torch.Generator().manual_seed(seed)
        images = torch.rand(len(labels), 1, 8, 8, generator=generator)
        names = [f"name{i}" for i in range(classes)]
        return TensorImages(images, torch.as_tensor(labels), names, mean=0.5, std=0.2)

    return make


@pytest.fixture
def uneven_dataset(make_dataset) -> TensorImages:
    """37 images of 7 classes of unequal sizes, in shuffled order."""
    labels = torch.arange(_CLASSES).repeat_interleave(torch.tensor([4, 9, 3, 5, 6, 2, 8]))
    return make_dataset(labels[torch.randperm(37, generator=torch.Generator().manual_seed(3))])


# -- a task that is learned, and forgotten, in an epoch or two ------------------------------------

_PLACES = 3


@pytest.fixture(scope="session")
def patches() -> Callable[..., TensorImages]:
    """Makes images of 3 classes; the class is the place of a bright square."""

    def make(per_class: int = 40, seed: int = 0) -> TensorImages:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(_PLACES).repeat(per_class)
        images = 0.1 * torch.rand(len(labels), 1, 6, 6, generator=generator)
        for image, label in zip(images, labels.tolist(), strict=True):
            image[0, 2 * label : 2 * label + 2] += 0.8
        return TensorImages(images, labels, [str(c) for c in range(_PLACES)])

    return make


@pytest.fixture(scope="session")
def linear() -> Callable[..., nn.Module]:
    """Makes a network that knows all of them but ``forgotten``, which never wins."""

    def make(forgotten: int | None = None) -> nn.Module:
        head = nn.Linear(36, _PLACES)
        with torch.no_grad():
            head.weight.zero_()
            for label in range(_PLACES):
                head.weight[label, 12 * label : 12 * label + 12] = 1.0
            head.bias.zero_()
            if forgotten is not None:
                head.bias[forgotten] = -20.0
        return nn.Sequential(nn.Flatten(), head)

    return make
