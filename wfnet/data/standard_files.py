"""Whether data are a published data set: by digests of its files, not by what they are called."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Sequence
from pathlib import Path

from wfnet.data import cifar10, mnist

# MD5 sums that the publishers and torchvision give, of what has the test images: the IDX file of
# MNIST as it is unpacked, the archives of CIFAR-10, and the file of its Python version.
DIGESTS = {
    "mnist": ("2646ac647ad5339dbf082846283269ea",),
    "cifar10": (
        "c32a1d4ab5d03f1284b67883e8d87530",
        "c58f30108f718f92721af3b95e74349a",
        "40351d587109b95175f43aff81a1287e",
    ),
}


def standard_name(name: str, data_dir: str | Path | None, classes: Sequence[str]) -> str | None:
    """Returns "mnist", "cifar10" or "imagenet" if the data are that set, else None.

    MNIST and CIFAR-10 are known by the digest of a test file, ImageNet by the names of its 1,000
    class folders. CIFAR-10's unpacked binary version has no published digests: it is not
    recognised.

    Args:
        name: of the data: ``mnist``, ``cifar10``, or an image folder.
        data_dir: folder with the files of a set by name.
        classes: class names of the data.
    """
    if name in DIGESTS and data_dir is not None:
        if name == "mnist":
            path = mnist.find_idx(data_dir, mnist.TEST[0])
        else:
            path = cifar10.found_files(data_dir)[-1]
        content = path.read_bytes()
        if name == "mnist" and path.suffix == ".gz":
            content = gzip.decompress(content)
        found = hashlib.md5(content, usedforsecurity=False).hexdigest()
        return name if found in DIGESTS[name] else None
    return "imagenet" if sorted(classes) == _imagenet_classes() else None


def _imagenet_classes() -> list[str]:
    """WordNet numbers of the classes, sorted; none where timm is not installed."""
    try:
        from timm.data import ImageNetInfo
    except ImportError:
        return []
    return sorted(ImageNetInfo("imagenet-1k").label_names())
