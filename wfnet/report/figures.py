"""Figures of an evaluation: accuracies, gate maps, associations, attribution, confusion, trust.

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
from wfnet.evaluation.attribution import AttributionResult
from wfnet.evaluation.confusion import ConfusionChange
from wfnet.fusion.trace import execution_order
from wfnet.network import WFNet
from wfnet.services.extras import require
from wfnet.services.files import write_atomically
from wfnet.trust import CHECKS, TrustResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure

BEFORE, AFTER, RETAINED, INK = "#9AA5B1", "#D55E00", "#0072B2", "#222222"
RETRAINED = "#009E73"
SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DPI = 160
# Up to this many classes have a bar and a name each; more are drawn as points without names.
_NAMED = 40
# Pixels of a gate map, at least, in both directions.
_PIXELS = 700
_SORTS = ("index", "original", "acc_f")


def accuracy_per_class(
    result: EvaluationResult,
    path: str | os.PathLike,
    sort: str | None = None,
    retrained: Mapping[int, tuple[float, float]] | None = None,
) -> None:
    """Draws the accuracy on each class, and on all others, before and after it is forgotten.

    Args:
        result: of :func:`wfnet.evaluation.evaluate`.
        path: file to write; its ending chooses the format (png, svg, pdf).
        sort: order of the classes: "index", "original" (accuracy before, highest first) or
            "acc_f" (worst forgotten first). By default by index if every class gets its name,
            else by "original".
        retrained: class -> (Acc_r, Acc_f), fractions, of a network retrained without the class, to
            stand beside; classes may be missing.

    Raises:
        ImportError: without matplotlib (extra ``viz``).
        ValueError: for an unknown order or file format, before anything is written.
    """
    records = _sorted(result.records, sort)
    named = len(records) <= _NAMED
    figure = _figure(max(8.0, min(16.0, 2.5 + 0.45 * len(records)) if named else 11.0), 6.4)
    upper, lower = figure.subplots(2, 1, sharex=True)
    before, after = "before", "after, with the class forgotten"
    series: dict[str, tuple[list[float], str]] = {
        before: ([r.original_acc_f for r in records], BEFORE),
        f"{after} (Acc_f)": ([r.acc_f for r in records], AFTER),
    }
    levels = [[], []]
    if retrained:
        absent = (math.nan, math.nan)
        levels = list(zip(*(retrained.get(r.index, absent) for r in records), strict=True))
        series["retrained without it"] = (list(levels[1]), RETRAINED)
    _draw_accuracy(upper, records, series)
    upper.set_title("Accuracy on the class itself, before and after it is forgotten")
    upper.set_ylabel("accuracy on the class, %")
    series = {
        before: ([r.original_acc_r for r in records], BEFORE),
        f"{after} (Acc_r)": ([r.acc_r for r in records], RETAINED),
    }
    if retrained:
        series["retrained without it"] = (list(levels[0]), RETRAINED)
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
    rows = _rows_of(net, classes)
    layers = _shown_layers(net)
    height = 1.6 + (0.24 * len(rows) if len(rows) <= _NAMED else 4.6)
    figure = _figure(13.0, max(3.2, height))
    axes = figure.subplots(1, len(layers), squeeze=False)[0]
    _draw_gates(figure, list(axes), net, layers, rows, names, sort)
    figure.suptitle("Gates per forgotten class and output channel", fontsize=13)
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
        "on the class, before": ([r.original_acc_f for r in records], BEFORE),
        "on the class, after forgetting it": ([r.acc_f for r in records], AFTER),
        "on all other classes, after": ([r.acc_r for r in records], RETAINED),
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


def association_graph(
    net: WFNet,
    path: str | os.PathLike,
    layer: str | None = None,
    names: Sequence[str] | None = None,
    classes: Sequence[int] | None = None,
    top: int = 10,
) -> None:
    """Draws which classes close the same filters (the paper's Figure 3).

    Each class is linked to its ``top`` filters, those with the lowest gates in the layer; filters
    that only one class closes are left out. For more classes than can be told apart, the figure
    shows the most shared filters and the pairs of classes that share most instead.

    Args:
        net: the filtered network.
        path: file to write.
        layer: name of a masked layer; the last one to run by default.
        names: names of all classes; numbers by default.
        classes: rows; all by default.
        top: filters of each class.

    Raises:
        ImportError: without matplotlib (extra ``viz``).
        ValueError: for an unknown layer, classes out of range, ``top`` below 1 or an unknown file
            format.
    """
    rows = _rows_of(net, classes)
    order = execution_order(net.model, list(net.masked_layers))
    chosen = order[-1] if layer is None else layer
    if chosen not in net.masked_layers:
        raise ValueError(f"{chosen!r} is no masked layer; they are {', '.join(order)}")
    if top < 1:
        raise ValueError(f"top must be at least 1; got {top}")
    gates = net.masked_layers[chosen].gates()[rows].detach().float().cpu()
    links = associations(gates, top)
    texts = [str(row) if names is None else names[row] for row in rows]
    kept = int((links.sum(0) >= 2).sum())
    title = (
        f"Filters that several classes close, layer {chosen}: of the {min(top, links.shape[1])} "
        f"lowest gates of each class, {kept} of {links.shape[1]} filters are shared"
    )
    many = len(rows) > 20
    figure = _figure(13.0, 6.4 if many else 5.4)
    if many:
        _draw_shared(figure, links, texts)
    else:
        _draw_graph(figure.subplots(), links, texts)
    figure.suptitle(title, fontsize=12)
    _save(figure, path)


def associations(gates: torch.Tensor, top: int = 10) -> torch.Tensor:
    """Whether a filter is among the ``top`` lowest gates of a class: ``[K, O]`` bool for
    gates ``[K, O]``. Among equal gates the first filters count."""
    lowest = gates.argsort(dim=1, stable=True)[:, :top]
    return torch.zeros_like(gates, dtype=torch.bool).scatter_(1, lowest, True)


def insertion_deletion(result: AttributionResult, path: str | os.PathLike) -> None:
    """Draws insertion and deletion curves: mean over classes, spread, and a random order.

    Args:
        result: of :func:`wfnet.evaluation.attribution.attribution`.
        path: file to write.

    Raises:
        ImportError: without matplotlib (extra ``viz``).
        ValueError: for an unknown file format.
    """
    figure = _figure(11.0, 5.0)
    shares = [100 * share for share in result.shares]
    mean = result.mean
    for axis, name, color, text in zip(
        figure.subplots(1, 2, sharey=True),
        ("insertion", "deletion"),
        (RETAINED, AFTER),
        ("Insertion: the class's gates reset to 1", "Deletion: all gates at 1, then set to 0"),
        strict=True,
    ):
        curves = 100 * result.curve(name)
        low, high = (torch.quantile(curves, q, dim=0).tolist() for q in (0.1, 0.9))
        axis.fill_between(
            shares,
            low,
            high,
            color=color,
            alpha=0.2,
            lw=0,
            label="10th to 90th percentile of classes",
        )
        axis.plot(
            shares, curves.mean(0).tolist(), color=color, lw=2,
            label=f"lowest learned gates first: area {mean[name]:.2f}",
        )  # fmt: skip
        axis.plot(
            shares, (100 * result.curve(f"{name}_random")).mean(0).tolist(), color=INK, lw=1.6,
            ls="--", label=f"random order: area {mean[name + '_random']:.2f}",
        )  # fmt: skip
        axis.set_title(text, fontsize=11)
        axis.set_xlabel("gates changed, % of each layer")
        axis.set_xlim(0, 100)
        axis.set_ylim(0, 103)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    figure.axes[0].set_ylabel("confidence in the class,\n% of the original's, at most 100")
    figure.suptitle(
        f"Are the closed gates those that the class needs? ({len(result.records):,} classes)",
        fontsize=12,
    )
    _save(figure, path)


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
    if len(change.classes) <= 20 and len(change.names) <= 20:
        figure = _figure(13.0, max(4.6, 1.9 + 0.32 * len(change.classes)))
        _draw_confusion_maps(figure, change)
    else:
        figure = _figure(13.5, 8.6)
        _draw_confusion_summary(figure, change)
    _save(figure, path)


def trust_checks(result: TrustResult, path: str | os.PathLike) -> None:
    """Draws the trust checks: each measure beside its two levels, probes, and relearning.

    Args:
        result: of :func:`wfnet.trust.run_checks`.
        path: file to write.

    Raises:
        ImportError: without matplotlib (extra ``viz``).
        ValueError: without records, or for an unknown file format.
    """
    means = result.means()
    if not means:
        raise ValueError("the trust result has no records to draw")
    figure = _figure(13.5, 7.2)
    left, right = figure.subfigures(1, 2, width_ratios=[1.25, 1])
    _draw_levels(left.subplots(), means)
    upper, lower = right.subplots(2, 1)
    _draw_probes(upper, result)
    _draw_relearning(lower, result)
    classes = len({record.index for record in result.records})
    what = "class" if classes == 1 else "classes"
    figure.suptitle(f"Trust checks, means over {classes:,} {what}", fontsize=13)
    _save(figure, path)


# -- drawing --------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> Figure:
    figure = require("matplotlib.figure", "viz").Figure(
        figsize=(width, height), dpi=_DPI, layout="constrained", facecolor="white"
    )
    # A figure without a manager of pyplot draws on this canvas, whatever display there is.
    require("matplotlib.backends.backend_agg", "viz").FigureCanvasAgg(figure)
    return figure


def _rows_of(net: WFNet, classes: Sequence[int] | None) -> list[int]:
    rows = list(range(net.num_classes)) if classes is None else [int(c) for c in classes]
    if not rows:
        raise ValueError("classes must name at least one class, or be None for all of them")
    for row in rows:
        if not 0 <= row < net.num_classes:
            raise ValueError(
                f"class {row} is out of range: the filters have classes 0 to {net.num_classes - 1}"
            )
    return rows


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
    series: Mapping[str, tuple[Sequence[float], str]],
    zoom: bool = False,
) -> None:
    """Bars, or points for many classes, of ``series``: label -> (fractions, colour)."""
    places = range(len(records))
    everything = []
    width = 0.84 / len(series)
    for i, (label, (shares, color)) in enumerate(series.items()):
        values = [100 * share for share in shares]
        everything += [value for value in values if not math.isnan(value)]
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
        if math.isnan(value):
            continue
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
    """(title, name) of the first, an intermediate and the last masked layer to run, if so many."""
    names = execution_order(net.model, list(net.masked_layers))
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
        enlarged = gates.repeat_interleave(math.ceil(_PIXELS / gates.shape[0]), 0)
        enlarged = enlarged.repeat_interleave(math.ceil(_PIXELS / gates.shape[1]), 1)
        image = axis.imshow(
            enlarged.numpy(), aspect="auto", cmap=colors, norm=norm,
            extent=(-0.5, gates.shape[1] - 0.5, gates.shape[0] - 0.5, -0.5),
        )  # fmt: skip
        separator = "\n" if compact else ": "
        axis.set_title(f"{place}{separator}{_shorten(name, 26)}", fontsize=10)
        axis.set_xlabel("channel, most closed first" if sort else "channel", fontsize=9)
        axis.tick_params(labelsize=8.5)
        axis.xaxis.get_major_locator().set_params(integer=True, nbins=5)
    _name_rows(axes, rows, names, 20 if compact else _NAMED)
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02, aspect=30)
    bar.set_label("gate, % (100: as in the original)", fontsize=9)
    if norm.vmax > 100:
        bar.set_ticks([0, 50, 100, *_ticks_above(norm.vmax)])
    bar.ax.tick_params(labelsize=8.5)


def _gate_colors(highest: float) -> tuple[Colormap, Normalize]:
    """Dark blue is closed, white is 100%; where gates amplify, orange is above.

    The few percent that a normalised gate can rise (105% for an ``alpha_init`` of 3) stay white;
    above, the scale reaches to 200% at least, so that small rises do not look like large ones.
    """
    colors = require("matplotlib.colors", "viz")
    blues = ["#08306B", "#2171B5", "#6BAED6", "#C6DBEF", "#F7FBFF"]
    if highest <= 110:
        return colors.LinearSegmentedColormap.from_list("gates", blues), colors.Normalize(0, 100)
    both = [*blues, "#FDD0A2", "#FD8D3C", "#D94801", "#A63603"]
    places = [0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1]
    return (
        colors.LinearSegmentedColormap.from_list("gates", list(zip(places, both, strict=True))),
        colors.TwoSlopeNorm(100, 0, max(200.0, highest)),
    )


def _ticks_above(highest: float) -> list[float]:
    """A few round percentages between 100 and ``highest``."""
    step = _round_step((highest - 100) / 3)
    return [100 + step * i for i in range(1, 4) if 100 + step * i <= highest]


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


def _draw_graph(axis: Axes, links: torch.Tensor, names: Sequence[str]) -> None:
    """Classes above, shared filters below in the order of their classes' mean place, links."""
    classes = len(links)
    shared = (links.sum(0) >= 2).nonzero().squeeze(1)
    axis.set_axis_off()
    if not len(shared):
        axis.text(0.5, 0.5, "no filter is among the lowest gates of two classes", ha="center")
        return
    place = torch.linspace(0, 1, classes) if classes > 1 else torch.tensor([0.5])
    counts = links[:, shared].sum(0)
    center = (links[:, shared] * place.unsqueeze(1)).sum(0) / counts
    order = center.argsort(stable=True)
    shared, counts = shared[order], counts[order]
    below = torch.linspace(0, 1, len(shared)) if len(shared) > 1 else torch.tensor([0.5])
    most = int(counts.max())
    for j, (filter_, count) in enumerate(zip(shared.tolist(), counts.tolist(), strict=True)):
        for i in links[:, filter_].nonzero().squeeze(1).tolist():
            strength = 0.25 + 0.55 * (count - 1) / max(most - 1, 1)
            axis.plot([place[i], below[j]], [1, 0], color=RETAINED, lw=1.1, alpha=strength)
    short = max(map(len, names)) <= 3  # names then fit into the dots
    axis.scatter(place, [1] * classes, s=420, color=INK, zorder=3)
    axis.scatter(below, [0] * len(shared), s=40 + 45 * counts, color=AFTER, zorder=3)
    for i, name in enumerate(names):
        axis.text(
            place[i], 1 if short else 1.07, _shorten(name, 16), color="white" if short else INK,
            ha="center" if short or classes <= 8 else "left", va="center" if short else "bottom",
            rotation=0 if short or classes <= 8 else 35, fontsize=10, zorder=4,
        )  # fmt: skip
    small = 8 if len(shared) <= 30 else 6.5
    for j, filter_ in enumerate(shared.tolist()):
        axis.text(
            below[j], -0.09, str(filter_), ha="center", va="top", fontsize=small,
            rotation=0 if len(shared) <= 30 else 90,
        )  # fmt: skip
    axis.text(-0.03, 1, "class", ha="right", va="center", fontsize=10, color=INK)
    axis.text(-0.03, 0, "filter", ha="right", va="center", fontsize=10, color=AFTER)
    axis.text(
        0.5, -0.26, f"larger and darker: shared by more classes (2 to {most})", ha="center",
        va="top", fontsize=9, color=INK,
    )  # fmt: skip
    axis.set_xlim(-0.09, 1.06)
    axis.set_ylim(-0.36, 1.2 if short else 1.5)


def _draw_shared(figure: Figure, links: torch.Tensor, names: Sequence[str]) -> None:
    """The most shared filters, and the pairs of classes that share most of theirs."""
    left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
    counts = links.sum(0)
    most = counts.argsort(descending=True, stable=True)[:30]
    most = most[counts[most] >= 2]
    _bars_by_name(
        left, [f"filter {f}" for f in most.tolist()], counts[most].tolist(), AFTER,
        "classes with the filter among their lowest gates", "The most shared filters",
    )  # fmt: skip
    common = links.float() @ links.float().T
    common.fill_diagonal_(0)
    pairs = common.triu(1).flatten().argsort(descending=True, stable=True)[:30].tolist()
    pairs = [divmod(pair, len(links)) for pair in pairs]
    values = [int(common[i, j]) for i, j in pairs]
    texts = [f"{_shorten(names[i], 22)} \u2013 {_shorten(names[j], 22)}" for i, j in pairs]
    _bars_by_name(
        right, texts, values, RETAINED, "filters in common",
        "The pairs of classes that share most filters",
    )  # fmt: skip


def _bars_by_name(
    axis: Axes, names: list[str], values: list[float], color: str, unit: str, title: str,
    written: str = "{:g}",
) -> None:  # fmt: skip
    """Horizontal bars, the first at the top, with their values."""
    places = list(range(len(names)))
    axis.barh(places, values, color=color, height=0.72)
    axis.set_yticks(places, names, fontsize=7.5 if len(names) > 20 else 9)
    axis.set_ylim(len(names) - 0.4, -0.6)
    span = max([abs(v) for v in values], default=1) or 1
    for place, value in zip(places, values, strict=True):
        axis.text(
            value + 0.012 * span * (1 if value >= 0 else -1), place, written.format(value),
            va="center", ha="left" if value >= 0 else "right", fontsize=7.5,
        )  # fmt: skip
    low = min([0.0, *values])
    axis.set_xlim(1.14 * low if low < 0 else 0, 1.12 * span if max([0.0, *values]) > 0 else 0)
    axis.set_xlabel(unit, fontsize=9)
    axis.set_title(title, fontsize=11)
    if all(isinstance(value, int) for value in values):
        axis.xaxis.get_major_locator().set_params(integer=True)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_confusion_maps(figure: Figure, change: ConfusionChange) -> None:
    left, right = figure.subplots(1, 2)
    rows = [_shorten(change.names[c], 14) for c in change.classes.tolist()]
    columns = [_shorten(name, 14) for name in change.names]
    shares = 100 * change.shares()
    image = left.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=100, aspect="auto")
    figure.colorbar(image, ax=left, pad=0.02).set_label("images of the forgotten class, %")
    left.set_title("Where images of the forgotten class go", fontsize=11)
    left.set_xlabel("taken for")
    harm = 100 * change.collateral()
    reach = max(5.0, harm.nan_to_num(0).abs().max().item())
    image = right.imshow(harm.numpy(), cmap="PuOr", vmin=-reach, vmax=reach, aspect="auto")
    figure.colorbar(image, ax=right, pad=0.02).set_label("change of accuracy, points")
    right.set_title("What it does to the other classes", fontsize=11)
    right.set_xlabel("class")
    for axis, values, bright in ((left, shares, 55.0), (right, harm, 0.6 * reach)):
        axis.set_xticks(range(len(columns)), columns)
        axis.set_yticks(range(len(rows)), rows)
        if max(map(len, columns)) > 3:
            axis.tick_params(axis="x", rotation=60)
            for text in axis.get_xticklabels():
                text.set_horizontalalignment("right")
                text.set_rotation_mode("anchor")
        axis.set_ylabel("forgotten class")
        for i, j in (values.nan_to_num(0).abs() >= 0.5).nonzero().tolist():
            value = values[i, j].item()
            axis.text(
                j, i, f"{value:.0f}" if axis is left else f"{value:+.0f}", ha="center",
                va="center", fontsize=8, color="white" if abs(value) > bright else INK,
            )  # fmt: skip
    for i, c in enumerate(change.classes.tolist()):
        right.text(c, i, "\u2715", ha="center", va="center", fontsize=8, color=BEFORE)


