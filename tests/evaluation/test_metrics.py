import math

import pytest
import torch

from wfnet.evaluation import metrics


@pytest.mark.parametrize("base", [math.e, 2])
def test_jensen_shannon_agrees_with_scipy(base):
    distance = pytest.importorskip("scipy.spatial.distance")
    generator = torch.Generator().manual_seed(1)
    a, b = 3 * torch.randn(2, 50, 7, generator=generator, dtype=torch.float64)
    expected = distance.jensenshannon(a.softmax(1).numpy(), b.softmax(1).numpy(), base, axis=1) ** 2
    torch.testing.assert_close(
        metrics.jensen_shannon(a, b, base), torch.from_numpy(expected), rtol=1e-12, atol=1e-14
    )


def test_jensen_shannon_bounds():
    certain = torch.tensor([[0.0, -math.inf], [400.0, -400.0]]).half()
    assert metrics.jensen_shannon(certain, certain.flip(1), 2).tolist() == [1.0, 1.0]
    assert metrics.jensen_shannon(certain, certain).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("classes", "expected"), [(10, 0.474), (1000, 0.311)])
def test_zrf_of_a_confident_network_against_a_uniform_one(classes, expected):
    """Base e, the default, fits the published tables of original models."""
    confident = torch.full((3, classes), -1e4)
    confident[:, 1] = 0
    value = 1 - metrics.jensen_shannon(confident, torch.zeros(3, classes)).mean().item()
    assert value == pytest.approx(expected, abs=2e-3)  # expected values are rounded


def test_confidence_kept_is_a_capped_ratio_of_probabilities():
    before = torch.tensor([[2.0, 0.0], [2.0, 0.0], [-2000.0, 0.0]])
    after = torch.tensor([[0.0, 0.0], [5.0, 0.0], [-2000.0, 0.0]])
    kept = metrics.confidence_kept(after, before, torch.tensor([0, 0, 0]))
    assert kept.tolist() == pytest.approx([0.5 / before[0].softmax(0)[0].item(), 1.0, 1.0])
