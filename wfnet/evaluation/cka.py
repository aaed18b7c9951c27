"""Centred kernel alignment: how alike two networks represent the same images.

Kornblith et al., "Similarity of Neural Network Representations Revisited" (ICML 2019), with linear
kernels ``K = X X'``, ``L = Y Y'`` and, so that minibatches and more features than images do not
bias it, the estimate of Nguyen et al., "Do Wide and Deep Networks Learn the Same Things?" (ICLR
2021, eqs. 2 to 4): over minibatches of ``n`` images each, and with diagonals of 0 in ``K`` and
``L``::

    hsic(K, L) = (tr(K L) + sum(K) sum(L) / ((n - 1)(n - 2)) - 2 sum(K L) / (n - 2)) / (n (n - 3))
    cka = mean hsic(K, L) / sqrt(mean hsic(K, K) mean hsic(L, L))

1: the same up to a rotation, a scale and a shift; about 0: unrelated (it can fall below).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LEAST = 4  # images


def linear_cka(first: Tensor, second: Tensor, batch_size: int = 256) -> float:
    """Returns the linear CKA of features ``[N, d]`` and ``[N, e]`` of the same images.

    A last minibatch of fewer than 4 images is left out. NaN where one of them does not vary.

    Raises:
        ValueError: for fewer than 4 images, or other numbers of them.
    """
    if len(first) != len(second) or len(first) < LEAST:
        raise ValueError(
            f"CKA needs features of the same images, {LEAST} at least; got {len(first)} and "
            f"{len(second)}"
        )
    sums = torch.zeros(3, dtype=torch.float64)
    for x, y in zip(first.split(batch_size), second.split(batch_size), strict=True):
        if len(x) >= LEAST:
            a, b = _kernel(x), _kernel(y)
            sums += torch.tensor([_hsic(a, b), _hsic(a, a), _hsic(b, b)], dtype=torch.float64)
    both, own, other = sums.tolist()
    return both / math.sqrt(own * other) if own > 0 and other > 0 else math.nan


def _kernel(features: Tensor) -> Tensor:
    """Returns ``X X'`` ``[n, n]`` fp64 with a diagonal of 0; centring first loses no digits."""
    x = features.double()
    x = x - x.mean(0)
    return (x @ x.T).fill_diagonal_(0)


def _hsic(a: Tensor, b: Tensor) -> float:
    n = len(a)
    rows = (a.sum(0) * b.sum(0)).sum()
    found = (a * b).sum() + a.sum() * b.sum() / ((n - 1) * (n - 2)) - 2 * rows / (n - 2)
    return (found / (n * (n - 3))).item()
