import copy

import pytest
import torch

from wfnet.data import TensorImages
from wfnet.evaluation.relearning import RelearnConfig, relearn, relearn_times

CLASSES = 3
K = 7


def test_a_class_is_relearned_and_the_epochs_counted(patches, linear):
    train, test = patches(), patches(10, seed=1)
    config = RelearnConfig(samples=60, batch_size=20, lr=0.1, max_epochs=40)
    result = relearn_times(linear, train, test, original=linear(), config=config, progress=False)
    for record in result.records:
        assert record.original == 1.0
        assert record.accuracy[0] == 0.0
        assert 1 <= record.epochs <= 40
        assert len(record.accuracy) == record.epochs + 1  # stopped as soon as it was regained
        assert record.accuracy[-1] == 1.0
        assert all(value < 1.0 for value in record.accuracy[:-1])
        assert record.epochs_tolerant <= record.epochs
    assert result.mean == (sum(r.epochs for r in result.records) / CLASSES, 0)
    # A smaller learning rate takes longer: the count means something.
    slow = RelearnConfig(samples=60, batch_size=20, lr=0.02, max_epochs=100)
    slower = relearn_times(linear, train, test, original=linear(), config=slow, progress=False)
    assert slower.mean[0] > result.mean[0]


def test_what_was_never_lost_takes_no_epoch_and_what_never_comes_back_counts_the_cap(
    patches, linear
):
    train, test = patches(), patches(10, seed=1)
    config = RelearnConfig(samples=30, batch_size=10, lr=1e-6, max_epochs=2)
    kept = relearn_times(
        lambda label: linear(), train, test, linear(), config=config, progress=False
    )
    assert kept.mean == (0, 0)
    lost = relearn_times(linear, train, test, linear(), config=config, progress=False)
    assert lost.mean == (2, CLASSES)
    assert [record.epochs for record in lost.records] == [None] * CLASSES


def test_the_tolerance_is_counted_in_points(patches, linear):
    images = patches(10, seed=1).batch(torch.arange(0, 30, CLASSES)).images  # class 0
    model = linear()
    with torch.no_grad():
        images = images.clone()
        images[0] = 0.0
        images[0, 0, 4:] = 5.0  # one of ten is taken for another class
    exact = relearn(model, patches(), images, 0, 1.0, RelearnConfig(lr=1e-7, max_epochs=1))
    assert exact.accuracy[0] == 0.9
    assert (exact.epochs, exact.epochs_tolerant) == (None, None)
    wide = RelearnConfig(lr=1e-7, max_epochs=1, tolerance=0.1)
    assert relearn(model, patches(), images, 0, 1.0, wide).epochs_tolerant == 0


def test_images_come_from_the_pool_alone(patches, linear):
    train, test = patches(), patches(10, seed=1)
    config = RelearnConfig(samples=60, batch_size=20, lr=0.1, max_epochs=5)
    seen = []

    class Watched(TensorImages):
        def batch(self, indices):
            seen.append(self.labels[indices])
            return super().batch(indices)

    watched = Watched(train.images, train.labels, train.classes)
    result = relearn_times(
        linear, watched, test, linear(), classes=[1], config=config, progress=False,
        pool=lambda label: (train.labels != label).nonzero().flatten(),
    )  # fmt: skip
    drawn = torch.cat([part for part in seen if len(part) == 20])
    assert len(drawn)
    assert not (drawn == 1).any()
    assert result.records[0].epochs is None  # never shown, never relearned
    with pytest.raises(ValueError, match="at least 2 training images"):
        relearn(linear(), train, test.images, 0, 1.0, config, pool=torch.tensor([1]))


def test_runs_repeat_and_nothing_that_was_given_changes(dataset, make_net, patches, linear):
    net = make_net()
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    config = RelearnConfig(samples=8, batch_size=4, max_epochs=2)
    first = relearn_times(net, dataset, dataset, config=config, progress=False)
    again = relearn_times(net, dataset, dataset, config=config, progress=False)
    assert first.records == again.records
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    model = linear(0)
    weights = copy.deepcopy(model.state_dict())
    relearn(model, patches(), patches(4).images[:2], 0, 1.0, config)
    assert all(torch.equal(t, weights[n]) for n, t in model.state_dict().items())


def test_bad_settings_are_refused(dataset, make_net, linear):
    with pytest.raises(ValueError, match="optimizer='lion'"):
        RelearnConfig(optimizer="lion")
    with pytest.raises(ValueError, match="samples must be a whole number of at least 2, got 1"):
        RelearnConfig(samples=1)
    with pytest.raises(ValueError, match="original="):
        relearn_times(lambda label: linear(), dataset, dataset)
    with pytest.raises(ValueError, match=f"0 to {K - 1}"):
        relearn_times(make_net(), dataset, dataset, classes=[K])
