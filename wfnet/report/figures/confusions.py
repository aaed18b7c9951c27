"""Figures of confusion: where images of a forgotten class go, and what it does to the others."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wfnet.evaluation.confusion import ConfusionChange
from wfnet.report.figures.style import (
    AFTER,
    BEFORE,
    INK,
    RETAINED,
    bars_by_name,
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


def confusion(change: ConfusionChange, path: str | os.PathLike) -> None:
    """Draws where images of a forgotten class go, and what it does to the other classes.

    Up to 20 rows as two maps; more as sorted curves, with the strongest flows and the hardest hit
    classes by name.

    Args:
        change: of :func:`wfnet.evaluation.confusion.confusion_change`.
        path: file to write.

    Raises:
        ImportError: without matplotlib (extra ``viz``).
        ValueError: for an unknown file format.
    """
    few = max(len(change.classes), len(change.names)) <= _IN_A_MAP
    size = (13.0, max(4.6, 1.9 + 0.32 * len(change.classes))) if few else (13.5, 8.6)
    with picture(path, *size) as figure:
        if few:
            _draw_maps(figure, change)
        else:
            _draw_summary(figure, change)


def _draw_maps(figure: Figure, change: ConfusionChange) -> None:
    left, right = figure.subplots(1, 2)
    shares, harm = 100 * change.shares(), 100 * change.collateral()
    reach = max(5.0, harm.nan_to_num(0).abs().max().item())
    image = left.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=100, aspect="auto")
    figure.colorbar(image, ax=left, pad=0.02).set_label("images of the forgotten class, %")
    left.set_title("Where images of the forgotten class go")
    left.set_xlabel("taken for")
    _label_cells(left, shares, change, "{:.0f}", bright=55.0)
    image = right.imshow(harm.numpy(), cmap="PuOr", vmin=-reach, vmax=reach, aspect="auto")
    figure.colorbar(image, ax=right, pad=0.02).set_label("change of accuracy, points")
    right.set_title("What it does to the other classes")
    right.set_xlabel("class")
    _label_cells(right, harm, change, "{:+.0f}", bright=0.6 * reach)
    for i, label in enumerate(change.classes.tolist()):
        right.text(label, i, "\u2715", ha="center", va="center", fontsize=8, color=BEFORE)


def _label_cells(
    axis: Axes, values: Tensor, change: ConfusionChange, written: str, bright: float
) -> None:
    """Names rows and columns, and writes every value that rounds to more than 0."""
    columns = [shorten(name, 14) for name in change.names]
    axis.set_xticks(range(len(columns)), columns)
    rows = change.classes.tolist()
    axis.set_yticks(range(len(rows)), [columns[row] for row in rows])
    axis.set_ylabel("forgotten class")
    if max(map(len, columns)) > 3:
        slant(axis, 60)
    for i, j in (values.nan_to_num(0).abs() >= 0.5).nonzero().tolist():
        value = values[i, j].item()
        color = "white" if abs(value) > bright else INK
        axis.text(j, i, written.format(value), ha="center", va="center", fontsize=8, color=color)


def _draw_summary(figure: Figure, change: ConfusionChange) -> None:
    (flows, kept), (suffering, changes) = figure.subplots(2, 2)
    names, classes = change.names, change.classes.tolist()
    shares, original = 100 * change.shares(), 100 * change.original_shares()
    own = torch.arange(len(classes))
    elsewhere = shares.clone()
    elsewhere[own, change.classes] = -1
    most, target = elsewhere.max(1)
    strongest = most.argsort(descending=True, stable=True)[:_BARS].tolist()
    bars_by_name(
        flows,
        [
            f"{shorten(names[classes[i]], 24)} \u2192 {shorten(names[target[i]], 24)}"
            for i in strongest
        ],
        [most[i].item() for i in strongest],
        RETAINED,
        "images of the forgotten class, %",
        "The strongest flows from a forgotten class",
        "{:.0f}",
    )
    _sorted_curve(kept, original[own, change.classes], "kept on the class, before", BEFORE)
    _sorted_curve(kept, shares[own, change.classes], "kept on the class, after", AFTER)
    receiver = "to the one class that receives most"
    _sorted_curve(kept, most.clamp_min(0), receiver, RETAINED, ls="--")
    kept.set_ylim(-2, 118)
    kept.set_yticks(range(0, 101, 20))
    kept.set_ylabel("images of the forgotten class, %")
    kept.set_xlabel(f"forgotten classes ({len(classes):,}), each curve sorted by itself")
    kept.set_title("Where images of a forgotten class go")
    kept.legend(loc="upper right")
    harm = 100 * change.collateral()
    suffered, caused = harm.nanmean(0), harm.nanmean(1)
    known = (~suffered.isnan()).nonzero().squeeze(1)
    worst = known[suffered[known].argsort(stable=True)[:_BARS]].tolist()
    bars_by_name(
        suffering,
        [shorten(names[k], 30) for k in worst],
        [suffered[k].item() for k in worst],
        AFTER,
        "mean change of accuracy, points",
        "Classes that suffer most from others' rows",
        "{:+.1f}",
    )
    label = "on a class, mean over the rows of others"
    _sorted_curve(changes, suffered[known], label, AFTER, descending=False)
    label = "under a row, mean over the other classes"
    caused = caused[~caused.isnan()]
    _sorted_curve(changes, caused, label, RETAINED, ls="--", descending=False)
    changes.axhline(0, color=BEFORE, lw=1)
    changes.set_title("Change of accuracy on the other classes")
    changes.set_ylabel("change of accuracy, points")
    changes.set_xlabel("classes, each curve sorted by itself")
    changes.legend(loc="lower right")


def _sorted_curve(
    axis: Axes, values: Tensor, label: str, color: str, ls: str = "-", descending: bool = True
) -> None:
    ordered = values.sort(descending=descending).values
    axis.plot(ordered.tolist(), label=label, color=color, lw=2, ls=ls)
    axis.grid(True)
