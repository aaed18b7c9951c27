"""Maps of gates: forgotten class by output channel."""

import math
from collections.abc import Mapping, Sequence

from wfnet.fusion.trace import execution_order
from wfnet.network import WFNet
from wfnet.report.figures.style import (
    NAMED,
    Axes,
    Colormap,
    FigureBase,
    Normalize,
    picture,
    shorten,
)
from wfnet.services.extras import require
from wfnet.services.files import FilePath

# Pixels of a map, at least, in both directions.
_PIXELS = 700
_BLUES = ["#08306B", "#2171B5", "#6BAED6", "#C6DBEF", "#F7FBFF"]
_ORANGES = ["#FDD0A2", "#FD8D3C", "#D94801", "#A63603"]


def gate_heatmap(net: WFNet, path: FilePath, classes: Sequence[int], names: Sequence[str]) -> None:
    """Draws the gates (class x channel) of the first, an intermediate and the last masked layer.

    Args:
        net: the filtered network.
        path: file to write.
        classes: rows to draw.
        names: names of all classes.
    """
    height = 1.6 + (0.24 * len(classes) if len(classes) <= NAMED else 4.6)
    with picture(path, 13.0, max(3.2, height)) as figure:
        draw_gates(figure, net, classes, names)
        figure.suptitle("Gates per forgotten class and output channel")


def draw_gates(
    figure: FigureBase,
    net: WFNet,
    rows: Sequence[int],
    names: Sequence[str] | Mapping[int, str],
    compact: bool = False,
) -> None:
    """Draws one map a layer side by side, and a colour bar beside them.

    Args:
        figure: an empty figure.
        net: the filtered network.
        rows: classes to draw.
        names: by class.
        compact: for a narrow figure: channels in the order of their mean gate, titles on two lines,
            fewer names.
    """
    layers = execution_order(net.model, list(net.masked_layers))
    shown = {"first": layers[0], "intermediate": layers[len(layers) // 2], "last": layers[-1]}
    if len(layers) < 3:
        shown = dict(zip(("first", "last"), layers, strict=False))
    axes = list(figure.subplots(1, len(shown), squeeze=False)[0])
    found = (net.masked_layers[name].gates() for name in shown.values())
    maps = [100 * gates[rows].detach().float().cpu() for gates in found]
    colors, norm = _gate_colors(max(gates.max().item() for gates in maps))
    for axis, (place, name), gates in zip(axes, shown.items(), maps, strict=True):
        if compact:
            gates = gates[:, gates.mean(0).argsort(stable=True)]
        # Cells are enlarged to at least a pixel: smoothing then joins channels that share a pixel
        # without blurring the borders between classes.
        height, width = gates.shape
        enlarged = gates.repeat_interleave(math.ceil(_PIXELS / height), 0)
        enlarged = enlarged.repeat_interleave(math.ceil(_PIXELS / width), 1).numpy()
        cells = (-0.5, width - 0.5, height - 0.5, -0.5)
        image = axis.imshow(enlarged, aspect="auto", cmap=colors, norm=norm, extent=cells)
        separator = "\n" if compact else ": "
        axis.set_title(f"{place}{separator}{shorten(name, 26)}", fontsize=10)
        axis.set_xlabel("channel, most closed first" if compact else "channel")
        axis.xaxis.get_major_locator().set_params(integer=True, nbins=5)
    _name_rows(axes, rows, names, compact)
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02, aspect=30)
    bar.set_label("gate, % (100: as in the original)")
    if norm.vmax > 100:
        step = _round_step((norm.vmax - 100) / 3)
        above = [100 + step * i for i in range(1, 4) if 100 + step * i <= norm.vmax]
        bar.set_ticks([0, 50, 100, *above])


def _gate_colors(highest: float) -> tuple[Colormap, Normalize]:
    """Returns colours for gates: dark blue is closed, white is 100%, orange is above.

    The few percent that a normalised gate can rise (105% for an ``alpha_init`` of 3) stay white;
    above, the scale reaches to 200% at least, so that small rises do not look like large ones.
    """
    colors = require("matplotlib.colors", "viz")
    from_list = colors.LinearSegmentedColormap.from_list
    if highest <= 110:
        return from_list("gates", _BLUES), colors.Normalize(0, 100)
    return from_list("gates", [*_BLUES, *_ORANGES]), colors.TwoSlopeNorm(100, 0, max(200, highest))


def _name_rows(
    axes: list[Axes], rows: Sequence[int], names: Sequence[str] | Mapping[int, str], compact: bool
) -> None:
    """Names classes beside the first map; about ten numbers where there are too many for that."""
    first, *others = axes
    for axis in others:
        axis.set_yticks([])
    if len(rows) <= (20 if compact else NAMED):
        length = 14 if compact else 22
        first.set_yticks(range(len(rows)), [shorten(names[row], length) for row in rows])
    else:
        ticks = range(0, len(rows), _round_step(len(rows) / 10))
        first.set_yticks(ticks, [str(rows[tick]) for tick in ticks])
    first.set_ylabel("forgotten class")


def _round_step(step: float) -> int:
    """Returns the next of 1, 2, 5, 10, 20, 50, ..."""
    size = 10 ** math.floor(math.log10(max(step, 1)))
    return next(int(m * size) for m in (1, 2, 5, 10) if m * size >= step)
