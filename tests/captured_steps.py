"""Untraining steps of small networks, captured or not: on a CUDA device, and on a pretended one."""

import torch
from torch import nn

import wfnet
from wfnet.gate_tables import flatten_filters
from wfnet.untraining.expansion import expand
from wfnet.untraining.objectives import BalancedObjective
from wfnet.untraining.optimizers import RowAdam
from wfnet.untraining.step import UntrainingStep

CLASSES = 6


class Residual(nn.Module):
    """A stem with a pooling, a block with a projection shortcut, and one without."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.first, self.project = nn.Conv2d(16, 64, 3, 2, 1, bias=False), nn.Conv2d(16, 64, 1, 2)
        self.norm = nn.BatchNorm2d(64)
        self.reduce, self.expand = nn.Conv2d(64, 64, 1), nn.Conv2d(64, 64, 3, padding=1)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        x = (self.norm(self.first(x)) + self.project(x)).relu()
        x = (self.expand(self.reduce(x).relu()) + x).relu()
        return self.head(x.mean((2, 3)))


def network(make, place: str, **options) -> wfnet.WFNet:
    """With random filters; fused and on backend ``eager`` unless told otherwise."""
    torch.manual_seed(0)
    net = wfnet.WFNet(make().eval(), CLASSES, **{"fuse": True, "backend": "eager", **options})
    for parameter in net.filter_parameters():
        nn.init.normal_(parameter, 2.0, 1.0)
    return net.to(place).to(memory_format=torch.channels_last)


def minibatch(seed: int, n: int = 4):
    """``n`` images on the host, and what they are expanded to."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (n,), generator=generator)
    images = torch.randn(n, 3, 32, 32, generator=generator)
    return images, expand(labels, CLASSES, 2, generator, share_images=True)


def step_of(net: wfnet.WFNet, capture: bool, objective=None) -> UntrainingStep:
    """A step in bf16 whose samples share images; within ``flatten_filters``."""
    optimizer = RowAdam(net.filter_parameters())
    objective = objective or BalancedObjective()
    return UntrainingStep(net, objective, optimizer, torch.bfloat16, True, capture=capture)


def untrained(net: wfnet.WFNet, sizes, capture=False, together=1, objective=None):
    """Filters and losses after steps over minibatches of ``sizes`` images."""
    parts = [minibatch(seed, n) for seed, n in enumerate(sizes)]
    with flatten_filters(net.filter_parameters()) as flat:
        step = step_of(net, capture, objective)
        losses = [
            step(parts[at : at + together], lr=0.2 / (at + 1)).total
            for at in range(0, len(parts), together)
        ]
        if capture:
            assert len(step.graphs.graphs) == 1 + together, "nothing was captured"
        return flat.cpu().clone(), torch.stack(losses).cpu()
