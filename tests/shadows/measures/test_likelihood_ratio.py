import math

import numpy as np
import pytest
import torch

from wfnet.shadows.measures import Pair
from wfnet.shadows.measures.likelihood_ratio import measure, scores


def drawn(shift, models=4, images=300, seed=0):
    generator = torch.Generator().manual_seed(seed)
    u, r = torch.randn(2, models, images, generator=generator, dtype=torch.float64)
    hardness = 3 * torch.randn(images, generator=generator, dtype=torch.float64)
    return Pair(u + hardness + shift, 2 * r + hardness)


def normal(x, mean, variance):
    return math.exp(-((x - mean) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)


def test_scores_leave_the_tested_models_out():
    pair = drawn(0.5, images=6)
    u, r = pair.unlearned.numpy(), pair.reference.numpy()
    positive, negative = scores(pair)
    for fold in range(4):
        a, b = np.delete(u, fold, 0), np.delete(r, fold, 0)
        variances = a.var(0, ddof=1).mean(), b.var(0, ddof=1).mean()
        for x in range(6):
            for tested, found in ((u, positive), (r, negative)):
                value = tested[fold, x]
                ratio = normal(value, a[:, x].mean(), variances[0])
                ratio /= normal(value, b[:, x].mean(), variances[1])
                assert found[fold, x].item() == pytest.approx(math.log(ratio))


def test_chance_for_equal_kinds_and_more_for_others():
    from sklearn.metrics import roc_auc_score

    generator = torch.Generator().manual_seed(1)
    u, r = torch.randn(2, 4, 2000, generator=generator, dtype=torch.float64)
    chance = measure([Pair(u, r)])["auc"]
    assert chance.low < 0.5 < chance.high
    pairs = [drawn(2.0, images=150), drawn(2.0, images=200, seed=7)]
    found = measure(pairs)
    positive, negative = (torch.cat(s, 1).flatten() for s in zip(*map(scores, pairs), strict=True))
    truth = np.r_[np.ones(len(positive)), np.zeros(len(negative))]
    area = roc_auc_score(truth, torch.cat((positive, negative)))
    assert found["auc"].value == pytest.approx(area)
    assert found["auc"].low < area < found["auc"].high
    rate = found["tpr_at_1%"]
    threshold = np.sort(negative)[::-1][len(negative) // 100]
    assert rate.value == pytest.approx((positive > threshold).double().mean().item())
    assert rate.low < rate.value < rate.high


def test_rates_that_the_sample_cannot_show_are_named():
    found = measure([drawn(1.0, images=100)])
    assert found["tpr_at_1%"].needs is None
    assert found["tpr_at_0.1%"].value is None
    assert found["tpr_at_0.1%"].needs.startswith("1,000 scores")
    with pytest.raises(ValueError, match="needs 3 models of a kind"):
        measure([drawn(1.0, models=2)])
