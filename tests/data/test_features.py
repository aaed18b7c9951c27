"""Features in the place of images: views, labels, corrupt images."""

import pytest
import torch

from wfnet.data import CorruptImage, CorruptImages, batches
from wfnet.data.features import FeatureImages
from wfnet.data.row_store import RowStore


class Noisy(torch.utils.data.Dataset):
    """Numbers 0, 1, 2 ... with noise, as images [1, 2, 2]; number 3 is corrupt."""

    labels, classes = torch.tensor([0, 1, 0, 1, 0, 1]), ["even", "odd"]

    def __len__(self):
        return 6

    def __getitem__(self, index):
        if index == 3:
            raise CorruptImage("three", "damaged")
        return index + 0.1 * torch.rand(1, 2, 2), int(self.labels[index])


def filled(entries, views=1, replace_corrupt=True):
    entries = torch.tensor(entries)
    store = RowStore("features", "host", len(entries), (4,), torch.float32, "cpu")
    features = FeatureImages(Noisy(), store, entries, views)
    about = 0, CorruptImages(3), 0, replace_corrupt
    counts = list(features.fill(lambda images: images.flatten(1) + 10, *about))
    assert not list(features.fill(None, *about)) or not replace_corrupt
    return features, counts


def test_views_of_an_image_differ_and_have_its_label():
    features, counts = filled([0, 1, 6, 7, 12, 13], views=3)
    assert (counts, len(features), features.name_of(7)) == ([2, 2, 2], 18, "Noisy[1]")
    batch = features.batch(torch.tensor([1, 7, 13, 6]))
    assert batch.labels.tolist() == [1, 1, 1, 0]
    assert batch.images.floor().unique(dim=1).flatten().tolist() == [11, 11, 11, 10]
    assert len(batch.images[:3, 0].unique()) == 3


@pytest.mark.parametrize("replace_corrupt", [True, False])
def test_a_corrupt_image_is_replaced_or_left_out(replace_corrupt):
    features, _ = filled([1, 2, 3], replace_corrupt=replace_corrupt)
    (batch, *more) = batches(features, torch.tensor([[3, 2], [3, 3]]))
    if replace_corrupt:  # by the next one of its class, as `batches` does it
        assert batch.indices.tolist() == [3, 2]
        assert batch.images[0].floor().tolist() == [15] * 4
        assert len(more) == 1
    else:
        assert batch.indices.tolist() == [2]
        assert not more  # nothing remains of the second one
