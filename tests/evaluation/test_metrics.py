import math

import pytest
import torch
from torch.nn import functional as F

from wfnet.evaluation import metrics


def test_topk_hits_by_hand():
    logits = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.1, 0.4], [0.0, 0.3, 0.6]])
    labels = torch.tensor([1, 2, 0])
    assert metrics.topk_hits(logits, labels).tolist() == [True, False, False]
    assert metrics.topk_hits(logits, labels, 2).tolist() == [True, True, False]
    assert metrics.topk_hits(logits, labels, 5).tolist() == [True, True, True]


def test_accuracies_by_hand():
    # Rows forget classes 2, 0 and 1; the samples per class are 10, 20, 30, and none.
    classes = torch.tensor([2, 0, 1])
    seen = torch.tensor([[10, 20, 30], [10, 20, 30], [0, 0, 0]])
    correct = torch.tensor([[9, 12, 3], [1, 20, 15], [0, 0, 0]])
    forget = metrics.accuracy_forget(correct, seen, classes)
    retain = metrics.accuracy_retain(correct, seen, classes)
    assert forget[:2].tolist() == [3 / 30, 1 / 10]
    assert retain[:2].tolist() == [21 / 30, 35 / 50]  # samples are weighed, not classes
    assert forget[2].isnan()
    assert retain[2].isnan()


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


@pytest.mark.parametrize(
    ("classes", "base", "expected"),
    # Base e fits the published tables of original models; base 2 would have given the others.
    [(10, math.e, 0.474), (1000, math.e, 0.311), (10, 2, 0.24), (1000, 2, 0.006)],
)
def test_zrf_of_a_confident_network_against_a_uniform_one(classes, base, expected):
    confident = torch.full((3, classes), -1e4)
    confident[:, 1] = 0
    value = metrics.zrf(confident, torch.zeros(3, classes), base).item()
    assert value == pytest.approx(expected, abs=2e-3)  # expected values are rounded
    assert metrics.zrf(confident, confident, base) == 1


@pytest.mark.filterwarnings("ignore:reduction. 'mean'")
@pytest.mark.parametrize("mode", ["swapped", "swapped_elementwise_mean"])
def test_zrf_modes_are_the_published_expressions(mode):
    p, q = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0)).double().softmax(-1)
    m = (p + q) / 2
    reduction = "mean" if mode == "swapped_elementwise_mean" else "batchmean"
    published = F.kl_div(p.log(), m, reduction=reduction) + F.kl_div(
        q.log(), m, reduction=reduction
    )
    found, definition = (
        metrics.zrf_divergence(p.log(), q.log(), mode=m).mean().item() for m in (mode, "definition")
    )
    assert found == pytest.approx(published.item() / 2)
    assert found != pytest.approx(definition, abs=1e-3)


def test_confidence_kept_is_a_capped_ratio_of_probabilities():
    before = torch.tensor([[2.0, 0.0], [2.0, 0.0], [-2000.0, 0.0]])
    after = torch.tensor([[0.0, 0.0], [5.0, 0.0], [-2000.0, 0.0]])
    kept = metrics.confidence_kept(after, before, torch.tensor([0, 0, 0]))
    assert kept.tolist() == pytest.approx([0.5 / before[0].softmax(0)[0].item(), 1.0, 1.0])


def test_average_precision_by_hand():
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]])
    truth = torch.tensor([[1, 0], [0, 0], [1, 0]]).bool()
    found = metrics.average_precision(scores, truth)
    assert found[0].item() == pytest.approx((1 + 2 / 3) / 2)
    assert found[1].isnan()


def test_relearn_time_counts_the_cap_for_classes_that_never_came_back():
    assert metrics.relearn_time([None] * 10, 100) == (100, 10)
    assert metrics.relearn_time([3, None, 0], 100) == (103 / 3, 1)
