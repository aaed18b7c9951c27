"""Recipe durable: groups, the loss against a plain formula, statistics, whole runs, resuming."""

import pytest
import torch
from torch import nn

import wfnet
from wfnet import models
from wfnet.data.tensor_images import TensorImages
from wfnet.untraining.durable import (
    DurableObjective,
    GroupSampler,
    RowStatistics,
    durable_step,
    expand_groups,
)
from wfnet.untraining.expansion import ExpandedBatch
from wfnet.wrapping import wrap

CLASSES = 3


@pytest.fixture(scope="module")
def labelled(runs):
    def make(count=60, seed=0):
        bars = runs.bars(count // CLASSES, seed, CLASSES)
        return TensorImages(bars.images, bars.labels, bars.classes)

    return make


def groups(rows, forget_images, retain_images, **more):
    """Settings of a step of so many groups."""
    size = forget_images + retain_images
    images = {"forget_images": forget_images, "retain_images": retain_images}
    return wfnet.UntrainConfig(steps=1, batch_size=rows * size, **images, **more)


@pytest.fixture(scope="module")
def trained(labelled):
    model = models.create("resnet", CLASSES, seed=1, width=8).train()
    data = labelled(120, seed=3)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data.images), data.labels).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture
def net(trained):
    return wrap(trained, CLASSES, "durable")


def test_groups_hold_the_class_first_and_every_row_equally_often():
    labels = torch.tensor([0] * 5 + [1] * 30 + [2] * 50)
    sampler = GroupSampler(labels, groups(rows=2, forget_images=3, retain_images=6))
    seen = torch.zeros(CLASSES)
    for step in range(6):
        rows = sampler.rows_of(step)
        found = labels[sampler(step)].unflatten(0, (2, 9))
        for group, row in zip(found, rows, strict=True):
            assert group[:3].eq(row).all()
            assert group[3:].ne(row).all()
            seen[row] += 1
        assert torch.equal(sampler(step), sampler(step))
    assert seen.tolist() == [4, 4, 4]


@pytest.mark.parametrize(("others", "distinct"), [(7, 7), (200, 10)])
def test_other_images_of_a_group_repeat_only_where_there_are_too_few(others, distinct):
    labels = torch.cat((torch.full((300,), 2), torch.zeros(others))).long()
    sampler = GroupSampler(labels, groups(rows=1, forget_images=2, retain_images=10))
    step = next(step for step in range(2) if sampler.rows_of(step) == [2])
    chosen = sampler(step)[2:]
    assert (len(chosen), len(chosen.unique())) == (10, distinct)
    assert labels[chosen].eq(0).all()


def test_expanded_groups_keep_images_and_rows_together():
    labels = torch.tensor([2, 2, 0, 1, 0, 0, 2, 1])
    batch = expand_groups(labels, groups(rows=2, forget_images=2, retain_images=2))
    assert batch.source.tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert batch.forget.tolist() == [2, 2, 0, 0, 2, 2, 0, 0]
    assert batch.target.tolist() == labels[batch.source].tolist()
    assert batch.forget_size == 4


@pytest.mark.parametrize(("soft", "tolerance"), [(True, 100.0), (False, 0.2)])
def test_the_loss_is_that_of_the_formula(soft, tolerance, net):
    torch.manual_seed(0)
    rows = torch.tensor([0, 0, 1, 1, 0, 0, 0, 1, 1, 1])
    batch = ExpandedBatch(rows, torch.arange(10), torch.tensor([0, 0, 1, 1, 1, 2, 2, 0, 2, 0]), 4)
    z, original = torch.randn(10, CLASSES).double(), torch.randn(10, CLASSES).double()
    net.gate_mode.soft = soft
    found = DurableObjective(0.3, 0.1, tolerance, margin=1.5)(z, batch, original, net).total
    gap = z[torch.arange(10), rows] - torch.stack(
        [torch.cat((z[i, :r], z[i, r + 1 :])).logsumexp(0) for i, r in enumerate(rows)]
    )
    p, q = original[4:].softmax(1), z[4:].log_softmax(1)
    divergence = (p * (p.log() - q)).sum(1)
    truth = (1.0 if soft else 0.5) * divergence.mean()
    truth = truth + 0.3 * (1 + (gap[:4] + 1.5).exp()).log().mean()
    match = 0
    for own, others, cost in zip(
        (gap[:2], gap[2:4]), gap[4:].split(3), divergence.split(3), strict=True
    ):
        excess = (own.mean() - others.mean()) / others.std().clamp_min(0.5) - 0.5
        match = match + 0.1 * min(1, tolerance / cost.mean()) * excess.relu() / 2
    torch.testing.assert_close(found, truth + match)


