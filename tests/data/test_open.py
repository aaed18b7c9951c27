import subprocess
import sys

import numpy as np
import pytest
import torch
from image_files import (
    CLASS_NAMES,
    write_image,
)

from wfnet.data import (
    open_data,
)

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
