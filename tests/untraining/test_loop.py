"""Untraining: it forgets and retains, repeats bitwise, and keeps the last good filters."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from wfnet import UntrainConfig, WFNet, untrain
from wfnet.untraining.checkpoints import Checkpoints
from wfnet.untraining.objectives import BalancedObjective, Objective
from wfnet.untraining.validation import AccuracyValidator, HowToRun

CLASSES = 4


@pytest.fixture
def config(runs):
    """Settings of a short run on the bars; a validation every eighth step."""

    def with_changes(**changes):
        settings = {"steps": 20, "label_expansion": 3, "validations_per_epoch": 3}
        return runs.config(**{**settings, "checkpoint_every": None, "patience": 10, **changes})

    return with_changes


def test_it_forgets_every_class_and_retains_the_others(base, runs, config):
    net = WFNet(base, CLASSES)
    train, validation = runs.bars(), runs.bars(seed=1)
    before = AccuracyValidator(validation, CLASSES, 3, 0, BalancedObjective())(net)
    result = untrain(net, train, validation, config(steps=120, lr=0.2), progress=False)
    assert before.acc_f > 0.9
    assert result.best.acc_f < 0.05
    assert result.best.acc_r > before.acc_r - 0.05
    assert result.score == pytest.approx(0.5 * (1 - result.best.acc_f + result.best.acc_r))


def test_fused_and_unfused_runs_learn_the_same_filters(base, runs, config):
    data, filters = runs.bars(), []
    for fuse in (False, True):
        net = WFNet(base, CLASSES)
        untrain(net, data, None, config(steps=3, fuse=fuse), progress=False)
        assert net.fuse is False
        filters.append(torch.cat([p.detach().flatten() for p in net.filter_parameters()]))
    torch.testing.assert_close(*filters, rtol=1e-3, atol=1e-3)


def test_the_base_and_its_mode_do_not_change(base, runs, config):
    net = WFNet(base, CLASSES).eval()
    untrain(net, runs.bars(), config=config(steps=3), progress=False)
    plain, wrapped = base.state_dict(), net.model.state_dict()
    assert all(torch.equal(value, wrapped[name]) for name, value in plain.items())
    assert all(p.grad is None for p in net.model.parameters() if not p.requires_grad)
    assert not net.training


def test_the_paper_recipe(base, runs, caplog):
    settings = UntrainConfig.recipe("paper", CLASSES, steps=3, batch_size=8)
    net = WFNet(base, CLASSES, normalize_gate=False)
    result = untrain(net, runs.bars(), runs.bars(seed=1), settings, progress=False)
    assert all(p.abs().max() <= 3 for p in net.filter_parameters())
    assert {"retain", "forget", "closed", "loss"} <= set(result.history[0])
    assert "normalize_gate" not in caplog.text
    untrain(WFNet(base, CLASSES), runs.bars(), config=settings, progress=False)
    assert "normalize_gate=False" in caplog.text


@pytest.mark.parametrize(
    "changes",
    [
        {"sampler": "shuffled", "share_images": False},
        {"optimizer": "sgd", "lr": 1.0, "clip": 2.0},
        {"distil": False, "schedule": "constant"},
        {"stop_on": "loss", "amp": "bfloat16", "channels_last": True},
        {"epochs": 0.5, "steps": None},
    ],
    ids=str,
)
def test_settings(base, runs, config, changes):
    net = WFNet(base, CLASSES)
    settings = config(**{"steps": 4, **changes})
    result = untrain(net, runs.bars(), runs.bars(3, seed=1), settings, progress=False)
    assert result.steps == (12 if "epochs" in changes else 4)
    assert all(p.isfinite().all() for p in net.filter_parameters())
    assert any((p != 3).any() for p in net.filter_parameters())


def test_rows_that_did_not_occur_stay(runs, config):
    torch.manual_seed(0)
    net, data = WFNet(runs.BarNet(8), 8), runs.bars(6, classes=8)
    untrain(net, data, config=config(batch_size=2, label_expansion=1, steps=1), progress=False)
    moved = torch.stack([(p != 3).any(1) for p in net.filter_parameters()]).any(0)
    assert 1 <= moved.sum() <= 2


def test_two_classes(runs, config):
    torch.manual_seed(0)
    net, data = WFNet(runs.BarNet(2), 2), runs.bars(6, classes=2)
    assert untrain(net, data, data, config(steps=3), progress=False).steps == 3


def test_torchvision_like_data_sets(base, runs, config):
    data = runs.bars(per_class=4)
    batch = data.batch(torch.arange(len(data)))
    plain = torch.utils.data.TensorDataset(batch.images, batch.labels)
    net, other = WFNet(base, CLASSES), WFNet(base, CLASSES)
    untrain(net, plain, plain, config(steps=3), progress=False)
    untrain(other, data, data, config(steps=3), progress=False)
    runs.assert_same_filters(net, other)


def test_runs_repeat_bitwise_and_leave_the_random_state_alone(base, runs, config):
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state, net = torch.get_rng_state(), WFNet(base, CLASSES)
        found += [net, untrain(net, runs.bars(), runs.bars(seed=1), config(), progress=False)]
        assert torch.equal(state, torch.get_rng_state())
    runs.assert_same_run(*found)
    other = WFNet(base, CLASSES)
    untrain(other, runs.bars(), config=config(seed=1), progress=False)
    with pytest.raises(AssertionError):
        runs.assert_same_filters(other, found[0])


# -- validations and stopping ---------------------------------------------------------------------


def test_patience_ends_the_run_and_the_best_filters_are_kept(base, runs, config, tmp_path):
    net, validation = WFNet(base, CLASSES), runs.bars(4, seed=1)
    settings = config(steps=500, patience=2, schedule="constant", lr=3.0, validations_per_epoch=24)
    result = untrain(net, runs.bars(), validation, settings, tmp_path, progress=False)
    assert result.stopped_early
    assert result.steps == result.best_step + 2 < 500
    net.fuse = True  # as `untrain` ran it: equal in every bit
    how = HowToRun(channels_last=True)
    again = AccuracyValidator(validation, CLASSES, 4, 0, BalancedObjective(), how)(net)
    assert again == result.best
    runs.assert_same_filters(WFNet.from_pretrained(tmp_path, base), net)


def test_validations_per_epoch(base, runs, config):
    net, data = WFNet(base, CLASSES), runs.bars()
    # 96 images, 4 of them read a step: an epoch has 24 steps.
    result = untrain(net, data, data, config(steps=24, validations_per_epoch=5), progress=False)
    assert [record["step"] for record in result.history] == [5, 10, 15, 20, 24]
    assert result.history[-1]["epoch"] == 1


# -- losses that are not finite -------------------------------------------------------------------


def nan_after(steps, runs) -> Objective:
    left = [steps]

    def when(batch):
        left[0] -= 1
        return left[0] < 0

    return runs.NaNLoss(when)


@pytest.mark.parametrize("validated", [True, False])
def test_a_loss_that_is_not_finite_keeps_the_last_good_filters(
    base, runs, config, tmp_path, validated
):
    net = WFNet(base, CLASSES)
    validation = runs.bars(4, seed=1) if validated else None
    message = r"loss of step 10 is not finite.*lower lr.*check the images for NaN"
    with pytest.raises(FloatingPointError, match=message):
        untrain(
            net,
            runs.bars(),
            validation,
            config(),
            tmp_path,
            progress=False,
            objective=nan_after(9, runs),
        )
    runs.assert_same_filters(WFNet.from_pretrained(tmp_path, base), net)
    assert all(p.isfinite().all() for p in net.filter_parameters())
    assert any((p != 3).any() for p in net.filter_parameters())


def test_a_few_steps_of_nan_are_left_out_and_counted(runs, tmp_path, caplog):
    def go(folder=None, train=None, **changes):
        net = runs.network()
        return net, untrain(
            net,
            train or runs.images(),
            runs.images(4, 1),
            runs.config(steps=10, **changes),
            folder,
            folder is not None,
            False,
            runs.NaNLoss(lambda batch: batch.target[0] == 2),
        )

    net, result = go(max_nan_steps=20)
    skipped = caplog.text.count("is not finite: its images are left out")
    assert skipped >= 2
    assert f"({skipped} of at most 20)" in caplog.text
    assert result.steps == 10
    assert all(p.isfinite().all() for p in net.filter_parameters())
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, runs.raising(runs.images(), 4, 7), max_nan_steps=20)
    runs.assert_same_run(*go(tmp_path, max_nan_steps=20), net, result)
    with pytest.raises(FloatingPointError, match="is not finite"):
        go(max_nan_steps=skipped - 1)


# -- bad input ------------------------------------------------------------------------------------


def test_data_that_do_not_fit_the_network(base, runs):
    def refused(train, validation=None, net=None):
        with pytest.raises(ValueError) as error:
            untrain(net or WFNet(base, CLASSES), train, validation, progress=False)
        return str(error.value)

    data = runs.bars()
    none = data.select(torch.empty(0, dtype=torch.int64))
    without_one = data.select((data.labels != 1).nonzero().flatten())
    six = WFNet(runs.BarNet(6), 6)
    assert "have label 5, but the network has 4 classes" in refused(runs.bars(classes=6))
    assert "training data have 4 classes, the network has 6" in refused(data, net=six)
    assert "class 'bar 1' has no training image" in refused(without_one)
    assert "training data have no images" in refused(none)
    assert "validation data have no images" in refused(data, none)


# -- a run that is short in epochs ----------------------------------------------------------------


def test_a_run_of_a_fraction_of_an_epoch_is_validated_ten_times(base, runs, config):
    settings = config(steps=20, batch_size=2, min_validations=10, validations_per_epoch=5)
    train = runs.bars(100)  # an epoch has 400 steps
    result = untrain(WFNet(base, CLASSES), train, runs.bars(4, 1), settings, progress=False)
    assert [record["step"] for record in result.history] == list(range(2, 21, 2))
    default = UntrainConfig.recipe(num_classes=10)
    assert default.steps_between_validations(54_000) == default.steps // 10
    assert default.steps_between_validations(1257) == 16  # five an epoch, where that is more


def test_a_checkpoint_is_written_every_few_minutes(base, runs, config, tmp_path, monkeypatch):
    saved, save = [], Checkpoints.save
    monkeypatch.setattr(
        Checkpoints, "save", lambda self, *rest: saved.append(rest[1]["step"]) or save(self, *rest)
    )
    for seconds, expected in ((0.0, [1, 2, 3, 4]), (1000.0, [4])):
        saved.clear()
        monkeypatch.setattr("wfnet.untraining.loop._SECONDS_BETWEEN_CHECKPOINTS", seconds)
        settings = config(steps=4, checkpoint_every=1000)
        folder = tmp_path / str(seconds)
        untrain(WFNet(base, CLASSES), runs.bars(), None, settings, folder, progress=False)
        assert saved == expected


def test_resuming_without_a_checkpoint_says_so(base, runs, config, tmp_path, caplog):
    settings = config(steps=1)
    untrain(WFNet(base, CLASSES), runs.bars(), None, settings, tmp_path, True, False)
    assert f"{tmp_path} holds no checkpoint: the run starts from the beginning" in caplog.text


# -- values that are not finite -------------------------------------------------------------------


def test_images_and_filters_that_are_not_finite_are_refused_before_work(base, runs):
    for part, value in (("training", math.nan), ("validation", math.inf)):
        data = {"training": runs.bars(), "validation": runs.bars(4, 1)}
        data[part].images[5, 0, 2, 2] = value
        with pytest.raises(ValueError, match=rf"the {part} image TensorImages\[5\] has values"):
            untrain(WFNet(base, CLASSES), *data.values(), progress=False)
    net = WFNet(base, CLASSES)
    net.filter_parameters()[0].data[1, 2] = math.nan
    with pytest.raises(ValueError, match=r"the filters of conv1.alpha_weight are NaN or infinite"):
        untrain(net, runs.bars(), progress=False)


@pytest.mark.parametrize("validation", [False, True])
def test_an_image_file_that_is_not_finite_is_named(base, runs, config, validation, tmp_path):
    class Broken(runs.Files):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return (image * math.nan if index == 5 else image), label

    data = [runs.Files(runs.bars(4)), runs.Files(runs.bars(4, 1))]
    data[validation] = Broken(data[validation].dataset)
    net = WFNet(base, CLASSES)
    with pytest.raises(FloatingPointError, match=r"the image Broken\[5\] has values.*: repair it"):
        untrain(net, *data, config(), tmp_path, progress=False)
    assert all(p.isfinite().all() for p in net.filter_parameters())
    runs.assert_same_filters(WFNet.from_pretrained(tmp_path, base), net)


def test_steps_that_the_data_cannot_fill(base, runs, config):
    for changes, message in (
        ({"label_expansion": 100}, "label_expansion is 100, but there are 3 other classes"),
        ({"batch_size": 10_000}, "reads 5,000 images for a minibatch, but the training data have"),
    ):
        with pytest.raises(ValueError, match=message):
            untrain(WFNet(base, CLASSES), runs.bars(), None, config(**changes), progress=False)


# -- some of the classes --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "images", "changes"),
    [
        ([1, 2, 3], [1, 2, 3], {}),
        ([3, 1], [0, 1, 3], {}),
        ([2], [0, 2], {}),
        ([1, 2], [0, 1, 2, 3], {"optimizer": "sgd", "lr": 0.5, "objective": "paper"}),
    ],
)
def test_some_classes_with_images_of_some(base, runs, config, classes, images, changes, tmp_path):
    """Rows of the others stay as they are, bit by bit; no image is retained under its own row."""
    net = WFNet(base, CLASSES)
    train, validation = runs.bars(), runs.bars(6, 1)
    parts = [d.select(torch.isin(d.labels, torch.tensor(images)).nonzero().flatten())
             for d in (train, validation)]  # fmt: skip
    steps = 6 if changes else 60
    settings = config(steps=steps, classes=classes, **changes)
    result = untrain(net, *parts, settings, tmp_path, progress=False)
    moved = torch.stack([(p != 3).any(1) for p in net.filter_parameters()]).any(0)
    assert moved.nonzero().flatten().tolist() == sorted(classes)
    known = [not math.isnan(value) for value in result.best.acc_f_per_class]
    assert [label for label in range(CLASSES) if known[label]] == sorted(classes)
    if not changes:
        assert result.best.acc_f < 0.1
        assert result.best.acc_r > 0.9
    again = untrain(net, *parts, settings, tmp_path, True, progress=False)
    assert again.history == result.history


def test_classes_that_cannot_be_untrained(base, runs, config):
    def refused(classes, images=(0, 1, 2, 3)):
        data = runs.bars()
        data = data.select(torch.isin(data.labels, torch.tensor(images)).nonzero().flatten())
        with pytest.raises(ValueError) as error:
            untrain(WFNet(base, CLASSES), data, None, config(classes=classes), progress=False)
        return str(error.value)

    assert "classes has 7, but the network has 4 classes" in refused([1, 7])
    assert "class 'bar 2' has no training image" in refused([1, 2], (0, 1))
    assert "only class that is untrained" in refused([1], (1,))
    for wrong in ([], [-1], ["a"], [1.5]):
        with pytest.raises(ValueError, match="classes must be labels"):
            config(classes=wrong)


# -- networks and images as they come -------------------------------------------------------------


@pytest.mark.parametrize("kind", [tuple, "dict", "object"])
def test_a_network_that_returns_more_than_logits(base, runs, config, kind):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = copy.deepcopy(base)

        def forward(self, x):
            logits = self.inner(x)
            if kind is tuple:
                return logits, x
            return {"logits": logits} if kind == "dict" else SimpleNamespace(logits=logits)

    net, plain = WFNet(Wrapped().eval(), CLASSES), WFNet(base, CLASSES)
    for one in (net, plain):
        settings = config(steps=3, fuse=False)
        untrain(one, runs.bars(), runs.bars(4, 1), settings, progress=False)
    for p, q in zip(net.filter_parameters(), plain.filter_parameters(), strict=True):
        assert torch.equal(p, q)


def test_items_with_more_than_an_image_and_a_label(base, runs, config):
    class Items(runs.Files):
        def __init__(self, make):
            super().__init__(runs.bars())
            self.make = make

        def __getitem__(self, index):
            return self.make(*super().__getitem__(index))

    found = []
    for make in (
        lambda image, label: (image, label),
        lambda image, label: (image, label, "a.jpg"),
        lambda image, label: {"image": image, "label": label},
        lambda image, label: (image.double(), torch.tensor(label)),
    ):
        net = WFNet(base, CLASSES)
        untrain(net, Items(make), None, config(steps=2), progress=False)
        found.append(net)
    for net in found[1:]:
        runs.assert_same_filters(net, found[0])
    train = Items(lambda image, label: ((255 * image).byte(), label))
    with pytest.raises(ValueError, match=r"torch.uint8.*float32"):
        untrain(WFNet(base, CLASSES), train, None, config(steps=2), progress=False)
