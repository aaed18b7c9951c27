import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from wfnet.data import Dataset, Selection, classes_of, labels_of, select


class Foreign:
    """A data set in torchvision's manner, with some attributes."""

    def __init__(self, length=4, **attributes):
        self.length = length
        self.__dict__.update(attributes)

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return torch.full((1, 2, 2), float(index)), index % 2


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


class Letters(torch.utils.data.Dataset):
    """As torchvision's EMNIST letters: labels from 1 on, a name for the missing 0."""

    classes = ("N/A", "a", "b", "c")

    def __init__(self, target_transform=None):
        self.targets = torch.tensor([1, 3, 2, 1])
        self.target_transform = target_transform

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        label = int(self.targets[index])
        if self.target_transform is not None:
            label = self.target_transform(label)
        return torch.zeros(1, 2, 2), label


@pytest.mark.parametrize(
    ("transform", "labels", "names"),
    [
        (None, [1, 3, 2, 1], ["N/A", "a", "b", "c"]),
        (lambda label: label - 1, [0, 2, 1, 0], ["a", "b", "c"]),
        ({1: 2, 2: 0, 3: 1}.__getitem__, [2, 1, 0, 2], ["b", "c", "a"]),
        (lambda label: int(label == 1), [1, 0, 0, 1], ["0", "a"]),  # three names of one class
        (lambda label: torch.tensor(label % 3), [1, 0, 2, 1], ["0", "a", "b"]),
    ],
    ids=["none", "shifted", "permuted", "merged", "tensors"],
)
def test_labels_and_names_go_through_the_target_transform(transform, labels, names):
    dataset = Letters(transform)
    assert labels_of(dataset).tolist() == labels
    assert [int(dataset[i][1]) for i in range(4)] == labels
    assert classes_of(dataset) == names
    part = select(dataset, torch.tensor([1, 2]))
    assert part.labels.tolist() == labels[1:3]
    assert classes_of(part) == names
    subset = torch.utils.data.Subset(dataset, [3, 1])
    assert (labels_of(subset).tolist(), classes_of(subset)) == ([labels[3], labels[1]], names)


def test_a_target_transform_must_give_integers():
    with pytest.raises(ValueError, match=r"target_transform of Letters makes .* of label 1"):
        labels_of(Letters(lambda label: [0, 1, 0]))
