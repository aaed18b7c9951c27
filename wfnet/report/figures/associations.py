"""Associations between classes: which of them close the same filters (the paper's Figure 3)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from wfnet.fusion.trace import execution_order
from wfnet.network import WFNet
from wfnet.report.figures.style import AFTER, INK, RETAINED, Axes, picture, shorten
from wfnet.services.files import FilePath

# Filters of each class, and how many classes can be told apart.
TOP, SHOWN = 10, 20


def association_graph(
    net: WFNet, path: FilePath, classes: Sequence[int], names: Sequence[str]
) -> None:
    """Draws which classes close the same filters of the last masked layer to run.

    Each class is linked to the filters with the lowest gates; filters that only one class closes
    are left out. Of many classes, those that share most are drawn.

    Args:
        net: the filtered network.
        path: file to write.
        classes: rows.
        names: names of all classes.
    """
    layer = execution_order(net.model, list(net.masked_layers))[-1]
    links = associations(net.masked_layers[layer].gates()[classes].detach().float().cpu())
    filters = links.shape[1]
    sharing = links[:, links.sum(0) >= 2].sum(1).argsort(descending=True, stable=True)
    shown = sharing[:SHOWN].sort().values
    links, texts = links[shown], [names[classes[i]] for i in shown.tolist()]
    some = "" if len(shown) == len(classes) else f" ({SHOWN} of {len(classes):,} classes)"
    with picture(path, 13.0, 5.4) as figure:
        _draw_graph(figure.subplots(), links, texts)
        kept = int((links.sum(0) >= 2).sum())
        figure.suptitle(
            f"Filters that several classes close, layer {layer}: of the {min(TOP, filters)} "
            f"lowest gates of each class, {kept} of {filters} filters are shared{some}"
        )


def associations(gates: Tensor, top: int = TOP) -> Tensor:
    """Returns whether a filter is among the ``top`` lowest gates of a class.

    Args:
        gates: ``[K, O]``.
        top: filters of each class; among equal gates the first filters count.

    Returns:
        ``[K, O]`` bool.
    """
    lowest = gates.argsort(dim=1, stable=True)[:, :top]
    return torch.zeros_like(gates, dtype=torch.bool).scatter_(1, lowest, True)


def _draw_graph(axis: Axes, links: Tensor, names: Sequence[str]) -> None:
    """Draws classes above, shared filters below in the order of their classes' mean place."""
    axis.set_axis_off()
    shared = (links.sum(0) >= 2).nonzero().squeeze(1)
    if not len(shared):
        axis.text(0.5, 0.5, "no filter is among the lowest gates of two classes", ha="center")
        return
    place = torch.linspace(0, 1, len(links))
    center = (links[:, shared] * place.unsqueeze(1)).sum(0) / links[:, shared].sum(0)
    shared = shared[center.argsort(stable=True)]
    counts = links[:, shared].sum(0)
    below = torch.linspace(0, 1, len(shared)) if len(shared) > 1 else torch.tensor([0.5])
    most = int(counts.max())
    for j, filter_ in enumerate(shared.tolist()):
        strength = 0.25 + 0.55 * (int(counts[j]) - 1) / max(most - 1, 1)
        for i in links[:, filter_].nonzero().squeeze(1).tolist():
            axis.plot([place[i], below[j]], [1, 0], color=RETAINED, lw=1.1, alpha=strength)
    axis.scatter(place, [1] * len(links), s=420, color=INK, zorder=3)
    axis.scatter(below, [0] * len(shared), s=40 + 45 * counts, color=AFTER, zorder=3)
    look = {"rotation": 35, "ha": "left"} if len(links) > 8 else {"ha": "center"}
    for i, name in enumerate(names):
        axis.text(place[i], 1.07, shorten(name, 16), fontsize=10, va="bottom", color=INK, **look)
    number = {"fontsize": 6.5, "rotation": 90} if len(shared) > 30 else {"fontsize": 8}
    for j, filter_ in enumerate(shared.tolist()):
        axis.text(below[j], -0.09, str(filter_), ha="center", va="top", **number)
    axis.text(-0.03, 1, "class", ha="right", va="center", fontsize=10, color=INK)
    axis.text(-0.03, 0, "filter", ha="right", va="center", fontsize=10, color=AFTER)
    legend = f"larger and darker: shared by more classes (2 to {most})"
    axis.text(0.5, -0.26, legend, ha="center", va="top", fontsize=9, color=INK)
    axis.set(xlim=(-0.09, 1.06), ylim=(-0.36, 1.5))