def test_noise_is_that_of_seed_and_step(net):
    batch = expand_groups(torch.tensor([1, 0, 0, 2, 1, 1]), groups(2, 1, 2))
    drawn = []
    for seed, step in ((0, 4), (0, 4), (0, 5), (1, 4)):
        with durable_step(net, batch, seed, step):
            drawn.append(net.gate_mode.noise["bn1"])
            assert net.gate_mode.soft == (step == 4)
    assert [torch.equal(drawn[0], noise) for noise in drawn[1:]] == [True, False, False]


@torch.no_grad()
def test_statistics_are_those_of_the_baked_network_on_the_other_classes(net, labelled):
    data, net = labelled(), net.double()
    for layer in net.masked_layers.values():
        layer.alpha_hard += torch.randn_like(layer.alpha_hard)
        layer.alpha_soft += torch.randn_like(layer.alpha_soft)
    RowStatistics(net, data, data.labels, images=1000, seed=0).measure(last=True)
    plain = net.bake(1)
    kept = {}
    for name, module in plain.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(
                lambda m, args, name=name: kept.update({name: args[0]})
            )
    plain(data.images[data.labels != 1].double())
    for name, x in kept.items():
        norm = plain.get_submodule(name)
        alive = norm.weight != 0
        torch.testing.assert_close(norm.running_mean[alive], x.mean((0, 2, 3))[alive])
        var = x.var((0, 2, 3), unbiased=False)
        torch.testing.assert_close(norm.running_var[alive], var[alive])
    # Under two rows at once, as an export measures it.
    rest = data.images[data.labels == 1].double()
    exported, run_time = net.bake([2, 0], images=rest), net.bake([2, 0])
    for name in kept:
        theirs, own = (plain.get_submodule(name) for plain in (exported, run_time))
        torch.testing.assert_close(own.running_mean, theirs.running_mean)


def test_a_compound_group_is_under_two_rows_and_takes_no_part_in_matching(net):
    labels = torch.tensor([0] * 9 + [1] * 9 + [2] * 9)
    config = groups(rows=2, forget_images=4, retain_images=3, compound=0.5)
    chosen = labels[GroupSampler(labels, config)(0)]
    batch = expand_groups(chosen, config)
    pair = batch.forget[:, 1] >= 0
    assert pair.sum() == 7
    assert torch.equal(batch.weight, torch.where(pair, 0.5, 1.0))
    own = pair & (torch.arange(len(batch)) < batch.forget_size)
    assert [int(batch.target[own].eq(c).sum()) for c in batch.forget[pair][0]] == [2, 2]
    assert not torch.isin(batch.target[pair & ~own], batch.forget[pair][0]).any()
    z = torch.randn(len(batch), CLASSES)
    raised = z.clone()
    raised[own.nonzero().flatten(), batch.target[own]] += 5
    terms = [DurableObjective()(x, batch, z, net).terms["match"] for x in (z, raised)]
    assert torch.equal(*terms)


@torch.no_grad()
def test_statistics_of_several_rows_are_measured_at_the_export(net, labelled):
    data, net = labelled(), net.double()
    for layer in net.masked_layers.values():
        layer.alpha_hard += 2 * torch.randn_like(layer.alpha_hard)
    images = data.images[data.labels == 2].double()
    plain = net.bake([0, 1], images=images)
    found = plain(images)
    torch.testing.assert_close(plain.train()(images), found)  # by the moments of the batch
    assert not torch.allclose(net.bake([0, 1])(images), found)


def config(**changes):
    small = {"batch_size": 36, "forget_images": 4, "retain_images": 8, "statistics_images": 40}
    return wfnet.UntrainConfig.recipe("durable", CLASSES, **{"steps": 12, **small, **changes})


def test_a_run_forgets_and_the_class_does_not_come_back_with_new_statistics(net, labelled):
    data, test = labelled(120), labelled(60, 2)
    result = wfnet.untrain(net, data, labelled(30, 1), config(steps=120, lr=0.3), progress=False)
    assert result.best.acc_f < 0.2
    assert result.best.acc_r > 0.9
    plain = net.bake(1)
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
            module.train()
    with torch.no_grad():
        plain(data.images)
        right = plain.eval()(test.images).argmax(1) == test.labels
    own = test.labels == 1
    assert right[own].float().mean() < 0.2
    assert right[~own].float().mean() > 0.9


