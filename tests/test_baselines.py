import copy
import math

import pytest
import torch
from evaluated_networks import K, make_model, uneven_dataset
from test_relearning import CLASSES, linear, patches
from torch import nn

from wfnet.baselines import METHODS, BaselineConfig, BaselineModels, run_baseline, unlearn
from wfnet.evaluation import evaluate_models, metrics, reinitialise
from wfnet.evaluation.relearning import RelearnConfig

QUICK = BaselineConfig(epochs=30, lr=0.05, batch_size=20, max_norm=10.0, retain_weight=0.8)
TRAINING = {"epochs": 6, "lr": 0.02, "batch_size": 20, "channels_last": False}


def unsure():
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
def test_every_baseline_forgets_its_class_and_keeps_the_others(method):
    train, test, original = patches(), patches(10, seed=1), unsure()
    weights = copy.deepcopy(original.state_dict())
    state = torch.get_rng_state()
    config = BaselineConfig(epochs=60, lr=0.01, batch_size=20) if "neg" in method else QUICK
    for label in range(CLASSES):
        assert accuracy(original, test, label) == (1.0, 1.0)
        model = unlearn(method, original, train, label, config, TRAINING)
        forgotten, kept = accuracy(model, test, label)
        assert forgotten <= 0.1
        assert kept >= (0.5 if method == "negative_gradient" else 0.95)  # ascent is blind to others
        assert not model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, weights[n]) for n, t in original.state_dict().items())


def test_baselines_repeat_and_see_what_they_should():
    train, original = patches(), linear()
    first, again = (unlearn("random_labels", original, train, 1, QUICK) for _ in range(2))
    assert torch.equal(first[1].weight, again[1].weight)
    seen = []

    class Watched(type(train)):
        def batch(self, indices):
            seen.append(self.labels[indices])
            return super().batch(indices)

    watched = Watched(train.images, train.labels, train.classes)
    unlearn("retrained", original, watched, 1, training=TRAINING)
    assert len(seen) == 0 or not (torch.cat(seen) == 1).any()
    seen.clear()
    unlearn("negative_gradient", original, watched, 1, QUICK)
    assert set(torch.cat(seen).tolist()) == {1}
    seen.clear()
    unlearn("neggrad_plus", original, watched, 1, BaselineConfig(epochs=1, batch_size=20))
    assert torch.cat(seen).bincount().tolist() == [40, 80, 40]  # as many of the class as of others


def test_ascent_stops_when_the_class_is_forgotten():
    steps = []
    model = unsure()
    model.register_forward_hook(lambda *_: steps.append(1))
    config = BaselineConfig(epochs=500, lr=0.05, batch_size=40, momentum=0.0, batch_norm="frozen")
    unlearn("negative_gradient", model, patches(), 0, config)
    assert 1 < len(steps) < 400


def test_retraining_starts_from_new_weights():
    built = []

    def fresh():
        built.append(nn.Sequential(nn.Flatten(), nn.Linear(36, CLASSES)))
        return built[-1]

    model = unlearn("retrained", linear(), patches(), 0, training=TRAINING, fresh=fresh)
    assert model is built[0]


def test_models_evaluated_one_by_one_equal_the_definitions():
    dataset, original = uneven_dataset(), make_model().eval()
    changed = {label: copy.deepcopy(original) for label in range(K)}
    for label, model in changed.items():
        with torch.no_grad():
            model[-1].bias[label] -= 5.0
    result = evaluate_models(changed.__getitem__, original, dataset, batch_size=8, progress=False)
    images, labels, _ = dataset.batch(torch.arange(len(dataset)))
    new = reinitialise(original, 0)
    for label, record in enumerate(result.records):
        own = labels == label
        with torch.no_grad():
            logits = changed[label](images)
            right = (logits.argmax(1) == labels).double()
            zrf = metrics.zrf(logits[own], new(images[own]))
            before = (original(images).argmax(1) == labels).double()
        assert record.acc_f == pytest.approx(right[own].mean().item())
        assert record.acc_r == pytest.approx(right[~own].mean().item())
        assert record.original_acc_r == pytest.approx(before[~own].mean().item())
        assert record.zrf == pytest.approx(zrf.item(), abs=1e-6)
    assert len({record.acc_r for record in result.records}) > 2


def test_a_run_goes_on_class_by_class(tmp_path, monkeypatch):
    train, test, original = patches(), patches(10, seed=1), linear()
    made = []

    def count(method, *rest):
        made.append(rest[2])
        if len(made) == 2:
            raise KeyboardInterrupt
        return unlearn(method, *rest)

    monkeypatch.setattr("wfnet.baselines.per_class.unlearn", count)

    def models(**changes):
        config = BaselineConfig(**{**vars(QUICK), **changes})
        return BaselineModels("random_labels", tmp_path, original, train, config)

    options = {"relearn": RelearnConfig(max_epochs=2), "progress": False}
    with pytest.raises(KeyboardInterrupt):
        run_baseline(models(), test, **options)
    result = run_baseline(models(), test, **options)
    assert made == [0, 1, 1, 2]
    assert [record.index for record in result.evaluation.records] == [0, 1, 2]
    assert len(result.relearning.records) == CLASSES
    assert result.settings["lr"] == QUICK.lr
    again = run_baseline(models(), test, **options)
    assert made == [0, 1, 1, 2]
    assert again.evaluation.records == result.evaluation.records
    with pytest.raises(ValueError, match="records of another settings"):
        models(lr=0.01)(0)
    path = models().path(0)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match="truncated"):
        models()(0)
    models().remove()
    assert not path.exists()


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="lr must be a number above 0, got nan"):
        BaselineConfig(lr=math.nan)
    with pytest.raises(ValueError, match="retain_weight must be a number of at most 1"):
        BaselineConfig(retain_weight=2)
    with pytest.raises(ValueError, match="no baseline 'fisher'"):
        unlearn("fisher", linear(), patches(), 0)
    with pytest.raises(ValueError, match="class 7 has 0 training images"):
        unlearn("retrained", linear(), patches(), 7)
    diverges = BaselineConfig(epochs=50, lr=1e6, weight_decay=1e6)
    with pytest.raises(FloatingPointError, match="lower its lr"):
        unlearn("random_labels", linear(), patches(), 0, diverges)
