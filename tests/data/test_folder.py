import pytest
import torch
from image_files import (
    CLASS_NAMES,
)

from wfnet.data import (
    ImageFiles,
    evaluation_transform,
    open_data,
)

SIZE = 16


def files(root, **kwargs):
    return ImageFiles(root, evaluation_transform(SIZE, crop_pct=1.0), **kwargs)


def test_folder_order_and_items(image_folder):
    data = files(image_folder / "train")
    assert data.classes == list(CLASS_NAMES)
    assert data.labels.bincount().tolist() == [6, 6, 6]
    image, label = data[7]
    assert image.shape == (3, SIZE, SIZE)
    assert image.dtype == torch.float32
    assert label == 1
    assert data.path(7) == image_folder / "train" / "bee" / "1.png"
    part = data.select(torch.tensor([7, 0]))
    assert torch.equal(part[0][0], image)
    assert part.labels.tolist() == [1, 0]
    assert files(image_folder / "train", channels=1, classes=CLASS_NAMES).channels == 1


def test_empty_class_folder_is_named(image_folder):
    (image_folder / "train" / "dog").mkdir()
    (image_folder / "train" / "dog" / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"class folder 'dog' in .*train has no images"):
        files(image_folder / "train")


def test_folders_must_agree(image_folder):
    (image_folder / "val" / "bee").rename(image_folder / "val" / "wasp")
    with pytest.raises(ValueError, match=r"val lacks class folder 'bee' and has .*'wasp' besides"):
        open_data(image_folder)


def test_folder_without_classes(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    with pytest.raises(ValueError, match="train has no class folders"):
        open_data(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        files(tmp_path / "nothing")
