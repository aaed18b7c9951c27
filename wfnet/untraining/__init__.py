"""Untraining: one round that fits the filters of all classes on a frozen network."""

from wfnet.untraining.loop import untrain
from wfnet.untraining.run_state import UntrainResult
from wfnet.untraining.untrain_config import UntrainConfig

__all__ = ["UntrainConfig", "UntrainResult", "untrain"]