def _draw_confusion_summary(figure: Figure, change: ConfusionChange) -> None:
    (upper_left, upper_right), (lower_left, lower_right) = figure.subplots(2, 2)
    names, classes = change.names, change.classes.tolist()
    shares, original = 100 * change.shares(), 100 * change.original_shares()
    own = torch.arange(len(classes))
    elsewhere = shares.clone()
    elsewhere[own, change.classes] = -1
    most, target = elsewhere.max(1)
    count = 18
    chosen = most.argsort(descending=True, stable=True)[:count].tolist()
    _bars_by_name(
        upper_left,
        [
            f"{_shorten(names[classes[i]], 24)} \u2192 {_shorten(names[target[i]], 24)}"
            for i in chosen
        ],
        [most[i].item() for i in chosen], RETAINED, "images of the forgotten class, %",
        "The strongest flows from a forgotten class", "{:.0f}",
    )  # fmt: skip
    curves = {
        "kept on the class, before": (original[own, change.classes], BEFORE, "-"),
        "kept on the class, after": (shares[own, change.classes], AFTER, "-"),
        "to the one class that receives most": (most.clamp_min(0), RETAINED, "--"),
    }
    for label, (values, color, style) in curves.items():
        upper_right.plot(values.sort(descending=True).values.tolist(), label=label, color=color,
                         lw=2, ls=style)  # fmt: skip
    upper_right.set_ylim(-2, 118)
    upper_right.set_yticks(range(0, 101, 20))
    upper_right.set_ylabel("images of the forgotten class, %")
    upper_right.set_xlabel(f"forgotten classes ({len(classes):,}), each curve sorted by itself")
    upper_right.set_title("Where images of a forgotten class go", fontsize=11)
    upper_right.legend(frameon=False, fontsize=8.5, ncols=1, loc="upper right")
    harm = 100 * change.collateral()
    suffered = harm.nanmean(0)
    known = (~suffered.isnan()).nonzero().squeeze(1)
    worst = known[suffered[known].argsort(stable=True)[:count]].tolist()
    _bars_by_name(
        lower_left, [_shorten(names[k], 30) for k in worst], [suffered[k].item() for k in worst],
        AFTER, "mean change of accuracy, points", "Classes that suffer most from others' rows",
        "{:+.1f}",
    )  # fmt: skip
    lower_right.plot(suffered[known].sort().values.tolist(), color=AFTER, lw=2,
                     label="on a class, mean over the rows of others")  # fmt: skip
    caused = harm.nanmean(1)
    lower_right.plot(caused[~caused.isnan()].sort().values.tolist(), color=RETAINED, lw=2, ls="--",
                     label="under a row, mean over the other classes")  # fmt: skip
    lower_right.axhline(0, color=BEFORE, lw=1)
    lower_right.set_title("Change of accuracy on the other classes", fontsize=11)
    lower_right.set_ylabel("change of accuracy, points")
    lower_right.set_xlabel("classes, each curve sorted by itself")
    lower_right.legend(frameon=False, fontsize=8.5, loc="lower right")
    for axis in (upper_right, lower_right):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)


