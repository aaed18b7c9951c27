"""Figures of a run, one module for each family; matplotlib is imported when one is drawn.

Each is a function that writes the file ``path``, whose ending chooses the format (png, svg, pdf).
It raises ImportError without matplotlib (extra ``viz``), and ValueError for an unknown format.
"""

from wfnet.report.figures.accuracies import overview
from wfnet.report.figures.associations import association_graph
from wfnet.report.figures.attack_bars import attack_levels, attacks
from wfnet.report.figures.confusions import confusion
from wfnet.report.figures.curves import insertion_deletion, training_curves
from wfnet.report.figures.gate_maps import gate_heatmap

__all__ = [
    "association_graph",
    "attack_levels",
    "attacks",
    "confusion",
    "gate_heatmap",
    "insertion_deletion",
    "overview",
    "training_curves",
]
