import pytest
import torch

from wfnet.shadows.measures.measure import bootstrap


def test_bootstrap_of_a_mean():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = bootstrap(lambda chosen: values[chosen].mean().item(), 400)
    error = values.std().item() / 20
    assert low == pytest.approx(values.mean().item() - 1.96 * error, abs=0.4 * error)
    assert high == pytest.approx(values.mean().item() + 1.96 * error, abs=0.4 * error)
