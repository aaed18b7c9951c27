"""Features at the cut, kept: the same filters, no image is read twice, what is refused."""

import signal

import pytest
import torch

from wfnet import UntrainConfig, WFNet, untrain
from wfnet.data import CorruptImage, CorruptImages, batches, limit_per_class, row_store
from wfnet.data.row_store import RowStore
from wfnet.gate_tables import side_by_side
from wfnet.untraining.kept_features import FeatureImages
from wfnet.untraining.signals import Stopped


@pytest.fixture
def late(base, go, runs):
    """Untrains with masks in the second convolution alone; the filters."""

    def run(folder=None, **changes):
        net = WFNet(base, runs.BARS, targets="conv2")
        net, _ = go(folder, net=net, **{"validation": runs.bars(4, seed=1), **changes})
        return side_by_side(net.filter_parameters()).detach()

    return run


@pytest.mark.parametrize("fuse", [True, False])
def test_filters_are_those_of_a_run_that_computes_them_anew(late, tmp_path, fuse):
    expected = late(features="off", fuse=fuse)
    on_disk = {"features": "disk", "cache_dir": str(tmp_path)}
    for kept in ({}, {"features": "host"}, on_disk, on_disk):
        assert torch.equal(late(fuse=fuse, **kept), expected)
    assert len([*tmp_path.glob("features-*.float32")]) == 2  # training and validation images
    assert not torch.equal(late(feature_dtype="bfloat16"), expected)


def test_no_image_is_read_once_features_are_there(late, runs):
    read = []
    late(train=runs.Files(runs.bars(), read.append), features="host", steps=40)
    assert len(read) == 2 * 16 + len(set(read))  # some are looked at first, to know them
    read.clear()
    late(train=runs.Files(runs.bars(), read.append), features="off", steps=40)
    assert len(read) == 40 * 4


def test_few_images_are_those_of_a_data_set_of_so_many(late, runs):
    whole = runs.bars(6)
    few = whole.select(limit_per_class(whole.labels, 2, 0))
    assert torch.equal(late(train=whole, images_per_class=2), late(train=few))
    assert not torch.equal(late(train=whole), late(train=few))


def test_random_images_are_kept_as_a_number_of_views(late, runs):
    class Noisy(runs.Files):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return image + 0.1 * torch.rand_like(image), label

    images = Noisy(runs.bars(), lambda index: None)
    assert torch.equal(late(train=images), late(train=images, features="off"))  # none are kept
    with pytest.raises(ValueError, match="transformed at random; say how many views"):
        late(train=images, features="host")
    assert late(train=images, views=2).isfinite().all()
    with pytest.raises(ValueError, match="are the same each time: leave out views"):
        late(views=2)


def test_a_run_that_is_stopped_while_it_fills_the_store_goes_on(late, runs, tmp_path):
    def stop(index):
        if index == 30:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Stopped, match="after step 0 of"):
        late(tmp_path, train=runs.Files(runs.bars(), stop), features="host")
    assert torch.equal(late(tmp_path, train=runs.Files(runs.bars(), lambda index: None)), late())


def test_what_is_refused(base, late, monkeypatch, runs):
    with pytest.raises(ValueError, match="nothing frozen lies in front of its first mask"):
        untrain(
            WFNet(base, runs.BARS), runs.bars(), config=runs.config(features="host"), progress=False
        )
    with pytest.raises(ValueError, match=r"Files.*does not say"):
        late(train=runs.Files(runs.bars(), lambda index: None), features="disk")
    with pytest.raises(ValueError, match="leave out features='off'"):
        UntrainConfig(steps=1, features="off", views=2)
    monkeypatch.setattr(row_store, "free_memory", lambda: 1000)
    with pytest.raises(ValueError, match="does not fit"):
        late(features="host")
    late()  # unasked, they are not kept


class Numbers(torch.utils.data.Dataset):
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
    features = FeatureImages(Numbers(), store, entries, views)
    about = {"seed": 0, "replace_corrupt": replace_corrupt, "max_corrupt": CorruptImages(3)}
    counts = list(features.fill(lambda images: images.flatten(1) + 10, **about))
    assert not list(features.fill(None, **about)) or not replace_corrupt
    return features, counts


def test_views_of_an_image_differ_and_have_its_label():
    features, counts = filled([0, 1, 6, 7, 12, 13], views=3)
    assert (counts, len(features), features.name_of(7)) == ([2, 2, 2], 18, "Numbers[1]")
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
