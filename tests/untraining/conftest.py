"""Untraining runs of a fraction of a second, and what interrupts them."""

import math
import os
import signal
import time
import traceback
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from wfnet import UntrainConfig, WFNet, models, untrain
from wfnet.data import CorruptImage, MultiLabelTensors, TensorImages
from wfnet.untraining.objectives import BalancedObjective

CLASSES = 6
BARS = 4
MEASURED = ("seconds", "samples_per_second")


# -- networks and images --------------------------------------------------------------------------


def network(classes: int = CLASSES, **arguments) -> WFNet:
    """An untrained network, of more layers than :class:`BarNet`."""
    return WFNet(models.create("resnet", classes, 1, seed=1, width=4), classes, **arguments)


def several_labels(count: int = 24, classes: int = CLASSES) -> MultiLabelTensors:
    """Random images with several labels each; each has one and lacks one."""
    generator = torch.Generator().manual_seed(0)
    multi_hot = torch.rand(count, classes, generator=generator) < 0.35
    multi_hot[:, 0] |= ~multi_hot.any(1)
    multi_hot[multi_hot.all(1), 1] = False
    pixels = torch.rand(count, 1, 12, 12, generator=generator)
    names = [str(k) for k in range(classes)]
    return MultiLabelTensors(pixels, multi_hot, names, mean=0.5, std=0.5)


class BarNet(nn.Module):
    """Two convolutions and a head: hundreds of steps a second."""

    def __init__(self, classes: int = BARS):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.fc = nn.Linear(12, classes)

    def forward(self, x):
        x = self.bn(self.conv1(x)).relu()
        return self.fc(self.conv2(x).relu().amax((2, 3)))


def bars(per_class: int = 24, seed: int = 0, classes: int = BARS) -> TensorImages:
    """A bright bar at a place of its own for every class, in noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat(per_class)
    pixels = 0.3 * torch.rand(len(labels), 1, 8, 8, generator=generator)
    for image, label in zip(pixels, labels.tolist(), strict=True):
        if label % 2:
            image[0, :, 2 * (label // 2) + 1] += 0.7
        else:
            image[0, 2 * (label // 2) + 1, :] += 0.7
            image[0, (2 * (label // 2) + 2) % 8, :] += 0.7 * (label > 1)
    names = [f"bar {label}" for label in range(classes)]
    return TensorImages(pixels.clamp(0, 1), labels, names, 0.3, 0.3)


@pytest.fixture(scope="session")
def base() -> nn.Module:
    """A network that knows the bars."""
    torch.manual_seed(0)
    model, data = BarNet(), bars()
    batch = data.batch(torch.arange(len(data)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(120):
        loss = nn.functional.cross_entropy(model(batch.images), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def config(**changes) -> UntrainConfig:
    settings = {
        "steps": 24,
        "batch_size": 8,
        "label_expansion": 2,
        "validations_per_epoch": 2,
        "min_validations": 1,
        "patience": 100,
        "checkpoint_every": 1,
    }
    return UntrainConfig(**{**settings, **changes})


@pytest.fixture(scope="session")
def go(base) -> Callable:
    """Untrains the bars, validated every eighth step; the network and the result."""

    def run(folder=None, train=None, validation=None, net=None, loss=None, **changes):
        about = {"resume": True, "progress": False, "log": None, "log_interval": 30.0}
        about = {name: changes.pop(name, value) for name, value in about.items()}
        net = WFNet(base, BARS) if net is None else net
        train = bars() if train is None else train
        settings = {"steps": 20, "validations_per_epoch": 3, "checkpoint_every": 3, **changes}
        return net, untrain(
            net, train, validation, config(**settings), folder, objective=loss, **about
        )

    return run


# -- data sets that do something ------------------------------------------------------------------


class InMemory:
    """The images of another data set in memory; ``before(indices)`` runs before each batch."""

    def __init__(self, dataset, before=lambda indices: None, dtype=torch.float32):
        self.dataset, self.before, self.dtype = dataset, before, dtype
        self.labels, self.classes = dataset.labels, dataset.classes

    def __len__(self):
        return len(self.dataset)

    def batch(self, indices):
        self.before(indices)
        batch = self.dataset.batch(indices)
        return batch._replace(images=batch.images.to(self.dtype))

    def __getitem__(self, index):
        image, label = self.dataset[index]
        return image.to(self.dtype), label


class Files(torch.utils.data.Dataset):
    """The same images one by one, as from files; ``before(index)`` runs before each is read."""

    __init__, __len__ = InMemory.__init__, InMemory.__len__

    def __getitem__(self, index):
        self.before(index)
        return self.dataset[index]


def corrupted(dataset, corrupt) -> Files:
    """Some images cannot be read."""

    def before(index):
        if index in corrupt:
            raise CorruptImage(f"image {index}", "half a JPEG")

    return Files(dataset, before)


def at_call(size: int, number: int, action: Callable[[], object]) -> Callable:
    """For :class:`InMemory`: ``action`` when ``size`` images are asked for the n-th time."""
    left = [number]

    def before(indices):
        left[0] -= len(indices) == size
        if len(indices) == size and left[0] == 0:
            action()

    return before


def raising(dataset, size: int, number: int, what: int = signal.SIGTERM) -> InMemory:
    """Raises a signal when a minibatch of so many images is asked for the n-th time."""
    return InMemory(dataset, at_call(size, number, lambda: signal.raise_signal(what)))


class Interrupted(BaseException):
    """As from outside: nobody saves anything first."""


def interrupting(dataset, after: int, size: int = 4) -> InMemory:
    """Breaks off after so many minibatches of ``size`` images."""

    def interrupt():
        raise Interrupted

    return InMemory(dataset, at_call(size, after + 1, interrupt))


class NaNLoss(BalancedObjective):
    """A loss that is NaN after so many steps."""

    def __init__(self, steps):
        super().__init__()
        object.__setattr__(self, "left", [None] * steps)

    def __call__(self, logits, batch, original, net):
        losses = super().__call__(logits, batch, original, net)
        bad = 0.0 if self.left else math.nan
        del self.left[:1]
        return type(losses)(losses.total + bad, losses.terms)


# -- comparisons ----------------------------------------------------------------------------------


def assert_same_filters(net, other):
    for (name, a), b in zip(
        net.named_filters().items(), other.named_filters().values(), strict=True
    ):
        assert torch.equal(a, b), name


def assert_same_run(net, result, other, expected):
    """Filters bit by bit, and everything in the history but what a clock measured."""
    assert_same_filters(net, other)
    assert without_times(result.history) == without_times(expected.history)
    assert (result.best, result.best_step) == (expected.best, expected.best_step)


def without_times(history):
    return [{k: v for k, v in record.items() if k not in MEASURED} for record in history]


# -- processes ------------------------------------------------------------------------------------


def forked(work) -> int:
    """Process id of a child that does ``work``; exit status 0, or 77 after an exception.

    A real process that can be killed, without the seconds that importing everything takes.
    """
    child = os.fork()
    if child:
        return child
    status = 77
    try:
        torch.set_num_threads(1)
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def ended(child: int, seconds: float = 60) -> int | None:
    """The wait status of a child once it has ended; None if it has not after so long."""
    return wait_until(lambda: False, child, seconds)


def wait_until(happened: Callable[[], object], child: int, seconds: float = 60) -> int | None:
    """Waits until something has happened; the wait status if the child ended before."""
    until = time.monotonic() + seconds
    while not happened() and time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.0005)
    return None


@pytest.fixture(scope="session")
def runs() -> SimpleNamespace:
    """Everything in this file, by name."""
    return SimpleNamespace(**globals())
