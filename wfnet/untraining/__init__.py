"""Untraining: one round that fits the filters of all classes on a frozen network."""

from wfnet.untraining.loop import UntrainConfig, UntrainResult, untrain

__all__ = ["UntrainConfig", "UntrainResult", "untrain"]
