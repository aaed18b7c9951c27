import math

import pytest
import torch

from wfnet.trust import closeness


def test_distances_between_distributions():
    logits = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    same = closeness.distances(logits, logits + 3)
    assert same == pytest.approx({"kl": 0, "js": 0, "tv": 0, "agreement": 1}, abs=1e-6)
    p, q = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.25, 0.25, 0.5]])
    found = closeness.distances(p.log(), q.log())
    assert found["kl"] == pytest.approx(math.log(2))
    assert found["tv"] == pytest.approx(0.5)
    m = (p + q) / 2
    expected = 0.5 * (0.5 * torch.log(p / m)[0, :2]).sum() + 0.5 * (q * (q / m).log()).sum()
    assert found["js"] == pytest.approx(expected.item())


def test_closeness_is_the_mean_over_other_retrained_models(make_subject, make_network):
    model, other = make_network(1), make_network(7)
    assert closeness.measure(model, make_subject())[0] == {}
    found, _ = closeness.measure(make_network(1), make_subject(retrained=[model, other]))
    alone, _ = closeness.measure(model, make_subject(retrained=[model, other]))
    assert set(found) == set(closeness.CHECK.measures)
    assert found["kl_forget"] == pytest.approx(alone["kl_forget"] / 2)
