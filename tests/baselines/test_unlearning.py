import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from wfnet.baselines import METHODS, BaselineConfig, Origin, unlearn
from wfnet.data import MultiLabelTensors
from wfnet.evaluation.initialisation import reinitialise

CLASSES = 3
TRAINING = {"epochs": 6, "lr": 0.02, "batch_size": 20, "channels_last": False}


@pytest.fixture
def unsure(linear):
    """A classifier whose ascent does not start in a saturated softmax."""
    model = linear()
    with torch.no_grad():
        model[1].weight.mul_(0.2)
    return model


def quick(method, **changes):
    """Its settings, for a linear map that learns fast."""
    values = {"epochs": 30, "lr": 0.05, "batch_size": 20, "max_norm": 10.0, **changes}
    known = METHODS[method].defaults
    return replace(known, **{name: v for name, v in values.items() if hasattr(known, name)})


def accuracy(model, dataset, label):
    """On the class, and on the others."""
    with torch.no_grad():
        right = model(dataset.batch(torch.arange(len(dataset))).images).argmax(1) == dataset.labels
    own = dataset.labels == label
    return right[own].double().mean().item(), right[~own].double().mean().item()


# The others have tests of their own: a linear map has no weight that matters to one class alone.
@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("ssd", "bad_teacher", "undo")])
def test_every_baseline_forgets_its_class_and_keeps_the_others(method, unsure, patches):
    train, test, original = patches(), patches(10, seed=1), unsure
    weights = copy.deepcopy(original.state_dict())
    state = torch.get_rng_state()
    changes = {"epochs": 60, "lr": 0.01, "max_norm": 1.0} if "neg" in method else {}
    config = quick(method, retain_weight=0.8, max_epochs=15, temperature=1.0, **changes)
    for label in range(CLASSES):
        assert accuracy(original, test, label) == (1.0, 1.0)
        model = unlearn(method, Origin(original, train, TRAINING), label, config)
        forgotten, kept = accuracy(model, test, label)
        assert forgotten <= 0.1
        assert kept >= (0.5 if method == "negative_gradient" else 0.95)  # ascent is blind to others
        assert not model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, weights[n]) for n, t in original.state_dict().items())


def test_dampening_is_that_of_the_formula(patches, unsure):
    """Of one linear map, whose gradients are known; a minibatch is all images of a kind."""
    train = patches()
    config = quick("ssd", batch_size=len(train), selection=1.5, strength=0.5)
    found = unlearn("ssd", Origin(unsure, train), 1, config)[1].weight

    def importance(chosen):
        x, y = train.images[chosen].flatten(1), train.labels[chosen]
        error = unsure(train.images[chosen]).softmax(1) - nn.functional.one_hot(y, CLASSES)
        return (error.T @ x / len(y)).square()

    own, every = importance(train.labels == 1), importance(train.labels >= 0)
    weight = unsure[1].weight
    damped = (0.5 * every / own).clamp(max=1) * weight
    assert (own > 1.5 * every).any()
    torch.testing.assert_close(found, torch.where(own > 1.5 * every, damped, weight))


def test_teachers_are_followed(patches, linear):
    """The bad one on the class and the original elsewhere; by undo the suppressed one."""
    train, original = patches(), linear()
    own = train.labels == 1
    bad = reinitialise(original, 0)
    found = unlearn("bad_teacher", Origin(original, train), 1, quick("bad_teacher"))
    config = quick("undo")
    student = unlearn("undo", Origin(original, train), 1, config)
    teacher = METHODS["undo"].prepare(Origin(original, train), 1, config)
    with torch.no_grad():
        names = {"found": found, "bad": bad, "good": original, "student": student, "t": teacher}
        seen = {name: m(train.images).softmax(1) for name, m in names.items()}
    near = {"rtol": 0, "atol": 0.15}
    torch.testing.assert_close(seen["found"][own], seen["bad"][own], **near)
    torch.testing.assert_close(seen["found"][~own], seen["good"][~own], **near)
    torch.testing.assert_close(seen["student"], seen["t"], **near)
    destroyed = replace(config, alpha=1, beta=1)
    drawn = METHODS["undo"].start(Origin(original, train), destroyed, teacher)
    assert drawn[1].weight.equal(bad[1].weight)


def test_salun_leaves_most_weights_alone(patches, linear):
    original = linear()
    config = quick("salun", epochs=2, saliency=0.2)
    found = unlearn("salun", Origin(original, patches()), 0, config)
    pairs = zip(found.parameters(), original.parameters(), strict=True)
    changed = torch.cat([(a != b).flatten() for a, b in pairs])
    assert 0 < changed.double().mean() <= 0.21
    with pytest.raises(ValueError, match="weight_decay must be 0"):
        unlearn("salun", Origin(original, patches()), 0, replace(config, weight_decay=0.1))


