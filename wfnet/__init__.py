"""Multi-class unlearning by weight filtering: one checkpoint that can forget any class on demand."""

from wfnet import functional
from wfnet.labels import checkpoint_context, forgetting
from wfnet.version import __version__

__all__ = ["__version__", "checkpoint_context", "forgetting", "functional"]
