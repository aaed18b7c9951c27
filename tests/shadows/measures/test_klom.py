import pytest
import torch
from torch.distributions import Normal, kl_divergence

from wfnet.shadows.measures import Pair
from wfnet.shadows.measures.klom import divergences, measure


def test_divergence_of_fitted_normals_from_retrained_to_unlearned():
    generator = torch.Generator().manual_seed(0)
    u, r = torch.randn(2, 5, 40, generator=generator, dtype=torch.float64)
    u = 3 * u - 1
    fits = [Normal(side.mean(0), side.var(0).mean().sqrt()) for side in (r, u)]
    torch.testing.assert_close(divergences(Pair(u, r)), kl_divergence(*fits))
    value = measure([Pair(u[:, :10], r[:, :10]), Pair(u[:, 10:], r[:, 10:])])["klom"]
    parts = torch.cat([divergences(Pair(u[:, p], r[:, p])) for p in (slice(10), slice(10, 40))])
    assert value.value == pytest.approx(parts.mean().item())
    assert value.low < value.value < value.high


def test_margins_are_clipped_and_constant_ones_are_no_error():
    far = Pair(torch.full((4, 3), -1e6).double(), torch.full((4, 3), -100.0).double())
    assert divergences(far).abs().max() < 1e-9
