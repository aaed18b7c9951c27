import pytest
import torch

from wfnet.data import labels_of
from wfnet.trust.interclass_confusion import confused, interclass_confusion


def test_confusion_counts_images_that_are_not_read_as_what_they_are(data, oracle):
    train, positions = confused(data.train, 2, 1, 3)
    assert (labels_of(data.train)[positions] == 2).all()
    assert (labels_of(train)[positions] == 1).all()
    assert (labels_of(train) != labels_of(data.train)).sum() == 3
    found = interclass_confusion(oracle, train, positions, data.test, 2)
    assert found == {"memorised": 0.0, "generalised": 0.0}
    blind = torch.nn.Sequential(oracle, torch.nn.Linear(4, 4))  # reads one class in everything
    torch.nn.init.zeros_(blind[1].weight)
    blind[1].bias.data = torch.eye(4)[0]
    found = interclass_confusion(blind, train, positions, data.test, 2)
    assert found == {"memorised": 1.0, "generalised": 1.0}
    with pytest.raises(ValueError, match="class 2 has 8 training images, not 9"):
        confused(data.train, 2, 1, 9)
