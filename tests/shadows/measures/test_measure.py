import pytest
import torch

from wfnet.shadows.measures.measure import bootstrap, clopper_pearson


@pytest.mark.parametrize(("hits", "trials"), [(0, 20), (3, 20), (20, 20), (7, 5000)])
def test_clopper_pearson_as_scipy_has_it(hits, trials):
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(hits, trials).proportion_ci(0.95, "exact")
    assert clopper_pearson(hits, trials) == pytest.approx(tuple(expected), abs=1e-9)


def test_bootstrap_of_a_mean():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = bootstrap(lambda chosen: values[chosen].mean().item(), 400)
    error = values.std().item() / 20
    assert low == pytest.approx(values.mean().item() - 1.96 * error, abs=0.4 * error)
    assert high == pytest.approx(values.mean().item() + 1.96 * error, abs=0.4 * error)