def _draw_levels(axis: Axes, means: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> None:
    """One line per measure that is a fraction: the model under test between its two levels."""
    wanted = [
        (check, name, row)
        for check, rows in means.items()
        for name, row in rows.items()
        if not name.startswith(("kl_", "js_"))
        and not (check == "removal" and name.startswith("acc_r_"))
    ]
    kinds = {
        "original": ("original", BEFORE, "s", 110),
        "retrained": ("retrained without the class", RETRAINED, "D", 72),
        "forgetful": ("model under test", AFTER, "o", 28),
    }
    for place, (_, _, row) in enumerate(wanted):
        known = [row[who] for who in kinds if row[who] is not None]
        axis.plot([min(known), max(known)], [place, place], color="#D5DAE0", lw=2, zorder=1)
    for who, (label, color, marker, size) in kinds.items():
        points = [(row[who], i) for i, (_, _, row) in enumerate(wanted) if row[who] is not None]
        if points:
            x, y = zip(*points, strict=True)
            axis.scatter(x, y, color=color, marker=marker, s=size, label=label, zorder=3,
                         edgecolors="white", linewidths=0.7)  # fmt: skip
    axis.set_yticks(range(len(wanted)), [name for _, name, _ in wanted], fontsize=8)
    edges = [i for i in range(1, len(wanted)) if wanted[i][0] != wanted[i - 1][0]]
    for edge in edges:
        axis.axhline(edge - 0.5, color="#C4CAD0", lw=0.8)
    for start in (0, *edges):
        axis.text(
            1.035, start, CHECKS[wanted[start][0]].TITLE, fontsize=8.5, va="center", color=INK
        )
    axis.set_ylim(len(wanted) - 0.4, -0.6)
    axis.set_xlim(-0.03, 1.03)
    axis.set_xlabel(
        "fraction (accuracy, area under the ROC, total variation, agreement)", fontsize=9
    )
    axis.grid(axis="x", alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _draw_probes(axis: Axes, result: TrustResult) -> None:
    found = [r for r in result.records if r.check == "probing" and r.details.get("layers")]
    axis.set_title("Linear probes: the class read from each layer", fontsize=11)
    if not found:
        axis.set_axis_off()
        axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes)
        return
    layers = list(found[0].details["layers"])
    values = torch.tensor([[100 * r.details["layers"][n] for n in layers] for r in found])
    places = range(len(layers))
    axis.plot(places, values.mean(0).tolist(), color=AFTER, marker="o", ms=4, lw=1.8,
              label="model under test")  # fmt: skip
    if len(found) > 1:
        axis.fill_between(places, values.amin(0).tolist(), values.amax(0).tolist(), color=AFTER,
                          alpha=0.18, lw=0, label="lowest to highest class")  # fmt: skip
    levels = [r.retrained["probe_last"] for r in found if "probe_last" in r.retrained]
    if levels:
        axis.scatter([len(layers) - 1], [100 * sum(levels) / len(levels)], color=RETRAINED,
                     marker="D", s=46, zorder=3, label="retrained, last layer")  # fmt: skip
    axis.set_xticks(places, [_shorten(name, 22) for name in layers], fontsize=7.5)
    axis.tick_params(axis="x", rotation=40)
    for text in axis.get_xticklabels():
        text.set_horizontalalignment("right")
        text.set_rotation_mode("anchor")
    if len(layers) > 14:
        for i, text in enumerate(axis.get_xticklabels()):
            text.set_visible(i % math.ceil(len(layers) / 14) == 0 or i == len(layers) - 1)
    axis.set_ylim(45, 103)
    axis.set_ylabel("balanced accuracy, %\n(50: chance)", fontsize=9)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8.5, loc="lower right")


