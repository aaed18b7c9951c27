"""The figure of the trust checks: every measure beside its levels, probes, and relearning."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from wfnet.report.figures.style import AFTER, BEFORE, INK, RETRAINED, picture, shorten, slant
from wfnet.trust import CHECKS, TrustRecord, TrustResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Label, colour, marker and size of each model whose measures are shown, hindmost first.
_MODELS = {
    "original": ("original", BEFORE, "s", 110),
    "retrained": ("retrained without the class", RETRAINED, "D", 72),
    "logit_masked": ("logit masked", INK, "^", 48),
    "bias_shifted": ("bias shifted", INK, "v", 36),
    "forgetful": ("model under test", AFTER, "o", 28),
}
_PROBES_NAMED = 14


def trust_checks(result: TrustResult, path: str | os.PathLike) -> None:
    """Draws the trust checks: each measure beside its two levels, probes, and relearning.

    Args:
        result: of :func:`wfnet.trust.run_checks`.
        path: file to write.

    Raises:
        ValueError: without records.
    """
    means = result.means()
    if not means:
        raise ValueError("the trust result has no records to draw")
    height = max(7.6, 0.17 * sum(map(len, means.values())))
    with picture(path, 15.0, height) as figure:
        left, right = figure.subfigures(1, 2, width_ratios=[1.6, 1])
        _draw_levels(left.subplots(), means)
        parts = (
            ("layers", "Linear probes: the class read from each layer", _draw_probes),
            ("course", "Relearning: best accuracy on the class by fine-tuning", _draw_relearning),
        )
        for axis, (detail, title, draw) in zip(right.subplots(2, 1), parts, strict=True):
            found = [record for record in result.records if record.details.get(detail)]
            axis.set_title(title)
            if found:
                draw(axis, found)
            else:
                axis.set_axis_off()
                axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes)
        classes = len({record.index for record in result.records})
        what = "class" if classes == 1 else "classes"
        figure.suptitle(f"Trust checks, means over {classes:,} {what}")


def _draw_levels(axis: Axes, means: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> None:
    """Draws one line per measure that is a fraction: the model under test between its levels."""
    wanted = [
        (CHECKS[check], name, row)
        for check, rows in means.items()
        for name, row in rows.items()
        if not name.startswith(("kl_", "js_", "acc_r_"))
    ]
    for place, (_, _, row) in enumerate(wanted):
        known = [row[who] for who in _MODELS if row[who] is not None]
        axis.plot([min(known), max(known)], [place, place], color="#D5DAE0", lw=2, zorder=1)
    for who, (label, color, marker, size) in _MODELS.items():
        points = [(row[who], i) for i, (_, _, row) in enumerate(wanted) if row[who] is not None]
        if points:
            x, y = zip(*points, strict=True)
            look = {"color": color, "marker": marker, "s": size, "label": label}
            axis.scatter(x, y, zorder=3, edgecolors="white", linewidths=0.7, **look)
    texts = [
        check.meaning(name).removeprefix("accuracy on the forgotten class, ")
        for check, name, _ in wanted
    ]
    axis.set_yticks(range(len(wanted)), [shorten(text, 60) for text in texts], fontsize=7.5)
    edges = [i for i in range(1, len(wanted)) if wanted[i][0] is not wanted[i - 1][0]]
    for edge in edges:
        axis.axhline(edge - 0.5, color="#C4CAD0", lw=0.8)
    for start in (0, *edges):
        title = wanted[start][0].title
        axis.text(1.035, start, title, fontsize=8.5, va="center", color=INK)
    axis.set(
        ylim=(len(wanted) - 0.4, -0.6),
        xlim=(-0.03, 1.03),
        xlabel="fraction (accuracy, area under the ROC, total variation, agreement)",
    )
    axis.grid(axis="x")
    axis.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _draw_probes(axis: Axes, found: list[TrustRecord]) -> None:
    layers = list(found[0].details["layers"])
    values = torch.tensor([[100 * r.details["layers"][n] for n in layers] for r in found])
    places = range(len(layers))
    mean, low, high = (v.tolist() for v in (values.mean(0), values.amin(0), values.amax(0)))
    axis.plot(places, mean, color=AFTER, marker="o", ms=4, lw=1.8, label="model under test")
    if len(found) > 1:
        spread = "lowest to highest class"
        axis.fill_between(places, low, high, color=AFTER, alpha=0.18, lw=0, label=spread)
    levels = [r.retrained["probe_last"] for r in found if "probe_last" in r.retrained]
    if levels:
        level, label = 100 * sum(levels) / len(levels), "retrained, last layer"
        look = {"color": RETRAINED, "marker": "D", "s": 46, "label": label}
        axis.scatter([len(layers) - 1], [level], zorder=3, **look)
    axis.set_xticks(places, [shorten(name, 22) for name in layers], fontsize=7.5)
    slant(axis, 40)
    every = math.ceil(len(layers) / _PROBES_NAMED)
    for i, text in enumerate(axis.get_xticklabels()):
        text.set_visible(i % every == 0 or i == len(layers) - 1)
    axis.set(ylim=(45, 103), ylabel="balanced accuracy, %\n(50: chance)")
    axis.grid()
    axis.legend(loc="lower right")


def _draw_relearning(axis: Axes, found: list[TrustRecord]) -> None:
    names = list(dict.fromkeys(name for record in found for name in record.forgetful))
    for who, shift in (("forgetful", -0.2), ("retrained", 0.2)):
        rows = [[r.row(name)[who] for r in found] for name in names]
        known = [[100 * value for value in row if value is not None] for row in rows]
        if any(known):
            heights = [sum(v) / len(v) if v else 0.0 for v in known]
            label, color, _, _ = _MODELS[who]
            places = [j + shift for j in range(len(names))]
            axis.bar(places, heights, 0.38, color=color, label=label)
            for x, height in zip(places, heights, strict=True):
                axis.text(x, height + 1.5, f"{height:.0f}", ha="center", fontsize=8.5)
    axis.set_xticks(range(len(names)), [_what_is_learned_from(name) for name in names])
    axis.set(ylim=(0, 128), yticks=range(0, 101, 20), ylabel="accuracy on the class, %")
    axis.grid(axis="y")
    axis.legend(ncols=2, loc="upper center")


def _what_is_learned_from(name: str) -> str:
    if name.endswith("retain_only"):
        return "other classes\nonly"
    count = name.rpartition("_")[2]
    return f"{count} image{'' if count == '1' else 's'}\nof the class"
