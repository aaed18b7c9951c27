"""Validation: every pair is counted once, and the loss is the objective's."""

import math

import pytest
import torch

from wfnet import WFNet
from wfnet.data import CorruptImages
from wfnet.untraining.objectives import BalancedObjective
from wfnet.untraining.validation import AccuracyValidator, HowToRun, Validation

CLASSES = 4


def scattered(base) -> WFNet:
    net = WFNet(base, CLASSES)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.filter_parameters():
            p.copy_(1 + 3 * torch.randn(p.shape, generator=generator))
    return net


def test_all_rows_where_there_are_few(base, runs):
    net, data = scattered(base), runs.bars(5, seed=1)
    scores = AccuracyValidator(data, CLASSES, 99, 0, BalancedObjective())(net)
    batch = data.batch(torch.arange(len(data)))
    for row in range(CLASSES):
        with torch.no_grad():
            correct = (net(batch.images, forget=row).argmax(1) == batch.labels).double()
        own = batch.labels == row
        assert scores.acc_f_per_class[row] == pytest.approx(correct[own].mean().item())
        assert scores.acc_r_per_class[row] == pytest.approx(correct[~own].mean().item())
    assert scores.acc_f == pytest.approx(sum(scores.acc_f_per_class) / CLASSES)


def test_with_many_classes_every_row_is_looked_at_about_equally(runs):
    data = runs.bars(30, classes=8)
    measure = AccuracyValidator(data, 8, 3, 0, BalancedObjective()).measure()
    batch = data.batch(torch.arange(len(data)))
    image, row = measure.pairs(batch)
    assert torch.equal(row[: len(data)], batch.labels)
    image, row = image[len(data) :], row[len(data) :]
    assert image.bincount().tolist() == [3] * len(data)
    assert (row != batch.labels[image]).all()
    assert row.bincount(minlength=8).min() > 50
    again = AccuracyValidator(data, 8, 3, 0, BalancedObjective()).measure()
    assert torch.equal(again.pairs(batch)[1][len(data) :], row)


def test_the_loss_is_the_objective_over_all_pairs(base, runs):
    net, data = scattered(base), runs.bars(40, seed=1)  # more than one batch of pairs
    scores = AccuracyValidator(data, CLASSES, 3, 0, BalancedObjective(0.3))(net)
    images, labels, _ = data.batch(torch.arange(len(data)))
    forget, retain = [], []
    with torch.no_grad():
        original = net(images, forget=None).log_softmax(1)
        for row in range(CLASSES):
            logits = net(images, forget=row).log_softmax(1)
            own = labels == row
            forget.append(-torch.log1p(-logits[own, row].double().exp()))
            retain.append((original.exp() * (original - logits)).sum(1)[~own])
    expected = torch.cat(retain).mean() + 0.3 * torch.cat(forget).mean()
    assert scores.loss == pytest.approx(expected.item(), rel=1e-3)


def test_classes_that_are_absent_do_not_count(base, runs):
    data = runs.bars(4, seed=1)
    data = data.select((data.labels != 2).nonzero().flatten())
    scores = AccuracyValidator(data, CLASSES, 3, 0, BalancedObjective())(WFNet(base, CLASSES))
    assert math.isfinite(scores.score)
    assert math.isnan(scores.acc_f_per_class[2])


def test_unreadable_images_are_left_out_and_none_at_all_is_an_error(base, runs, caplog):
    net, data = scattered(base), runs.bars(3, seed=1)

    def scores(corrupt):
        how = HowToRun(corrupt=CorruptImages(100))
        dataset = runs.corrupted(data, corrupt)
        return AccuracyValidator(dataset, CLASSES, 3, 0, BalancedObjective(), how)(net)

    assert math.isnan(scores({1, 5, 9}).acc_f_per_class[1])
    with pytest.raises(RuntimeError, match="no validation image can be read"):
        scores(set(range(12)))
    assert caplog.text.count("half a JPEG") == 15


def test_equal_accuracies_are_decided_by_the_loss():
    first, second = (Validation(0.5, 0.1, [], [], loss) for loss in (0.2, 0.1))
    accurate = Validation(0.9, 0.1, [], [], 0.3)
    assert accurate.rank("accuracy") > second.rank("accuracy") > first.rank("accuracy")
    assert second.rank("loss") > first.rank("loss") > accurate.rank("loss")


def test_of_a_large_split_some_images_are_looked_at_evenly_over_classes(base, runs):
    def images(most, data):
        how = HowToRun(images=most)
        return AccuracyValidator(data, CLASSES, 3, 0, BalancedObjective(), how).images

    data = runs.bars(300, seed=1)
    few = images(20, data)
    assert data.labels[few].bincount().tolist() == [5] * CLASSES
    assert torch.equal(images(20, data), few)
    assert data.labels[images(None, data)].bincount().tolist() == [250] * CLASSES
    assert len(images(None, runs.bars(100, seed=1))) == 400
