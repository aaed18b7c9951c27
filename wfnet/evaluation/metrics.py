"""The measures of the evaluation: one definition each, as pure functions on tensors.

Every rate is a fraction in [0, 1]; sums run in fp64. "Paper" is Poppi et al., "Multi-Class
Unlearning for Image Classification via Weight Filtering" (arXiv 2304.02049), section "Measures".
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from wfnet.services import settings
from wfnet.services.extras import require

TOP_K = 5
LOG_BASE = settings.Number(1.0, 1e6, above=True)


def topk_hits(logits: Tensor, labels: Tensor, k: int = 1) -> Tensor:
    """Whether the true class is among the ``k`` largest of ``logits [B, K]``: ``[B]`` bool.

    ``labels [B]`` are int64. With ``k >= K`` every sample is a hit.
    """
    named = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (named == labels.unsqueeze(1)).any(1)


def accuracies(correct: Tensor, seen: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Acc_r and Acc_f of each row, ``[R]`` fp64 each, NaN where no sample was seen (paper).

    Acc_f is the accuracy on samples of the class that the row forgets (0 is best), Acc_r that on
    samples of all other classes (the original's is best). Every sample counts once, so large
    classes weigh more. ``correct`` and ``seen [R, K]`` count hits and samples of class k under row
    r, which forgets ``classes[r]``.
    """
    own = [table.gather(1, classes.unsqueeze(1)).squeeze(1) for table in (correct, seen)]
    others = [table.sum(1) - part for table, part in zip((correct, seen), own, strict=True)]
    return others[0].double() / others[1], own[0].double() / own[1]


def jensen_shannon(logits: Tensor, other_logits: Tensor, base: float = math.e) -> Tensor:
    """Jensen-Shannon divergence between the softmax distributions of two sets of logits.

    ``JS(p, q) = KL(p || m) / 2 + KL(q || m) / 2`` with ``m = (p + q) / 2`` (Lin, "Divergence
    measures based on the Shannon entropy", 1991): symmetric, between 0 and ``log_base(2)``. A
    probability of 0 (a logit of -inf) is fine.

    Args:
        logits, other_logits: ``[..., K]``, any floating-point dtype; the result ``[...]`` is fp64.
        base: base of the logarithm; e gives nats, 2 gives bits.
    """
    log_p = torch.log_softmax(logits.double(), -1)
    log_q = torch.log_softmax(other_logits.double(), -1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    divergence = _divergence(log_p, log_m) + _divergence(log_q, log_m)
    # Rounding can leave -1e-17 for equal distributions.
    return (divergence / 2 / math.log(base)).clamp_min(0)


def _divergence(log_p: Tensor, log_m: Tensor) -> Tensor:
    """``KL(p || m)`` over the last dimension, with ``0 * log 0 = 0``."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_m), 0).sum(-1)


def relearn_time(epochs: Sequence[int | None], cap: int) -> dict[str, float]:
    """RT: mean ``epochs`` until the original accuracy is regained; how many classes ``never`` did.

    A class that never regained it within ``cap`` epochs (None) counts as ``cap``: so do the
    published values, which read ``100 (10)`` where none of ten classes did (paper).
    """
    mean = sum(cap if count is None else count for count in epochs) / len(epochs)
    return {"epochs": mean, "never": epochs.count(None)}


def confidence_kept(logits: Tensor, original_logits: Tensor, labels: Tensor) -> Tensor:
    """Confidence in the true class divided by the original network's, capped at 1 (paper).

    ``[n]`` fp64, of ``logits [n, K]`` and ``labels [n]``; 1 where the original confidence
    underflows to 0.
    """
    index = labels.unsqueeze(1)
    own = torch.log_softmax(logits.double(), 1).gather(1, index)
    before = torch.log_softmax(original_logits.double(), 1).gather(1, index)
    ratio = (own - before).clamp_max(0).exp().squeeze(1)
    return torch.where(before.squeeze(1).exp() > 0, ratio, 1.0)


def average_precision(scores: Tensor, truth: Tensor, weights: Tensor | None = None) -> Tensor:
    """scikit-learn's average precision of each label, ``[K]`` fp64: NaN where no image has it.

    The mean precision at the ranks of a label's images, without interpolation. Scores ``[N, K]``
    (logits will do) that say nothing give the label's share of the images, in ``truth [N, K]``;
    ``weights [N]`` are of images.
    """
    score = require("sklearn.metrics", "eval").average_precision_score
    values = torch.full((truth.shape[1],), torch.nan, dtype=torch.float64)
    for k in truth.any(0).nonzero().flatten().tolist():
        own, found = truth[:, k].numpy(), scores[:, k].float().numpy()
        values[k] = score(own, found, sample_weight=weights)
    return values
