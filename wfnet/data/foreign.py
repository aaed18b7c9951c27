"""Data sets of other packages that cannot be read at random: loaders and streams, read once."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler
from torch.utils.data import IterableDataset as Stream
from torch.utils.data.dataloader import default_collate

from wfnet.data.dataset import Dataset, Selection, image_and_label_of, is_table
from wfnet.data.tensor_images import TensorImages
from wfnet.services.log import logger

READ_BYTES = 4 << 30  # of images that are kept in memory where they cannot be read at random


def as_dataset(data: Any, num_classes: int, limit: int = READ_BYTES) -> Dataset:
    """Returns labelled images with random access, which samplers of untraining need.

    A DataLoader that only batches and shuffles is replaced by its data set, so that transforms are
    drawn anew for every minibatch. Another DataLoader (with a sampler or a collate function of its
    own) and a stream (IterableDataset, of `datasets` too) are read once, from the beginning to the
    end, and kept in memory as float32. Anything else is returned as it is.

    data:        items or batches are `(images, labels)` or dicts (`image_and_label_of`).
    num_classes: of the network; names of classes that the data do not name are their numbers.
    limit:       bytes of images that may be kept.

    Raises ValueError for more than `limit` bytes, for images that are no floats of one shape, or
    for labels that are no integers.
    """
    if isinstance(data, DataLoader) and _only_batches(data):
        data = data.dataset
    if is_table(data):
        return Selection(data)
    if isinstance(data, DataLoader | Stream) or not hasattr(data, "__getitem__"):
        return _read(data, num_classes, limit)
    return data


def _only_batches(loader: DataLoader) -> bool:
    """Whether a loader gives each item of a map-style data set once, in some order."""
    if isinstance(loader.dataset, Stream) or loader.collate_fn is not default_collate:
        return False
    if type(loader.batch_sampler) is not BatchSampler:
        return False
    sampler = loader.sampler
    every = type(sampler) is RandomSampler and not sampler.replacement
    return type(sampler) is SequentialSampler or (every and len(sampler) == len(loader.dataset))


def _read(data: Iterable, num_classes: int, limit: int) -> TensorImages:
    name, size = type(data).__name__, 0
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for number, item in enumerate(data):
        image, label = image_and_label_of(item, f"{name}[{number}]")
        if not isinstance(image, Tensor) or not image.is_floating_point() or image.dim() < 3:
            raise ValueError(
                f"{name}[{number}] has no float tensor [C, H, W] or [B, C, H, W]: end its "
                "transform in one (ToTensor, or ToDtype(torch.float32, scale=True))"
            )
        part = image.float().reshape(-1, *image.shape[-3:]).cpu()
        label = torch.as_tensor(label).reshape(-1).cpu()
        if len(label) != len(part) or label.is_floating_point() or label.dtype == torch.bool:
            raise ValueError(f"{name}[{number}] has no integer label for each of its images")
        if images and part.shape[1:] != images[0].shape[1:]:
            raise ValueError(
                f"{name}[{number}] has images {list(part.shape[1:])}, those before it "
                f"{list(images[0].shape[1:])}: give them one size"
            )
        size += part.nbytes
        if size > limit:
            raise ValueError(
                f"{name} has no random access, and its images take more than {limit / 2**30:g} GiB "
                "in memory: give a map-style data set, which is read as it is needed"
            )
        images.append(part)
        labels.append(label.to(torch.int64))
    if not images:
        raise ValueError(f"{name} gives no images")
    logger.info("%s was read into memory once: %.2f GiB of images", name, size / 2**30)
    found = torch.cat(labels)
    classes = getattr(getattr(data, "dataset", data), "classes", None)
    count = max(num_classes, int(found.max()) + 1)
    return TensorImages(torch.cat(images), found, classes or list(map(str, range(count))))
