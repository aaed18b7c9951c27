"""Untraining: one round that fits the filters of all classes on a frozen network."""

from wfnet.untraining.loop import UntrainResult, untrain
from wfnet.untraining.untrain_config import UntrainConfig

__all__ = ["UntrainConfig", "UntrainResult", "untrain"]
