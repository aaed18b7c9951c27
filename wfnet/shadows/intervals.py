"""Confidence intervals: of shares of independent trials, and of statistics over images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LEVEL = 0.95
RESAMPLES = 200


def clopper_pearson(hits: int, trials: int, level: float = LEVEL) -> tuple[float, float]:
    """Returns the exact interval of a share, ``hits`` of ``trials``.

    Clopper and Pearson, Biometrika 26 (1934): the shares at which so many hits or more, and so many
    or fewer, have probability ``(1 - level) / 2``. Found by bisection.
    """
    tail = (1 - level) / 2
    k = torch.arange(trials + 1, dtype=torch.float64)
    n = torch.tensor(float(trials), dtype=torch.float64)
    ways = (n + 1).lgamma() - (k + 1).lgamma() - (n - k + 1).lgamma()

    def more(share: float, least: int) -> float:
        """The probability of ``least`` hits or more."""
        p = torch.tensor(share, dtype=torch.float64)
        return (ways + k * p.log() + (n - k) * (1 - p).log())[least:].exp().sum().item()

    low = 0.0 if hits == 0 else _root(lambda share: more(share, hits) - tail)
    high = 1.0 if hits == trials else _root(lambda share: more(share, hits + 1) - (1 - tail))
    return low, high


def _root(rising: Callable[[float], float]) -> float:
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if rising(middle) > 0 else (middle, high)
    return (low + high) / 2


def bootstrap(
    statistic: Callable[[Tensor], float], count: int, level: float = LEVEL, seed: int = 0
) -> tuple[float, float]:
    """Returns the percentile interval of ``statistic(chosen)`` over resampled images.

    Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13. ``chosen [count]``
    int64 are positions of images, drawn with replacement. Models are not resampled: what other
    seeds would give is not in the interval.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randint(count, (count,), generator=generator) for _ in range(RESAMPLES)]
    found = torch.tensor([statistic(chosen) for chosen in draws], dtype=torch.float64)
    low, high = found.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2]).double()).tolist()
    return low, high
