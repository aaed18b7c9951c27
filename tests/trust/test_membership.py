import math

import pytest
import torch
from torch import nn

from wfnet.trust import membership


def test_area_under_the_curve_is_that_of_sklearn_and_its_error_that_of_the_u_test():
    from sklearn.metrics import roc_auc_score

    generator = torch.Generator().manual_seed(0)
    for shift in (0.0, 1.0, -2.0):
        positive = torch.randn(17, generator=generator).add(shift).round(decimals=1).double()
        negative = torch.randn(23, generator=generator).round(decimals=1).double()
        expected = roc_auc_score([1] * 17 + [0] * 23, torch.cat((positive, negative)))
        assert membership.roc_auc(positive, negative) == pytest.approx(expected, abs=1e-12)
    # Of scores alike on both sides, that of Mann-Whitney's U: (n + m + 1) / 12 n m.
    assert membership.auc_error(0.5, 30, 20) == pytest.approx(math.sqrt(51 / 12 / 600))


def test_confidence_is_the_logit_of_the_probability():
    logits = torch.tensor([[2.0, -1.0, 0.5], [200.0, 0.0, 0.0]], dtype=torch.float64)
    p = torch.softmax(logits, 1)[0, 0]
    found = membership.confidence(logits, 0)
    assert found[0].item() == pytest.approx(torch.log(p / (1 - p)).item())
    assert found[1].item() == pytest.approx(200 - math.log(2))  # where 1 - p would be 0


def test_true_positives_at_a_bounded_false_positive_rate():
    positive = torch.tensor([5.0, 6.0, 0.5, 2.0])
    negative = torch.arange(10.0)  # one of ten may be above the threshold: 9, so it is 8
    assert membership.true_positives(positive, negative) == 0.0
    assert membership.true_positives(positive + 5, negative) == 0.5


class Constant(nn.Module):
    """log-odds of class 1: `level` for each image, and the image's own hardness."""

    def __init__(self, level, seed):
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(level))
        self.seed = seed

    def forward(self, x):
        noise = 0.1 * torch.randn(len(x), generator=torch.Generator().manual_seed(self.seed))
        odds = self.bias + 10 * x.mean((1, 2, 3)) + noise
        return odds.unsqueeze(1) * torch.eye(4)[1]


def test_an_overconfident_member_is_found_and_one_more_retrained_model_is_not(make_subject):
    retrained = [Constant(-5.0, seed) for seed in (1, 2, 3)]

    def measured(model, others):
        return membership.measure(model, make_subject(retrained=others))[0]

    assert 0.2 < measured(Constant(-5.0, 4), retrained)["lira_auc"] < 0.8
    assert measured(Constant(-3.0, 4), retrained)["lira_auc"] == 1.0
    assert measured(Constant(-9.0, 4), retrained)["lira_auc"] == 0.0
    with_one = measured(retrained[0], retrained[:2])  # itself is no other
    assert "lira_auc" not in with_one
    assert "auc_calibrated" in with_one
    assert "auc_calibrated" not in measured(retrained[0], [])
