import itertools

import pytest
import torch
from torch import nn

import wfnet


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("wfnet.report.figures.style.DPI", 60)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, to look inside."""
    from matplotlib.figure import Figure

    seen, save = [], Figure.savefig

    def spy(self, *args, **kwargs):
        save(self, *args, **kwargs)
        seen.append(self)

    monkeypatch.setattr(Figure, "savefig", spy)
    return seen


@pytest.fixture
def make_net():
    def make(classes, layers=4, channels=8):
        sizes = [3, *[channels] * layers]
        convolutions = [nn.Conv2d(a, b, 3) for a, b in itertools.pairwise(sizes)]
        with torch.random.fork_rng():
            model = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(channels, classes))
            net = wfnet.WFNet(model, classes)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for alpha in net.filter_parameters():
                alpha.copy_(5 * torch.randn(alpha.shape, generator=generator))
        return net

    return make


def _texts(figure):
    texts = [t for part in (figure, *figure.subfigs) for t in part.texts]
    for axis in (a for part in (figure, *figure.subfigs) for a in part.axes):
        legend = axis.get_legend()
        texts += [*axis.texts, axis.title, *(legend.get_texts() if legend else ())]
        if axis.axison:
            texts += [axis.xaxis.label, axis.yaxis.label]
            for ticks, limits in ((axis.xaxis, axis.get_xlim()), (axis.yaxis, axis.get_ylim())):
                low, high = sorted(limits)
                for tick in ticks.get_major_ticks():
                    if low <= tick.get_loc() <= high and tick.label1.get_visible():
                        texts.append(tick.label1)
    return [text for text in texts if text.get_text()]


@pytest.fixture
def outside():
    """Texts of a figure that do not lie inside the picture."""

    def find(figure):
        width, height = figure.get_size_inches() * figure.dpi
        return [
            text.get_text()
            for text in _texts(figure)
            for box in [text.get_window_extent()]
            if box.x0 < -2 or box.y0 < -2 or box.x1 > width + 2 or box.y1 > height + 2
        ]

    return find


@pytest.fixture
def overlapping():
    """Pairs of neighbouring texts that are drawn over each other."""

    def find(texts):
        boxes = [(t.get_text(), t.get_window_extent()) for t in texts if t.get_text()]
        return [(a[0], b[0]) for a, b in itertools.pairwise(boxes) if a[1].overlaps(b[1])]

    return find
