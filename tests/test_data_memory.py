"""In-memory data, labels of foreign data sets, splits, digits and rendered characters."""

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from wfnet.data import (
    Dataset,
    Selection,
    TensorImages,
    batches,
    classes_of,
    labels_of,
    limit_per_class,
    open_data,
    select,
    split_dataset,
    stratified_split,
    tensor_images,
)
from wfnet.data.glyphs import (
    CHARACTERS,
    FONTS,
    HUNDRED,
    characters_of,
    font_folder,
    glyphs,
    render,
)


def tensor_set(count=12, channels=3, dtype=torch.uint8, size=8, **kwargs):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, channels, size, size), generator=generator)
    images = images.to(torch.uint8) if dtype == torch.uint8 else images.to(dtype) / 255
    return TensorImages(images, torch.arange(count) % 3, ["a", "b", "c"], **kwargs)


class Foreign:
    """A data set in torchvision's manner, with some attributes."""

    def __init__(self, length=4, **attributes):
        self.length = length
        self.__dict__.update(attributes)

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return torch.full((1, 2, 2), float(index)), index % 2


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_normalises_on_access(dtype):
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    data = tensor_set(dtype=dtype, mean=mean, std=std)
    raw = tensor_set(dtype=dtype).batch(torch.arange(12)).images
    expected = (raw - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    batch = data.batch(torch.tensor([5, 2]))
    torch.testing.assert_close(batch.images, expected[[5, 2]], atol=1e-6, rtol=1e-6)
    assert batch.labels.tolist() == [2, 2]
    assert batch.indices.tolist() == [5, 2]
    image, label = data[5]
    assert image.dtype == torch.float32
    assert torch.equal(image, batch.images[0])
    assert label == 2
    assert isinstance(label, int)
    assert isinstance(data, Dataset)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("size", [5, 16])
def test_resizing_on_access_equals_resizing_once(monkeypatch, dtype, size):
    once = tensor_set(dtype=dtype, size=8).images
    early = TensorImages(once, torch.zeros(12).long(), ["a"], size=size)
    assert early.images.shape[-1] == size
    monkeypatch.setattr(tensor_images, "RESIZED_BYTES", 10)
    late = TensorImages(once, torch.zeros(12).long(), ["a"], size=size)
    assert late.images.shape[-1] == 8
    rows = torch.tensor([3, 1, 7])
    torch.testing.assert_close(late.batch(rows).images, early.batch(rows).images)
    assert torch.equal(late.select(rows)[1][0], late.batch(rows).images[1])


def test_grey_becomes_colour_and_colour_grey():
    grey = tensor_set(channels=1)
    colour = TensorImages(grey.images, grey.labels, grey.classes, (0, 0, 0), (1, 2, 4), channels=3)
    batch = colour.batch(torch.arange(12)).images
    assert batch.shape == (12, 3, 8, 8)
    torch.testing.assert_close(batch[:, 0], 4 * batch[:, 2])
    repeated = TensorImages(
        grey.images.expand(-1, 3, -1, -1), grey.labels, grey.classes, channels=1
    )
    assert torch.equal(repeated.images, grey.images)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(3, 8, 8)}, "N, C, H, W"),
        ({"images": torch.zeros(3, 1, 8, 8, dtype=torch.int64)}, "uint8 or floating"),
        ({"labels": torch.zeros(2).long()}, "3 images but 2 labels"),
        ({"labels": torch.tensor([0, 1, 2])}, "label 2 is outside 0..1"),
        ({"labels": torch.tensor([0, -1, 0])}, "label -1"),
        ({"labels": torch.zeros(3)}, "integers"),
        ({"mean": (0.1, 0.2)}, "mean has 2 values"),
        ({"std": 0.0}, "std must be above 0"),
        ({"images": torch.zeros(3, 2, 8, 8), "channels": 3}, "2 channels cannot become 3"),
    ],
)
def test_bad_tensors_are_refused(change, message):
    good = {"images": torch.zeros(3, 1, 8, 8), "labels": torch.tensor([0, 1, 0])}
    with pytest.raises(ValueError, match=message):
        TensorImages(**{**good, "classes": ["a", "b"], **change})


@pytest.mark.parametrize(
    "dataset",
    [
        Foreign(labels=np.array([0, 1, 0, 1])),
        Foreign(labels=None, targets=[0, 1, 0, 1]),
        Foreign(targets=torch.tensor([0, 1, 0, 1], dtype=torch.int32)),
        Foreign(samples=[("a.jpg", 0), ("b.jpg", 1), ("c.jpg", 0), ("d.jpg", 1)]),
        Foreign(reader=Foreign(samples=[("a", 0), ("b", 1), ("c", 0), ("d", 1)])),
        TensorDataset(torch.zeros(4, 1), torch.tensor([0, 1, 0, 1])),
        Subset(Foreign(6, targets=[1, 0, 1, 0, 1, 9]), [1, 2, 3, 4]),
        ConcatDataset([Foreign(2, targets=[0, 1]), Foreign(2, labels=[0, 1])]),
        Foreign(labels=lambda: 0, targets=[0, 1, 0, 1]),
    ],
)
def test_labels_of_torchvision_like_sets(dataset):
    labels = labels_of(dataset)
    assert labels.dtype == torch.int64
    assert labels.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(
    "dataset",
    [
        Foreign(),
        Foreign(targets=[0.5] * 4),
        Foreign(targets=[[0, 1]] * 4),
        Foreign(targets=["a"] * 4),
        Foreign(targets=[0, 1]),
    ],
)
def test_labels_of_says_what_is_missing(dataset):
    with pytest.raises(ValueError, match="Foreign has no usable labels: give it an attribute"):
        labels_of(dataset)


