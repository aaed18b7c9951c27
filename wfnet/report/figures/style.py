"""The style that all figures share: colours, fonts, how a picture is begun and how it is written.

Figures use matplotlib's object-oriented interface: no window opens and pyplot's state stays as it
is. Colours are those of Okabe and Ito, which colour-blind readers can tell apart; values are in %.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wfnet.services.extras import require
from wfnet.services.files import FilePath, write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure, FigureBase
else:  # matplotlib is imported when a figure is drawn
    Axes = Colormap = Figure = FigureBase = Normalize = Any

BEFORE, AFTER, RETAINED, RETRAINED, INK = "#9AA5B1", "#D55E00", "#0072B2", "#009E73", "#222222"
SERIES = (RETAINED, AFTER, RETRAINED, "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DPI = 160
# Up to this many classes have a bar and a name each; more are drawn as points without names.
NAMED = 40
STYLE = {
    "axes.axisbelow": True,
    "axes.labelsize": 9.5,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "figure.titlesize": 12.5,
    "grid.alpha": 0.25,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "text.parse_math": False,  # class names may hold dollar signs
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}


@contextmanager
def picture(path: FilePath, width: float, height: float) -> Iterator[Figure]:
    """Gives an empty figure to draw on, in the common style, and writes it to ``path`` afterwards.

    Args:
        path: file to write; its ending chooses the format (png, svg, pdf).
        width, height: in inches.

    Raises:
        ImportError: without matplotlib (extra ``viz``).
        ValueError: for an unknown file format, before anything is drawn.
    """
    matplotlib = require("matplotlib", "viz")
    with matplotlib.rc_context(STYLE):
        figure = require("matplotlib.figure", "viz").Figure(
            figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white"
        )
        # A figure that pyplot does not manage draws on this canvas, whatever display there is.
        require("matplotlib.backends.backend_agg", "viz").FigureCanvasAgg(figure)
        suffix = Path(path).suffix.lstrip(".").lower()
        if suffix not in figure.canvas.get_supported_filetypes():
            raise ValueError(
                f"{path} has no ending that names a picture format; use one of .png, .svg, .pdf"
            )
        yield figure
        write_atomically(path, lambda temporary: figure.savefig(temporary, format=suffix))


def shorten(text: str, length: int = 18) -> str:
    """Returns ``text``, its end replaced by an ellipsis where it is longer than ``length``."""
    return text if len(text) <= length else f"{text[: length - 1]}\u2026"


def slant(axis: Axes, degrees: float) -> None:
    """Turns the labels of the x axis so that each ends at its tick."""
    axis.tick_params(axis="x", rotation=degrees)
    for text in axis.get_xticklabels():
        text.set_horizontalalignment("right")
        text.set_rotation_mode("anchor")