@pytest.mark.parametrize("classes", [None, [0, 2]])
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(
    trained, labelled, tmp_path, classes
):
    def go(folder, stop=100):
        def interrupt(record):
            if record["step"] >= stop:
                raise KeyboardInterrupt

        net = wrap(trained, CLASSES, "durable")
        data, settings = (labelled(), labelled(30, 1)), config(classes=classes)
        wfnet.untrain(net, *data, settings, folder, True, progress=False, log=interrupt)
        assert not net.gate_mode.from_base
        return {**net.named_filters(), **net.named_statistics()}

    whole = go(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "cut", stop=6)
    for _ in range(2):  # the second time it is finished, and only loaded
        for name, value in go(tmp_path / "cut").items():
            assert torch.equal(whole[name], value), name


def test_some_classes_are_untrained_and_all_others_stay_bit_by_bit(trained, labelled, tmp_path):
    """With images of two classes alone, which have other moments than those of all three."""
    few, test = (d.select((d.labels != 1).nonzero().flatten()) for d in (labelled(120), labelled()))
    net = wrap(trained, CLASSES, "durable")
    settings = config(steps=60, lr=0.3, classes=[0, 2], batch_size=24, compound=0)
    wfnet.untrain(net, few, None, settings, tmp_path, progress=False)
    fresh = wrap(trained, CLASSES, "durable")
    untouched = fresh.named_filters() | fresh.named_statistics()
    for name, table in (net.named_filters() | net.named_statistics()).items():
        moved = table.ne(untouched[name]).any(1)
        assert not moved[1], name
        assert moved[0] or "row_" not in name, name
    net, images = net.eval(), test.images
    with torch.no_grad():
        original = net(images)
        assert torch.equal(net(images, 1), original)
        weights = trained.state_dict()
        assert all(torch.equal(x, weights[n]) for n, x in net.bake(1).state_dict().items())
        torch.testing.assert_close(
            net(images, torch.tensor([[1, 2]] * len(images))), net(images, 2)
        )
        found = net(images, 2)
        torch.testing.assert_close(net.bake(2)(images), found, rtol=1e-4, atol=1e-4)
    right = found.argmax(1) == test.labels
    assert right[test.labels == 2].float().mean() < 0.2
    assert right[test.labels == 0].float().mean() > 0.7  # 0.3 with moments as they are


def test_moments_of_other_images_count_as_changes_of_the_base(net, labelled):
    """A fresh row normalises images of one class as the original network does."""
    data = labelled().select((labelled().labels == 0).nonzero().flatten())
    rows = torch.zeros(len(data), dtype=torch.long)
    with torch.no_grad():
        original, apart = net(data.images), []
        for _ in range(2):
            with net.gate_mode.grouped(rows):
                apart.append((net(data.images, rows) - original).abs().max())
            RowStatistics(net, data, data.labels, 64, 0).measure_base()
    assert apart[0] > 0.5
    assert apart[1] < 1e-4


@pytest.mark.parametrize(
    ("of", "changes", "message"),
    [
        ([1], {"classes": [1]}, "images of 2 classes or more, 1 of them untrained; the .* have 1"),
        ([1, 2], {"classes": [1, 2], "compound": 1.0}, r"of 3 classes or more, .*set compound=0"),
    ],
)
def test_too_few_classes_are_refused(net, labelled, of, changes, message):
    data = labelled()
    few = data.select(torch.isin(data.labels, torch.tensor(of)).nonzero().flatten())
    with pytest.raises(ValueError, match=message):
        wfnet.untrain(net, few, None, config(**changes), progress=False)


def test_what_does_not_fit_together_is_refused(trained, labelled, net):
    data = labelled()
    with pytest.raises(ValueError, match=r"trains durable gates, but the network has sigmoid"):
        wfnet.untrain(wfnet.WFNet(trained, CLASSES), data, config=config(), progress=False)
    balanced = wfnet.UntrainConfig.recipe("balanced", CLASSES, steps=1)
    with pytest.raises(ValueError, match=r"trains sigmoid gates, but the network has durable"):
        wfnet.untrain(net, data, config=balanced, progress=False)
