import math

import pytest
import torch

from wfnet.trust import similarity
from wfnet.trust.similarity import linear_cka


def test_similarity_is_the_mean_over_other_retrained_models(make_subject, make_network):
    model, other = make_network(2), make_network(3)
    assert similarity.measure(model, make_subject())[0] == {}
    found, details = similarity.measure(make_network(1), make_subject(retrained=[model, other]))
    assert set(found) == set(similarity.CHECK.measures)
    assert set(details["forget"]) == {"conv1", "conv2", "input of the head"}
    one, _ = similarity.measure(make_network(1), make_subject(retrained=[model]))
    two, _ = similarity.measure(make_network(1), make_subject(retrained=[other]))
    mean = (one["cka_retain_last"] + two["cka_retain_last"]) / 2
    assert found["cka_retain_last"] == pytest.approx(mean)
    same, _ = similarity.measure(make_network(2), make_subject(retrained=[model]))
    assert same == pytest.approx(dict.fromkeys(same, 1.0))


def hsic(k, q):
    """The unbiased estimate as sums over distinct positions (Song et al., 2012)."""
    n = len(k)
    pairs = sum(k[i, j] * q[i, j] for i in range(n) for j in range(n) if i != j)
    triples = sum(
        k[i, j] * q[i, m]
        for i in range(n)
        for j in range(n)
        for m in range(n)
        if len({i, j, m}) == 3
    )
    fours = sum(
        k[i, j] * q[m, o]
        for i in range(n)
        for j in range(n)
        for m in range(n)
        for o in range(n)
        if len({i, j, m, o}) == 4
    )
    two, three = n * (n - 1), n * (n - 1) * (n - 2)
    return pairs / two - 2 * triples / three + fours / (three * (n - 3))


def test_unbiased_estimate_over_minibatches():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(11, d, generator=generator, dtype=torch.float64) for d in (3, 20))
    y[:, :3] += x
    expected = torch.zeros(3).double()
    for a, b in ((x[:6], y[:6]), (x[6:], y[6:])):
        k, q = a @ a.T, b @ b.T
        expected += torch.stack([hsic(k, q), hsic(k, k), hsic(q, q)])
    both, own, other = expected.tolist()
    assert linear_cka(x, y, 6) == pytest.approx(both / math.sqrt(own * other))


def test_rotations_scales_and_shifts_do_not_matter_and_unrelated_features_do():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 60, 100, generator=generator)
    turn = torch.linalg.qr(torch.randn(100, 100, generator=generator))[0]
    assert linear_cka(x, 3 * x @ turn + 5) == pytest.approx(1)
    assert abs(linear_cka(x, y)) < 0.1  # 0.6 without the correction: more features than images
    assert math.isnan(linear_cka(x, torch.ones(60, 5)))
    with pytest.raises(ValueError, match="4 at least"):
        linear_cka(x[:3], y[:3])
