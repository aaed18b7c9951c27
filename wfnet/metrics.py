"""The measures of the evaluation: one definition each, as pure functions on tensors.

Every rate is a fraction in [0, 1]; sums run in fp64. "Paper" is Poppi et al., "Multi-Class
Unlearning for Image Classification via Weight Filtering" (arXiv 2304.02049), section "Measures".
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TOP_K = 5


def topk_hits(logits: Tensor, labels: Tensor, k: int = 1) -> Tensor:
    """Whether the true class is among the ``k`` largest logits of each sample.

    Args:
        logits: ``[B, K]``, without NaN.
        labels: ``[B]`` int64 in ``0 .. K-1``.
        k: as many classes as may be named; all of them where ``k >= K``.

    Returns:
        ``[B]`` bool.

    Raises:
        ValueError: for ``k`` below 1 or shapes that do not fit.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1; got {k}")
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"logits must be [B, K] and labels [B]; got {list(logits.shape)} and "
            f"{list(labels.shape)}"
        )
    named = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (named == labels.unsqueeze(1)).any(1)


def accuracy_forget(correct: Tensor, seen: Tensor, classes: Tensor) -> Tensor:
    """Acc_f of each row: accuracy on samples of the class that the row forgets (paper; 0 is best).

    ``Acc_f[r] = correct[r, classes[r]] / seen[r, classes[r]]``; the reported figure is the mean
    over rows. With counts of top-5 hits it is the top-5 variant.

    Args:
        correct: ``[R, K]`` integers: hits of samples of class k under row r.
        seen: ``[R, K]`` integers: samples of class k that were run under row r.
        classes: ``[R]`` int64, the class that each row forgets.

    Returns:
        ``[R]`` fp64; NaN where no sample was seen.
    """
    return _own(correct, classes) / _own(seen, classes)


def accuracy_retain(correct: Tensor, seen: Tensor, classes: Tensor) -> Tensor:
    """Acc_r of each row: accuracy on samples of all other classes (paper; the original is best).

    ``Acc_r[r] = sum_{k != classes[r]} correct[r, k] / sum_{k != classes[r]} seen[r, k]``. Every
    sample counts once, so large classes weigh more. Arguments and result as
    :func:`accuracy_forget`.
    """
    return _others(correct, classes) / _others(seen, classes)


def _own(counts: Tensor, classes: Tensor) -> Tensor:
    return counts.gather(1, classes.unsqueeze(1)).squeeze(1).double()


def _others(counts: Tensor, classes: Tensor) -> Tensor:
    return counts.sum(1).double() - _own(counts, classes)


def jensen_shannon(logits: Tensor, other_logits: Tensor, base: float = math.e) -> Tensor:
    """Jensen-Shannon divergence between the softmax distributions of two sets of logits.

    ``JS(p, q) = KL(p || m) / 2 + KL(q || m) / 2`` with ``m = (p + q) / 2`` (Lin, "Divergence
    measures based on the Shannon entropy", 1991): symmetric, between 0 and ``log_base(2)``. It is
    computed from log-probabilities in fp64; a probability of 0 (a logit of -inf) is fine.

    Args:
        logits, other_logits: ``[..., K]``, any floating-point dtype.
        base: base of the logarithm; e gives nats, 2 gives bits.

    Returns:
        ``[...]`` fp64.

    Raises:
        ValueError: for shapes that differ or a base that no logarithm has.
    """
    check_base(base)
    if logits.shape != other_logits.shape:
        raise ValueError(
            f"both logits must have the same shape; got {list(logits.shape)} and "
            f"{list(other_logits.shape)}"
        )
    log_p = torch.log_softmax(logits.double(), -1)
    log_q = torch.log_softmax(other_logits.double(), -1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    divergence = (_divergence(log_p, log_m) + _divergence(log_q, log_m)) / 2
    # Rounding can leave -1e-17 for equal distributions.
    return (divergence / math.log(base)).clamp_min(0)


def _divergence(log_p: Tensor, log_m: Tensor) -> Tensor:
    """``KL(p || m)`` over the last dimension, with ``0 * log 0 = 0``."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_m), 0).sum(-1)


def zrf(logits: Tensor, initial_logits: Tensor, base: float = math.e) -> Tensor:
    """Zero Retrain Forgetting: 1 - mean JS divergence from a network that knows nothing.

    ``ZRF = 1 - 1/n * sum_i JS(softmax(logits_i), softmax(initial_logits_i))`` over the forget
    samples, between the unlearned network and the same network newly initialised (paper; Chundawat
    et al., "Can Bad Teaching Induce Forgetting?", AAAI 2023). 1: as clueless as a new one.

    The papers do not state the base of the logarithm. The natural one fits the values published
    for original models (confident against uniform gives 0.474 for 10 classes and 0.311 for 1,000),
    so it is the default; write the base beside every value.

    Args:
        logits: ``[n, K]`` of the unlearned network on samples of the forgotten class.
        initial_logits: ``[n, K]`` of the newly initialised network on the same samples.
        base: base of the logarithm.

    Returns:
        Scalar, fp64; NaN for no samples.

    Raises:
        As :func:`jensen_shannon`.
    """
    return 1 - jensen_shannon(logits, initial_logits, base).mean()


def check_base(base: float) -> None:
    """Raises ValueError unless logarithms to ``base`` exist and grow."""
    if not (math.isfinite(base) and base > 1):
        raise ValueError(
            f"zrf_base={base} is no base of a logarithm; use math.e (default), 2 or another number "
            "above 1"
        )
