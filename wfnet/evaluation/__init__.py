"""Evaluation: the paper's measures of a filtered network, class by class, and its tables."""

from wfnet.evaluation.groups import GroupRecord, GroupResult, choose_groups, evaluate_groups
from wfnet.evaluation.initialisation import reinitialise
from wfnet.evaluation.models import evaluate_models
from wfnet.evaluation.results import ClassRecord, EvaluationResult, PairCounts, Scores
from wfnet.evaluation.rows import evaluate

__all__ = [
    "ClassRecord",
    "EvaluationResult",
    "GroupRecord",
    "GroupResult",
    "PairCounts",
    "Scores",
    "choose_groups",
    "evaluate",
    "evaluate_groups",
    "evaluate_models",
    "reinitialise",
]
