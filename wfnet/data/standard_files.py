"""Whether data are a published data set: by digests of its files, not by what they are called."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Sequence
from pathlib import Path

from wfnet.data import cifar10, mnist

# MD5 sums that the publishers and torchvision give: of the IDX files of MNIST as they are unpacked,
MNIST_FILES = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
# of the archives of CIFAR-10, and of the files of its Python version.
CIFAR10_ARCHIVES = {
    "cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530",
    "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
}
CIFAR10_FILES = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
IMAGENET_CLASSES = 1000


def standard_name(name: str, data_dir: str | Path | None, classes: Sequence[str]) -> str | None:
    """Returns "mnist", "cifar10" or "imagenet" if the data are that set, else None.

    MNIST and CIFAR-10 are known by digests of the files that are read, ImageNet by the names of its
    1,000 class folders. CIFAR-10's unpacked binary version has no published digests: it is not
    recognised.

    Args:
        name: of the data: ``mnist``, ``cifar10``, or an image folder.
        data_dir: folder with the files of a set by name.
        classes: class names of the data.
    """
    if name == "mnist" and data_dir is not None:
        paths = [mnist.find_idx(data_dir, file) for file in MNIST_FILES]
        return "mnist" if _have(paths, list(MNIST_FILES.values())) else None
    if name == "cifar10" and data_dir is not None:
        return "cifar10" if _is_cifar10(cifar10.found_files(data_dir)) else None
    if len(classes) == IMAGENET_CLASSES and sorted(classes) == _imagenet_classes():
        return "imagenet"
    return None


def _is_cifar10(paths: Sequence[Path]) -> bool:
    if len(paths) == 1 and paths[0].name in CIFAR10_ARCHIVES:
        return _have(paths, [CIFAR10_ARCHIVES[paths[0].name]])
    known = [CIFAR10_FILES.get(path.name) for path in paths]
    return len(paths) == len(CIFAR10_FILES) and None not in known and _have(paths, known)


def _have(paths: Sequence[Path], digests: Sequence[str]) -> bool:
    return all(_digest(path) == known for path, known in zip(paths, digests, strict=True))


def _digest(path: Path) -> str:
    content = path.read_bytes()
    if path.suffix == ".gz" and not path.name.endswith(".tar.gz"):
        content = gzip.decompress(content)
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _imagenet_classes() -> list[str]:
    """WordNet numbers of the classes, sorted; none where timm is not installed."""
    try:
        from timm.data import ImageNetInfo
    except ImportError:
        return []
    return sorted(ImageNetInfo("imagenet-1k").label_names())
