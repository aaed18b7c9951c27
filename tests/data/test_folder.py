import pytest
import torch
from image_files import CLASS_NAMES, write_image

from wfnet.data import ImageFiles, evaluation_transform, open_data

SIZE = 16


def files(root, **kwargs):
    return ImageFiles(root, evaluation_transform(SIZE, crop_pct=1.0), **kwargs)


def test_order_and_items(image_folder):
    data = files(image_folder / "train", classes=CLASS_NAMES)
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


def test_folders_must_agree(image_folder):
    (image_folder / "val" / "bee").rename(image_folder / "val" / "wasp")
    with pytest.raises(ValueError, match=r"val has other classes .* unknown 'wasp', missing 'bee'"):
        open_data(image_folder)


def test_folders_without_classes_or_images(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        files(tmp_path / "nothing")
    with pytest.raises(ValueError, match="has no class folders"):
        files(tmp_path)
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    with pytest.raises(FileNotFoundError, match=r"the classes dog\. Add images"):
        files(tmp_path)


def test_what_is_passed_over_is_named_once(image_folder, tmp_path, caplog):
    root = image_folder / "train"
    (root / "cat").rename(tmp_path / "elsewhere")
    (root / "cat").symlink_to(tmp_path / "elsewhere")  # a class may be a link
    (root / "ant" / "a.heic").write_bytes(b"x")
    (root / "ant" / ".DS_Store").write_bytes(b"x")
    (root / ".git").mkdir()
    write_image(root / "bee" / "deeper" / "6.png", 6)
    assert files(root).labels.bincount().tolist() == [6, 7, 6]
    (line,) = caplog.messages
    assert "1 files are no images: ant/a.heic" in line
