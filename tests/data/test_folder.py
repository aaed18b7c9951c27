import pytest
import torch
from image_files import CLASS_NAMES, WORDNET, write_image, write_tiny_imagenet

from wfnet.data import ImageFiles, evaluation_transform, folder_classes, open_data

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


@pytest.fixture
def tiny_imagenet(tmp_path):
    return write_tiny_imagenet(tmp_path / "tiny-imagenet-200")


def test_classes_of_validation_images_come_from_the_list(tiny_imagenet):
    assert folder_classes(tiny_imagenet) == list(WORDNET)
    data = open_data(tiny_imagenet, image_size=16, validation_fraction=0.25)
    assert data.classes == list(WORDNET)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [9, 3, 6]
    assert data.test.labels.tolist() == [0, 2, 1, 0, 2, 1]
    assert data.test.name_of(3).endswith("val/images/val_3.JPEG")
    assert data.test[0][0].shape == (3, 16, 16)


def test_a_damaged_list_is_named(tiny_imagenet):
    path = tiny_imagenet / "val" / "val_annotations.txt"
    content = path.read_text()
    for damaged, error, message in (
        (content.replace("val_4", "val_9"), FileNotFoundError, r"val_9.JPEG does not exist, but"),
        (content.replace("\t", " "), ValueError, "a tab between"),
        (content.replace(WORDNET[2], "n09"), ValueError, "unknown 'n09'"),
    ):
        path.write_text(damaged)
        with pytest.raises(error, match=message):
            open_data(tiny_imagenet, image_size=16)