def test_selection_adapts_foreign_sets():
    theirs = Foreign(5, targets=[0, 1, 0, 1, 0])
    ours = Selection(theirs)
    assert isinstance(ours, Dataset)
    assert ours.classes == ["0", "1"]
    part = select(theirs, torch.tensor([3, 2]))
    assert part.labels.tolist() == [1, 0]
    assert float(part[0][0].mean()) == 3.0
    again = select(part, torch.tensor([1]))
    assert float(again[0][0].mean()) == 2.0
    assert classes_of(Subset(Foreign(2, targets=[0, 1], classes=["x", "y"]), [0])) == ["x", "y"]
    with pytest.raises(ValueError, match="label 1 but only 1 class names"):
        Selection(Foreign(2, targets=[0, 1], classes=["x"]))


def test_batches_of_tensors_keep_the_order():
    data = tensor_set(channels=1)
    order = [torch.tensor([4, 0]), [7], torch.tensor([2, 2, 1])]
    read = list(batches(data, order))
    assert [batch.indices.tolist() for batch in read] == [[4, 0], [7], [2, 2, 1]]
    assert torch.equal(read[2].images[0], data[2][0])


def test_stratified_split_is_seeded_and_complete():
    labels = torch.tensor([0] * 50 + [1] * 20 + [2] * 3)[torch.randperm(73)]
    rest, held = stratified_split(labels, 0.2, seed=1)
    assert sorted(rest.tolist() + held.tolist()) == list(range(73))
    assert labels[held].bincount().tolist() == [10, 4, 1]
    again = stratified_split(labels, 0.2, seed=1)
    assert torch.equal(again[1], held)
    assert not torch.equal(stratified_split(labels, 0.2, seed=2)[1], held)
    assert stratified_split(torch.tensor([0, 0]), 0.99, seed=0)[0].shape == (1,)


def test_stratified_split_names_the_single_image():
    with pytest.raises(ValueError, match=r"class 'b' has a single image .* add images"):
        stratified_split(torch.tensor([0, 0, 1]), 0.5, 0, ["a", "b"])
    with pytest.raises(ValueError, match=r"between 0 and 1, got 1\.5"):
        stratified_split(torch.tensor([0, 0]), 1.5, 0)


def test_limit_per_class():
    labels = torch.tensor([0] * 10 + [1] * 2)
    chosen = limit_per_class(labels, 3, seed=0)
    assert labels[chosen].bincount().tolist() == [3, 2]
    assert torch.equal(chosen, limit_per_class(labels, 3, seed=0))
    with pytest.raises(ValueError, match="1 or more, got 0"):
        limit_per_class(labels, 0, seed=0)


def test_split_dataset_of_tensors():
    rest, held = split_dataset(tensor_set(30), 0.2, seed=0)
    assert (len(rest), len(held)) == (24, 6)
    assert held.labels.bincount().tolist() == [2, 2, 2]


def test_digits():
    splits = open_data("digits", channels=3)
    assert splits.num_classes == 10
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 1797
    assert abs(len(splits.test) / 1797 - 0.2) < 0.005
    assert splits.test.labels.bincount().min() >= 34
    image, _ = splits.train[0]
    assert image.shape == (3, 32, 32)
    every = splits.train.batch(torch.arange(len(splits.train))).images
    assert abs(float(every.mean())) < 0.1
    assert 0.7 < float(every.std()) < 1.2
    assert "seed 0" in str(splits)
    other = open_data("digits", seed=1, image_size=16)
    assert other.train.images.shape[-1] == 16
    few = open_data("digits", train_per_class=5, test_per_class=2)
    assert (len(few.train), len(few.test)) == (50, 20)


def test_digit_splits_share_no_image():
    splits = open_data("digits", image_size=8)
    parts = (splits.train, splits.validation, splits.test)
    seen = [bytes(image.numpy().tobytes()) for part in parts for image in part.images]
    whole = {bytes(image) for image in seen}
    # load_digits has no duplicates, so a shared image would make the set smaller.
    assert len(whole) == 1797


def test_glyphs_are_seeded():
    a = glyphs(26, per_class=10, seed=3)
    b = glyphs(26, per_class=10, seed=3)
    c = glyphs(26, per_class=10, seed=4)
    assert torch.equal(a.train.images, b.train.images)
    assert not torch.equal(a.train.images, c.train.images)
    assert a.classes == list(CHARACTERS[26])
    assert (len(a.train), len(a.validation), len(a.test)) == (26 * 7, 26, 26 * 2)


def test_a_hundred_distinct_characters_have_fonts():
    assert len(set(HUNDRED)) == 100
    assert all((font_folder() / f"{name}.ttf").is_file() for name in FONTS)
    images = render(HUNDRED, torch.arange(100), noise=0.0, distortion=0.0)
    assert images.shape == (100, 1, 32, 32)
    contrast = images.flatten(1).max(1).values.int() - images.flatten(1).min(1).values.int()
    assert contrast.min() > 40


def test_noise_and_colour():
    clean = render("AB", torch.zeros(20).long(), noise=0.0, channels=3)
    noisy = render("AB", torch.zeros(20).long(), noise=0.5, channels=3)
    assert clean.shape == (20, 3, 32, 32)
    assert noisy.float().diff(dim=-1).abs().mean() > 2 * clean.float().diff(dim=-1).abs().mean()


@pytest.mark.parametrize("arguments", [{"num_classes": 101}, {"channels": 2}, {"noise": -1.0}])
def test_bad_glyphs_are_refused(arguments):
    with pytest.raises(ValueError, match=r"glyphs|noise"):
        glyphs(**arguments)
    assert characters_of(12) == HUNDRED[:12]
