import subprocess
import sys

import numpy as np
import pytest
import torch
from image_files import CLASS_NAMES, write_image, write_shard

from wfnet.data import folder_classes, open_data

SIZE = 16


def test_open_folder(image_folder):
    splits = open_data(image_folder, image_size=SIZE, validation_fraction=1 / 6)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (15, 3, 6)
    names = {
        str(part.path(i)) for part in (splits.train, splits.validation) for i in range(len(part))
    }
    assert len(names) == 18
    assert splits.name == "images"
    same = open_data("images", image_folder.parent, image_size=SIZE, validation_fraction=1 / 6)
    assert np.array_equal(same.validation._files, splits.validation._files)
    grey = open_data(image_folder, image_size=SIZE, channels=1, train_per_class=2, test_per_class=1)
    assert grey.train[0][0].shape == (1, SIZE, SIZE)
    assert (len(grey.train), len(grey.test)) == (6, 3)


def test_a_test_folder_makes_val_the_validation_part(image_folder):
    for name in CLASS_NAMES:
        write_image(image_folder / "test" / name / "x.png", 7)
    splits = open_data(image_folder, image_size=SIZE)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (18, 6, 3)


def test_augmentation_is_for_training_alone(image_folder):
    splits = open_data(image_folder, image_size=SIZE, augment=True)
    assert not torch.equal(splits.train[0][0], splits.train[0][0])
    assert torch.equal(splits.validation[0][0], splits.validation[0][0])
    with pytest.raises(ValueError, match="exclude each other"):
        open_data(image_folder, augment=True, transform=lambda image: image)


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("nowhere", FileNotFoundError, "neither the name of a data set"),
        ("images/train", FileNotFoundError, r"train/train does not exist: an image folder has"),
    ],
)
def test_missing_folders_are_named(image_folder, path, error, message):
    with pytest.raises(error, match=message):
        open_data(path, image_folder.parent)


def test_single_image_class_cannot_be_split(image_folder):
    for number, suffix in enumerate(("jpg", "png", "jpeg", "webp", "bmp")):
        (image_folder / "train" / "ant" / f"{number}.{suffix}").unlink()
    with pytest.raises(ValueError, match="class 'ant' has a single image"):
        open_data(image_folder)


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_missing_named_sets(tmp_path, name):
    with pytest.raises(
        FileNotFoundError, match=f"{tmp_path}.* does not exist.*nothing is downloaded"
    ):
        open_data(name, tmp_path)
    with pytest.raises(ValueError, match="needs data_dir"):
        open_data(name)


def test_importing_data_needs_no_extra():
    code = (
        "import sys, wfnet.data, wfnet.models, wfnet.training; "
        "print([m for m in ('torchvision', 'timm', 'sklearn', 'PIL', 'matplotlib') "
        "if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


def test_a_missing_extra_is_named(monkeypatch, image_folder):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install wfnet\[eval\]"):
        open_data("digits")


@pytest.mark.parametrize("beside", ["archive", "other labels", "the same labels"])
def test_class_folders_win_over_what_lies_beside_them(image_folder, beside):
    plain = open_data(image_folder, image_size=SIZE)
    for part in ("train", "val"):
        if beside == "archive":
            write_shard(image_folder / part / "originals.tar", {"0.txt": b"x"})
        elif beside == "other labels":
            (image_folder / part / "labels.csv").write_text("id,breed\n1,ant\n")
        else:
            files = sorted((image_folder / part).glob("*/*"))
            rows = [f"{f.parent.name}/{f.name},{f.parent.name}" for f in files]
            (image_folder / part / "labels.csv").write_text("\n".join(["image,labels", *rows]))
    splits = open_data(image_folder, image_size=SIZE)
    assert splits.classes == list(CLASS_NAMES)
    assert torch.equal(splits.train.labels, plain.train.labels)
    assert folder_classes(image_folder) == list(CLASS_NAMES)


def test_a_file_of_labels_that_says_more_than_the_folders_wins(image_folder):
    for part in ("train", "val"):
        files = sorted((image_folder / part).glob("*/*"))
        names = ["cat;dog" if number % 2 else "ant" for number in range(len(files))]
        rows = [f"{f.parent.name}/{f.name},{name}" for f, name in zip(files, names, strict=True)]
        (image_folder / part / "labels.csv").write_text("\n".join(["image,labels", *rows]))
    assert open_data(image_folder, image_size=SIZE).classes == ["ant", "cat", "dog"]


def test_parts_are_limited_by_class(image_folder):
    limits = {"train_per_class": 3, "validation_per_class": 1, "test_per_class": 1}
    splits = open_data(image_folder, image_size=SIZE, validation_fraction=0.4, **limits)
    parts = (splits.train, splits.validation, splits.test)
    assert [len(part) for part in parts] == [9, 3, 3]


def test_names_for_classes_that_are_only_numbered(image_folder):
    names = [f"digit {number}" for number in range(10)]
    splits = open_data("digits", image_size=8, class_names=names)
    assert splits.classes == splits.train.classes == splits.test.classes == names
    with pytest.raises(ValueError, match="digits has 10 classes, not 2"):
        open_data("digits", image_size=8, class_names=["a", "b"])
    with pytest.raises(ValueError, match="class name 'digit 1' is given twice"):
        open_data("digits", image_size=8, class_names=[*names[:-1], "digit 1"])
    with pytest.raises(ValueError, match="has class names of its own"):
        open_data(image_folder, class_names=["a", "b", "c"])


def test_grey_images_take_the_average_of_colour_statistics():
    grey = open_data("digits", image_size=8, channels=1, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    plain = open_data("digits", image_size=8, channels=1, mean=0.2, std=0.5)
    torch.testing.assert_close(grey.test[0][0], plain.test[0][0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": 2}, "images have 1 or 3 channels, not 2"),
        ({"image_size": 0}, "image_size must be a whole number of at least 1, got 0"),
        ({"seed": 2**70}, "seed must be a whole number of at most"),
        ({"mean": float("nan")}, "mean must be a number of at least -1000, got nan"),
        ({"std": (0.5, 0.0, 0.5)}, "std must be a number above 0, got 0.0"),
        ({"validation_fraction": 1}, "validation_fraction must be a number below 1, got 1"),
        ({"crop_pct": 1.5}, "crop_pct must be a number of at most 1, got 1.5"),
        ({"train_per_class": 0}, "train_per_class must be a whole number of at least 1, got 0"),
    ],
)
@pytest.mark.parametrize("data", ["digits", "folder"])
def test_settings_out_of_range_are_refused_for_any_data(data, settings, message, image_folder):
    with pytest.raises(ValueError, match=message):
        open_data(image_folder if data == "folder" else data, **settings)
