"""Maps of gates: forgotten class by output channel."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from wfnet.fusion.trace import execution_order
from wfnet.network import WFNet
from wfnet.report.figures.style import NAMED, checked_rows, picture, shorten
from wfnet.services.extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import FigureBase

# Pixels of a map, at least, in both directions.
_PIXELS = 700
_BLUES = ["#08306B", "#2171B5", "#6BAED6", "#C6DBEF", "#F7FBFF"]
_ORANGES = ["#FDD0A2", "#FD8D3C", "#D94801", "#A63603"]


def gate_heatmap(
    net: WFNet,
    path: str | os.PathLike,
    classes: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    sort: bool = False,
) -> None:
    """Draws the gates (class x channel) of the first, an intermediate and the last masked layer.

    Args:
        net: the filtered network.
        path: file to write.
        classes: rows to draw; all by default.
        names: names of all classes; numbers by default.
        sort: order the channels of each layer by their mean gate, most closed first; by default
            they keep the order of the network.

    Raises:
        ImportError: without matplotlib (extra ``viz``).
        ValueError: for no classes, classes out of range or an unknown file format.
    """
    rows = checked_rows(net, classes)
    layers = shown_layers(net)
    height = 1.6 + (0.24 * len(rows) if len(rows) <= NAMED else 4.6)
    with picture(path, 13.0, max(3.2, height)) as figure:
        axes = figure.subplots(1, len(layers), squeeze=False)[0]
        draw_gates(figure, list(axes), net, layers, rows, names, sort)
        figure.suptitle("Gates per forgotten class and output channel")


def shown_layers(net: WFNet) -> list[tuple[str, str]]:
    """Returns (title, name) of the first, an intermediate and the last masked layer to run."""
    names = execution_order(net.model, list(net.masked_layers))
    if len(names) < 3:
        return list(zip(("first", "last"), names, strict=False))
    return [("first", names[0]), ("intermediate", names[len(names) // 2]), ("last", names[-1])]


def draw_gates(
    figure: FigureBase,
    axes: list[Axes],
    net: WFNet,
    layers: list[tuple[str, str]],
    rows: list[int],
    names: Sequence[str] | Mapping[int, str] | None,
    sort: bool,
    compact: bool = False,
) -> None:
    """Draws one map on each of ``axes``, and a colour bar beside them.

    Args:
        figure: that the axes are of.
        axes: one for each layer.
        net: the filtered network.
        layers: (title, name) of each.
        rows: classes to draw.
        names: by class; numbers if None.
        sort: order channels by their mean gate.
        compact: for a narrow figure: titles on two lines, fewer names.
    """
    maps = [
        100 * net.masked_layers[name].gates()[rows].detach().float().cpu() for _, name in layers
    ]
    colors, norm = _gate_colors(max(gates.max().item() for gates in maps))
    image = None
    for axis, (place, name), gates in zip(axes, layers, maps, strict=True):
        if sort:
            gates = gates[:, gates.mean(0).argsort(stable=True)]
        # Cells are enlarged to at least a pixel: smoothing then joins channels that share a pixel
        # without blurring the borders between classes.
        height, width = gates.shape
        enlarged = gates.repeat_interleave(math.ceil(_PIXELS / height), 0)
        enlarged = enlarged.repeat_interleave(math.ceil(_PIXELS / width), 1)
        place_of_cells = (-0.5, width - 0.5, height - 0.5, -0.5)
        image = axis.imshow(
            enlarged.numpy(), aspect="auto", cmap=colors, norm=norm, extent=place_of_cells
        )
        axis.set_title(f"{place}{chr(10) if compact else ': '}{shorten(name, 26)}", fontsize=10)
        axis.set_xlabel("channel, most closed first" if sort else "channel")
        axis.xaxis.get_major_locator().set_params(integer=True, nbins=5)
    _name_rows(axes, rows, names, 20 if compact else NAMED)
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02, aspect=30)
    bar.set_label("gate, % (100: as in the original)")
    if norm.vmax > 100:
        bar.set_ticks([0, 50, 100, *_ticks_above(norm.vmax)])


def _gate_colors(highest: float) -> tuple[Colormap, Normalize]:
    """Returns colours for gates: dark blue is closed, white is 100%, orange is above.

    The few percent that a normalised gate can rise (105% for an ``alpha_init`` of 3) stay white;
    above, the scale reaches to 200% at least, so that small rises do not look like large ones.
    """
    colors = require("matplotlib.colors", "viz")
    if highest <= 110:
        return colors.LinearSegmentedColormap.from_list("gates", _BLUES), colors.Normalize(0, 100)
    both = [*_BLUES, *_ORANGES]
    places = [i / (len(both) - 1) for i in range(len(both))]
    return (
        colors.LinearSegmentedColormap.from_list("gates", list(zip(places, both, strict=True))),
        colors.TwoSlopeNorm(100, 0, max(200.0, highest)),
    )


def _ticks_above(highest: float) -> list[float]:
    """Returns a few round percentages between 100 and ``highest``."""
    step = _round_step((highest - 100) / 3)
    return [100 + step * i for i in range(1, 4) if 100 + step * i <= highest]


def _name_rows(
    axes: list[Axes],
    rows: list[int],
    names: Sequence[str] | Mapping[int, str] | None,
    named: int,
) -> None:
    """Names classes beside the first map; about ten numbers where there are too many for that."""
    first, *others = axes
    length = 14 if named < NAMED else 22
    for axis in others:
        axis.set_yticks([])
    if len(rows) <= named:
        texts = [str(row) if names is None else shorten(names[row], length) for row in rows]
        first.set_yticks(range(len(rows)), texts)
    else:
        ticks = list(range(0, len(rows), _round_step(len(rows) / 10)))
        first.set_yticks(ticks, [str(rows[tick]) for tick in ticks])
    first.set_ylabel("forgotten class")


def _round_step(step: float) -> int:
    """Returns the next of 1, 2, 5, 10, 20, 50, ..."""
    size = 10 ** math.floor(math.log10(max(step, 1)))
    return next(int(m * size) for m in (1, 2, 5, 10) if m * size >= step)
