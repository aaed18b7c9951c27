"""Figures of a run, where matplotlib is installed; it is imported when something is drawn."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

from wfnet.cli.runs import CURVES, FIGURES
from wfnet.evaluation import EvaluationResult
from wfnet.network import WFNet

logger = logging.getLogger("wfnet")


def draw_evaluation(
    result: EvaluationResult, net: WFNet, names: Sequence[str], folder: Path
) -> list[str]:
    """Draws the figures of an evaluation; returns their names, none without matplotlib."""
    figures = _figures()
    if figures is None:
        return []
    overview, accuracies, gates = FIGURES
    figures.overview(result, net, folder / overview)
    figures.accuracy_per_class(result, folder / accuracies)
    rows = [record.index for record in result.records]
    figures.gate_heatmap(net, folder / gates, classes=rows, names=names)
    return list(FIGURES)


def draw_training(history: Sequence[Mapping[str, object]], folder: Path) -> list[str]:
    """Draws losses and accuracies of untraining; returns the name, none without matplotlib."""
    figures = _figures()
    if figures is None:
        return []
    figures.training_curves(history, folder / CURVES)
    return [CURVES]


def _figures() -> ModuleType | None:
    if importlib.util.find_spec("matplotlib") is None:
        logger.warning("no figures: matplotlib is not installed (`pip install wfnet[viz]`)")
        return None
    return importlib.import_module("wfnet.figures")
