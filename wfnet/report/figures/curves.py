"""Curves: losses and accuracies while untraining; insertion and deletion of gates."""

import math
from collections.abc import Mapping, Sequence

import torch

from wfnet.evaluation.attribution import AttributionResult
from wfnet.report.figures.style import AFTER, INK, RETAINED, SERIES, Axes, picture
from wfnet.services.files import FilePath

# Name -> (step, value) in the order of training.
Points = dict[str, list[tuple[float, float]]]


def training_curves(history: Sequence[Mapping[str, object]], path: FilePath) -> None:
    """Draws losses and accuracies over the steps of untraining.

    Args:
        history: records in the order of training. ``step`` is the x position (default: position
            in the list); finite numbers under names with "loss" are drawn on the left, those that
            begin with "acc" (fractions) on the right, in %. Records need not have every name.
        path: file to write.

    Raises:
        ValueError: for a history without losses and accuracies.
    """
    series = _points(history)
    losses = {name: points for name, points in series.items() if "loss" in name}
    accuracies = {name: points for name, points in series.items() if name.startswith("acc")}
    count = bool(losses) + bool(accuracies)
    if not count:
        raise ValueError(
            f"the history has no losses or accuracies to draw ({len(history)} records); its "
            "records need names such as 'loss' or 'acc_r'"
        )
    with picture(path, 5.6 * count + 0.4, 3.8) as figure:
        axes = list(figure.subplots(1, count, squeeze=False)[0])
        if losses:
            _draw_points(axes[0], losses, "loss", 1)
            axes[0].set_title("Losses while untraining")
        if accuracies:
            _draw_points(axes[-1], accuracies, "accuracy", 100)
            axes[-1].set(title="Accuracy on validation images while untraining", ylim=(-3, 103))


def _draw_points(axis: Axes, series: Points, label: str, scale: int) -> None:
    shown = {"acc_r": "Acc_r (other classes)", "acc_f": "Acc_f (forgotten class)"}
    names = {name: shown.get(name, name.replace("_", " ")) for name in series}
    for i, (name, points) in enumerate(series.items()):
        steps, values = [step for step, _ in points], [scale * value for _, value in points]
        look = {"color": SERIES[i % len(SERIES)], "lw": 1.6, "ms": 3.5}
        marker = "o" if len(points) <= 30 else None
        axis.plot(steps, values, label=names[name], marker=marker, **look)
    axis.set_xlabel("step")
    axis.grid()
    one = len(series) == 1
    axis.set_ylabel((names.popitem()[1] if one else label) + (", %" if scale == 100 else ""))
    if not one:
        axis.legend()


def _points(history: Sequence[Mapping[str, object]]) -> Points:
    """Returns every finite number in the history by name."""
    series: Points = {}
    for position, record in enumerate(history):
        for name, value in record.items():
            if isinstance(value, torch.Tensor) and value.numel() == 1:
                value = value.item()
            if isinstance(value, int | float) and math.isfinite(value):
                step = record.get("step", position)
                series.setdefault(name, []).append((float(step), float(value)))
    return series


def insertion_deletion(result: AttributionResult, path: FilePath) -> None:
    """Draws insertion and deletion curves: mean over classes, spread, and a random order.

    Args:
        result: of :func:`wfnet.evaluation.attribution.attribution`.
        path: file to write.
    """
    shares = [100 * share for share in result.shares]
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
            label = f"lowest learned gates first: area {result.mean[name]:.2f}"
            axis.plot(shares, curves.mean(0).tolist(), color=color, lw=2, label=label)
            label = f"random order: area {result.mean[f'{name}_random']:.2f}"
            axis.plot(shares, chance.mean(0).tolist(), color=INK, lw=1.6, ls="--", label=label)
            axis.set(
                title=title, xlabel="gates changed, % of each layer", xlim=(0, 100), ylim=(0, 103)
            )
            axis.grid()
            axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16))
        axes[0].set_ylabel("confidence in the class,\n% of the original's, at most 100")
        figure.suptitle(
            f"Are the closed gates those that the class needs? ({len(result.records):,} classes)"
        )
