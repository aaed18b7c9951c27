import math

import pytest
import torch

from wfnet.trust import closeness


def test_distances_between_distributions():
    logits = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    same = closeness.distances(logits, logits + 3)
    assert same["kl"] == pytest.approx(0, abs=1e-12)
    assert same["tv"] == pytest.approx(0, abs=1e-6)
    assert same["agreement"] == 1.0
    p, q = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.25, 0.25, 0.5]])
    found = closeness.distances(p.log(), q.log())
    assert found["kl"] == pytest.approx(math.log(2))
    assert found["tv"] == pytest.approx(0.5)
    m = (p + q) / 2
    expected = 0.5 * (0.5 * torch.log(p / m)[0, :2]).sum() + 0.5 * (q * (q / m).log()).sum()
    assert found["js"] == pytest.approx(expected.item())


def test_closeness_is_the_mean_over_retrained_models(make_subject, make_network):
    subject = make_subject()
    model, other = subject.forgetful, make_network(7)
    assert closeness.measure(model, subject, [])["values"] == {}
    found = closeness.measure(model, subject, [model, other])["values"]
    alone = closeness.measure(model, subject, [other])["values"]
    assert set(found) == set(closeness.CHECK.measures)
    assert found["kl_forget"] == pytest.approx(alone["kl_forget"] / 2)
