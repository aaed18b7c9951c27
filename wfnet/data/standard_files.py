"""Whether data are a published data set: by digests of its files, not by what they are called."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Sequence
from pathlib import Path

from wfnet.data import mnist

# MD5 sum by the publishers, of MNIST's test images as they are unpacked.
MNIST_DIGEST = "2646ac647ad5339dbf082846283269ea"


def standard_name(name: str, data_dir: str | Path | None, classes: Sequence[str]) -> str | None:
    """Returns "mnist", "cifar10" or "imagenet" if the data are that set, else None.

    MNIST and CIFAR-10 are known by their digests (torchvision has checked CIFAR-10's when it
    read it), ImageNet by the names of its 1,000 class folders.

    Args:
        name: of the data: ``mnist``, ``cifar10``, or an image folder.
        data_dir: folder with the files of a set by name.
        classes: class names of the data.
    """
    if name == "mnist":
        path = mnist.find_idx(data_dir, mnist.TEST[0])
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        found = hashlib.md5(content, usedforsecurity=False).hexdigest()
        return name if found == MNIST_DIGEST else None
    if name == "cifar10":
        return name
    return "imagenet" if sorted(classes) == _imagenet_classes() else None


def _imagenet_classes() -> list[str]:
    """WordNet numbers of the classes, sorted; none where timm is not installed."""
    try:
        from timm.data import ImageNetInfo
    except ImportError:
        return []
    return sorted(ImageNetInfo("imagenet-1k").label_names())
