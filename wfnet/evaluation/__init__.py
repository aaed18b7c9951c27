"""Evaluation: the paper's measures of a filtered network, class by class, and its tables."""

from wfnet.evaluation.initialisation import reinitialise
from wfnet.evaluation.results import ClassRecord, EvaluationResult, PairCounts, Scores
from wfnet.evaluation.rows import evaluate

__all__ = [
    "ClassRecord",
    "EvaluationResult",
    "PairCounts",
    "Scores",
    "evaluate",
    "reinitialise",
]
