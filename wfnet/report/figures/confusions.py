"""Figures of confusion: where images of a forgotten class go, and what it does to the others."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wfnet.evaluation.confusion import ConfusionChange
from wfnet.report.figures.style import (
    AFTER,
    BEFORE,
    INK,
    RETAINED,
    picture,
    shorten,
    slant,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# More classes than this make no readable map.
_IN_A_MAP = 20
_BARS = 18
_IMAGES, _CHANGE = "images of the forgotten class, %", "change of accuracy, points"


def confusion(change: ConfusionChange, path: str | os.PathLike) -> None:
    """Draws where images of a forgotten class go, and what it does to the other classes.

    Up to 20 rows as two maps; more as sorted curves, with the strongest flows and the hardest hit
    classes by name.

    Args:
        change: of :func:`wfnet.evaluation.confusion.confusion_change`.
        path: file to write.
    """
    few = max(len(change.classes), len(change.names)) <= _IN_A_MAP
    size = (13.0, max(4.6, 1.9 + 0.32 * len(change.classes))) if few else (13.5, 8.6)
    with picture(path, *size) as figure:
        if few:
            _draw_maps(figure, change)
        else:
            left, right = figure.subplots(2, 2)
            _draw_flows(*left, change)
            _draw_harm(*right, change)


def _draw_maps(figure: Figure, change: ConfusionChange) -> None:
    left, right = figure.subplots(1, 2)
    shares, harm = 100 * change.shares(), 100 * change.collateral()
    reach = max(5.0, harm.nan_to_num(0).abs().max().item())
    _draw_map(left, shares, change, "{:.0f}", 55.0, _IMAGES, cmap="Blues", vmin=0, vmax=100)
    left.set(title="Where images of the forgotten class go", xlabel="taken for")
    span = {"cmap": "PuOr", "vmin": -reach, "vmax": reach}
    _draw_map(right, harm, change, "{:+.0f}", 0.6 * reach, _CHANGE, **span)
    right.set(title="What it does to the other classes", xlabel="class")
    for i, label in enumerate(change.classes.tolist()):
        right.text(label, i, "\u2715", ha="center", va="center", fontsize=8, color=BEFORE)


def _draw_map(
    axis: Axes,
    values: Tensor,
    change: ConfusionChange,
    written: str,
    bright: float,
    unit: str,
    **colors: object,
) -> None:
    """Draws a map with named rows and columns; values that do not round to 0 are written."""
    image = axis.imshow(values.numpy(), aspect="auto", **colors)
    axis.figure.colorbar(image, ax=axis, pad=0.02).set_label(unit)
    names = [shorten(name, 14) for name in change.names]
    rows = [names[row] for row in change.classes.tolist()]
    axis.set_xticks(range(len(names)), names)
    axis.set_yticks(range(len(rows)), rows)
    axis.set_ylabel("forgotten class")
    if max(map(len, names)) > 3:
        slant(axis, 60)
    for i, j in (values.nan_to_num(0).abs() >= 0.5).nonzero().tolist():
        value = values[i, j].item()
        color = "white" if abs(value) > bright else INK
        axis.text(j, i, written.format(value), ha="center", va="center", fontsize=8, color=color)


def _draw_flows(flows: Axes, kept: Axes, change: ConfusionChange) -> None:
    """Draws the strongest flows by name, and how many images stay, for all classes."""
    names, classes = [shorten(name, 24) for name in change.names], change.classes.tolist()
    shares, own = 100 * change.shares(), torch.arange(len(classes))
    elsewhere = shares.clone()
    elsewhere[own, change.classes] = -1
    most, target = elsewhere.max(1)
    strongest = most.argsort(descending=True, stable=True)[:_BARS].tolist()
    bars = [(f"{names[classes[i]]} \u2192 {names[target[i]]}", most[i].item()) for i in strongest]
    _bars_by_name(flows, bars, RETAINED, _IMAGES, "{:.0f}")
    flows.set_title("The strongest flows from a forgotten class")
    before = 100 * change.original_shares()[own, change.classes]
    _sorted_curve(kept, before, "kept on the class, before", BEFORE)
    _sorted_curve(kept, shares[own, change.classes], "kept on the class, after", AFTER)
    receiver = "to the one class that receives most"
    _sorted_curve(kept, most.clamp_min(0), receiver, RETAINED, ls="--")
    kept.set(
        ylim=(-2, 118),
        yticks=range(0, 101, 20),
        ylabel=_IMAGES,
        xlabel=f"forgotten classes ({len(classes):,}), each curve sorted by itself",
        title="Where images of a forgotten class go",
    )
    kept.legend(loc="upper right")


def _draw_harm(suffering: Axes, changes: Axes, change: ConfusionChange) -> None:
    """Draws the classes that suffer most by name, and the change of accuracy of all."""
    harm = 100 * change.collateral()
    suffered, caused = harm.nanmean(0), harm.nanmean(1)
    known = (~suffered.isnan()).nonzero().squeeze(1)
    worst = known[suffered[known].argsort(stable=True)[:_BARS]].tolist()
    bars = [(shorten(change.names[k], 30), suffered[k].item()) for k in worst]
    _bars_by_name(suffering, bars, AFTER, f"mean {_CHANGE}", "{:+.1f}")
    suffering.set_title("Classes that suffer most from others' rows")
    label = "on a class, mean over the rows of others"
    _sorted_curve(changes, suffered[known], label, AFTER, descending=False)
    label = "under a row, mean over the other classes"
    caused = caused[~caused.isnan()]
    _sorted_curve(changes, caused, label, RETAINED, ls="--", descending=False)
    changes.axhline(0, color=BEFORE, lw=1)
    changes.set(
        title="Change of accuracy on the other classes",
        ylabel=_CHANGE,
        xlabel="classes, each curve sorted by itself",
    )
    changes.legend(loc="lower right")


def _sorted_curve(
    axis: Axes, values: Tensor, label: str, color: str, ls: str = "-", descending: bool = True
) -> None:
    ordered = values.sort(descending=descending).values
    axis.plot(ordered.tolist(), label=label, color=color, lw=2, ls=ls)
    axis.grid(True)


def _bars_by_name(
    axis: Axes, bars: Sequence[tuple[str, float]], color: str, unit: str, written: str
) -> None:
    """Draws horizontal bars (name, value), the first at the top, with their values."""
    names, values = [name for name, _ in bars], [value for _, value in bars]
    axis.barh(range(len(bars)), values, color=color, height=0.72)
    axis.set_yticks(range(len(bars)), names, fontsize=9)
    axis.set_ylim(len(bars) - 0.4, -0.6)
    span = max(map(abs, values), default=1) or 1
    for place, value in enumerate(values):
        side, gap = ("left", 0.012) if value >= 0 else ("right", -0.012)
        text = written.format(value)
        axis.text(value + gap * span, place, text, va="center", ha=side, fontsize=7.5)
    axis.set(
        xlim=(1.14 * min([0.0, *values]), 1.12 * span if max([0.0, *values]) > 0 else 0),
        xlabel=unit,
    )
