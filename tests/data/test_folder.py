import os

import pytest
import torch
from image_files import CLASS_NAMES, write_image

from wfnet.data import ImageFiles, evaluation_transform, open_data

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


def test_every_folder_is_read_once_whatever_links_to_it(image_folder, caplog):
    root = image_folder / "train"
    (root / "ant" / "up").symlink_to(root)
    (root / "bee" / "up").symlink_to(image_folder)
    (root / "bee" / "side").symlink_to(root / "ant")
    (root / "bee" / "twice").mkdir()
    write_image(root / "bee" / "twice" / "6.png", 6)
    (root / "bee" / "zz").symlink_to(root / "bee" / "twice")
    (root / "loop").symlink_to(image_folder)
    data = files(root)
    assert data.classes == list(CLASS_NAMES)
    assert data.labels.bincount().tolist() == [6, 7, 6]
    for link in ("ant/up", "bee/up", "bee/side", "bee/zz", "loop"):
        assert link in caplog.text


def test_a_class_may_be_a_link_but_two_classes_are_not_one_folder(image_folder, tmp_path):
    root = image_folder / "train"
    (root / "cat").rename(tmp_path / "elsewhere")
    (root / "cat").symlink_to(tmp_path / "elsewhere")
    assert files(root).labels.bincount().tolist() == [6, 6, 6]
    (root / "dog").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"'cat', 'dog' in .* are one and the same folder"):
        files(root)


def test_what_is_passed_over_is_named_once(image_folder, caplog):
    root = image_folder / "train"
    (root / "ant" / "a.heic").write_bytes(b"x")
    (root / "ant" / "gone.jpg").symlink_to(root / "nowhere.jpg")
    (root / "ant" / "round.jpg").symlink_to("about.jpg")
    (root / "ant" / "about.jpg").symlink_to("round.jpg")
    (root / "dog").symlink_to("dog")
    os.mkfifo(root / "bee" / "pipe.jpg")
    (root / "stray.png").write_bytes(b"x")
    (root / "ant" / ".DS_Store").write_bytes(b"x")
    assert files(root).labels.bincount().tolist() == [6, 6, 6]
    (line,) = caplog.messages
    assert "1 files that are no images (ant/a.heic)" in line
    nowhere = "dog, ant/about.jpg, ant/gone.jpg, ant/round.jpg"
    assert f"4 links that lead nowhere ({nowhere})" in line
    assert "1 pipes or devices (bee/pipe.jpg)" in line
    assert "1 files outside a class (stray.png)" in line
    assert ".DS_Store" not in line


def test_an_empty_class_of_another_part_gets_advice_that_can_be_followed(image_folder):
    for file in (image_folder / "val" / "bee").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=r"'bee' in .*val has no images .* from every part"):
        files(image_folder / "val", classes=CLASS_NAMES)
