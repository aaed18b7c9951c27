"""Figures of a run, where matplotlib is installed; it is imported when something is drawn."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

from wfnet.cli.runs import ATTRIBUTION
from wfnet.evaluation import EvaluationResult
from wfnet.evaluation.attribution import AttributionRecord, AttributionResult
from wfnet.evaluation.confusion import ConfusionChange
from wfnet.network import WFNet
from wfnet.trust import TrustResult

logger = logging.getLogger("wfnet")


def draw_run(
    folder: Path,
    net: WFNet,
    names: Sequence[str],
    result: EvaluationResult | None = None,
    change: ConfusionChange | None = None,
    trust: TrustResult | None = None,
    retrained: Mapping[int, tuple[float, float]] | None = None,
) -> list[str]:
    """Draws every figure that its arguments allow; returns their names, none without matplotlib.

    Args:
        folder: of the run; its ``attribution.json`` is drawn, too.
        net: the filtered network.
        names: of all classes.
        result, change, trust: results, where there are any.
        retrained: class -> (Acc_r, Acc_f) of networks retrained without it.
    """
    figures = _figures()
    if figures is None:
        return []
    rows = list(range(net.num_classes))
    drawn = ["gates.png", "associations.png"]
    if result is not None:
        rows = [record.index for record in result.records]
        figures.overview(result, net, folder / "overview.png")
        figures.accuracy_per_class(result, folder / "accuracy_per_class.png", retrained=retrained)
        drawn += ["overview.png", "accuracy_per_class.png"]
    figures.gate_heatmap(net, folder / "gates.png", classes=rows, names=names)
    figures.association_graph(net, folder / "associations.png", names=names, classes=rows)
    if change is not None:
        figures.confusion(change, folder / "confusion.png")
        drawn.append("confusion.png")
    if (folder / ATTRIBUTION).is_file():
        curves = read_attribution(folder / ATTRIBUTION)
        figures.insertion_deletion(curves, folder / "attribution.png")
        drawn.append("attribution.png")
    if trust is not None:
        figures.trust_checks(trust, folder / "trust.png")
        drawn.append("trust.png")
    return drawn


def read_attribution(path: Path) -> AttributionResult:
    """The insertion and deletion curves in a file. Raises ValueError if it is damaged."""
    try:
        content = json.loads(path.read_text())
        records = [AttributionRecord(**record) for record in content["classes"]]
        return AttributionResult(
            content["shares"], records, content["settings"], content["seconds"]
        )
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and make it again") from error


def draw_training(history: Sequence[Mapping[str, object]], folder: Path) -> None:
    """Draws losses and accuracies of untraining."""
    figures = _figures()
    if figures is not None:
        figures.training_curves(history, folder / "training_curves.png")


def _figures() -> ModuleType | None:
    if importlib.util.find_spec("matplotlib") is None:
        logger.warning("no figures: matplotlib is not installed (`pip install wfnet[viz]`)")
        return None
    return importlib.import_module("wfnet.report.figures")
