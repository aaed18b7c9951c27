import math

import pytest
import torch

from wfnet.shadows.measures import Pair
from wfnet.shadows.measures.forget_quality import CAP, DELTA, epsilons, measure


def by_hand(u, r):
    """Epsilon of one image: every threshold and interval, one by one."""
    found = [0.0]
    values = sorted([*u, *r])
    middle = (len(u) - 1) // 2  # torch's median
    above = (u, r) if sorted(u)[middle] > sorted(r)[middle] else (r, u)
    inside = (u, r) if max(u) - min(u) < max(r) - min(r) else (r, u)
    tries = [(above, low, math.inf) for low in values]
    tries += [(inside, low, high) for low in values for high in values if low <= high]
    for (positive, negative), low, high in tries:
        fnr = sum(not low <= x <= high for x in positive) / len(positive)
        fpr = sum(low <= x <= high for x in negative) / len(negative)
        if fpr == fnr == 0:
            found.append(CAP)
        elif fpr > 0 and fnr > 0:
            for a, b in ((fpr, fnr), (fnr, fpr)):
                if 1 - DELTA - a > 0:
                    found.append(math.log((1 - DELTA - a) / b))
    return max(found)


@pytest.mark.parametrize("models", [4, 7])
def test_epsilon_is_that_of_the_best_attack(models):
    generator = torch.Generator().manual_seed(models)
    u, r = torch.randn(2, models, 30, generator=generator, dtype=torch.float64)
    u[:, 10:20] += 2
    u[:, 20:] *= 0.1
    expected = [by_hand(u[:, i].tolist(), r[:, i].tolist()) for i in range(30)]
    torch.testing.assert_close(epsilons(Pair(u, r)), torch.tensor(expected).double())


def test_score_halves_with_every_half_of_epsilon():
    generator = torch.Generator().manual_seed(0)
    u, r = torch.randn(2, 20, 30, generator=generator, dtype=torch.float64)
    found = epsilons(Pair(u, r)).tolist()
    points = [2.0 ** -math.floor(e / 0.5) if e < math.ceil(math.log(19)) else 0 for e in found]
    assert measure([Pair(u, r)])["score"].value == pytest.approx(sum(points) / 30)
    assert measure([Pair(u + 100, r)])["score"].value == 0
    assert measure([Pair(u + 100, r)])["epsilon"].value == CAP
