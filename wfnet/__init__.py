"""Multi-class unlearning by weight filtering: one checkpoint that forgets any class on demand."""

from wfnet import functional
from wfnet.evaluation import EvaluationResult, evaluate
from wfnet.functional import explain
from wfnet.labels import checkpoint_context, forgetting
from wfnet.layers import WFConv2d, WFLinear
from wfnet.network import WFNet
from wfnet.untraining import UntrainConfig, UntrainResult, untrain
from wfnet.version import __version__

__all__ = [
    "EvaluationResult",
    "UntrainConfig",
    "UntrainResult",
    "WFConv2d",
    "WFLinear",
    "WFNet",
    "__version__",
    "checkpoint_context",
    "evaluate",
    "explain",
    "forgetting",
    "functional",
    "untrain",
]
