"""Figures of confusion: where images of a forgotten class go, and what it does to the others."""

import math

from torch import Tensor

from wfnet.evaluation.confusion import ConfusionChange
from wfnet.report.figures.style import BEFORE, INK, Axes, picture, shorten, slant
from wfnet.services.files import FilePath

# More classes than this make no readable map.
SHOWN = 20


def confusion(change: ConfusionChange, path: FilePath) -> None:
    """Draws where images of a forgotten class go, and what it does to the other classes.

    Both are maps, forgotten class by class; of many classes, those with the largest values are
    shown.

    Args:
        change: of :func:`wfnet.evaluation.confusion.confusion_change`.
        path: file to write.
    """
    shares, harm = 100 * change.shares(), 100 * change.collateral()
    reach = max(5.0, harm.nan_to_num(0).abs().max().item())
    with picture(path, 13.0, max(4.6, 1.9 + 0.32 * min(SHOWN, len(change.classes)))) as figure:
        left, right = figure.subplots(1, 2)
        unit = "images of the forgotten class, %"
        _draw_map(left, shares, change, "{:.0f}", 55.0, unit, cmap="Blues", vmin=0, vmax=100)
        left.set(title="Where images of the forgotten class go", xlabel="taken for")
        unit, span = "change of accuracy, points", {"vmin": -reach, "vmax": reach}
        _draw_map(right, harm, change, "{:+.0f}", 0.6 * reach, unit, cmap="PuOr", **span)
        right.set(title="What it does to the other classes", xlabel="class")


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
    size = values.nan_to_num(0).abs()
    rows = size.amax(1).topk(min(SHOWN, len(size))).indices.sort().values
    columns = size[rows].amax(0).topk(min(SHOWN, size.shape[1])).indices.sort().values
    shown = values[rows][:, columns]
    forgotten, columns = change.classes[rows].tolist(), columns.tolist()
    image = axis.imshow(shown.numpy(), aspect="auto", **colors)
    axis.figure.colorbar(image, ax=axis, pad=0.02).set_label(unit)
    names = [shorten(change.names[k], 14) for k in columns]
    axis.set_xticks(range(len(names)), names)
    axis.set_yticks(range(len(forgotten)), [shorten(change.names[k], 14) for k in forgotten])
    some = f" ({SHOWN} of {len(values):,})" if len(values) > SHOWN else ""
    axis.set_ylabel(f"forgotten class{some}")
    if max(map(len, names)) > 3:
        slant(axis, 60)
    look = {"ha": "center", "va": "center", "fontsize": 8}
    for i, label in enumerate(forgotten):
        for j, column in enumerate(columns):
            value = shown[i, j].item()
            if abs(value) >= 0.5:
                color = "white" if abs(value) > bright else INK
                axis.text(j, i, written.format(value), color=color, **look)
            elif label == column and math.isnan(value):  # its own accuracy is no harm
                axis.text(j, i, "\u2715", color=BEFORE, **look)
