"""One door to every data set: by name, an image folder, or a folder of shards."""

from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch

from wfnet.data import glyphs, mnist
from wfnet.data.cache import CachedImages
from wfnet.data.class_names import check_names
from wfnet.data.dataset import select
from wfnet.data.encoded import EncodedImages
from wfnet.data.folder import ANNOTATIONS, AnnotatedFiles, ImageFiles, class_folders
from wfnet.data.multi_hot import LABEL_FILE, MultiLabelFiles
from wfnet.data.published import SETS, read_published
from wfnet.data.shards import ImageShards, find_shards
from wfnet.data.splits import Splits, limit_per_class, split_dataset
from wfnet.data.tensor_images import TensorImages
from wfnet.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Transform,
    evaluation_transform,
    per_channel,
    training_transform,
)
from wfnet.services import settings
from wfnet.services.extras import require
from wfnet.services.files import readable

# Named sets whose files lie in `data_dir`, and their channels.
NAMES_WITH_FILES = {"mnist": 1} | dict.fromkeys(SETS, 3)
_NAMES = ("digits", *sorted(NAMES_WITH_FILES), "glyphs10", "glyphs26", "glyphs100")
# Of other packages, loaded where they are used: `function(data_dir)` returns the training and the
# test part, as data sets.
OTHERS = {e.name: e for e in entry_points(group="wfnet.data") if e.name not in _NAMES}
NAMES = (*_NAMES, *OTHERS)
TEST_FRACTION = 0.2  # of the named sets that come without a test part
_DIGITS_SCALE = (0.3053,), (0.3761,)  # mean and standard deviation


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

    name_or_dir: `digits` (ships with scikit-learn), `mnist`, `cifar10`, `cifar100`,
                 `cifar100-coarse` or `svhn` (files in `data_dir`), `glyphs10`, `glyphs26`,
                 `glyphs100` (rendered), else a folder with `train/<class>/` and `val/<class>/`
                 (or Tiny-ImageNet's), or with WebDataset shards (`train/*.tar` or `*train*.tar`,
                 and `val`), or with `train/labels.csv` beside images of several labels each
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

    Another package adds a name by an entry point of the group `wfnet.data`; it prepares its images
    itself, so that `image_size`, `channels`, `mean` and `std` do not change them.

    `test` is the data set's own test part (for folders `val/`; with a folder `test/` beside it,
    `test/` is the test part and `val/` the validation part). Settings are chosen on `validation`.
    Raises FileNotFoundError or ValueError in one sentence for what is missing or does not fit.
    """
    name = str(name_or_dir)
    for what, values, allowed in (
        ("image_size", image_size, settings.int_from(1, 2**14)),
        ("mean", mean, settings.pixel_mean),
        ("std", std, settings.pixel_std),
    ):
        several = values if isinstance(values, Sequence | torch.Tensor) else [values]
        for value in several if values is not None else ():
            settings.check_value(what, value, allowed)
    if name in NAMES:
        train, test = _named_set(name, data_dir, image_size or 32, channels, mean, std, seed)
        train, validation = split_dataset(train, validation_fraction, seed)
    else:
        if transform is not None and (augment or cache is not None):
            raise ValueError(
                "augment or cache and a transform of one's own exclude each other: describe the "
                "transform by image_size, interpolation and crop_pct, or leave it out"
            )
        root, channels = _folder(name, data_dir), channels or 3
        name = root.name
        how: dict[str, Any] = {
            "size": image_size or 224,
            "mean": per_channel(IMAGENET_MEAN if mean is None else mean, channels),
            "std": per_channel(IMAGENET_STD if std is None else std, channels),
            "interpolation": interpolation,
        }
        plain = transform or evaluation_transform(**how, crop_pct=crop_pct)
        parts = _open_folder(root, plain, channels, validation_fraction, seed)
        # Without a cache, too, a GPU gets bytes and normalises them itself: that takes the workers
        # half their time, and a quarter of the way.
        on_gpu = torch.device(device).type == "cuda"
        if cache is not None or (on_gpu and transform is None):
            how |= {"crop_pct": crop_pct, "device": device, "folder": cache_dir}
            train, validation, test = (
                CachedImages(images, cache, **how, augment=augment and images is parts[0])
                if len(images)
                else images
                for images in parts
            )
        else:
            train, validation, test = parts
            train = train.with_transform(training_transform(**how)) if augment else train
    if class_names is not None:
        names = _named(train.classes, list(class_names), name)
        for part in (train, validation, test):
            part.classes = names
    limits = (train, train_per_class), (validation, validation_per_class), (test, test_per_class)
    parts = (
        part if limit is None else select(part, limit_per_class(part.labels, limit, seed))
        for part, limit in limits
    )
    return Splits(*parts, classes=train.classes, name=name, seed=seed)


def _named_set(
    name: str,
    data_dir: str | Path | None,
    size: int,
    channels: int | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    seed: int,
) -> tuple[TensorImages, TensorImages]:
    """The training and the test part of a data set in memory."""
    if name in OTHERS:
        return OTHERS[name].load()(data_dir)
    channels = channels or NAMES_WITH_FILES.get(name, 1)
    classes = [str(number) for number in range(count_classes(name, data_dir))]
    if name == "mnist":
        scale, parts = (mnist.MEAN, mnist.STD), mnist.read_mnist(data_dir)
    elif name in SETS:
        scale = SETS[name].mean, SETS[name].std
        parts, classes = read_published(name, data_dir)
    elif name == "digits":  # 1,797 images of 8x8 pixels
        bunch = require("sklearn.datasets", "eval").load_digits()
        images = torch.from_numpy(bunch.images).float().div_(16.0).unsqueeze(1)
        scale, parts = _DIGITS_SCALE, [(images, torch.from_numpy(bunch.target).to(torch.int64))]
    else:
        classes = list(glyphs.CHARACTERS[int(name.removeprefix("glyphs"))])
        labels = torch.arange(len(classes)).repeat_interleave(glyphs.PER_CLASS)
        images = glyphs.render("".join(classes), labels, seed, size, channels)
        scale, parts = (glyphs.MEAN, glyphs.STD), [(images, labels)]
    mean, std = scale[0] if mean is None else mean, scale[1] if std is None else std
    sets = [TensorImages(*part, classes, mean, std, size, channels) for part in parts]
    return split_dataset(sets[0], TEST_FRACTION, seed) if len(sets) == 1 else (sets[0], sets[1])


def count_classes(name: str, data_dir: str | Path | None) -> int:
    """Returns the number of classes of a data set by name, without reading an image.

    Raises FileNotFoundError or ValueError if its files are not there.
    """
    if name in NAMES_WITH_FILES and not data_dir:
        raise ValueError(f"{name} needs data_dir (--data-dir), the folder with its files")
    if name in OTHERS:
        return len(open_data(name, data_dir).classes)
    if name == "mnist":
        return mnist.count_classes(data_dir)
    if name in SETS:
        return SETS[name].check(data_dir)
    return int(name.removeprefix("glyphs")) if name.startswith("glyphs") else 10


def _named(classes: list[str], names: list[str], data: str) -> list[str]:
    """Returns `names` for classes that are only numbered, or that have these names already."""
    numbered = classes == [str(number) for number in range(len(classes))]
    if len(names) != len(classes) or not (numbered or classes == names):
        raise ValueError(
            f"{data} has {len(classes)} classes ({', '.join(classes[:5])}, ...), which cannot get "
            f"{len(names)} names: only classes without a name get one each"
        )
    check_names(names, "class_names")
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


def folder_classes(root: Path) -> list[str]:
    """Returns the class names of a folder with `train/<class>/` or with shards, without reading an
    image.

    A folder without training images has those of `val`. Raises FileNotFoundError or ValueError if
    it is neither.
    """
    part = "train" if _has_part(root, "train") or not _has_part(root, "val") else "val"
    if (root / part).is_dir() and _kind(root, part) is ImageFiles:
        # The images are listed when they are opened.
        return [readable(name) for name in class_folders(root / part)]
    return _part(root, part, lambda image: image, 3, None).classes


def _kind(root: Path, part: str) -> type[EncodedImages]:
    """Returns how a part is read: a file of labels wins over class folders, and they over shards.

    Archives often stay beside the folders that they were unpacked to.
    """
    if (root / part / LABEL_FILE).is_file():
        return MultiLabelFiles
    if (root / part / ANNOTATIONS).is_file():
        return AnnotatedFiles
    folders = (path for path in (root / part).glob("[!.]*") if path.is_dir())
    return ImageShards if find_shards(root, part) and not any(folders) else ImageFiles


def _has_part(root: Path, part: str) -> bool:
    return (root / part).is_dir() or bool(find_shards(root, part))


def _open_folder(
    root: Path, transform: Transform, channels: int, validation_fraction: float, seed: int
) -> tuple[EncodedImages, EncodedImages, EncodedImages]:
    """The training, validation and test part of a folder."""
    if not _has_part(root, "train") and _has_part(root, "val"):
        # Enough to evaluate, and to untrain on validation images: no training and validation part.
        val = _part(root, "val", transform, channels, None)
        none = val.select(torch.empty(0, dtype=torch.int64))
        return none, none, val
    train = _part(root, "train", transform, channels, None)
    val = _part(root, "val", transform, channels, train.classes)
    if _has_part(root, "test") and not isinstance(val, AnnotatedFiles):
        return train, val, _part(root, "test", transform, channels, train.classes)
    train, validation = split_dataset(train, validation_fraction, seed)
    return train, validation, val


def _part(
    root: Path, part: str, transform: Transform, channels: int, classes: Sequence[str] | None
) -> EncodedImages:
    """The images of one part, however they lie there."""
    kind = _kind(root, part)
    if kind is ImageShards:
        return ImageShards(find_shards(root, part), transform, channels, classes)
    if not (root / part).is_dir():
        raise FileNotFoundError(
            f"{root / part} does not exist: an image folder has {root / 'train' / '<class>'} "
            f"and {root / 'val' / '<class>'}, or shards {root / 'train' / '*.tar'} and "
            f"{root / 'val' / '*.tar'}"
        )
    return kind(root / part, transform, channels, classes)
