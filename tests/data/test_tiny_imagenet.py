import pytest
from image_files import WORDNET, write_tiny_imagenet

from wfnet.data import folder_classes, open_data


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
