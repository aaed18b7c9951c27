import subprocess
import sys

import pytest
import torch
from image_files import CLASS_NAMES, write_image, write_tar

from wfnet.data import folder_classes, open_data

SIZE = 16


def sizes(splits):
    return [len(part) for part in (splits.train, splits.validation, splits.test)]


def test_open_folder(image_folder):
    splits = open_data(image_folder, image_size=SIZE, validation_fraction=1 / 6)
    assert sizes(splits) == [15, 3, 6]
    parts = (splits.train, splits.validation)
    assert len({part.name_of(i) for part in parts for i in range(len(part))}) == 18
    assert splits.name == "images"
    same = open_data("images", image_folder.parent, image_size=SIZE, validation_fraction=1 / 6)
    assert same.validation.name_of(0) == splits.validation.name_of(0)
    limits = {"train_per_class": 3, "validation_per_class": 1, "test_per_class": 1}
    few = open_data(image_folder, image_size=SIZE, channels=1, validation_fraction=0.4, **limits)
    assert few.train[0][0].shape == (1, SIZE, SIZE)
    assert sizes(few) == [9, 3, 3]


def test_parts_that_a_folder_may_have(image_folder):
    for name in CLASS_NAMES:
        write_image(image_folder / "test" / name / "x.png", 7)
    assert sizes(open_data(image_folder, image_size=SIZE)) == [18, 6, 3]
    (image_folder / "train").rename(image_folder / "other")
    splits = open_data(image_folder, image_size=SIZE, cache="host", augment=True)
    assert sizes(splits) == [0, 0, 6]
    assert folder_classes(image_folder) == list(CLASS_NAMES)


def test_augmentation_is_for_training_alone(image_folder):
    splits = open_data(image_folder, image_size=SIZE, augment=True)
    assert not torch.equal(splits.train[0][0], splits.train[0][0])
    assert torch.equal(splits.validation[0][0], splits.validation[0][0])
    for option in ({"augment": True}, {"cache": "host"}):
        with pytest.raises(ValueError, match="exclude each other"):
            open_data(image_folder, transform=lambda image: image, **option)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", "neither the name of a data set"),
        ("images/train", r"train/train does not exist: an image folder has"),
        ("cifar10", "does not exist.*nothing is downloaded"),
    ],
)
def test_missing_files_are_named(image_folder, path, message):
    with pytest.raises(FileNotFoundError, match=message):
        open_data(path, image_folder.parent)
    with pytest.raises(ValueError, match="cifar10 needs data_dir"):
        open_data("cifar10")


def test_importing_data_needs_no_extra_and_a_missing_one_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install wfnet\[eval\]"):
        open_data("digits")
    code = (
        "import sys, wfnet.data, wfnet.models, wfnet.training; "
        "print([m for m in ('torchvision', 'timm', 'sklearn', 'PIL', 'matplotlib') "
        "if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


def test_class_folders_win_over_an_archive_and_a_file_of_labels_over_both(image_folder):
    for part in ("train", "val"):
        write_tar(image_folder / part / "originals.tar", {"0.txt": b"x"})
    assert open_data(image_folder, image_size=SIZE).classes == list(CLASS_NAMES)
    for part in ("train", "val"):
        files = sorted((image_folder / part).glob("*/*.*"))
        labels = ["cat;dog" if number % 2 else "ant" for number in range(len(files))]
        rows = [f"{f.parent.name}/{f.name},{x}" for f, x in zip(files, labels, strict=True)]
        (image_folder / part / "labels.csv").write_text("\n".join(["image,labels", *rows]))
    assert open_data(image_folder, image_size=SIZE).classes == ["ant", "cat", "dog"]
    assert folder_classes(image_folder) == ["ant", "cat", "dog"]


def test_names_for_classes_that_are_only_numbered(image_folder):
    names = [f"digit {number}" for number in range(10)]
    splits = open_data("digits", image_size=8, class_names=names)
    assert splits.classes == splits.train.classes == splits.test.classes == names
    with pytest.raises(ValueError, match=r"digits has 10 classes .* cannot get 2 names"):
        open_data("digits", image_size=8, class_names=["a", "b"])
    with pytest.raises(ValueError, match="'digit 1' twice"):
        open_data("digits", image_size=8, class_names=[*names[:-1], "digit 1"])
    with pytest.raises(ValueError, match="only classes without a name"):
        open_data(image_folder, class_names=["a", "b", "c"])


def test_mean_and_std_are_checked_and_averaged_for_grey_images():
    grey = open_data("digits", image_size=8, channels=1, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    plain = open_data("digits", image_size=8, channels=1, mean=0.2, std=0.5)
    torch.testing.assert_close(grey.test[0][0], plain.test[0][0])
    with pytest.raises(ValueError, match="mean must be a number of at least -1000, got nan"):
        open_data("digits", mean=float("nan"))
    with pytest.raises(ValueError, match=r"std must be a number above 0, got 0\.0"):
        open_data("digits", std=(0.5, 0.0, 0.5))
