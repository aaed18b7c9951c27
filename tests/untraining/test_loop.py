"""Untraining: it forgets and retains, repeats bitwise, and keeps the last good filters."""

import math

import pytest
import torch

from wfnet import UntrainConfig, WFNet, untrain
from wfnet.untraining.objectives import BalancedObjective
from wfnet.untraining.run_state import RunStore, identity_of
from wfnet.untraining.validation import AccuracyValidator

CLASSES = 4


def test_it_forgets_every_class_and_leaves_the_base_alone(base, runs, go):
    net, validation = WFNet(base, CLASSES).eval(), runs.bars(seed=1)
    about = CLASSES, BalancedObjective(), runs.config(validation_rows=3)
    before = AccuracyValidator(validation, *about)(net)
    _, result = go(validation=validation, net=net, steps=120)
    assert before.acc_f > 0.9
    assert result.best.acc_f < 0.05
    assert result.best.acc_r > before.acc_r - 0.05
    assert result.score == pytest.approx(0.5 * (1 - result.best.acc_f + result.best.acc_r))
    plain, wrapped = base.state_dict(), net.model.state_dict()
    assert all(torch.equal(value, wrapped[name]) for name, value in plain.items())
    assert all(p.grad is None for p in net.model.parameters() if not p.requires_grad)
    assert not net.training
    assert net.fuse is False
    # 96 images, 4 of them read a step: an epoch has 24 steps, and is looked at three times.
    assert [record["step"] for record in result.history] == list(range(8, 121, 8))
    assert result.history[-1]["epoch"] == 5


def test_the_paper_recipe(base, runs, caplog):
    settings = UntrainConfig.recipe("paper", CLASSES, steps=3, batch_size=8)
    net = WFNet(base, CLASSES, normalize_gate=False)
    result = untrain(net, runs.bars(), runs.bars(seed=1), settings, progress=False)
    assert all(p.abs().max() <= 3 for p in net.filter_parameters())
    assert {"retain", "forget", "closed", "loss"} <= set(result.history[0])
    assert "normalize_gate" not in caplog.text
    untrain(WFNet(base, CLASSES), runs.bars(), config=settings, progress=False)
    assert "normalize_gate=False" in caplog.text


def test_runs_repeat_bitwise_and_leave_the_random_state_alone(runs, go):
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        found += go(validation=runs.bars(4, 1))
        assert torch.equal(state, torch.get_rng_state())
    runs.assert_same_run(*found)
    with pytest.raises(AssertionError):
        runs.assert_same_filters(go(seed=1)[0], found[0])


# -- validations, checkpoints and stopping --------------------------------------------------------


def test_patience_ends_the_run_and_the_best_filters_are_kept(base, runs, go, tmp_path):
    validation = runs.bars(4, seed=1)
    changes = {"patience": 2, "schedule": "constant", "lr": 3.0, "validations_per_epoch": 24}
    net, result = go(tmp_path, None, validation, steps=500, **changes)
    assert result.stopped_early
    assert result.steps == result.best_step + 2 < 500
    net.fuse = True  # as `untrain` ran it: equal in every bit
    again = AccuracyValidator(validation, CLASSES, BalancedObjective(), runs.config(**changes))(net)
    assert again == result.best
    runs.assert_same_filters(WFNet.from_pretrained(tmp_path, base), net)


