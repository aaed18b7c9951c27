"""Scores of filters on a validation split, by which settings and stopping are judged."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Validation:
    """Quick scores on a validation split.

    Attributes:
        acc_r, acc_f: means over rows that occur in the split (fractions).
        acc_r_per_class, acc_f_per_class: ``[K]`` lists, NaN for rows that do not occur.
        loss: the objective, from means over all pairs.

    On multi-label data, mean average precisions stand in the place of accuracies.
    """

    acc_r: float
    acc_f: float
    acc_r_per_class: list[float]
    acc_f_per_class: list[float]
    loss: float

    @property
    def score(self) -> float:
        """``0.5 * ((1 - Acc_f) + Acc_r)``."""
        return 0.5 * ((1 - self.acc_f) + self.acc_r)
