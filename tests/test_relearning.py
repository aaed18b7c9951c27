import copy

import pytest
import torch
from evaluated_networks import K, make_net, uneven_dataset
from torch import nn

from wfnet.data import TensorImages
from wfnet.evaluation import metrics
from wfnet.evaluation.relearning import RelearnConfig, relearn, relearn_times


@pytest.fixture
def dataset():
    return uneven_dataset()


CLASSES = 3


def patches(per_class=40, seed=0):
    """Images whose class is the place of a bright square: learned in an epoch or two."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(CLASSES).repeat(per_class)
    images = 0.1 * torch.rand(len(labels), 1, 6, 6, generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[0, 2 * label : 2 * label + 2] += 0.8
    return TensorImages(images, labels, [str(c) for c in range(CLASSES)])


def linear(forgotten=None):
    """Sums of the bright rows; a forgotten class never wins."""
    head = nn.Linear(36, CLASSES)
    with torch.no_grad():
        head.weight.zero_()
        for label in range(CLASSES):
            head.weight[label, 12 * label : 12 * label + 12] = 1.0
        head.bias.zero_()
        if forgotten is not None:
            head.bias[forgotten] = -20.0
    return nn.Sequential(nn.Flatten(), head)


def test_a_class_is_relearned_and_the_epochs_counted():
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


def test_what_was_never_lost_takes_no_epoch_and_what_never_comes_back_counts_the_cap():
    train, test = patches(), patches(10, seed=1)
    config = RelearnConfig(samples=30, batch_size=10, lr=1e-6, max_epochs=2)
    kept = relearn_times(
        lambda label: linear(), train, test, linear(), config=config, progress=False
    )
    assert kept.mean == (0, 0)
    lost = relearn_times(linear, train, test, linear(), config=config, progress=False)
    assert lost.mean == (2, CLASSES)
    assert [record.epochs for record in lost.records] == [None] * CLASSES


def test_the_tolerance_is_counted_in_points():
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


def test_images_come_from_the_pool_alone():
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


def test_runs_repeat_and_nothing_that_was_given_changes(dataset):
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


def test_an_interrupted_call_goes_on(dataset, tmp_path, monkeypatch):
    net, path = make_net(), tmp_path / "relearning.json"
    config = RelearnConfig(samples=8, batch_size=4, max_epochs=1)
    whole = relearn_times(net, dataset, dataset, config=config, progress=False)
    done = []
    inner = relearn

    def interrupt(model, train, images, label, *rest, **more):
        done.append(label)
        if len(done) == 4:
            raise KeyboardInterrupt
        return inner(model, train, images, label, *rest, **more)

    monkeypatch.setattr("wfnet.evaluation.relearning.relearn", interrupt)
    options = {"config": config, "records": path, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        relearn_times(net, dataset, dataset, **options)
    resumed = relearn_times(net, dataset, dataset, **options)
    assert done == [0, 1, 2, 3, 3, 4, 5, 6]
    assert resumed.records == whole.records
    with pytest.raises(ValueError, match="records of another settings"):
        relearn_times(net, dataset, dataset, **{**options, "config": RelearnConfig()})
    path.write_text(path.read_text()[:40])
    with pytest.raises(ValueError, match="is damaged"):
        relearn_times(net, dataset, dataset, **options)


def test_bad_settings_are_refused(dataset):
    with pytest.raises(ValueError, match="optimizer='lion'"):
        RelearnConfig(optimizer="lion")
    with pytest.raises(ValueError, match="samples must be a whole number of at least 2, got 1"):
        RelearnConfig(samples=1)
    with pytest.raises(ValueError, match="original="):
        relearn_times(lambda label: linear(), dataset, dataset)
    with pytest.raises(ValueError, match=f"0 to {K - 1}"):
        relearn_times(make_net(), dataset, dataset, classes=[K])


def test_mean_relearn_time_counts_the_cap_for_classes_that_never_came_back():
    assert metrics.relearn_time([None] * 10, 100) == (100, 10)
    assert metrics.relearn_time([3, None, 0], 100) == (103 / 3, 1)
    with pytest.raises(ValueError, match="at least one class"):
        metrics.relearn_time([], 100)
