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


def test_topk_hits_agrees_with_sklearn():
    sklearn = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 12, generator=generator)
    labels = torch.randint(12, (200,), generator=generator)
    for k in (1, 3, 5):
        expected = sklearn.top_k_accuracy_score(
            labels.numpy(), logits.numpy(), k=k, labels=list(range(12))
        )
        assert metrics.topk_hits(logits, labels, k).double().mean().item() == pytest.approx(
            expected, abs=1e-15
        )


def test_topk_hits_of_an_empty_batch():
    hits = metrics.topk_hits(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    assert hits.shape == (0,)
    assert hits.dtype == torch.bool


@pytest.mark.parametrize(
    ("logits", "labels", "k", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), 0, "k must be at least 1"),
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64), 1, r"\[2, 3\] and \[3\]"),
        (torch.zeros(3), torch.zeros(3, dtype=torch.int64), 1, r"logits must be \[B, K\]"),
    ],
)
def test_topk_hits_refuses(logits, labels, k, message):
    with pytest.raises(ValueError, match=message):
        metrics.topk_hits(logits, labels, k)


def test_accuracies_by_hand():
    # Rows forget classes 2 and 0; the samples per class are 10, 20, 30.
    classes = torch.tensor([2, 0])
    seen = torch.tensor([[10, 20, 30], [10, 20, 30]])
    correct = torch.tensor([[9, 12, 3], [1, 20, 15]])
    assert metrics.accuracy_forget(correct, seen, classes).tolist() == [3 / 30, 1 / 10]
    assert metrics.accuracy_retain(correct, seen, classes).tolist() == [21 / 30, 35 / 50]
    assert metrics.accuracy_retain(correct, seen, classes).dtype == torch.float64


def test_accuracy_weighs_samples_and_not_classes():
    classes = torch.tensor([0])
    seen = torch.tensor([[5, 1, 99]])
    correct = torch.tensor([[0, 1, 0]])
    assert metrics.accuracy_retain(correct, seen, classes).item() == 0.01


def test_accuracy_without_samples_is_nan():
    seen = torch.zeros(1, 3, dtype=torch.int64)
    assert metrics.accuracy_forget(seen, seen, torch.tensor([1])).isnan().all()
    assert metrics.accuracy_retain(seen, seen, torch.tensor([1])).isnan().all()


@pytest.mark.parametrize("base", [math.e, 2, 10])
def test_jensen_shannon_agrees_with_scipy(base):
    distance = pytest.importorskip("scipy.spatial.distance")
    generator = torch.Generator().manual_seed(1)
    a = 3 * torch.randn(50, 7, generator=generator, dtype=torch.float64)
    b = 3 * torch.randn(50, 7, generator=generator, dtype=torch.float64)
    expected = distance.jensenshannon(a.softmax(1).numpy(), b.softmax(1).numpy(), base, axis=1) ** 2
    torch.testing.assert_close(
        metrics.jensen_shannon(a, b, base), torch.from_numpy(expected), rtol=1e-12, atol=1e-14
    )


def test_jensen_shannon_by_hand():
    # p = (1, 0), q = (1/2, 1/2), m = (3/4, 1/4)
    p = torch.tensor([0.0, -math.inf])
    q = torch.zeros(2)
    expected = (math.log(4 / 3) + 0.5 * math.log(2 / 3) + 0.5 * math.log(2)) / 2
    assert metrics.jensen_shannon(p, q).item() == pytest.approx(expected, abs=1e-15)
    assert metrics.jensen_shannon(q, p).item() == pytest.approx(expected, abs=1e-15)


def test_jensen_shannon_bounds():
    certain = torch.tensor([[0.0, -math.inf], [400.0, -400.0]])
    assert metrics.jensen_shannon(certain, certain.flip(1), 2).tolist() == [1.0, 1.0]
    assert metrics.jensen_shannon(certain, certain).tolist() == [0.0, 0.0]
    assert metrics.jensen_shannon(torch.zeros(2, 3), torch.ones(2, 3)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_jensen_shannon_sums_in_double(dtype):
    generator = torch.Generator().manual_seed(2)
    a, b = (torch.randn(4, 1000, generator=generator).to(dtype) for _ in range(2))
    result = metrics.jensen_shannon(a, b)
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, metrics.jensen_shannon(a.double(), b.double()))


def test_jensen_shannon_refuses_other_shapes():
    with pytest.raises(ValueError, match="same shape"):
        metrics.jensen_shannon(torch.zeros(2, 3), torch.zeros(2, 4))


@pytest.mark.parametrize(
    ("classes", "base", "expected"),
    # Base e fits the published tables of original models; base 2 would have given the others.
    [(10, math.e, 0.474), (1000, math.e, 0.311), (10, 2, 0.24), (1000, 2, 0.006)],
)
def test_zrf_of_a_confident_network_against_a_uniform_one(classes, base, expected):
    confident = torch.full((3, classes), -1e4)
    confident[:, 1] = 0
    # The expected values are rounded to two or three digits.
    value = metrics.zrf(confident, torch.zeros(3, classes), base).item()
    assert value == pytest.approx(expected, abs=2e-3)


def test_zrf_is_one_for_equal_networks_and_averages_samples():
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(6, 5, generator=generator) for _ in range(2))
    assert metrics.zrf(a, a).item() == 1
    mean = torch.stack([metrics.zrf(a[i : i + 1], b[i : i + 1]) for i in range(6)]).mean()
    torch.testing.assert_close(metrics.zrf(a, b), mean)


@pytest.mark.parametrize("base", [1, 0, -2, math.inf, math.nan, 0.5])
def test_base_must_be_above_one(base):
    with pytest.raises(ValueError, match="zrf_base"):
        metrics.zrf(torch.zeros(1, 2), torch.zeros(1, 2), base)


@pytest.mark.filterwarnings("ignore:reduction. 'mean'")
@pytest.mark.parametrize("mode", ["swapped", "swapped_elementwise_mean"])
def test_zrf_modes_are_the_published_expressions(mode):
    p, q = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0)).double().softmax(-1)
    m = (p + q) / 2
    reduction = "mean" if mode == "swapped_elementwise_mean" else "batchmean"
    published = 1 - 0.5 * (
        F.kl_div(p.log(), m, reduction=reduction) + F.kl_div(q.log(), m, reduction=reduction)
    )
    assert metrics.zrf(p.log(), q.log(), mode=mode).item() == pytest.approx(published.item())
    assert metrics.zrf(p.log(), q.log()).item() != pytest.approx(published.item(), abs=1e-3)


def test_area_under_curve_is_that_of_trapezoids():
    shares = torch.tensor([0.0, 0.25, 1.0])
    values = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.5]])
    assert metrics.area_under_curve(shares, values).tolist() == [0.875, 0.3125]
    with pytest.raises(ValueError, match="0 to 1"):
        metrics.area_under_curve(torch.tensor([0.0, 0.5]), values[:, :2])


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


def test_mean_relearn_time_counts_the_cap_for_classes_that_never_came_back():
    assert metrics.relearn_time([None] * 10, 100) == (100, 10)
    assert metrics.relearn_time([3, None, 0], 100) == (103 / 3, 1)
    with pytest.raises(ValueError, match="at least one class"):
        metrics.relearn_time([], 100)
