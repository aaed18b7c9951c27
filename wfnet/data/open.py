"""One door to every data set: by name, or an image folder."""

from collections.abc import Sequence
from pathlib import Path

from wfnet.data import cifar10, digits, glyphs, mnist
from wfnet.data.folder import ImageFiles, class_folders
from wfnet.data.splits import Splits, limit_dataset, split_dataset
from wfnet.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Transform,
    evaluation_transform,
    training_transform,
)

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
    validation_fraction: float = 0.1,
    seed: int = 0,
) -> Splits:
    """Open a data set as training, validation and test parts.

    name_or_dir: `digits` (ships with scikit-learn), `mnist` or `cifar10` (files in `data_dir`),
                 `glyphs10`, `glyphs26`, `glyphs100` (rendered), else a folder with `train/<class>/`
                 and `val/<class>/`; a relative folder is looked for in `data_dir` first.
    image_size, channels: of the tensors; default 32 pixels for the named sets, 224 for folders.
    mean, std:   per channel, on a scale of 0 to 1; default: the data set's own, ImageNet's for
                 folders.
    interpolation, crop_pct, augment, transform: for folders: resizing, whether training images are
                 cropped and mirrored at random, and a transform that replaces all of it.
    train_per_class, test_per_class: at most that many images of each class, drawn by seed.
    validation_fraction: the part of the training images, drawn by seed, that `train` does not have.

    `test` is the data set's own test part (for folders `val/`; with a folder `test/` beside it,
    `test/` is the test part and `val/` the validation part). Settings are chosen on `validation`.
    Raises FileNotFoundError or ValueError in one sentence for what is missing or does not fit.
    """
    name = str(name_or_dir)
    given = {
        key: value
        for key, value in (
            ("image_size", image_size),
            ("channels", channels),
            ("mean", mean),
            ("std", std),
        )
        if value is not None
    }
    validation = None
    if name == "digits":
        train, test = digits.read_digits(**given, seed=seed)
    elif name in ("mnist", "cifar10"):
        if data_dir is None:
            raise ValueError(f"{name} needs data_dir, the folder with its files")
        read = mnist.read_mnist if name == "mnist" else cifar10.read_cifar10
        train, test = read(data_dir, **given)
    elif name in NAMES:
        train, test = glyphs.read_glyphs(int(name.removeprefix("glyphs")), **given, seed=seed)
    else:
        root = _folder(name, data_dir)
        given = {"image_size": 224, "channels": 3, **given}
        train, validation, test = _open_folder(
            root, given, interpolation, crop_pct, augment, transform, validation_fraction, seed
        )
        name = root.name
    if validation is None:
        train, validation = split_dataset(train, validation_fraction, seed)
    return Splits(
        train=limit_dataset(train, train_per_class, seed),
        validation=validation,
        test=limit_dataset(test, test_per_class, seed),
        classes=train.classes,
        name=name,
        seed=seed,
    )


def _folder(name: str, data_dir: str | Path | None) -> Path:
    places = [Path(name)] if data_dir is None else [Path(data_dir, name), Path(name)]
    for place in places:
        if place.is_dir():
            return place
    raise FileNotFoundError(
        f"{name!r} is neither the name of a data set ({', '.join(NAMES)}) nor a folder: "
        f"{' and '.join(str(place) for place in places)} not found"
    )


def _open_folder(
    root: Path,
    given: dict,
    interpolation: str,
    crop_pct: float,
    augment: bool,
    transform: Transform | None,
    validation_fraction: float,
    seed: int,
) -> tuple[ImageFiles, ImageFiles, ImageFiles]:
    for part in ("train", "val"):
        if not (root / part).is_dir():
            raise FileNotFoundError(
                f"{root / part} does not exist: an image folder has {root / 'train' / '<class>'} "
                f"and {root / 'val' / '<class>'}"
            )
    size, channels = given["image_size"], given["channels"]
    mean = _as_many(given.get("mean", IMAGENET_MEAN), channels)
    std = _as_many(given.get("std", IMAGENET_STD), channels)
    plain = transform or evaluation_transform(size, mean, std, interpolation, crop_pct)
    classes = class_folders(root / "train")
    train = ImageFiles(root / "train", plain, channels, classes)
    val = ImageFiles(root / "val", plain, channels, classes)
    if (root / "test").is_dir():
        validation, test = val, ImageFiles(root / "test", plain, channels, classes)
    else:
        train, validation = split_dataset(train, validation_fraction, seed)
        test = val
    if augment:
        if transform is not None:
            raise ValueError("augment=True and a transform of one's own exclude each other")
        train = train.with_transform(training_transform(size, mean, std, interpolation))
    return train, validation, test


def _as_many(values: float | Sequence[float], channels: int) -> list[float]:
    """One value for each channel; grey images take the average of colour statistics."""
    values = [float(values)] if isinstance(values, (int, float)) else [float(v) for v in values]
    if channels == 1 and len(values) == 3:
        return [sum(values) / 3]
    if len(values) not in (1, channels):
        raise ValueError(f"{len(values)} mean or std values for images of {channels} channels")
    return values * channels if len(values) == 1 else values
