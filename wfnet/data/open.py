"""One door to every data set: by name, an image folder, or a folder of shards."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from wfnet.data import cifar10, digits, glyphs, mnist
from wfnet.data.cache import CachedImages
from wfnet.data.dataset import Dataset
from wfnet.data.encoded import EncodedImages
from wfnet.data.folder import ImageFiles, class_folders, has_class_images, has_images
from wfnet.data.multi_hot import MultiLabelFiles, find_labels, labels_say_more
from wfnet.data.shards import ImageShards, find_shards
from wfnet.data.splits import Splits, limit_dataset, split_dataset
from wfnet.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Transform,
    evaluation_transform,
    training_transform,
)
from wfnet.services import settings
from wfnet.services.files import readable
from wfnet.services.settings import int_from

logger = logging.getLogger("wfnet")

NAMES = ("digits", "mnist", "cifar10", "glyphs10", "glyphs26", "glyphs100")


def open_data(
    name_or_dir: str | Path,
    data_dir: str | Path | None = None,
    *,
    image_size: int | None = None,
    channels: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    interpolation: str = "bicubic",
    crop_pct: float = 0.875,
    augment: bool = False,
    transform: Transform | None = None,
    train_per_class: int | None = None,
    test_per_class: int | None = None,
    validation_per_class: int | None = None,
    validation_fraction: float = 0.1,
    seed: int = 0,
    cache: str | None = None,
    cache_dir: str | Path | None = None,
    device: torch.device | str = "cpu",
    class_names: Sequence[str] | None = None,
) -> Splits:
    """Open a data set as training, validation and test parts.

    name_or_dir: `digits` (ships with scikit-learn), `mnist` or `cifar10` (files in `data_dir`),
                 `glyphs10`, `glyphs26`, `glyphs100` (rendered), else a folder with `train/<class>/`
                 and `val/<class>/`, or with WebDataset shards (`train/*.tar` or `*train*.tar`, and
                 `val`), or with `train/labels.csv` beside images of several labels each
                 (`wfnet.data.multi_hot`); a relative folder is looked for in `data_dir` first.
    image_size, channels: of the tensors; default 32 pixels for the named sets, 224 for folders.
    mean, std:   per channel, on a scale of 0 to 1; default: the data set's own, ImageNet's for
                 folders.
    interpolation, crop_pct, augment, transform: for folders: resizing, whether training images are
                 cropped and mirrored at random, and a transform that replaces all of it.
    train_per_class, validation_per_class, test_per_class: at most that many images of each class,
                 drawn by seed.
    validation_fraction: the part of the training images, drawn by seed, that `train` does not have.
    cache, cache_dir, device: for folders: keep decoded pixels ("device", "host" or "disk"), and
                 where batches are wanted; see `CachedImages`.
    class_names: for data that only number their classes, such as files in MNIST's format.

    `test` is the data set's own test part (for folders `val/`; with a folder `test/` beside it,
    `test/` is the test part and `val/` the validation part). Settings are chosen on `validation`.
    Raises FileNotFoundError or ValueError in one sentence for what is missing or does not fit.
    """
    name = str(name_or_dir)
    for what, value, allowed in (
        ("image_size", image_size, int_from(1, 2**14)),
        ("seed", seed, settings.seed),
        ("validation_fraction", validation_fraction, settings.inner_fraction),
        ("crop_pct", crop_pct, settings.fraction),
        *(("mean", part, settings.pixel_mean) for part in _listed(mean)),
        *(("std", part, settings.pixel_std) for part in _listed(std)),
        ("train_per_class", train_per_class, settings.positive_int),
        ("validation_per_class", validation_per_class, settings.positive_int),
        ("test_per_class", test_per_class, settings.positive_int),
    ):
        wrong = None if value is None else allowed.violation(value)
        if wrong:
            raise ValueError(f"{what} must be {wrong}, got {value!r}")
    if channels not in (None, 1, 3):
        raise ValueError(f"images have 1 or 3 channels, not {channels!r}")
    if mean is not None and channels is not None:
        mean = _as_many(mean, channels)
    if std is not None and channels is not None:
        std = _as_many(std, channels)
    given = {"image_size": image_size, "channels": channels, "mean": mean, "std": std}
    given = {key: value for key, value in given.items() if value is not None}
    validation = None
    if cache is not None and name in NAMES:
        logger.info("%s is in memory as it is: no cache is made", name)
    if name == "digits":
        train, test = digits.read_digits(**given, seed=seed)
    elif name in ("mnist", "cifar10"):
        if data_dir is None:
            raise ValueError(f"{name} needs data_dir, the folder with its files")
        if name == "mnist":
            train, test = mnist.read_mnist(data_dir, **given, class_names=class_names)
        else:
            train, test = cifar10.read_cifar10(data_dir, **given)
    elif name in NAMES:
        train, test = glyphs.read_glyphs(int(name.removeprefix("glyphs")), **given, seed=seed)
    else:
        root = _folder(name, data_dir)
        channels = given.get("channels", 3)
        reading = _Reading(
            size=given.get("image_size", 224),
            channels=channels,
            mean=_as_many(given.get("mean", IMAGENET_MEAN), channels),
            std=_as_many(given.get("std", IMAGENET_STD), channels),
            interpolation=interpolation,
            crop_pct=crop_pct,
            augment=augment,
            transform=transform,
            cache=cache,
            cache_dir=cache_dir,
            device=device,
        )
        train, validation, test = _open_folder(root, reading, validation_fraction, seed)
        name = root.name
    if validation is None:
        train, validation = split_dataset(train, validation_fraction, seed)
    if class_names is not None:
        for part in (train, validation, test):
            part.classes = _named(part.classes, class_names, name)
    return Splits(
        train=limit_dataset(train, train_per_class, seed),
        validation=limit_dataset(validation, validation_per_class, seed),
        test=limit_dataset(test, test_per_class, seed),
        classes=train.classes,
        name=name,
        seed=seed,
    )


def _listed(values: float | Sequence[float] | None) -> list[float]:
    if values is None:
        return []
    return list(values) if isinstance(values, Sequence | torch.Tensor) else [values]


def _named(classes: list[str], names: Sequence[str], data: str) -> list[str]:
    """Returns `names` for classes that are only numbered, or that have these names already."""
    names = list(names)
    if classes != names and classes != [str(number) for number in range(len(classes))]:
        raise ValueError(
            f"{data} has class names of its own ({', '.join(classes[:5])}, ...): leave out others"
        )
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"the class name {twice!r} is given twice: give every class another name")
    if len(names) != len(classes):
        raise ValueError(
            f"{data} has {len(classes)} classes, not {len(names)}: give a name of its own to each, "
            "in the order of their numbers"
        )
    return names


def _folder(name: str, data_dir: str | Path | None) -> Path:
    places = [Path(name)] if data_dir is None else [Path(data_dir, name), Path(name)]
    for place in places:
        if place.is_dir():
            return place
    raise FileNotFoundError(
        f"{name!r} is neither the name of a data set ({', '.join(NAMES)}) nor a folder: "
        f"{' and '.join(str(place) for place in places)} not found"
    )


@dataclass(frozen=True)
class _Reading:
    """How images of a folder become the network's input; see `open_data`."""

    size: int
    channels: int
    mean: list[float]
    std: list[float]
    interpolation: str
    crop_pct: float
    augment: bool
    transform: Transform | None
    cache: str | None
    cache_dir: str | Path | None
    device: torch.device | str

    def __post_init__(self) -> None:
        if self.transform is not None and (self.augment or self.cache is not None):
            option = "augment=True" if self.augment else f"cache={self.cache!r}"
            raise ValueError(
                f"{option} and a transform of one's own exclude each other: describe the transform "
                "by image_size, interpolation and crop_pct, or leave it out"
            )

    def plain(self) -> Transform:
        """Without augmentation."""
        return self.transform or evaluation_transform(
            self.size, self.mean, self.std, self.interpolation, self.crop_pct
        )

    def finish(self, images: EncodedImages, augment: bool) -> Dataset:
        """`images` with augmentation and cache as they were asked for."""
        # Without a cache, too, a GPU gets bytes and normalises them itself: that takes the workers
        # half their time, and a quarter of the way.
        on_gpu = torch.device(self.device).type == "cuda"
        if self.cache is not None or (on_gpu and self.transform is None):
            return CachedImages(
                images,
                self.cache,
                self.size,
                self.mean,
                self.std,
                self.interpolation,
                self.crop_pct,
                augment,
                self.device,
                self.cache_dir,
            )
        if augment:
            return images.with_transform(
                training_transform(self.size, self.mean, self.std, self.interpolation)
            )
        return images


