import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler

import wfnet
from wfnet.data import Selection, as_dataset, batches, classes_of, labels_of, select
from wfnet.untraining import UntrainConfig


class Stream(IterableDataset):
    """Yields the items that it is given."""

    def __init__(self, items, classes=None):
        self.items, self.classes = items, classes

    def __iter__(self):
        return iter(self.items)


class Pictures(torch.utils.data.Dataset):
    """Items are dicts, as of an image processor."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"pixel_values": self.images[index], "labels": int(self.labels[index])}


@pytest.fixture
def items():
    images = torch.rand(12, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    return images, torch.arange(12) % 3


def filters_after_untraining(data):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    net = wfnet.WFNet(model, 3)
    config = UntrainConfig(steps=3, batch_size=4, label_expansion=2)
    wfnet.untrain(net, data, data, config, progress=False)
    assert wfnet.evaluate(net, data, progress=False).table()
    return torch.cat([p.detach().flatten() for p in net.filter_parameters()])


def test_any_form_of_the_same_images_untrains_the_same_filters(items):
    images, labels = items
    plain = TensorDataset(images, labels)
    expected = filters_after_untraining(plain)
    pairs = [(image, int(label)) for image, label in plain]
    forms = [
        DataLoader(plain, batch_size=5, shuffle=True),  # only its data set is used
        DataLoader(plain, batch_size=5, collate_fn=lambda pairs: default_batch(pairs)),
        Stream(pairs),
        DataLoader(Stream(pairs), batch_size=5),
        Pictures(images, labels),
        DataLoader(Pictures(images, labels), batch_size=7),
    ]
    for form in forms:
        assert torch.equal(filters_after_untraining(form), expected)


def default_batch(pairs):
    images, labels = zip(*pairs, strict=True)
    return {"image": torch.stack(images), "label": torch.tensor(labels)}


def test_a_sampler_of_ones_own_decides_which_images_are_used(items):
    plain = TensorDataset(*items)
    weights = torch.tensor([1.0, 1.0, 0.0]).repeat(4)
    loader = DataLoader(plain, batch_size=3, sampler=WeightedRandomSampler(weights, 12))
    found = as_dataset(loader, 3)
    assert len(found) == 12
    assert set(found.labels.tolist()) == {0, 1}
    assert as_dataset(DataLoader(plain), 3) is plain
    assert as_dataset(plain, 3) is plain
    assert as_dataset(Stream([(items[0][0], 1)], ["cat", "dog"]), 2).classes == ["cat", "dog"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "gives no images"),
        ([(torch.zeros(1, 6, 6, dtype=torch.uint8), 0)], "no float tensor"),
        ([(torch.zeros(1, 6, 6), 0.5)], "no integer label"),
        ([(torch.zeros(2, 1, 6, 6), torch.tensor([0]))], "for each of its images"),
        ([{"x": 1}], "has x: an item that is a dict has `pixel_values`"),
        ([(torch.zeros(1, 6, 6), 0), (torch.zeros(1, 7, 6), 0)], "give them one size"),
    ],
)
def test_what_cannot_be_read_is_said_in_a_sentence(given, message):
    with pytest.raises(ValueError, match=message):
        as_dataset(Stream(given), 3)


def test_a_stream_without_end_stops_at_the_limit():
    class Endless(IterableDataset):
        def __iter__(self):
            while True:
                yield torch.zeros(1, 6, 6), 0

    with pytest.raises(ValueError, match=r"more than 0.000976562 GiB .* map-style"):
        as_dataset(Endless(), 3, limit=1 << 20)


def test_tables_of_hugging_face(items):
    datasets = pytest.importorskip("datasets")
    images, labels = items
    names = datasets.ClassLabel(names=["a", "b", "c"])
    features = datasets.Features({"index": datasets.Value("int64"), "label": names})
    rows = {"index": list(range(12)), "label": labels.tolist()}
    table = datasets.Dataset.from_dict(rows, features=features)

    def transform(rows):
        return {"pixel_values": [images[i] for i in rows["index"]], "label": rows["label"]}

    ready = table.with_transform(transform)
    assert torch.equal(labels_of(ready), labels)
    assert classes_of(ready) == ["a", "b", "c"]
    (batch,) = batches(ready, [torch.tensor([4, 2])])
    assert torch.equal(batch.images, images[[4, 2]])
    assert isinstance(select(ready, torch.tensor([1, 3])), Selection)
    expected = filters_after_untraining(TensorDataset(images, labels))
    assert torch.equal(filters_after_untraining(ready), expected)
    stream = table.to_iterable_dataset().map(transform, batched=True, remove_columns=["index"])
    assert torch.equal(filters_after_untraining(stream.with_format("torch")), expected)
    with pytest.raises(ValueError, match="call that of the classes `label`"):
        labels_of(table.rename_column("label", "kind"))
    with pytest.raises(ValueError, match="an item that is a dict has"):
        next(batches(table, [torch.tensor([0])]))
