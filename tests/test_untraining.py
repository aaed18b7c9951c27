"""Untraining: it forgets and retains, repeats bitwise, resumes bitwise, and refuses bad input."""

import csv
import importlib
import json
import math

import pytest
import torch
from torch import nn

from wfnet import WFNet
from wfnet.data import TensorImages
from wfnet.untraining import UntrainConfig, untrain
from wfnet.untraining.checkpoints import CHECKPOINT_NAME
from wfnet.untraining.objectives import BalancedObjective, not_label
from wfnet.untraining.optimizers import RowAdam
from wfnet.untraining.validation import Validator

CLASSES = 4
MEASURED = ("seconds", "samples_per_second", "images_per_second", "data_wait")


class Net(nn.Module):
    """Two convolutions and a head, small enough for hundreds of steps a second."""

    def __init__(self, classes=CLASSES):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.fc = nn.Linear(12, classes)

    def forward(self, x):
        x = self.bn(self.conv1(x)).relu()
        return self.fc(self.conv2(x).relu().amax((2, 3)))


def make_data(per_class=24, seed=0, classes=CLASSES):
    """A bright bar at a place of its own for every class, in noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat(per_class)
    images = 0.3 * torch.rand(len(labels), 1, 8, 8, generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        if label % 2:
            image[0, :, 2 * (label // 2) + 1] += 0.7
        else:
            image[0, 2 * (label // 2) + 1, :] += 0.7
            image[0, (2 * (label // 2) + 2) % 8, :] += 0.7 * (label > 1)
    names = [f"bar {label}" for label in range(classes)]
    return TensorImages(images.clamp(0, 1), labels, names, 0.3, 0.3)


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    model = Net()
    data = make_data()
    batch = data.batch(torch.arange(len(data)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(120):
        loss = nn.functional.cross_entropy(model(batch.images), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    held_out = make_data(seed=1)
    held_out = held_out.batch(torch.arange(len(held_out)))
    correct = model(held_out.images).argmax(1) == held_out.labels
    assert correct.double().mean() > 0.9
    return model


def config(**changes):
    settings = {"steps": 20, "batch_size": 8, "label_expansion": 3, "validations_per_epoch": 3}
    return UntrainConfig(**{**settings, **changes})


def filters(net):
    return {name: p.detach().clone() for name, p in net.named_filters().items()}


def assert_same_filters(net, other):
    for (name, a), b in zip(
        net.named_filters().items(), other.named_filters().values(), strict=True
    ):
        assert torch.equal(a, b), name


def without_times(history):
    return [{k: v for k, v in record.items() if k not in MEASURED} for record in history]


class Interrupted(BaseException):
    """As from outside: nobody saves anything first."""


class Interrupting:
    """A data set that breaks off when its batches have been asked for so many times."""

    def __init__(self, dataset, after):
        self.dataset = dataset
        self.left = after
        self.labels = dataset.labels
        self.classes = dataset.classes

    def __len__(self):
        return len(self.dataset)

    def batch(self, indices):
        if len(indices) == 3:  # the look at three images that marks a data set
            return self.dataset.batch(indices)
        if self.left == 0:
            raise Interrupted
        self.left -= 1
        return self.dataset.batch(indices)


# -- it works -------------------------------------------------------------------------------------


def test_it_forgets_every_class_and_retains_the_others(base):
    net = WFNet(base, CLASSES)
    train, validation = make_data(), make_data(seed=1)
    before = Validator(validation, CLASSES, 3, 0, BalancedObjective())(net)
    result = untrain(net, train, validation, config(steps=120, lr=0.2), progress=False)
    assert before.acc_f > 0.9
    assert result.best.acc_f < 0.05
    assert result.best.acc_r > before.acc_r - 0.05
    assert result.score == pytest.approx(0.5 * (1 - result.best.acc_f + result.best.acc_r))
    net.fuse = True  # as `untrain` ran it: equal in every bit
    assert (
        Validator(validation, CLASSES, 3, 0, BalancedObjective(), channels_last=True)(net)
        == result.best
    )


def test_fused_and_unfused_runs_learn_the_same_filters(base):
    data, filters = make_data(), []
    for fuse in (False, True):
        net = WFNet(base, CLASSES)
        untrain(net, data, None, config(steps=3, fuse=fuse), progress=False)
        assert net.fuse is False
        filters.append(torch.cat([p.detach().flatten() for p in net.filter_parameters()]))
    torch.testing.assert_close(*filters, rtol=1e-3, atol=1e-3)


def test_the_base_does_not_change(base):
    net = WFNet(base, CLASSES)
    untrain(net, make_data(), config=config(), progress=False)
    plain, wrapped = base.state_dict(), net.model.state_dict()
    assert all(torch.equal(value, wrapped[name]) for name, value in plain.items())
    assert all(p.grad is None for p in net.model.parameters() if not p.requires_grad)


def test_the_paper_recipe_runs_and_keeps_filters_in_bounds(base):
    net = WFNet(base, CLASSES, normalize_gate=False)
    settings = UntrainConfig.recipe("paper", CLASSES, steps=10, batch_size=8)
    result = untrain(net, make_data(), make_data(seed=1), settings, progress=False)
    assert all(p.abs().max() <= 3 for p in net.filter_parameters())
    assert {"retain", "forget", "closed", "loss"} <= set(result.history[0])


def test_the_paper_recipe_on_normalised_gates_is_said(base, caplog):
    net = WFNet(base, CLASSES)
    settings = UntrainConfig.recipe("paper", CLASSES, steps=1, batch_size=8)
    untrain(net, make_data(), config=settings, progress=False)
    assert "normalize_gate=False" in caplog.text


@pytest.mark.parametrize(
    "changes",
    [
        {"share_images": False},
        {"sampler": "shuffled"},
        {"sampler": "shuffled", "share_images": False},
        {"optimizer": "sgd", "lr": 1.0},
        {"distil": False},
        {"stop_on": "loss"},
        {"amp": "bfloat16"},
        {"channels_last": True},
        {"epochs": 0.5, "steps": None},
        {"clip": 2.0},
        {"schedule": "constant"},
    ],
    ids=str,
)
def test_settings(base, changes):
    net = WFNet(base, CLASSES)
    settings = config(**{"steps": 4, **changes})
    result = untrain(net, make_data(), make_data(per_class=3, seed=1), settings, progress=False)
    assert result.steps == {"epochs": 12}.get(next(iter(changes)), 4)
    assert all(p.isfinite().all() for p in net.filter_parameters())
    assert any((p != 3).any() for p in net.filter_parameters())


def test_two_classes_and_more_classes_than_the_batch():
    for classes in (2, 8):
        torch.manual_seed(0)
        net = WFNet(Net(classes), classes)
        data = make_data(per_class=6, classes=classes)
        untrain(net, data, data, config(batch_size=4, steps=3), progress=False)


def test_rows_that_did_not_occur_stay():
    torch.manual_seed(0)
    net = WFNet(Net(8), 8)
    data = make_data(per_class=6, classes=8)
    untrain(net, data, config=config(batch_size=2, label_expansion=1, steps=1), progress=False)
    moved = torch.stack([(p != 3).any(1) for p in net.filter_parameters()]).any(0)
    assert 1 <= moved.sum() <= 2


def test_torchvision_like_data_sets(base):
    data = make_data(per_class=4)
    batch = data.batch(torch.arange(len(data)))
    plain = torch.utils.data.TensorDataset(batch.images, batch.labels)
    net, other = WFNet(base, CLASSES), WFNet(base, CLASSES)
    untrain(net, plain, plain, config(steps=3), progress=False)
    untrain(other, data, data, config(steps=3), progress=False)
    assert_same_filters(net, other)


def test_an_ordinary_loop_gives_the_same_kind_of_training(base):
    net = WFNet(base, CLASSES)
    data = make_data().batch(torch.arange(32))
    optimizer = RowAdam(net.filter_parameters(), lr=0.1)
    losses = []
    for _ in range(25):
        loss = not_label(net(data.images, forget=data.labels), data.labels).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_training_mode_is_put_back(base):
    net = WFNet(base, CLASSES).eval()
    untrain(net, make_data(), config=config(steps=1), progress=False)
    assert not net.training
    assert not net.model.training


# -- validation and stopping ----------------------------------------------------------------------


def test_validation_sees_all_rows_where_there_are_few(base):
    net = WFNet(base, CLASSES)
    data = make_data(per_class=5, seed=1)
    validator = Validator(data, CLASSES, 99, 0, BalancedObjective())
    batch = data.batch(torch.arange(len(data)))
    pairs = validator.pairs(batch.labels, batch.indices)
    assert len(pairs) == len(data) * CLASSES
    assert len(set(zip(pairs.source.tolist(), pairs.forget.tolist(), strict=True))) == len(pairs)
    with torch.no_grad():
        for p in net.filter_parameters():
            p.normal_(1, 3)
        scores = validator(net)
        for row in range(CLASSES):
            correct = net(batch.images, forget=row).argmax(1) == batch.labels
            own = batch.labels == row
            assert scores.acc_f_per_class[row] == pytest.approx(correct[own].double().mean().item())
            assert scores.acc_r_per_class[row] == pytest.approx(
                correct[~own].double().mean().item()
            )
    assert scores.acc_f == pytest.approx(sum(scores.acc_f_per_class) / CLASSES)


def test_validation_with_many_classes_looks_at_every_row_about_equally():
    data = make_data(per_class=30, classes=8)
    validator = Validator(data, 8, 3, 0, BalancedObjective())
    pairs = validator.pairs(data.labels, torch.arange(len(data)))
    rows = pairs.forget[pairs.retain_half]
    assert len(pairs) == len(data) * 4
    assert (rows != pairs.target[pairs.retain_half]).all()
    assert rows.bincount(minlength=8).min() > 50
    again = Validator(data, 8, 3, 0, BalancedObjective()).pairs(
        data.labels, torch.arange(len(data))
    )
    assert torch.equal(pairs.forget, again.forget)


def test_validation_loss_is_the_objective_over_all_pairs(base):
    net = WFNet(base, CLASSES)
    data = make_data(per_class=40, seed=1)  # more than one batch of pairs
    objective = BalancedObjective(0.3)
    validator = Validator(data, CLASSES, 3, 0, objective)
    scores = validator(net)
    batch = data.batch(torch.arange(len(data)))
    pairs = validator.pairs(batch.labels, batch.indices)
    with torch.no_grad():
        logits = net(batch.images, forget=pairs.forget, source=pairs.source)
        total = objective(logits, pairs, net(batch.images), net).total
    assert scores.loss == pytest.approx(total.item(), rel=1e-4)


def test_classes_absent_from_validation_do_not_count(base):
    net = WFNet(base, CLASSES)
    validation = make_data(per_class=4, seed=1)
    validation = validation.select((validation.labels != 2).nonzero().flatten())
    result = untrain(net, make_data(), validation, config(steps=2), progress=False)
    assert math.isfinite(result.score)
    assert math.isnan(result.best.acc_f_per_class[2])


def test_patience_ends_the_run_and_the_best_filters_are_kept(base, tmp_path):
    net = WFNet(base, CLASSES)
    validation = make_data(seed=1)
    settings = config(steps=500, patience=2, schedule="constant", lr=3.0, validations_per_epoch=24)
    result = untrain(net, make_data(), validation, settings, tmp_path, progress=False)
    assert result.stopped_early
    assert result.steps == result.best_step + 2 < 500
    net.fuse = True
    again = Validator(validation, CLASSES, 4, 0, BalancedObjective(), channels_last=True)(net)
    assert again == result.best
    assert_same_filters(WFNet.from_pretrained(tmp_path, base), net)


def test_validations_per_epoch(base):
    net = WFNet(base, CLASSES)
    data = make_data()  # 96 images, 4 of them read a step: an epoch has 24 steps
    result = untrain(net, data, data, config(steps=24, validations_per_epoch=5), progress=False)
    assert [record["step"] for record in result.history] == [5, 10, 15, 20, 24]
    assert result.history[-1]["epoch"] == 1


# -- files ----------------------------------------------------------------------------------------


def test_output_folder(base, tmp_path):
    net = WFNet(base, CLASSES)
    result = untrain(net, make_data(), make_data(seed=1), config(), tmp_path, progress=False)
    assert result.filters == tmp_path
    assert_same_filters(WFNet.from_pretrained(tmp_path, base), net)
    content = json.loads((tmp_path / "history.json").read_text())
    assert content["config"]["steps"] == 20
    assert content["history"] == result.history
    with open(tmp_path / "history.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [record["step"] for record in result.history]
    assert {"acc_r", "acc_f", "score", "loss", "retain", "forget", "lr"} <= set(rows[0])
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_progress_shows_losses_and_accuracies(base, capsys):
    pytest.importorskip("tqdm")
    untrain(WFNet(base, CLASSES), make_data(), make_data(seed=1), config())
    shown = capsys.readouterr().err
    for word in ("retain", "forget", "Acc_r", "Acc_f", "samples/s"):
        assert word in shown


def test_without_optional_packages(base, tmp_path, monkeypatch):
    real_import = importlib.import_module

    def refuse(name, *args, **kwargs):
        if name.startswith(("tqdm", "torch.utils.tensorboard")):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(importlib, "import_module", refuse)
    untrain(WFNet(base, CLASSES), make_data(), None, config(steps=2), tmp_path)
    assert not (tmp_path / "tensorboard").exists()


# -- repeatable and resumable ---------------------------------------------------------------------


def test_runs_repeat_bitwise_and_leave_the_random_state_alone(base):
    nets, results = [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        net = WFNet(base, CLASSES)
        results.append(untrain(net, make_data(), make_data(seed=1), config(), progress=False))
        nets.append(net)
        assert torch.equal(state, torch.get_rng_state())
    assert_same_filters(*nets)
    assert without_times(results[0].history) == without_times(results[1].history)


def test_another_seed_is_another_run(base):
    nets = [WFNet(base, CLASSES) for _ in range(2)]
    for seed, net in enumerate(nets):
        untrain(net, make_data(), config=config(seed=seed, steps=3), progress=False)
    assert any(
        (a != b).any()
        for a, b in zip(nets[0].filter_parameters(), nets[1].filter_parameters(), strict=True)
    )


@pytest.mark.parametrize("changes", [{}, {"share_images": False}, {"optimizer": "sgd", "lr": 1.0}])
@pytest.mark.parametrize("after", [5, 9, 16])
def test_a_resumed_run_equals_an_uninterrupted_one(base, tmp_path, after, changes):
    settings = config(checkpoint_every=3, patience=50, **changes)  # validations every 8 (4) steps
    train, validation = make_data(), make_data(per_class=4, seed=1)
    whole = WFNet(base, CLASSES)
    expected = untrain(whole, train, validation, settings, tmp_path / "whole", progress=False)

    net = WFNet(base, CLASSES)
    with pytest.raises(Interrupted):
        untrain(
            net, Interrupting(train, after), validation, settings, tmp_path / "cut", progress=False
        )
    net = WFNet(base, CLASSES)  # a new process starts from the base
    result = untrain(
        net, train, validation, settings, tmp_path / "cut", resume=True, progress=False
    )
    assert_same_filters(net, whole)
    assert without_times(result.history) == without_times(expected.history)
    assert (result.best, result.best_step) == (expected.best, expected.best_step)
    assert_same_filters(WFNet.from_pretrained(tmp_path / "cut", base), whole)


def test_resuming_without_a_checkpoint_starts_and_a_finished_run_is_loaded(base, tmp_path):
    net = WFNet(base, CLASSES)
    train, validation = make_data(), make_data(per_class=4, seed=1)
    first = untrain(net, train, validation, config(), tmp_path, resume=True, progress=False)
    other = WFNet(base, CLASSES)
    again = untrain(other, train, validation, config(), tmp_path, resume=True, progress=False)
    assert_same_filters(net, other)
    assert again.history == first.history
    assert again.steps == 20


@pytest.fixture
def interrupted(base, tmp_path):
    """A folder with an unfinished run."""
    with pytest.raises(Interrupted):
        untrain(
            WFNet(base, CLASSES), Interrupting(make_data(), 7), None,
            config(checkpoint_every=3), tmp_path, progress=False,
        )  # fmt: skip
    return tmp_path


def test_an_unfinished_run_is_not_overwritten(base, interrupted):
    before = (interrupted / CHECKPOINT_NAME).read_bytes()
    with pytest.raises(FileExistsError, match=r"unfinished run \(step 6\).*resume=True"):
        untrain(WFNet(base, CLASSES), make_data(), None, config(), interrupted, progress=False)
    assert (interrupted / CHECKPOINT_NAME).read_bytes() == before


def test_resuming_with_other_settings(base, interrupted):
    with pytest.raises(ValueError, match=r"lr=0.2, now it is 0.1"):
        untrain(WFNet(base, CLASSES), make_data(), None, config(lr=0.1), interrupted, True, False)


def test_resuming_may_change_what_does_not_matter(base, interrupted):
    settings = config(checkpoint_every=5)
    result = untrain(WFNet(base, CLASSES), make_data(), None, settings, interrupted, True, False)
    assert result.steps == 20


def test_resuming_with_other_data(base, interrupted):
    with pytest.raises(ValueError, match="another training data"):
        untrain(WFNet(base, CLASSES), make_data(seed=3), None, config(), interrupted, True, False)
    with pytest.raises(ValueError, match="another validation data"):
        untrain(
            WFNet(base, CLASSES), make_data(), make_data(seed=3), config(), interrupted, True, False
        )


def test_resuming_with_another_base(interrupted):
    torch.manual_seed(5)
    net = WFNet(Net(), CLASSES)
    with pytest.raises(ValueError, match="another base network"):
        untrain(net, make_data(), None, config(), interrupted, True, False)


def test_resuming_with_other_layers(base, interrupted):
    net = WFNet(base, CLASSES, targets=["conv1"])
    with pytest.raises(ValueError, match=r"another (base network|filters)"):
        untrain(net, make_data(), None, config(), interrupted, True, False)


@pytest.mark.parametrize("damage", ["cut", "foreign", "empty"])
@pytest.mark.parametrize("resume", [True, False])
def test_a_damaged_checkpoint(base, interrupted, damage, resume):
    for path in interrupted.glob("untraining*.safetensors"):
        if damage == "foreign":
            from wfnet.services.files import write_tensors

            write_tensors(path, {"x": torch.zeros(1)})
        else:
            path.write_bytes(path.read_bytes()[:500] if damage == "cut" else b"")
    error = ValueError if resume else FileExistsError
    with pytest.raises(error, match=r"truncated|not a checkpoint"):
        untrain(WFNet(base, CLASSES), make_data(), None, config(), interrupted, resume, False)


# -- bad input ------------------------------------------------------------------------------------


class Exploding(BalancedObjective):
    """An objective whose loss is NaN from some step on."""

    def __init__(self, good):
        super().__init__()
        object.__setattr__(self, "left", [good])

    def __call__(self, logits, batch, original, net):
        losses = super().__call__(logits, batch, original, net)
        self.left[0] -= 1
        if self.left[0] < 0:
            return type(losses)(losses.total * math.nan, losses.terms)
        return losses


@pytest.mark.parametrize("validated", [True, False])
def test_a_loss_that_is_not_finite_keeps_the_last_good_filters(base, tmp_path, validated):
    net, short = WFNet(base, CLASSES), WFNet(base, CLASSES)
    validation = make_data(per_class=4, seed=1) if validated else None
    with pytest.raises(FloatingPointError, match=r"loss of step 10 is not finite.*lower lr"):
        untrain(
            net, make_data(), validation, config(), tmp_path, progress=False, objective=Exploding(9)
        )
    assert_same_filters(WFNet.from_pretrained(tmp_path, base), net)
    assert all(p.isfinite().all() for p in net.filter_parameters())
    if not validated:
        with pytest.raises(FloatingPointError):
            untrain(short, make_data(), None, config(), progress=False, objective=Exploding(9))
        assert any((p != 3).any() for p in net.filter_parameters())
        assert_same_filters(net, short)


def test_images_with_nan(base):
    data = make_data()
    data.images[5] = math.nan
    net = WFNet(base, CLASSES)
    with pytest.raises(FloatingPointError, match="check the images for NaN"):
        untrain(net, data, config=config(steps=200), progress=False)
    assert all(p.isfinite().all() for p in net.filter_parameters())


def test_labels_that_the_network_does_not_have(base):
    data = make_data(classes=6)
    with pytest.raises(ValueError, match="have label 5, but the network has 4 classes"):
        untrain(WFNet(base, CLASSES), data, progress=False)


def test_a_class_count_that_does_not_fit():
    net = WFNet(Net(6), 6)
    with pytest.raises(ValueError, match="training data have 4 classes, the network has 6"):
        untrain(net, make_data(), progress=False)


def test_a_class_without_images(base):
    data = make_data()
    data = data.select((data.labels != 1).nonzero().flatten())
    with pytest.raises(ValueError, match="class 'bar 1' has no training image"):
        untrain(WFNet(base, CLASSES), data, progress=False)


def test_no_images(base):
    data = make_data().select(torch.empty(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="training data have no images"):
        untrain(WFNet(base, CLASSES), data, progress=False)
    with pytest.raises(ValueError, match="validation data have no images"):
        untrain(WFNet(base, CLASSES), make_data(), data, progress=False)


class Corrupted(torch.utils.data.Dataset):
    """Some images cannot be read."""

    def __init__(self, dataset, corrupt):
        self.dataset = dataset
        self.corrupt = corrupt
        self.labels = dataset.labels
        self.classes = dataset.classes

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        if index in self.corrupt:
            from wfnet.data import CorruptImage

            raise CorruptImage(f"image {index}", "not an image")
        return self.dataset[index]


@pytest.mark.parametrize("share", [True, False])
def test_corrupt_images_are_left_out_and_counted(base, tmp_path, share):
    # Whole minibatches are lost too, and a resumed run still sees what it would have seen.
    train = Corrupted(make_data(), {*range(0, 40, 4), *range(1, 41, 4)})
    settings = config(
        batch_size=2 if share else 4, max_corrupt=30, checkpoint_every=1, share_images=share
    )
    net = WFNet(base, CLASSES)
    result = untrain(net, train, None, settings, tmp_path / "whole", progress=False)
    assert result.steps == 20
    assert 0 < len(result.corrupt_images) <= 20
    assert all(name.startswith("image ") for name in result.corrupt_images)

    class Stopping(BalancedObjective):
        def __call__(self, *args):
            if args[3].calls == 11:
                raise Interrupted
            args[3].calls += 1
            return super().__call__(*args)

        def __repr__(self):
            return repr(BalancedObjective())

    other = WFNet(base, CLASSES)
    other.calls = 0
    with pytest.raises(Interrupted):
        untrain(other, train, None, settings, tmp_path / "cut", False, False, Stopping())
    other = WFNet(base, CLASSES)
    untrain(other, train, None, settings, tmp_path / "cut", True, False)
    assert_same_filters(net, other)


def test_too_many_corrupt_images(base):
    train = Corrupted(make_data(), set(range(96)))
    with pytest.raises(RuntimeError, match="more than max_corrupt=3"):
        untrain(WFNet(base, CLASSES), train, config=config(max_corrupt=3), progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "best"}, "objective='best' is not one of 'balanced', 'paper'"),
        ({"steps": None}, "steps or as epochs"),
        ({"epochs": 1.0}, "steps or as epochs"),
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"epochs": -1.0, "steps": None}, "epochs must be a number above 0"),
        ({"batch_size": 7}, "batch_size must be even"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 2"),
        ({"label_expansion": 0}, "label_expansion"),
        ({"lr": 0}, "lr must be a number above 0, got 0"),
        ({"lr": math.nan}, "lr must be a number above 0, got nan"),
        ({"lambda1": -0.1}, "lambda1"),
        ({"patience": 0}, "patience"),
        ({"stop_on": "acc"}, "stop_on='acc' is not one of 'accuracy', 'loss'"),
        ({"amp": "float16"}, "amp='float16' is not one of None, 'bfloat16'"),
        ({"workers": -1}, "workers"),
        ({"clip": 0.0}, "clip"),
        ({"batch_size": "32"}, "batch_size must be a whole number"),
        ({"steps": 2.5}, "steps must be a whole number, got 2.5"),
    ],
    ids=str,
)
def test_settings_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_recipes():
    ten, hundred = (UntrainConfig.recipe(num_classes=k) for k in (10, 100))
    assert ten.objective == hundred.objective == "balanced"
    assert hundred.steps > ten.steps
    assert hundred.lr < ten.lr
    assert UntrainConfig.recipe(num_classes=100, batch_size=64).steps == hundred.steps // 2
    paper = UntrainConfig.recipe("paper")
    assert (paper.lr, paper.clip, paper.optimizer, paper.batch_size) == (100, 3, "sgd", 32)
    assert (paper.lambda0, paper.lambda1, paper.lambda2, paper.label_expansion) == (1, 1, 1, 5)
    assert UntrainConfig.recipe(num_classes=10, epochs=2).steps is None
    assert UntrainConfig.recipe("paper", steps=7).epochs is None
    with pytest.raises(ValueError, match="no recipe 'nicest'"):
        UntrainConfig.recipe("nicest")
    with pytest.raises(TypeError, match="unexpected"):
        UntrainConfig.recipe(leraning_rate=1)
