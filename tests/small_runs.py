"""Untraining runs of a fraction of a second, for tests of what interrupts them."""

import os
import time
import traceback
from collections.abc import Callable

import torch

from wfnet import WFNet, models
from wfnet.data import TensorImages
from wfnet.untraining import UntrainConfig

CLASSES = 6
MEASURED = ("seconds", "samples_per_second", "images_per_second", "data_wait")


def network(classes: int = CLASSES, **arguments) -> WFNet:
    return WFNet(models.create("resnet", classes, 1, seed=1, width=4), classes, **arguments)


def images(per_class: int = 8, seed: int = 0, classes: int = CLASSES) -> TensorImages:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat(per_class)
    pixels = torch.rand(len(labels), 1, 12, 12, generator=generator)
    return TensorImages(pixels, labels, [str(label) for label in range(classes)], 0.5, 0.5)


class Files(torch.utils.data.Dataset):
    """The same images one by one, as from files; ``before(index)`` runs before each is read."""

    def __init__(self, dataset, before=lambda index: None):
        self.dataset, self.before = dataset, before
        self.labels, self.classes = dataset.labels, dataset.classes

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        self.before(index)
        return self.dataset[index]


def config(**changes) -> UntrainConfig:
    settings = {
        "steps": 24, "batch_size": 8, "label_expansion": 2, "validations_per_epoch": 2,
        "patience": 100, "checkpoint_every": 1,
    }  # fmt: skip
    return UntrainConfig(**{**settings, **changes})


def assert_same_run(net, result, other, expected):
    """Filters bit by bit, and everything in the history but what a clock measured."""
    for (name, a), b in zip(
        net.named_filters().items(), other.named_filters().values(), strict=True
    ):
        assert torch.equal(a, b), name
    assert without_times(result.history) == without_times(expected.history)
    assert (result.best, result.best_step) == (expected.best, expected.best_step)


def without_times(history):
    return [{k: v for k, v in record.items() if k not in MEASURED} for record in history]


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
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.002)
    return None


def wait_until(happened: Callable[[], object], child: int, seconds: float = 60) -> int | None:
    """Waits until something has happened; the wait status if the child ended before."""
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.0005)
    return None
