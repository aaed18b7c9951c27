import logging
import os
import random

import numpy as np
import pytest
import torch
from image_files import truncate
from torchvision.datasets import ImageFolder

from wfnet.data import (
    CachedImages,
    CorruptImages,
    ImageFiles,
    Selection,
    batches,
    corrupt_limit,
    evaluation_transform,
    training_transform,
)
from wfnet.data.loading import LostWorker
from wfnet.data.transforms import IMAGENET_MEAN, IMAGENET_STD

SIZE = 16


def files(root):
    return ImageFiles(root / "train", evaluation_transform(SIZE, crop_pct=1.0))


def index_batches(count, size=4):
    return torch.arange(count).split(size)


def damage(root):
    """Three corrupt files of three kinds; returns their paths in order."""
    return [
        truncate(root / "train" / "ant" / "0.jpg"),
        truncate(root / "train" / "bee" / "1.png"),
        truncate(root / "train" / "cat" / "4.bmp", keep=0.0),
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_images_are_left_out_named_and_counted(image_folder, caplog, workers):
    damaged = damage(image_folder)
    data = files(image_folder)
    corrupt = CorruptImages(limit=3)
    with caplog.at_level(logging.WARNING, "wfnet"):
        read = list(batches(data, [[0], *index_batches(18, 6)], workers, corrupt))
        list(batches(data, index_batches(18), workers, corrupt))  # met again: not counted again
    assert [batch.indices.tolist() for batch in read] == [  # none for a batch of which none remains
        [1, 2, 3, 4, 5],
        [6, 8, 9, 10, 11],
        [12, 13, 14, 15, 17],
    ]
    assert torch.equal(read[1].images[1], data[8][0])
    assert torch.equal(read[1].labels, data.labels[6:11])
    assert set(corrupt.found) == {str(path) for path in damaged}
    assert [sum(str(path) in text for text in caplog.messages) for path in damaged] == [1, 1, 1]
    with pytest.raises(RuntimeError, match=r"3 corrupt images, more than max_corrupt=2.*4\.bmp"):
        list(batches(data, index_batches(18), workers, max_corrupt=2))
    assert corrupt_limit(data) == 10
    foreign = ImageFolder(str(image_folder / "train"), evaluation_transform(SIZE))
    assert [batch.indices.tolist() for batch in batches(foreign, [[0, 1]])] == [[1]]


@pytest.mark.parametrize(("workers", "cached"), [(0, False), (2, False), (0, True), (2, True)])
def test_in_training_the_next_of_its_class_replaces_it(image_folder, workers, cached):
    damage(image_folder)
    data = files(image_folder)
    if cached:
        data = CachedImages(data, "host", SIZE, IMAGENET_MEAN, IMAGENET_STD, crop_pct=1.0)
    truncate(next((image_folder / "train" / "cat").glob("5.*")))
    corrupt = CorruptImages(limit=4)
    for _ in range(2):  # the second time from the cache, where there is one
        read = list(batches(data, index_batches(18, 6), workers, corrupt, replace_corrupt=True))
        assert [batch.indices.tolist() for batch in read] == [
            [1, 1, 2, 3, 4, 5],
            [6, 8, 8, 9, 10, 11],
            [12, 13, 14, 15, 12, 12],
        ]
        assert torch.equal(torch.cat([batch.labels for batch in read]), data.labels)
        assert torch.equal(read[1].images[1], data[8][0])
    assert len(corrupt.found) == 4


def test_a_class_without_a_readable_image_ends_training(image_folder):
    for file in (image_folder / "train" / "bee").iterdir():
        truncate(file)
    with pytest.raises(RuntimeError, match=r"no image of the class of .*bee.* can be read"):
        list(batches(files(image_folder), [[0, 6]], replace_corrupt=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_vanished_file_is_no_corrupt_image(image_folder, workers):
    data = files(image_folder)
    data.path(3).unlink()
    with pytest.raises(FileNotFoundError, match=r"^\[Errno 2\]"):
        list(batches(data, index_batches(18), workers))


def test_a_dead_worker_is_reported():
    data = [(torch.zeros(1, 2, 2), 0)] * 4
    dies = type("Dies", (list,), {"__getitem__": lambda self, index: os._exit(9)})(data)
    dies.labels = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(LostWorker, match="a data worker died"):
        list(batches(dies, [[0, 1]], workers=1))


def test_random_transforms_depend_on_seed_and_position_alone(image_folder):
    data = ImageFiles(image_folder / "train", training_transform(SIZE))
    order = list(index_batches(18, 6))
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]  # noqa: NPY002
    alone = list(batches(data, order, 0, seed=5))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert np.array_equal(before[2], np.random.get_state()[1])  # noqa: NPY002
    for other in (
        list(batches(data, order, 2, seed=5)),
        [alone[0], *batches(data, order[1:], 0, seed=5, start=1)],
    ):
        assert all(torch.equal(a.images, b.images) for a, b in zip(alone, other, strict=True))
    assert not torch.equal(alone[0].images, next(batches(data, order, seed=6)).images)


def test_indices_outside_the_data_set_are_refused(image_folder):
    for index in (18, -1):
        with pytest.raises(IndexError, match=rf"index {index} is outside 0\.\.17"):
            list(batches(files(image_folder), [[0, index]]))


class Items(torch.utils.data.Dataset):
    """A foreign data set whose items are made by a function of (image, label)."""

    def __init__(self, make):
        self.make, self.targets = make, [0, 1, 0, 1]

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.make(torch.full((1, 4, 4), float(index)), index % 2)


@pytest.mark.parametrize(
    "make",
    [
        lambda image, label: (image, label, "a.jpg"),
        lambda image, label: [image.double(), np.int64(label)],
        lambda image, label: (image, torch.tensor(label)),
    ],
    ids=["three", "list", "tensor"],
)
def test_items_of_foreign_data_sets(make):
    for data in (Items(make), Selection(Items(make))):
        (batch,) = batches(data, [[3, 2]])
        assert batch.labels.tolist() == [1, 0]
        assert batch.images[:, 0, 0, 0].tolist() == [3, 2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda image, label: (image.byte(), label), r"uint8 \[1, 4, 4\]: give .* ToDtype"),
        (lambda image, label: (image[0], label), r"float32 \[4, 4\]: give the data set a"),
        (lambda image, label: image, r"Items\[0\] is a Tensor: an item is \(image, label\)"),
        (lambda image, label: (image, "ant"), "has the label 'ant', which is no integer"),
        (lambda image, label: (image, 1), r"comes with label 1, but the labels of Items say 0"),
    ],
)
def test_items_that_cannot_be_used_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        list(batches(Items(make), [[0]]))
