"""Validation: every pair is counted once, and the loss is the objective's."""

import math

import pytest
import torch

from wfnet import WFNet
from wfnet.data import CorruptImages
from wfnet.untraining.objectives import BalancedObjective
from wfnet.untraining.validation import AccuracyValidator, Validation

CLASSES = 4


@pytest.fixture
def validator(runs):
    def make(data, *more, classes=CLASSES, **changes):
        settings = runs.config(**{"validation_rows": 3, **changes})
        return AccuracyValidator(data, classes, BalancedObjective(0.3), settings, *more)

    return make


@pytest.fixture
def scattered(base) -> WFNet:
    net = WFNet(base, CLASSES)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.filter_parameters():
            p.copy_(1 + 3 * torch.randn(p.shape, generator=generator))
    return net


def test_accuracies_and_loss_are_those_of_all_pairs(scattered, runs, validator):
    data = runs.bars(40, seed=1)  # more than one batch of pairs
    scores = validator(data, validation_rows=99)(scattered)
    images, labels, _ = data.batch(torch.arange(len(data)))
    forget, retain = [], []
    with torch.no_grad():
        original = scattered(images, forget=None).log_softmax(1)
        for row in range(CLASSES):
            logits = scattered(images, forget=row).log_softmax(1)
            own, correct = labels == row, (logits.argmax(1) == labels).double()
            assert scores.acc_f_per_class[row] == pytest.approx(correct[own].mean().item())
            assert scores.acc_r_per_class[row] == pytest.approx(correct[~own].mean().item())
            forget.append(-torch.log1p(-logits[own, row].double().exp()))
            retain.append((original.exp() * (original - logits)).sum(1)[~own])
    expected = torch.cat(retain).mean() + 0.3 * torch.cat(forget).mean()
    assert scores.loss == pytest.approx(expected.item(), rel=1e-3)
    assert scores.acc_f == pytest.approx(sum(scores.acc_f_per_class) / CLASSES)


def test_with_many_classes_every_row_is_looked_at_about_equally(runs, validator):
    data = runs.bars(30, classes=8)
    batch = data.batch(torch.arange(len(data)))
    image, row = validator(data, classes=8).pairs(batch)
    assert torch.equal(row[: len(data)], batch.labels)
    assert torch.equal(validator(data, classes=8).pairs(batch)[1], row)
    image, row = image[len(data) :], row[len(data) :]
    assert image.bincount().tolist() == [3] * len(data)
    assert (row != batch.labels[image]).all()
    assert row.bincount(minlength=8).min() > 50


def test_unreadable_images_are_left_out_and_none_at_all_is_an_error(
    scattered, runs, validator, caplog
):
    def scores(corrupt):
        data = runs.corrupted(runs.bars(3, seed=1), corrupt)
        return validator(data, None, CorruptImages(100))(scattered)

    found = scores({1, 5, 9})  # all images of a class
    assert math.isnan(found.acc_f_per_class[1])
    assert math.isfinite(found.score)
    with pytest.raises(RuntimeError, match="no validation image can be read"):
        scores(set(range(12)))
    assert caplog.text.count("half a JPEG") == 15


def test_logits_that_are_not_finite_are_an_error(scattered, runs, validator):
    data = runs.bars(3, seed=1)
    data.images[5, 0, 2, 2] = math.nan
    with pytest.raises(FloatingPointError, match="of 12 validation samples are NaN or infinite"):
        validator(data)(scattered)


def test_equal_accuracies_are_decided_by_the_loss():
    first, second = (Validation(0.5, 0.1, [], [], loss) for loss in (0.2, 0.1))
    accurate = Validation(0.9, 0.1, [], [], 0.3)
    assert accurate.rank("accuracy") > second.rank("accuracy") > first.rank("accuracy")
    assert second.rank("loss") > first.rank("loss") > accurate.rank("loss")


def test_of_a_large_split_some_images_are_looked_at_evenly_over_classes(runs, validator):
    data = runs.bars(300, seed=1)
    few = validator(data, validation_images=20).images
    assert data.labels[few].bincount().tolist() == [5] * CLASSES
    assert torch.equal(validator(data, validation_images=20).images, few)
    assert data.labels[validator(data).images].bincount().tolist() == [250] * CLASSES
    assert len(validator(runs.bars(100, seed=1)).images) == 400