def folder_classes(root: Path) -> list[str]:
    """Returns the class names of a folder with `train/<class>/` or with shards, without reading an
    image.

    A folder without training images has those of `val`. Raises FileNotFoundError or ValueError if
    it is neither.
    """
    part = "train" if _has_part(root, "train") or not _has_part(root, "val") else "val"
    if (root / part).is_dir() and _kind(root, part) == "folders":
        # The images are listed when they are opened.
        return [readable(name) for name in class_folders(root / part)]
    return _part(root, part, lambda image: image, 3, None).classes


def _kind(root: Path, part: str) -> str:
    """Returns how a part lies there: "folders", "shards" or "labels".

    Class folders win over shards and over a file of labels beside them, unless that file gives
    images labels other than their folders, or images lie beside it.
    """
    shards, labels = find_shards(root, part), find_labels(root / part)
    if not shards and labels is None:
        return "folders"
    if has_class_images(root / part):
        beside = labels if labels is not None else shards[0]
        if labels is None or not (has_images(root / part) or labels_say_more(labels)):
            logger.info("%s lies beside class folders and is not read", beside)
            return "folders"
    return "shards" if shards else "labels"


def _has_part(root: Path, part: str) -> bool:
    return (root / part).is_dir() or bool(find_shards(root, part))


