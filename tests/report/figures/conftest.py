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
    """The figures that were saved; all that is drawn lies inside the picture."""
    from matplotlib.figure import Figure

    seen, save = [], Figure.savefig

    def spy(self, *args, **kwargs):
        save(self, *args, **kwargs)
        seen.append(self)

    monkeypatch.setattr(Figure, "savefig", spy)
    yield seen
    for figure in seen:
        box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
        assert min(box.x0, box.y0) >= -0.03
        assert box.x1 <= width + 0.03
        assert box.y1 <= height + 0.03


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