def _draw_relearning(axis: Axes, result: TrustResult) -> None:
    found = [r for r in result.records if r.check == "relearning" and r.details.get("course")]
    axis.set_title("Relearning: best accuracy on the class by fine-tuning", fontsize=11)
    if not found:
        axis.set_axis_off()
        axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes)
        return
    names = list(dict.fromkeys(name for r in found for name in r.forgetful))
    counts = [name.rpartition("_")[2] for name in names]
    texts = [
        "other classes\nonly" if name.endswith("retain_only")
        else f"{count} image{'' if count == '1' else 's'}\nof the class"
        for name, count in zip(names, counts, strict=True)
    ]  # fmt: skip
    for i, (who, color, label) in enumerate(
        (("forgetful", AFTER, "model under test"), ("retrained", RETRAINED, "retrained"))
    ):
        values = [
            [100 * getattr(r, who)[name] for r in found if name in getattr(r, who)]
            for name in names
        ]
        if not any(values):
            continue
        heights = [sum(v) / len(v) if v else 0.0 for v in values]
        places = [j - 0.2 + 0.4 * i for j in range(len(names))]
        axis.bar(places, heights, 0.38, color=color, label=label)
        for x, height in zip(places, heights, strict=True):
            axis.text(x, height + 1.5, f"{height:.0f}", ha="center", fontsize=8.5)
    axis.set_xticks(range(len(names)), texts, fontsize=9)
    axis.set_ylim(0, 128)
    axis.set_yticks(range(0, 101, 20))
    axis.set_ylabel("accuracy on the class, %", fontsize=9)
    axis.grid(axis="y", alpha=0.25)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8.5, ncols=2, loc="upper center")


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
