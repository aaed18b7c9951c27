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
        Foreign(labels=lambda: 0, targets=torch.tensor([0, 1, 0, 1], dtype=torch.int32)),
        Foreign(reader=Foreign(samples=[("a", 0), ("b", 1), ("c", 0), ("d", 1)])),
        TensorDataset(torch.zeros(4, 1), torch.tensor([0, 1, 0, 1])),
        Subset(Foreign(6, targets=[1, 0, 1, 0, 1, 9]), [1, 2, 3, 4]),
        ConcatDataset([Foreign(2, targets=[0, 1]), Foreign(2, labels=np.array([0, 1]))]),
    ],
)
def test_labels_of_torchvision_like_sets(dataset):
    labels = labels_of(dataset)
    assert labels.dtype == torch.int64
    assert labels.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("attributes", [{}, {"targets": [[0, 1]] * 4}, {"targets": ["a"] * 4}])
def test_labels_of_says_what_is_missing(attributes):
    with pytest.raises(ValueError, match="Foreign has no usable labels: give it an attribute"):
        labels_of(Foreign(**attributes))


def test_selection_adapts_foreign_sets():
    theirs = Foreign(5, targets=[0, 1, 0, 1, 0])
    assert isinstance(Selection(theirs), Dataset)
    assert Selection(theirs).classes == ["0", "1"]
    part = select(theirs, torch.tensor([3, 2]))
    assert part.labels.tolist() == [1, 0]
    assert float(part[0][0].mean()) == 3.0
    again = select(part, torch.tensor([1]))
    assert float(again[0][0].mean()) == 2.0
    named = Foreign(2, targets=[0, 1], classes=["x", "y"])
    assert classes_of(Subset(named, [0])) == ["x", "y"]
    with pytest.raises(ValueError, match="label 1 but only 1 class names"):
        Selection(Foreign(2, targets=[0, 1], classes=["x"]))