def _open_folder(
    root: Path, reading: _Reading, validation_fraction: float, seed: int
) -> tuple[Dataset, Dataset, Dataset]:
    if not _has_part(root, "train") and _has_part(root, "val"):
        # Enough to evaluate, and to untrain on validation images: no training and validation part.
        val = _part(root, "val", reading.plain(), reading.channels, None)
        none = val.select(torch.empty(0, dtype=torch.int64))
        return none, none, reading.finish(val, False)
    train = _part(root, "train", reading.plain(), reading.channels, None)
    val = _part(root, "val", reading.plain(), reading.channels, train.classes)
    if _has_part(root, "test"):
        test = _part(root, "test", reading.plain(), reading.channels, train.classes)
        validation = val
    else:
        train, validation = split_dataset(train, validation_fraction, seed)
        test = val
    return (
        reading.finish(train, reading.augment),
        reading.finish(validation, False),
        reading.finish(test, False),
    )


def _part(
    root: Path, part: str, transform: Transform, channels: int, classes: Sequence[str] | None
) -> EncodedImages:
    """The images of one part, from shards or from class folders."""
    kind = _kind(root, part)
    if kind == "shards":
        return ImageShards(find_shards(root, part), transform, channels, classes)
    if kind == "labels":
        return MultiLabelFiles(root / part, transform, channels, classes)
    if not (root / part).is_dir():
        raise FileNotFoundError(
            f"{root / part} does not exist: an image folder has {root / 'train' / '<class>'} "
            f"and {root / 'val' / '<class>'}, or shards {root / 'train' / '*.tar'} and "
            f"{root / 'val' / '*.tar'}"
        )
    return ImageFiles(root / part, transform, channels, classes)


def _as_many(values: float | Sequence[float], channels: int) -> list[float]:
    """One value for each channel; grey images take the average of colour statistics."""
    values = [float(values)] if isinstance(values, (int, float)) else [float(v) for v in values]
    if channels == 1 and len(values) == 3:
        return [sum(values) / 3]
    if len(values) not in (1, channels):
        raise ValueError(f"{len(values)} mean or std values for images of {channels} channels")
    return values * channels if len(values) == 1 else values
