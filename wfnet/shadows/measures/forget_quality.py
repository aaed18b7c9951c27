"""Forget quality in the form of the NeurIPS 2023 machine unlearning challenge.

Triantafillou et al., "Are We Making Progress in Unlearning? Findings from the First NeurIPS
Unlearning Competition" (2024). For each image a set of attacks decides, from the confidence,
whether a model unlearned it or never saw it; with false positive and false negative rates over
models::

    epsilon = max over attacks of max(log((1 - d - fpr) / fnr), log((1 - d - fnr) / fpr)), d = 1e-5

Attacks are all thresholds (above: the kind with the larger median) and all intervals (inside: the
kind with the smaller range). One with exactly one rate 0 is left out, one with both 0 separates the
kinds: epsilon is infinite, 50 in the mean. An image scores ``2^-b`` for an epsilon in
``[b / 2, (b + 1) / 2)`` below ``ceil(log(S - 1))`` for ``S`` models of a kind, and 0 above: with
few models, mainly whether the kinds can be separated at all. The mean over images is the forgetting
quality: higher is better. (The challenge multiplies it by relative accuracies, which stand in other
tables here, and takes thresholds from a grid.)
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from wfnet.shadows.measures.measure import Measure, Pair, Values, mean_of_images

DELTA = 1e-5
CAP = 50.0


def measure(pairs: Sequence[Pair]) -> Values:
    """Returns score and mean epsilon over all images of all pairs."""
    found = torch.cat([epsilons(pair) for pair in pairs])
    top = math.ceil(math.log(len(pairs[0].unlearned) - 1))
    points = torch.where(found < top, 0.5 ** (found / 0.5).floor(), 0.0)
    return {"score": mean_of_images(points), "epsilon": mean_of_images(found)}


def epsilons(pair: Pair) -> Tensor:
    """Returns epsilon ``[n]`` of each image; 0 where every attack is left out."""
    u, r = pair.unlearned, pair.reference
    larger = u.median(0).values > r.median(0).values
    above = _largest(*_split(u, r, larger), thresholds=True)
    range_u, range_r = (side.amax(0) - side.amin(0) for side in (u, r))
    inside = _largest(*_split(u, r, range_u < range_r), thresholds=False)
    return torch.maximum(above, inside).clamp(0, CAP)


def _split(u: Tensor, r: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """Returns positives and negatives ``[S, n]``: ``u`` is positive where ``first [n]``."""
    return torch.where(first, u, r), torch.where(first, r, u)


def _largest(positive: Tensor, negative: Tensor, thresholds: bool) -> Tensor:
    """Returns the largest epsilon ``[n]`` of an attack that calls what is in ``[low, high]``
    positive: all such intervals between values, or those up to the largest value."""
    values = torch.cat((positive, negative)).sort(0).values  # [2 S, n]
    count = len(values)
    best = torch.full(values.shape[1:], -torch.inf, dtype=torch.float64)
    for i in range(count):
        for j in (count - 1,) if thresholds else range(i, count):
            low, high = values[i], values[j]
            misses = 1 - _inside(positive, low, high)
            false = _inside(negative, low, high)
            both, either = (misses + false == 0), (misses * false == 0)
            rates = torch.stack(
                [
                    (1 - DELTA - false).clamp_min(0).log() - misses.log(),
                    (1 - DELTA - misses).clamp_min(0).log() - false.log(),
                ]
            )
            found = torch.where(either, -torch.inf, rates.amax(0))
            best = torch.maximum(best, torch.where(both, torch.inf, found))
    return best


def _inside(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return ((values >= low) & (values <= high)).double().mean(0)


MEASURE = Measure(
    name="forget_quality",
    title="Forget quality (NeurIPS 2023 challenge)",
    definition=__doc__,
    values={"score": "forgetting quality, 0 to 1, high is good", "epsilon": "mean epsilon"},
    function=measure,
)
