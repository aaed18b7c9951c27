"""Images with several labels each: reading and checks."""

import numpy as np
import pytest
import torch
from PIL import Image

from wfnet.data import MultiLabelTensors, multi_hot_of, open_data, select
from wfnet.data.multi_hot import MultiLabelFiles, rarest_labels

K = 7


def random_labels(count, classes=K, seed=0):
    generator = torch.Generator().manual_seed(seed)
    multi_hot = torch.rand(count, classes, generator=generator) < 0.35
    multi_hot[:, 0] |= ~multi_hot.any(1)
    multi_hot[multi_hot.all(1), 1] = False
    return multi_hot


def tensors(count=24):
    images = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    names = [f"name{i}" for i in range(K)]
    return MultiLabelTensors(images, random_labels(count), names, mean=0.5, std=0.2)


def test_the_rarest_true_label_stands_for_an_image():
    multi_hot = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 0, 1], [1, 1, 0]]).bool()
    assert rarest_labels(multi_hot).tolist() == [1, 0, 2, 1]
    with pytest.raises(ValueError, match="image 1 has no label"):
        rarest_labels(torch.tensor([[1, 0], [0, 0]]).bool())
    with pytest.raises(ValueError, match="image 0 has every label"):
        rarest_labels(torch.tensor([[1, 1], [1, 0]]).bool())


def test_labels_stay_with_their_images():
    dataset = tensors()
    chosen = torch.tensor([5, 2, 9])
    part = select(dataset, chosen)
    assert torch.equal(multi_hot_of(part), dataset.multi_hot[chosen])
    assert torch.equal(part.labels, dataset.labels[chosen])
    assert part.multi_hot.gather(1, part.labels.unsqueeze(1)).all()
    subset = torch.utils.data.Subset(dataset, [3, 1])
    assert torch.equal(multi_hot_of(subset), dataset.multi_hot[[3, 1]])
    with pytest.raises(ValueError, match=r"multi_hot must be \[2, 3\]"):
        MultiLabelTensors(torch.rand(2, 1, 4, 4), torch.ones(2, 2), list("abc"))


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    for part in ("train", "val"):
        for name in ("a.png", "more/b.png", "c.png", "d.png", "e.png", "f.png", "g.png"):
            picture(tmp_path / part / name)
    (tmp_path / "train/labels.csv").write_text(
        "image,labels\na.png,cat;dog\nmore/b.png,cat\nc.png,\nd.png,bee\ne.png,cat;dog\nf.png,bee\n"
        "g.png,cat\n"
    )
    (tmp_path / "val/labels.json").write_text('{"a.png": ["dog"], "d.png": ["cat", "bee"]}')
    return tmp_path


def test_a_folder_of_images_beside_a_file_of_labels(folder, caplog):
    data = open_data(folder, image_size=8, channels=1, validation_fraction=0.5)
    assert data.classes == ["bee", "cat", "dog"]
    assert "1 images have no label" in caplog.text
    val = data.test
    assert isinstance(val, MultiLabelFiles)
    assert val.multi_hot.tolist() == [[False, False, True], [True, True, False]]
    assert val.name_of(1).endswith("d.png")
    image, label = val[1]
    assert image.shape == (1, 8, 8)
    assert val.multi_hot[1, label]
    cached = open_data(folder, image_size=8, channels=1, cache="host").test
    assert torch.equal(multi_hot_of(cached), val.multi_hot)
    assert torch.equal(multi_hot_of(cached.select(torch.tensor([1]))), val.multi_hot[1:])
    assert torch.equal(cached[1][0], image)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("file,tags\na.png,cat\n", "columns are"),
        ("image,labels\n", "names no images"),
        ("image,labels\nz.png,cat;dog\n", r"z\.png does not exist"),
        ("image,labels\na.png,cat\n", "at least 2"),
        ("image,labels\na.png,cat;dog\n", "every label"),
    ],
)
def test_a_bad_file_of_labels_is_refused(folder, content, message):
    (folder / "train/labels.csv").write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_data(folder)


def test_a_label_that_only_one_part_knows_is_refused(folder):
    (folder / "val/labels.json").write_text('{"a.png": ["fox"]}')
    with pytest.raises(ValueError, match="class 'fox', unknown to the other parts"):
        open_data(folder)
    (folder / "val/labels.json").write_text('{"a.png": "dog"}')
    with pytest.raises(ValueError, match="labels must be lists"):
        open_data(folder)
