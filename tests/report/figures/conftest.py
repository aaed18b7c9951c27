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
    """The figures that were saved; every text of them lies inside the picture."""
    from matplotlib.figure import Figure

    seen, save = [], Figure.savefig

    def spy(self, *args, **kwargs):
        save(self, *args, **kwargs)
        seen.append(self)

    monkeypatch.setattr(Figure, "savefig", spy)
    yield seen
    for figure in seen:
        width, height = figure.get_size_inches() * figure.dpi
        boxes = [(text.get_text(), text.get_window_extent()) for text in _texts(figure)]
        assert [
            text
            for text, box in boxes
            if box.x0 < -2 or box.y0 < -2 or box.x1 > width + 2 or box.y1 > height + 2
        ] == []


def _texts(figure):
    parts = (figure, *figure.subfigs)
    texts = [text for part in parts for text in part.texts]
    for axis in (axis for part in parts for axis in part.axes):
        legend = axis.get_legend()
        texts += [*axis.texts, axis.title, *(legend.get_texts() if legend else ())]
        for side in (axis.xaxis, axis.yaxis) if axis.axison else ():
            low, high = sorted(side.get_view_interval())
            ticks = [tick for tick in side.get_major_ticks() if low <= tick.get_loc() <= high]
            texts += [side.label, *(t.label1 for t in ticks if t.label1.get_visible())]
    return [text for text in texts if text.get_text()]


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