def test_scrub_alternates_and_noise_is_hard_for_the_class(patches, linear):
    train, original = patches(), linear()
    own, others = Origin(original, train).images(1)
    scrub, config = (
        METHODS["scrub"],
        quick("scrub", max_epochs=1, batch_size=200, class_batch_size=30),
    )
    passes = [
        [len(part) for part in scrub.order(config, own, others, epoch, torch.Generator())]
        for epoch in (0, 1)
    ]
    assert passes == [[30, 10, 80], [80]]
    noise, label = METHODS["unsir"].prepare(Origin(original, train), 1, quick("unsir"))
    assert (noise.shape, label) == ((10, 1, 6, 6), 1)
    assert (original(noise).softmax(1)[:, 1] < 0.1).all()


def test_baselines_repeat_and_see_what_they_should(patches, linear):
    train, original = patches(), linear()
    origin, config = Origin(original, train), quick("random_labels")
    first, again = (unlearn("random_labels", origin, 1, config) for _ in range(2))
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
    unlearn("negative_gradient", origin, 1, quick("negative_gradient"))
    assert set(torch.cat(seen).tolist()) == {1}
    seen.clear()
    unlearn("neggrad_plus", origin, 1, quick("neggrad_plus", epochs=1))
    assert torch.cat(seen).bincount().tolist() == [40, 80, 40]  # as many of the class as of others


def test_ascent_stops_when_the_class_is_forgotten(unsure, patches):
    steps = []
    model = unsure
    model.register_forward_hook(lambda *_: steps.append(1))
    config = quick("negative_gradient", epochs=500, batch_size=40, max_norm=1.0)
    unlearn("negative_gradient", Origin(model, patches()), 0, config)
    assert 1 < len(steps) < 400


def test_retraining_starts_from_new_weights(patches, linear):
    built = {}

    def fresh(seed):
        return built.setdefault(seed, nn.Sequential(nn.Flatten(), nn.Linear(36, CLASSES)))

    origin = Origin(linear(), patches(), TRAINING, fresh)
    for seed in (0, 1):
        assert unlearn("retrained", origin, 0, BaselineConfig(seed)) is built[seed]


def test_bad_input_is_refused(patches, linear):
    origin = Origin(linear(), patches())
    with pytest.raises(ValueError, match="no baseline 'fisher'"):
        unlearn("fisher", origin, 0)
    with pytest.raises(ValueError, match="class 7 has 0 training images"):
        unlearn("retrained", origin, 7)
    with pytest.raises(ValueError, match="settings of scrub are a ScrubConfig, got a Baseline"):
        unlearn("scrub", origin, 0, BaselineConfig())
    diverges = quick("random_labels", epochs=50, lr=1e6, weight_decay=1e6)
    with pytest.raises(FloatingPointError, match="lower its lr"):
        unlearn("random_labels", origin, 0, diverges)


def test_several_classes_and_several_labels(patches, linear):
    """By the trivial baselines and retraining; other methods say which ones can."""
    train = patches()
    for method in ("logit_masked", "bias_shifted", "retrained"):
        model = unlearn(method, Origin(linear(), train, TRAINING), (0, 2))
        found = model(train.batch(torch.arange(len(train))).images).argmax(1)
        assert found.eq(1).all(), method
    with pytest.raises(ValueError, match="salun forgets one class"):
        unlearn("salun", Origin(linear(), train), (0, 2))
    multi_hot = torch.nn.functional.one_hot(train.labels, CLASSES).bool()
    multi_hot[:, 1] |= torch.arange(len(train)) % 2 == 0
    labels = MultiLabelTensors(train.images, multi_hot, train.classes)
    images = labels.batch(torch.arange(len(labels))).images
    model = unlearn("bias_shifted", Origin(linear(), labels), 0)
    assert model(images)[:, 0].max() < 0
    positions = Origin(linear(), labels).images(1)
    assert torch.equal(positions[0], multi_hot[:, 1].nonzero().flatten())
    model = unlearn("retrained", Origin(linear(), labels, TRAINING), 0)
    known = model(images) > 0
    assert not known[:, 0].any()
    assert known[multi_hot[:, 2], 2].all()
    with pytest.raises(ValueError, match="scrub forgets one class"):
        unlearn("scrub", Origin(linear(), labels), 0)
