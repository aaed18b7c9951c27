"""Networks and images on which evaluations are tested: small, random, with unequal classes."""

import torch
from torch import nn

import wfnet
from wfnet.data import TensorImages

K = 7


def make_model(classes=K, channels=1):
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


def make_net(classes=K, seed=1, spread=3.0):
    net = wfnet.WFNet(make_model(classes), classes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for alpha in net.filter_parameters():
            alpha.copy_(spread * torch.randn(alpha.shape, generator=generator))
    return net


def make_dataset(labels, classes=K, seed=2):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(len(labels), 1, 8, 8, generator=generator)
    names = [f"name{i}" for i in range(classes)]
    return TensorImages(images, torch.as_tensor(labels), names, mean=0.5, std=0.2)


def uneven_dataset():
    """Unequal classes in shuffled order."""
    labels = torch.arange(K).repeat_interleave(torch.tensor([4, 9, 3, 5, 6, 2, 8]))
    return make_dataset(labels[torch.randperm(37, generator=torch.Generator().manual_seed(3))])
