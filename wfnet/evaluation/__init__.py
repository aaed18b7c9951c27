"""Evaluation: the paper's measures of a filtered network, class by class, and its tables."""

from wfnet.evaluation.groups import GroupRecord, GroupResult, choose_groups, evaluate_groups
from wfnet.evaluation.initialisation import reinitialise
from wfnet.evaluation.metrics import average_precision
from wfnet.evaluation.multilabel_rows import (
    MultiLabelRecord,
    MultiLabelResult,
    evaluate_multi_label,
)
from wfnet.evaluation.plain_models import evaluate_models
from wfnet.evaluation.results import ClassRecord, EvaluationResult, PairCounts, Scores
from wfnet.evaluation.rows import evaluate

__all__ = [
    "ClassRecord",
    "EvaluationResult",
    "GroupRecord",
    "GroupResult",
    "MultiLabelRecord",
    "MultiLabelResult",
    "PairCounts",
    "Scores",
    "average_precision",
    "choose_groups",
    "evaluate",
    "evaluate_groups",
    "evaluate_models",
    "evaluate_multi_label",
    "reinitialise",
]
