"""Figures of accuracy: on every class and on all others, before and after it is forgotten."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from wfnet.evaluation import ClassRecord, EvaluationResult
from wfnet.network import WFNet
from wfnet.report.figures.gate_maps import draw_gates, shown_layers
from wfnet.report.figures.style import (
    AFTER,
    BEFORE,
    INK,
    NAMED,
    RETAINED,
    RETRAINED,
    picture,
    shorten,
    slant,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ORDERS = {
    "index": (lambda r: r.index, "in the order of the data set"),
    "original": (lambda r: (-r.original_acc_f, r.index), "sorted by accuracy before"),
    "acc_f": (lambda r: (-r.acc_f, -r.original_acc_f, r.index), "sorted by Acc_f"),
}


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
    records, order = _ordered(result.records, sort)
    named = len(records) <= NAMED
    width = max(8.0, min(16.0, 2.5 + 0.45 * len(records))) if named else 11.0
    absent = (math.nan, math.nan)
    levels = [(retrained or {}).get(record.index, absent) for record in records]
    parts = (
        ("acc_f", AFTER, "the class itself", "the class", [acc_f for _, acc_f in levels]),
        ("acc_r", RETAINED, "all other classes", "the others", [acc_r for acc_r, _ in levels]),
    )
    with picture(path, width, 6.4) as figure:
        axes = figure.subplots(2, 1, sharex=True)
        for axis, (measure, color, images, short, level) in zip(axes, parts, strict=True):
            series = {
                "before": ([getattr(r, f"original_{measure}") for r in records], BEFORE),
                f"after, with the class forgotten ({measure.capitalize()})": (
                    [getattr(r, measure) for r in records],
                    color,
                ),
            }
            if retrained:
                series["retrained without it"] = (level, RETRAINED)
            _draw_accuracy(axis, records, series, zoom=measure == "acc_r" and not named)
            forgotten = "it" if measure == "acc_f" else "the class"
            axis.set_title(f"Accuracy on {images}, before and after {forgotten} is forgotten")
            axis.set_ylabel(f"accuracy on {short}, %")
        _name_classes(axes[-1], records, order)


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
    records, order = _ordered(result.records, None)
    layers = shown_layers(net)
    with picture(path, 15.0, 5.0) as figure:
        left, right = figure.subfigures(1, 2, width_ratios=[1.15, 1])
        axis = left.subplots()
        series = {
            "on the class, before": ([r.original_acc_f for r in records], BEFORE),
            "on the class, after forgetting it": ([r.acc_f for r in records], AFTER),
            "on all other classes, after": ([r.acc_r for r in records], RETAINED),
        }
        _draw_accuracy(axis, records, series)
        axis.set_ylabel("accuracy, %")
        before, after = result.original, result.mean
        left.suptitle(
            f"One checkpoint that can forget any of {len(records):,} classes\n"
            f"accuracy on the class {100 * before.acc_f:.1f}% \u2192 {100 * after.acc_f:.1f}%, "
            f"on all others {100 * before.acc_r:.1f}% \u2192 {100 * after.acc_r:.1f}%"
        )
        _name_classes(axis, records, order, "forgotten class")
        axes = list(right.subplots(1, len(layers), squeeze=False)[0])
        rows = sorted(record.index for record in records)
        names = {record.index: record.name for record in records}
        draw_gates(right, axes, net, layers, rows, names, sort=True, compact=True)
        right.suptitle("Gates: which channels each forgotten class closes")


def _ordered(records: Sequence[ClassRecord], sort: str | None) -> tuple[list[ClassRecord], str]:
    """Returns the records in the order asked for, and what the order is."""
    if sort is not None and sort not in _ORDERS:
        raise ValueError(f"sort={sort!r} is unknown; use one of {', '.join(_ORDERS)}, or None")
    key, name = _ORDERS[sort or ("index" if len(records) <= NAMED else "original")]
    return sorted(records, key=key), name


def _draw_accuracy(
    axis: Axes,
    records: Sequence[ClassRecord],
    series: Mapping[str, tuple[Sequence[float], str]],
    zoom: bool = False,
) -> None:
    """Draws ``series``, label -> (fractions, colour), as bars, or as points for many classes."""
    named = len(records) <= NAMED
    places = range(len(records))
    everything = []
    width = 0.84 / len(series)
    for i, (label, (shares, color)) in enumerate(series.items()):
        values = [100 * share for share in shares]
        everything += [value for value in values if not math.isnan(value)]
        if named:
            left = [place - 0.42 + i * width for place in places]
            axis.bar(left, values, 0.94 * width, align="edge", color=color, label=label)
            _write_values(axis, left, values, width, color, always=len(series) == 2)
        else:
            size = max(1.5, min(12.0, 3000 / len(records)))
            axis.scatter(places, values, s=size, color=color, label=label, linewidths=0)
    margin = 0.6 if named else 0.01 * len(records)
    axis.set_xlim(-margin, len(records) - 1 + margin)
    axis.grid(axis="y")
    if zoom:  # the rows of many classes differ by a point or less, which a full axis would hide
        low, high = min(everything), max(everything)
        margin = max(0.5, 0.1 * (high - low))
        axis.set_ylim(max(0.0, low - margin), min(100.5, high + 2.5 * margin))
    else:
        axis.set_ylim(0 if named else -1.5, 121)  # room for the legend above the data
        axis.set_yticks(range(0, 101, 20))
    legend = axis.legend(
        loc="upper center", ncols=len(series), borderaxespad=0.1, handletextpad=0.5
    )
    if not named:
        for handle in legend.legend_handles:
            handle.set_sizes([30])


def _write_values(
    axis: Axes, left: list[float], values: list[float], width: float, color: str, always: bool
) -> None:
    """Writes numbers above the bars where there is room; without a 0, a bar of 0 looks lost."""
    few = len(values) <= 12
    for x, value in zip(left, values, strict=True):
        zero = value < 0.05
        if (always and zero) or (few and (always or value < 5) and not math.isnan(value)):
            text = f"{value:.1f}" if 0.05 <= value < 99.95 else f"{value:.0f}"
            axis.text(
                x + 0.47 * width,
                value + 1,
                text,
                ha="center",
                va="bottom",
                color=INK if color == BEFORE else color,
                fontsize=8.5 if few else 7,
                fontweight="bold" if zero else "normal",
            )


def _name_classes(
    axis: Axes, records: Sequence[ClassRecord], order: str, title: str = "class"
) -> None:
    if len(records) > NAMED:
        axis.set_xlabel(f"{title} ({len(records):,}, {order})")
        return
    texts = [shorten(record.name) for record in records]
    axis.set_xticks(range(len(records)), texts)
    if max(map(len, texts)) * len(texts) > 90:
        if len(texts) <= 20:
            slant(axis, 45)
        else:
            axis.tick_params(axis="x", rotation=90)
    axis.set_xlabel(title)
