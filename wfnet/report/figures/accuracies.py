"""The figure of accuracy on every class and on all others, before and after it is forgotten."""

from collections.abc import Sequence
from operator import attrgetter

from wfnet.evaluation import ClassRecord
from wfnet.evaluation.results import means
from wfnet.network import WFNet
from wfnet.report.contents import Evaluation
from wfnet.report.figures import style
from wfnet.report.figures.gate_maps import draw_gates
from wfnet.report.figures.style import AFTER, BEFORE, NAMED, RETAINED, Axes
from wfnet.services.files import FilePath


def overview(result: Evaluation, net: WFNet, path: FilePath) -> None:
    """Draws what one evaluation shows, in one wide picture: accuracies left, gate maps right.

    Args:
        result: of :func:`wfnet.evaluation.evaluate`.
        net: the network that was evaluated.
        path: file to write.
    """
    forget, retain, score = result.forget, result.retain, result.score
    few = len(result.records) <= NAMED  # in the order of the data set, many by the score before
    order = attrgetter("index" if few else f"original_{forget}")
    records = sorted(result.records, key=order, reverse=not few)
    series = [
        ("on the class, before", [getattr(r, f"original_{forget}") for r in records], BEFORE),
        ("on the class, after forgetting it", [getattr(r, forget) for r in records], AFTER),
        ("on all other classes, after", [getattr(r, retain) for r in records], RETAINED),
    ]
    mean = means(records, [p + name for p in ("original_", "") for name in (forget, retain)])
    texts = [f"{100 * value:.1f}%" for value in mean.values()]
    with style.picture(path, 15.0, 5.0) as figure:
        left, right = figure.subfigures(1, 2, width_ratios=[1.15, 1])
        axis = left.subplots()
        _draw_accuracy(axis, series)
        axis.set_ylabel(f"{score}, %")
        left.suptitle(
            f"One checkpoint that can forget any of {len(records):,} classes\n"
            f"{score} on the class {texts[0]} \u2192 {texts[2]}, "
            f"on all others {texts[1]} \u2192 {texts[3]}"
        )
        _name_classes(axis, records, "forgotten class")
        names = {record.index: record.name for record in records}
        draw_gates(right, net, sorted(names), names, compact=True)
        right.suptitle("Gates: which channels each forgotten class closes")


def _draw_accuracy(axis: Axes, series: Sequence[tuple[str, Sequence[float], str]]) -> None:
    """Draws series (label, fractions, colour) as bars, or as points for many classes."""
    count, width = len(series[0][1]), 0.84 / len(series)
    named = count <= NAMED
    for i, (label, shares, color) in enumerate(series):
        values = [100 * share for share in shares]
        if named:
            left = [place - 0.42 + i * width for place in range(count)]
            bars = axis.bar(left, values, 0.94 * width, align="edge", color=color, label=label)
            # A low bar looks lost without its number.
            texts = [f"{value:.1f}".removesuffix(".0") if value < 5 else "" for value in values]
            ink = style.INK if color == BEFORE else color
            size = 8.5 if count <= 12 else 7
            for text in axis.bar_label(bars, texts, fontsize=size, color=ink, padding=1):
                text.set_fontweight("bold" if text.get_text() == "0" else "normal")
        else:
            size = max(1.5, min(12.0, 3000 / count))
            axis.scatter(range(count), values, s=size, color=color, label=label, linewidths=0)
    margin = 0.6 if named else 0.01 * count
    axis.set_xlim(-margin, count - 1 + margin)
    axis.grid(axis="y")
    axis.set_ylim(0 if named else -1.5, 121)  # room for the legend above the data
    axis.set_yticks(range(0, 101, 20))
    look = {"ncols": len(series), "borderaxespad": 0.1, "handletextpad": 0.5}
    legend = axis.legend(loc="upper center", **look)
    for handle in () if named else legend.legend_handles:
        handle.set_sizes([30])


def _name_classes(axis: Axes, records: Sequence[ClassRecord], title: str) -> None:
    if len(records) > NAMED:
        axis.set_xlabel(f"{title} ({len(records):,}, sorted by the height before)")
        return
    texts = [style.shorten(record.name) for record in records]
    axis.set_xticks(range(len(records)), texts)
    if max(map(len, texts)) * len(texts) > 90:
        if len(texts) <= 20:
            style.slant(axis, 45)
        else:
            axis.tick_params(axis="x", rotation=90)
    axis.set_xlabel(title)
