"""Multi-class unlearning by weight filtering: one checkpoint that forgets any class on demand."""

from wfnet import functional
from wfnet.functional import explain
from wfnet.labels import checkpoint_context, forgetting
from wfnet.layers import WFConv2d, WFLinear
from wfnet.network import WFNet
from wfnet.version import __version__

__all__ = [
    "WFConv2d",
    "WFLinear",
    "WFNet",
    "__version__",
    "checkpoint_context",
    "explain",
    "forgetting",
    "functional",
]
