"""Figures of an evaluation: accuracy per class, gate maps, training curves.

Drawn with matplotlib's object-oriented interface: no window, no global state of pyplot. Colours
are those of Okabe and Ito, told apart by colour-blind readers; values are in %.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from wfnet.evaluation import ClassRecord, EvaluationResult
from wfnet.extras import require
from wfnet.network import WFNet
from wfnet.pretrained import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BEFORE, AFTER, RETAINED, INK = "#9AA5B1", "#D55E00", "#0072B2", "#222222"
SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DPI = 160
# Up to this many classes have a bar and a name each; more are drawn as points without names.
_NAMED = 40
# Pixels of a gate map, at least, in both directions.
_PIXELS = 700
_SORTS = ("index", "original", "acc_f")


def accuracy_per_class(
    result: EvaluationResult, path: str | os.PathLike, sort: str | None = None
) -> None:
    """Draws the accuracy on each class, and on all others, before and after it is forgotten.

    Args:
        result: of :func:`wfnet.evaluation.evaluate`.
        path: file to write; its ending chooses the format (png, svg, pdf).
        sort: order of the classes: "index", "original" (accuracy before, highest first) or
            "acc_f" (worst forgotten first). By default by index if every class gets its name,
            else by "original".

    Raises:
        ImportError: without matplotlib (extra ``viz``).
        ValueError: for an unknown order or file format, before anything is written.
    """
    records = _sorted(result.records, sort)
    named = len(records) <= _NAMED
    figure = _figure(max(8.0, min(16.0, 2.5 + 0.45 * len(records)) if named else 11.0), 6.4)
    upper, lower = figure.subplots(2, 1, sharex=True)
    before, after = "before", "after, with the class forgotten"
    _draw_accuracy(
        upper, records, {before: ("original_acc_f", BEFORE), f"{after} (Acc_f)": ("acc_f", AFTER)}
    )
    upper.set_title("Accuracy on the class itself, before and after it is forgotten")
    upper.set_ylabel("accuracy on the class, %")
    series = {before: ("original_acc_r", BEFORE), f"{after} (Acc_r)": ("acc_r", RETAINED)}
    _draw_accuracy(lower, records, series, zoom=not named)
    lower.set_title("Accuracy on all other classes, before and after the class is forgotten")
    lower.set_ylabel("accuracy on the others, %")
    _name_classes(lower, records, _order_name(sort, named))
    _save(figure, path)


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
    rows = list(range(net.num_classes)) if classes is None else [int(c) for c in classes]
    if not rows:
        raise ValueError("classes must name at least one class, or be None for all of them")
    for row in rows:
        if not 0 <= row < net.num_classes:
            raise ValueError(
                f"class {row} is out of range: the filters have classes 0 to {net.num_classes - 1}"
            )
    layers = _shown_layers(net)
    height = 1.6 + (0.24 * len(rows) if len(rows) <= _NAMED else 4.6)
    figure = _figure(13.0, max(3.2, height))
    axes = figure.subplots(1, len(layers), squeeze=False)[0]
    _draw_gates(figure, list(axes), net, layers, rows, names, sort)
    figure.suptitle("Gates per forgotten class and channel: 100% open, 0% closed", fontsize=13)
    _save(figure, path)


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
    losses = _series(history, lambda name: "loss" in name)
    accuracies = _series(history, lambda name: name.startswith("acc"))
    panels = [panel for panel in (losses, accuracies) if panel]
    if not panels:
        raise ValueError(
            f"the history has no losses or accuracies to draw ({len(history)} records); its "
            "records need names such as 'loss' or 'acc_r'"
        )
    figure = _figure(5.6 * len(panels) + 0.4, 3.8)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        scale = 100 if panel is accuracies else 1
        for color, (name, points) in zip(_colors(len(panel)), panel.items(), strict=True):
            steps, values = zip(*points, strict=True)
            marker = "o" if len(points) <= 30 else None
            label = _pretty(name)
            axis.plot(
                steps, [scale * v for v in values], color=color, label=label, lw=1.6,
                marker=marker, ms=3.5,
            )  # fmt: skip
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        if panel is accuracies:
            axis.set_title("Accuracy on validation images while untraining")
            axis.set_ylabel("accuracy, %")
            axis.set_ylim(-3, 103)
        else:
            axis.set_title("Losses while untraining")
            axis.set_ylabel("loss")
        if len(panel) > 1:
            axis.legend(frameon=False, fontsize=9)
        else:
            axis.set_ylabel(f"{_pretty(next(iter(panel)))}{', %' if panel is accuracies else ''}")
    _save(figure, path)


def overview(result: EvaluationResult, net: WFNet, path: str | os.PathLike) -> None:
    """Draws what one evaluation shows, in one wide picture: accuracies left, gate maps right.

    Args:
        result: of :func:`wfnet.evaluation.evaluate`.
        net: the network that was evaluated.
        path: file to write.

    Raises:
        ImportError: without matplotlib (extra ``viz``).
        ValueError: for an unknown file format.
    """
    records = _sorted(result.records, None)
    layers = _shown_layers(net)
    figure = _figure(15.0, 5.0)
    left, right = figure.subfigures(1, 2, width_ratios=[1.15, 1])
    axis = left.subplots()
    series = {
        "on the class, before": ("original_acc_f", BEFORE),
        "on the class, after forgetting it": ("acc_f", AFTER),
        "on all other classes, after": ("acc_r", RETAINED),
    }
    _draw_accuracy(axis, records, series)
    axis.set_ylabel("accuracy, %")
    left.suptitle(
        f"One checkpoint that can forget any of {len(records):,} classes\n"
        f"accuracy on the class {_change(result.original.acc_f, result.mean.acc_f)}, "
        f"on all others {_change(result.original.acc_r, result.mean.acc_r)}",
        fontsize=12,
    )
    named = len(records) <= _NAMED
    _name_classes(axis, records, _order_name(None, named), "forgotten class")
    axes = list(right.subplots(1, len(layers), squeeze=False)[0])
    rows = [record.index for record in sorted(result.records, key=lambda r: r.index)]
    names = {record.index: record.name for record in result.records}
    _draw_gates(right, axes, net, layers, rows, names, sort=True, compact=True)
    right.suptitle("Gates: which channels each forgotten class closes", fontsize=12)
    _save(figure, path)


# -- drawing --------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> Figure:
    figure = require("matplotlib.figure", "viz").Figure(
        figsize=(width, height), dpi=_DPI, layout="constrained", facecolor="white"
    )
    # A figure without a manager of pyplot draws on this canvas, whatever display there is.
    require("matplotlib.backends.backend_agg", "viz").FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: str | os.PathLike) -> None:
    suffix = Path(path).suffix.lstrip(".").lower()
    known = figure.canvas.get_supported_filetypes()
    if suffix not in known:
        raise ValueError(
            f"{path} has no ending that names a picture format; use one of .png, .svg, .pdf"
        )
    write_atomically(path, lambda temporary: figure.savefig(temporary, format=suffix))


def _sorted(records: Sequence[ClassRecord], sort: str | None) -> list[ClassRecord]:
    if sort is not None and sort not in _SORTS:
        raise ValueError(f"sort={sort!r} is unknown; use one of {', '.join(_SORTS)}, or None")
    keys = {
        "index": lambda r: r.index,
        "original": lambda r: (-r.original_acc_f, r.index),
        "acc_f": lambda r: (-r.acc_f, -r.original_acc_f, r.index),
    }
    return sorted(records, key=keys[sort or _default_sort(len(records) <= _NAMED)])


def _default_sort(named: bool) -> str:
    return "index" if named else "original"


def _order_name(sort: str | None, named: bool) -> str:
    return {
        "index": "in the order of the data set",
        "original": "sorted by accuracy before",
        "acc_f": "sorted by Acc_f",
    }[sort or _default_sort(named)]


def _draw_accuracy(
    axis: Axes,
    records: Sequence[ClassRecord],
    series: Mapping[str, tuple[str, str]],
    zoom: bool = False,
) -> None:
    """Bars, or points for many classes, of the measures ``series``: label -> (name, colour)."""
    places = range(len(records))
    everything = []
    width = 0.84 / len(series)
    for i, (label, (name, color)) in enumerate(series.items()):
        values = [100 * getattr(record, name) for record in records]
        everything += values
        if len(records) <= _NAMED:
            left = [place - 0.42 + i * width for place in places]
            axis.bar(left, values, 0.94 * width, align="edge", color=color, label=label)
            _write_values(axis, left, values, width, color, always=len(series) == 2)
        else:
            size = max(1.5, min(12.0, 3000 / len(records)))
            axis.scatter(places, values, s=size, color=color, label=label, linewidths=0)
    margin = 0.6 if len(records) <= _NAMED else 0.01 * len(records)
    axis.set_xlim(-margin, len(records) - 1 + margin)
    _percent_axis(axis, everything, zoom, bars=len(records) <= _NAMED)
    legend = axis.legend(
        loc="upper center", ncols=len(series), frameon=False, fontsize=9.5,
        bbox_to_anchor=(0.5, 1.0), borderaxespad=0.1, handletextpad=0.5, columnspacing=1.6,
    )  # fmt: skip
    if len(records) > _NAMED:
        for handle in legend.legend_handles:
            handle.set_sizes([30])


def _write_values(
    axis: Axes, left: list[float], values: list[float], width: float, color: str, always: bool
) -> None:
    """Numbers above the bars where there is room; without a 0, a bar of 0 would look lost."""
    few = len(values) <= 12
    color = INK if color == BEFORE else color
    for x, value in zip(left, values, strict=True):
        if (always and value < 0.05) or (few and (always or value < 5)):
            text = f"{value:.1f}" if 0.05 <= value < 99.95 else f"{value:.0f}"
            axis.text(
                x + 0.47 * width, value + 1, text, ha="center", va="bottom", color=color,
                fontsize=8.5 if few else 7, fontweight="bold" if value < 0.05 else "normal",
            )  # fmt: skip


def _percent_axis(axis: Axes, values: list[float], zoom: bool, bars: bool) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.25)
    axis.set_axisbelow(True)
    if zoom:  # the rows of many classes differ by a point or less, which a full axis would hide
        low, high = min(values), max(values)
        margin = max(0.5, 0.1 * (high - low))
        axis.set_ylim(max(0.0, low - margin), min(100.5, high + 2.5 * margin))
    else:
        axis.set_ylim(0 if bars else -1.5, 121)  # room for the legend above the data
        axis.set_yticks(range(0, 101, 20))


def _name_classes(
    axis: Axes, records: Sequence[ClassRecord], order: str, title: str = "class"
) -> None:
    if len(records) > _NAMED:
        axis.set_xlabel(f"{title} ({len(records):,}, {order})")
        return
    texts = [_shorten(record.name) for record in records]
    axis.set_xticks(range(len(records)), texts)
    if max(map(len, texts)) * len(texts) > 90:
        axis.tick_params(axis="x", rotation=45 if len(texts) <= 20 else 90, labelsize=9)
        for text in axis.get_xticklabels():
            text.set_horizontalalignment("right" if len(texts) <= 20 else "center")
            text.set_rotation_mode("anchor" if len(texts) <= 20 else "default")
    axis.set_xlabel(title)


def _shorten(text: str, length: int = 18) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}\u2026"


def _shown_layers(net: WFNet) -> list[tuple[str, str]]:
    """(title, name) of the first, an intermediate and the last masked layer; fewer if there are."""
    names = list(net.masked_layers)
    if len(names) < 3:
        return list(zip(("first", "last"), names, strict=False))
    middle = len(names) // 2
    return [("first", names[0]), ("intermediate", names[middle]), ("last", names[-1])]


def _draw_gates(
    figure: Figure,
    axes: list[Axes],
    net: WFNet,
    layers: list[tuple[str, str]],
    rows: list[int],
    names: Sequence[str] | Mapping[int, str] | None,
    sort: bool,
    compact: bool = False,
) -> None:
    image = None
    for axis, (place, name) in zip(axes, layers, strict=True):
        gates = 100 * net.masked_layers[name].gates()[rows].detach().float().cpu()
        if sort:
            gates = gates[:, gates.mean(0).argsort(stable=True)]
        # Cells are enlarged to at least a pixel: smoothing then joins channels that share a pixel
        # without blurring the borders between classes.
        enlarged = gates.repeat_interleave(math.ceil(_PIXELS / gates.shape[0]), 0)
        enlarged = enlarged.repeat_interleave(math.ceil(_PIXELS / gates.shape[1]), 1)
        image = axis.imshow(
            enlarged.numpy(), aspect="auto", cmap="Blues_r", vmin=0, vmax=100,
            extent=(-0.5, gates.shape[1] - 0.5, gates.shape[0] - 0.5, -0.5),
        )  # fmt: skip
        separator = "\n" if compact else ": "
        axis.set_title(f"{place}{separator}{_shorten(name, 26)}", fontsize=10)
        axis.set_xlabel("channel, most closed first" if sort else "channel", fontsize=9)
        axis.tick_params(labelsize=8.5)
        axis.xaxis.get_major_locator().set_params(integer=True, nbins=5)
    _name_rows(axes, rows, names, 20 if compact else _NAMED)
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02, aspect=30)
    bar.set_label("gate, %", fontsize=9)
    bar.ax.tick_params(labelsize=8.5)


def _name_rows(
    axes: list[Axes],
    rows: list[int],
    names: Sequence[str] | Mapping[int, str] | None,
    named: int,
) -> None:
    """Class names beside the first map; about ten numbers where there are too many for that."""
    first, *others = axes
    length = 14 if named < _NAMED else 22
    for axis in others:
        axis.set_yticks([])
    if len(rows) <= named:
        texts = [str(row) if names is None else _shorten(names[row], length) for row in rows]
        first.set_yticks(range(len(rows)), texts)
    else:
        step = _round_step(len(rows) / 10)
        ticks = list(range(0, len(rows), step))
        first.set_yticks(ticks, [str(rows[tick]) for tick in ticks])
    first.set_ylabel("forgotten class", fontsize=9.5)


def _round_step(step: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50, ..."""
    size = 10 ** math.floor(math.log10(max(step, 1)))
    return next(int(m * size) for m in (1, 2, 5, 10) if m * size >= step)


def _change(before: float, after: float) -> str:
    return f"{100 * before:.1f}% \u2192 {100 * after:.1f}%"


def _series(
    history: Sequence[Mapping[str, object]], wanted
) -> dict[str, list[tuple[float, float]]]:
    series: dict[str, list[tuple[float, float]]] = {}
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


def _colors(count: int) -> list[str]:
    return [SERIES[i % len(SERIES)] for i in range(count)]
