import copy

import pytest
import torch
from torch import nn

from wfnet.baselines import METHODS, BaselineConfig, Origin, unlearn

CLASSES = 3
QUICK = BaselineConfig(epochs=30, lr=0.05, batch_size=20, max_norm=10.0, retain_weight=0.8)
TRAINING = {"epochs": 6, "lr": 0.02, "batch_size": 20, "channels_last": False}


@pytest.fixture
def unsure(linear):
    """A classifier whose ascent does not start in a saturated softmax."""
    model = linear()
    with torch.no_grad():
        model[1].weight.mul_(0.2)
    return model


def accuracy(model, dataset, label):
    """On the class, and on the others."""
    with torch.no_grad():
        right = model(dataset.batch(torch.arange(len(dataset))).images).argmax(1) == dataset.labels
    own = dataset.labels == label
    return right[own].double().mean().item(), right[~own].double().mean().item()


@pytest.mark.parametrize("method", METHODS)
def test_every_baseline_forgets_its_class_and_keeps_the_others(method, unsure, patches):
    train, test, original = patches(), patches(10, seed=1), unsure
    weights = copy.deepcopy(original.state_dict())
    state = torch.get_rng_state()
    config = BaselineConfig(epochs=60, lr=0.01, batch_size=20) if "neg" in method else QUICK
    for label in range(CLASSES):
        assert accuracy(original, test, label) == (1.0, 1.0)
        model = unlearn(method, Origin(original, train, TRAINING), label, config)
        forgotten, kept = accuracy(model, test, label)
        assert forgotten <= 0.1
        assert kept >= (0.5 if method == "negative_gradient" else 0.95)  # ascent is blind to others
        assert not model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, weights[n]) for n, t in original.state_dict().items())


def test_baselines_repeat_and_see_what_they_should(patches, linear):
    train, original = patches(), linear()
    first, again = (unlearn("random_labels", Origin(original, train), 1, QUICK) for _ in range(2))
    assert torch.equal(first[1].weight, again[1].weight)
    seen = []

    class Watched(type(train)):
        def batch(self, indices):
            seen.append(self.labels[indices])
            return super().batch(indices)

    watched = Watched(train.images, train.labels, train.classes)
    origin = Origin(original, watched, TRAINING)
    unlearn("retrained", origin, 1)
    assert len(seen) == 0 or not (torch.cat(seen) == 1).any()
    seen.clear()
    unlearn("negative_gradient", origin, 1, QUICK)
    assert set(torch.cat(seen).tolist()) == {1}
    seen.clear()
    unlearn("neggrad_plus", origin, 1, BaselineConfig(epochs=1, batch_size=20))
    assert torch.cat(seen).bincount().tolist() == [40, 80, 40]  # as many of the class as of others


def test_ascent_stops_when_the_class_is_forgotten(unsure, patches):
    steps = []
    model = unsure
    model.register_forward_hook(lambda *_: steps.append(1))
    config = BaselineConfig(epochs=500, lr=0.05, batch_size=40, momentum=0.0, batch_norm="frozen")
    unlearn("negative_gradient", Origin(model, patches()), 0, config)
    assert 1 < len(steps) < 400


def test_retraining_starts_from_new_weights(patches, linear):
    built = []

    def fresh():
        built.append(nn.Sequential(nn.Flatten(), nn.Linear(36, CLASSES)))
        return built[-1]

    model = unlearn("retrained", Origin(linear(), patches(), TRAINING, fresh), 0)
    assert model is built[0]


def test_bad_input_is_refused(patches, linear):
    origin = Origin(linear(), patches())
    with pytest.raises(ValueError, match="no baseline 'fisher'"):
        unlearn("fisher", origin, 0)
    with pytest.raises(ValueError, match="class 7 has 0 training images"):
        unlearn("retrained", origin, 7)
    diverges = BaselineConfig(epochs=50, lr=1e6, weight_decay=1e6)
    with pytest.raises(FloatingPointError, match="lower its lr"):
        unlearn("random_labels", origin, 0, diverges)
