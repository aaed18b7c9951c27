"""The figure of what an attacker gets back from an exported file, beside retrained networks."""

from collections.abc import Callable, Mapping

from wfnet.report.figures.style import AFTER, BEFORE, INK, RETAINED, RETRAINED, SERIES, picture
from wfnet.services.files import FilePath

# Label of what is done with the file, with check and measure of `wfnet trust`.
ATTACKS = {
    "nothing": ("removal", "acc_f"),
    "BatchNorm\nre-estimated": ("removal", "acc_f_batchnorm_all"),
    "fine-tuned on\nother classes": ("relearning", "acc_f_retain_only"),
    "fine-tuned with\none image of it": ("relearning", "acc_f_from_1"),
    "fine-tuned\nwith ten": ("relearning", "acc_f_from_10"),
    "its head row\nfrom ten": ("prototypes", "acc_f_head_10"),
    "the base's row\nput back": ("removal", "acc_f_base_head"),
    "its logit\nshifted": ("removal", "acc_f_offset"),
}
_COLORS = AFTER, RETAINED, SERIES[5], RETRAINED, INK


def attack_levels(measured: Callable[[str, str], float | None]) -> dict[str, float]:
    """Returns accuracies in % by label, from fractions by (check, measure), where there are any."""
    found = {label: measured(*names) for label, names in ATTACKS.items()}
    return {label: 100 * value for label, value in found.items() if value is not None}


def attacks(before: float, bars: Mapping[str, Mapping[str, float]], path: FilePath) -> None:
    """Draws the accuracy on the forgotten class after every attack.

    Args:
        before: of the original network, in %.
        bars: accuracies in % by name of a network (five at most), then by attack.
        path: file to write.
    """
    labels = [label for label in ATTACKS if all(label in levels for levels in bars.values())]
    step = 0.81 / len(bars)
    with picture(path, 8.6, 3.0) as figure:
        axis = figure.subplots()
        axis.axhline(before, color=BEFORE, ls="--", label=f"before: {before:.1f}")
        for number, (name, levels) in enumerate(bars.items()):
            color, heights = _COLORS[number], [levels[label] for label in labels]
            shift = step * (number - (len(bars) - 1) / 2)
            places = [place + shift for place in range(len(labels))]
            axis.bar(places, heights, 0.92 * step, color=color, label=name)
            for place, height in zip(places, heights, strict=True):
                axis.text(place, height + 2, f"{height:.0f}", ha="center", fontsize=6, color=color)
        axis.set_xticks(range(len(labels)), labels, fontsize=7.5)
        axis.set(ylim=(0, 116), yticks=range(0, 101, 20), ylabel="accuracy on the class, %")
        figure.legend(
            ncols=6, loc="outside upper center", fontsize=7.5, handlelength=1.2, columnspacing=1.2
        )
