"""Curves: losses and accuracies while untraining; insertion and deletion of gates."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence

import torch

from wfnet.evaluation.attribution import AttributionResult
from wfnet.report.figures.style import AFTER, INK, RETAINED, SERIES, picture

Points = dict[str, list[tuple[float, float]]]


def training_curves(history: Sequence[Mapping[str, object]], path: str | os.PathLike) -> None:
    """Draws losses and accuracies over the steps of untraining.

    Args:
        history: records in the order of training. ``step`` is the x position (default: position
            in the list); finite numbers under names with "loss" are drawn on the left, those that
            begin with "acc" (fractions) on the right, in %. Records need not have every name.
        path: file to write.

    Raises:
        ImportError: without matplotlib (extra ``viz``).
        ValueError: for a history without losses and accuracies, or an unknown file format.
    """
    panels = [
        ("Losses while untraining", "loss", "", 1, _points(history, lambda n: "loss" in n)),
        (
            "Accuracy on validation images while untraining",
            "accuracy, %",
            ", %",
            100,
            _points(history, lambda n: n.startswith("acc")),
        ),
    ]
    panels = [panel for panel in panels if panel[-1]]
    if not panels:
        raise ValueError(
            f"the history has no losses or accuracies to draw ({len(history)} records); its "
            "records need names such as 'loss' or 'acc_r'"
        )
    with picture(path, 5.6 * len(panels) + 0.4, 3.8) as figure:
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, (title, label, unit, scale, series) in zip(axes, panels, strict=True):
            for i, (name, points) in enumerate(series.items()):
                axis.plot(
                    [step for step, _ in points],
                    [scale * value for _, value in points],
                    color=SERIES[i % len(SERIES)],
                    label=_pretty(name),
                    lw=1.6,
                    marker="o" if len(points) <= 30 else None,
                    ms=3.5,
                )
            axis.set_xlabel("step")
            axis.grid()
            axis.set_title(title)
            axis.set_ylabel(label if len(series) > 1 else f"{_pretty(next(iter(series)))}{unit}")
            if scale == 100:
                axis.set_ylim(-3, 103)
            if len(series) > 1:
                axis.legend()


def insertion_deletion(result: AttributionResult, path: str | os.PathLike) -> None:
    """Draws insertion and deletion curves: mean over classes, spread, and a random order.

    Args:
        result: of :func:`wfnet.evaluation.attribution.attribution`.
        path: file to write.

    Raises:
        ImportError: without matplotlib (extra ``viz``).
        ValueError: for an unknown file format.
    """
    shares = [100 * share for share in result.shares]
    mean = result.mean
    parts = (
        ("insertion", RETAINED, "Insertion: the class's gates reset to 1"),
        ("deletion", AFTER, "Deletion: all gates at 1, then set to 0"),
    )
    with picture(path, 11.0, 5.0) as figure:
        axes = figure.subplots(1, 2, sharey=True)
        for axis, (name, color, title) in zip(axes, parts, strict=True):
            curves, chance = (100 * result.curve(n) for n in (name, f"{name}_random"))
            low, high = (torch.quantile(curves, q, dim=0).tolist() for q in (0.1, 0.9))
            spread = "10th to 90th percentile of classes"
            axis.fill_between(shares, low, high, color=color, alpha=0.2, lw=0, label=spread)
            label = f"lowest learned gates first: area {mean[name]:.2f}"
            axis.plot(shares, curves.mean(0).tolist(), color=color, lw=2, label=label)
            label = f"random order: area {mean[f'{name}_random']:.2f}"
            axis.plot(shares, chance.mean(0).tolist(), color=INK, lw=1.6, ls="--", label=label)
            axis.set_title(title)
            axis.set_xlabel("gates changed, % of each layer")
            axis.set_xlim(0, 100)
            axis.set_ylim(0, 103)
            axis.grid()
            axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16))
        axes[0].set_ylabel("confidence in the class,\n% of the original's, at most 100")
        figure.suptitle(
            f"Are the closed gates those that the class needs? ({len(result.records):,} classes)"
        )


def _points(history: Sequence[Mapping[str, object]], wanted: Callable[[str], bool]) -> Points:
    """Returns (step, value) of every finite number in the history whose name is wanted."""
    series: Points = {}
    for position, record in enumerate(history):
        for name, value in record.items():
            if isinstance(value, torch.Tensor) and value.numel() == 1:
                value = value.item()
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if wanted(name) and number and math.isfinite(value):
                step = record.get("step", position)
                series.setdefault(name, []).append((float(step), float(value)))
    return series


def _pretty(name: str) -> str:
    shown = {"acc_r": "Acc_r (other classes)", "acc_f": "Acc_f (forgotten class)"}
    return shown.get(name, name.replace("_", " "))