def test_a_checkpoint_is_written_every_few_minutes(go, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(RunStore, "save", lambda self, state, *_: saved.append(state.step))
    for seconds, expected in ((0.0, [1, 2, 3, 4]), (1000.0, [4])):
        saved.clear()
        monkeypatch.setattr("wfnet.untraining.loop._SECONDS_BETWEEN_CHECKPOINTS", seconds)
        go(folder=tmp_path / str(seconds), steps=4, checkpoint_every=1000)
        assert saved == expected


# -- values that are not finite -------------------------------------------------------------------


def test_a_loss_that_is_not_finite_keeps_the_last_good_filters(base, runs, go, tmp_path):
    net = WFNet(base, CLASSES)
    message = r"loss of step 10 is not finite.*lower lr.*check the images for NaN"
    with pytest.raises(FloatingPointError, match=message):
        go(folder=tmp_path, net=net, loss=runs.NaNLoss(9))
    runs.assert_same_filters(WFNet.from_pretrained(tmp_path, base), net)
    assert all(p.isfinite().all() for p in net.filter_parameters())
    assert any((p != 3).any() for p in net.filter_parameters())


# -- data and networks ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "validation", "classes", "message"),
    [
        ([0, 1, 2, 3], None, [1, 7], "classes has 7, but the network has 4 classes"),
        ([0, 1], None, [1, 2], "class 'bar 2' has no training image"),
        ([1], None, [1], "only class that is untrained"),
        ([0, 2, 3], None, None, "class 'bar 1' has no training image"),
        ([], None, None, "training data have no images"),
        ([0, 1, 2, 3], [], None, "validation data have no images"),
    ],
)
def test_data_that_do_not_fit(runs, go, train, validation, classes, message):
    def images(of):
        data = runs.bars()
        return data.select(torch.isin(data.labels, torch.tensor(of)).nonzero().flatten())

    with pytest.raises(ValueError, match=message):
        go(None, images(train), None if validation is None else images(validation), classes=classes)


def test_data_of_other_classes(runs, go):
    with pytest.raises(ValueError, match="have label 5, but the network has 4 classes"):
        go(train=runs.bars(classes=6))
    with pytest.raises(ValueError, match="data have 4 classes, but the network has 6"):
        go(net=WFNet(runs.BarNet(6), 6))


@pytest.mark.parametrize(
    ("classes", "images", "changes"),
    [
        ([3, 1], [0, 1, 3], {}),
        ([1, 2], [0, 1, 2, 3], {"optimizer": "sgd", "lr": 0.5, "objective": "paper"}),
    ],
)
def test_some_classes_with_images_of_some(runs, go, classes, images, changes):
    """Rows of the others stay as they are, bit by bit; no image is retained under its own row."""
    parts = []
    for data in (runs.bars(), runs.bars(6, 1)):
        wanted = torch.isin(data.labels, torch.tensor(images))
        parts.append(data.select(wanted.nonzero().flatten()))
    net, result = go(None, *parts, classes=classes, steps=6 if changes else 60, **changes)
    moved = torch.stack([(p != 3).any(1) for p in net.filter_parameters()]).any(0)
    assert moved.nonzero().flatten().tolist() == sorted(classes)
    known = [not math.isnan(value) for value in result.best.acc_f_per_class]
    assert [label for label in range(CLASSES) if known[label]] == sorted(classes)
    if not changes:
        assert result.best.acc_f < 0.1
        assert result.best.acc_r > 0.9


def test_images_with_several_labels(runs):
    """Runs repeat bit by bit; the mark of the data has all labels, not only the rarest ones."""
    data, other = runs.several_labels(), runs.several_labels()
    runs_of = []
    for _ in range(2):
        net = runs.network()
        settings = UntrainConfig.recipe("balanced", runs.CLASSES, steps=6, batch_size=8)
        runs_of += [net, untrain(net, data, data, settings, progress=False)]
    runs.assert_same_run(*runs_of)
    assert 0 < runs_of[1].best.acc_r <= 1
    common = int(other.multi_hot.sum(0).argmax())
    free = ~other.multi_hot[:, common] & (other.multi_hot.sum(1) < runs.CLASSES - 1)
    other.multi_hot[int(free.nonzero()[0]), common] = True
    assert torch.equal(data.labels, other.labels)
    marks = [identity_of(net, d, None, BalancedObjective()) for d in (data, other)]
    assert marks[0]["training data"] != marks[1]["training data"]
