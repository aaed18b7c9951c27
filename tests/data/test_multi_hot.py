"""Images with several labels each: reading and checks."""

import pytest
import torch
from image_files import write_image

from wfnet.data import MultiLabelTensors, multi_hot_of, open_data, select
from wfnet.data.multi_hot import MultiLabelFiles, rarest_labels


def test_the_rarest_true_label_stands_for_an_image():
    multi_hot = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 0, 1], [1, 1, 0]]).bool()
    assert rarest_labels(multi_hot).tolist() == [1, 0, 2, 1]
    dataset = MultiLabelTensors(torch.rand(4, 1, 8, 8), multi_hot, ["a", "b", "c"])
    part = select(dataset, torch.tensor([2, 0]))
    assert torch.equal(multi_hot_of(part), multi_hot[[2, 0]])
    assert part.labels.tolist() == [2, 1]
    subset = torch.utils.data.Subset(dataset, [3, 1])
    assert torch.equal(multi_hot_of(subset), multi_hot[[3, 1]])


@pytest.mark.parametrize(
    ("multi_hot", "message"),
    [
        ([[1, 0], [0, 0]], "image 1 has no label"),
        ([[1, 1], [1, 0]], "image 0 has every label"),
        ([[1, 0, 0], [0, 1, 0]], r"multi_hot must be \[2, 2\]"),
    ],
)
def test_bad_tables_are_refused(multi_hot, message):
    with pytest.raises(ValueError, match=message):
        MultiLabelTensors(torch.rand(2, 1, 4, 4), torch.tensor(multi_hot), ["a", "b"])


@pytest.fixture
def folder(tmp_path):
    for part in ("train", "val"):
        for number, name in enumerate(("a", "more/b", "c", "d", "e", "f", "g")):
            write_image(tmp_path / part / f"{name}.png", number, size=(8, 8))
    labels = "a.png,cat;dog more/b.png,cat c.png, d.png,bee e.png,cat;dog f.png,bee g.png,cat"
    (tmp_path / "train/labels.csv").write_text("\n".join(["image,labels", *labels.split()]))
    (tmp_path / "val/labels.csv").write_text("image,labels\na.png,dog\nd.png,cat;bee\n")
    return tmp_path


def test_a_folder_of_images_beside_a_file_of_labels(folder, caplog):
    data = open_data(folder, image_size=8, channels=1, validation_fraction=0.5)
    assert data.classes == ["bee", "cat", "dog"]
    assert "1 images have no label" in caplog.text
    assert isinstance(data.test, MultiLabelFiles)
    assert data.test.multi_hot.tolist() == [[False, False, True], [True, True, False]]
    assert data.test.name_of(1).endswith("d.png")
    image, label = data.test[1]
    assert image.shape == (1, 8, 8)
    assert data.test.multi_hot[1, label]
    cached = open_data(folder, image_size=8, channels=1, cache="host").test
    part = cached.select(torch.tensor([1]))
    assert torch.equal(multi_hot_of(part), data.test.multi_hot[1:])
    assert torch.equal(part[0][0], image)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("train/labels.csv", "file,tags\na.png,cat\n", "the columns image and labels"),
        ("train/labels.csv", "image,labels\n", "a line for each image"),
        ("train/labels.csv", "image,labels\nz.png,cat;dog\n", r"z\.png does not exist"),
        ("val/labels.csv", "image,labels\na.png,fox\n", "class 'fox', unknown to the other parts"),
    ],
)
def test_a_bad_file_of_labels_is_refused(folder, file, content, message):
    (folder / file).write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_data(folder)
