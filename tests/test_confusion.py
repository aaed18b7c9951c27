"""Where images of forgotten classes go, the order of layers, and figures of these."""

import math

import pytest
import torch
from torch import nn

import wfnet
from wfnet import models
from wfnet.data.tensor_images import TensorImages
from wfnet.evaluation.attribution import AttributionRecord, AttributionResult
from wfnet.evaluation.confusion import ConfusionChange, confusion_change
from wfnet.fusion.trace import execution_order
from wfnet.trust import TrustRecord, TrustResult

CLASSES = 5


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(6, CLASSES))  # fmt: skip
    net = wfnet.WFNet(model, CLASSES)
    with torch.no_grad():
        for alpha in net.filter_parameters():
            alpha.copy_(5 * torch.randn(alpha.shape))
    return net


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(CLASSES).repeat(6)
    pictures = 3 * torch.randn(len(labels), 1, 8, 8, generator=generator)
    return TensorImages(pictures, labels, [f"class {k}" for k in range(CLASSES)])


@pytest.mark.parametrize("batch_size", [3, 256])
def test_counts_are_those_of_one_image_at_a_time(net, images, batch_size):
    found = confusion_change(net, images, batch_size=batch_size, progress=False)
    own = torch.zeros(CLASSES, CLASSES, dtype=torch.int64)
    original, correct = own.clone(), own.clone()
    with torch.no_grad():
        for image, label in zip(images.images, images.labels.tolist(), strict=True):
            original[label, net(image[None]).argmax()] += 1
            for row in range(CLASSES):
                guess = net(image[None], forget=row).argmax().item()
                correct[row, label] += guess == label
                if row == label:
                    own[row, guess] += 1
    assert torch.equal(found.destinations, own)
    assert torch.equal(found.original_destinations, original)
    assert torch.equal(found.correct, correct)
    assert found.seen.eq(6).all()
    before = original.diagonal().double() / 6
    change = found.collateral()
    assert change.diagonal().isnan().all()
    expected = correct[1, 3] / 6 - before[3]
    assert change[1, 3].item() == pytest.approx(expected.item())
    assert found.shares().sum(1).tolist() == pytest.approx([1.0] * CLASSES)


def test_some_rows_and_some_other_rows(net, images):
    found = confusion_change(net, images, classes=[4, 1, 2], other_rows=1, progress=False)
    assert found.destinations.shape == (3, CLASSES)
    assert found.destinations.sum(1).tolist() == [6, 6, 6]
    assert int(found.seen.sum()) == 3 * 6 + len(images)  # own rows, and one other for each image
    whole = confusion_change(net, images, progress=False)
    assert torch.equal(found.destinations, whole.destinations[[4, 1, 2]])
    assert torch.equal(found.original_shares(), whole.original_shares()[[4, 1, 2]])


def test_the_table_survives_a_file(net, images, tmp_path):
    found = confusion_change(net, images, classes=[3, 0], progress=False)
    found.to_json(tmp_path / "confusion.json")
    again = ConfusionChange.from_json(tmp_path / "confusion.json")
    assert again.names == found.names
    for name in ("classes", "destinations", "original_destinations", "seen", "correct"):
        assert torch.equal(getattr(again, name), getattr(found, name))
    (tmp_path / "confusion.json").write_text('{"format": 1}')
    with pytest.raises(ValueError, match="not a confusion table of"):
        ConfusionChange.from_json(tmp_path / "confusion.json")
    with pytest.raises(FileNotFoundError):
        ConfusionChange.from_json(tmp_path / "none.json")


def test_the_network_is_not_changed(net, images):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    modes = [m.training for m in net.modules()]
    state = torch.get_rng_state()
    confusion_change(net, images, progress=False)
    assert all(torch.equal(before[n], v) for n, v in net.state_dict().items())
    assert [m.training for m in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_layers_in_the_order_of_the_forward_pass():
    net = wfnet.WFNet(models.create("resnet", 3, width=8), 3)
    names = list(net.masked_layers)
    assert names[-1] == "layer3.0.downsample.0"
    order = execution_order(net.model, names)
    assert order[-3:] == ["layer3.0.downsample.0", "layer3.0.conv1", "layer3.0.conv2"]
    assert sorted(order) == sorted(names)
    assert execution_order(net.bake(0), names) == order  # plain models, too


def test_a_network_that_cannot_be_traced_keeps_its_order():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.second, self.first = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)

        def forward(self, x):
            return self.second(self.first(x)) if x.sum() > 0 else x

    assert execution_order(Branching(), ["second", "first"]) == ["second", "first"]


# -- figures --------------------------------------------------------------------------------------


@pytest.fixture
def figures(monkeypatch):
    pytest.importorskip("matplotlib")
    from wfnet.report import figures

    monkeypatch.setattr("wfnet.report.figures.style.DPI", 40)
    return figures


@pytest.fixture
def drawn(figures, monkeypatch):
    from matplotlib.figure import Figure

    seen, save = [], Figure.savefig

    def spy(self, *args, **kwargs):
        save(self, *args, **kwargs)
        seen.append(self)

    monkeypatch.setattr(Figure, "savefig", spy)
    return seen


def inside(figure):
    """True if every text that is shown lies inside the picture, else the text."""
    width, height = figure.get_size_inches() * figure.dpi
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
    for text in filter(lambda t: t.get_text(), texts):
        box = text.get_window_extent()
        if not (box.x0 > -2 and box.y0 > -2 and box.x1 < width + 2 and box.y1 < height + 2):
            return text.get_text()
    return True


def test_associations_are_the_lowest_gates(figures):
    gates = torch.tensor([[0.9, 0.1, 0.5, 0.1], [0.2, 0.2, 0.2, 0.9]])
    links = figures.associations(gates, 2)
    assert links.tolist() == [[False, True, False, True], [True, True, False, False]]
    assert figures.associations(gates, 9).all()


def test_association_graph_keeps_shared_filters(net, figures, drawn, tmp_path):
    figures.association_graph(net, tmp_path / "graph.png", top=2)
    links = figures.associations(net.masked_layers["0"].gates(), 2)
    shared = (links.sum(0) >= 2).nonzero().squeeze(1)
    axis = drawn[0].axes[0]
    assert len(axis.lines) == int(links[:, shared].sum())
    shown = [text.get_text() for text in axis.texts]
    assert {str(f) for f in shared.tolist()} <= set(shown)
    assert f"{len(shared)} of 6 filters are shared" in drawn[0].get_suptitle()
    assert inside(drawn[0]) is True


def test_association_graph_of_many_classes_has_no_crowd_of_names(figures, drawn, tmp_path):
    model = nn.Sequential(nn.Conv2d(1, 40, 3), nn.Flatten(), nn.Linear(40, 300))
    net = wfnet.WFNet(model, 300)
    with torch.no_grad():
        for alpha in net.filter_parameters():
            alpha.copy_(torch.randn(alpha.shape, generator=torch.Generator().manual_seed(0)))
    names = [f"a class with a long name, {k}" for k in range(300)]
    figures.association_graph(net, tmp_path / "graph.png", names=names)
    left, right = drawn[0].axes
    assert len(left.get_yticks()) <= 30
    assert len(right.get_yticks()) <= 30
    links = figures.associations(net.masked_layers["0"].gates(), 10)
    assert left.patches[0].get_width() == links.sum(0).max()
    assert inside(drawn[0]) is True
    with pytest.raises(ValueError, match="'fc' is no masked layer"):
        figures.association_graph(net, tmp_path / "b.png", layer="fc")
    with pytest.raises(ValueError, match="top must be at least 1"):
        figures.association_graph(net, tmp_path / "b.png", top=0)


@pytest.mark.parametrize("classes", [5, 1000])
def test_figure_of_confusion(figures, drawn, tmp_path, classes):
    generator = torch.Generator().manual_seed(0)
    size = (classes, classes)
    destinations = (torch.rand(size, generator=generator) < 4 / classes).long()
    seen = torch.full(size, 2)
    correct = torch.randint(0, 3, size, generator=generator)
    original = torch.eye(classes, dtype=torch.int64) * 4 + destinations
    change = ConfusionChange(
        [f"a class with a long name, {k}" for k in range(classes)], torch.arange(classes),
        destinations, original, seen, correct,
    )  # fmt: skip
    figures.confusion(change, tmp_path / "confusion.png")
    assert (tmp_path / "confusion.png").stat().st_size > 1000
    assert inside(drawn[0]) is True
    ticks = [len(a.get_xticks()) + len(a.get_yticks()) for a in drawn[0].axes]
    assert max(ticks) <= 40
    if classes == 5:
        shown = torch.from_numpy(drawn[0].axes[0].images[0].get_array().data)
        torch.testing.assert_close(shown, 100 * change.shares())


@pytest.mark.parametrize("classes", [1, 300])
def test_figure_of_insertion_and_deletion(figures, drawn, tmp_path, classes):
    shares = [0.0, 0.5, 1.0]
    names = ("insertion", "deletion", "insertion_random", "deletion_random")
    records = [
        AttributionRecord(k, str(k), 5, 0.8, 0.1, 0.5, 0.4,
                          {n: [0.0, k / classes, 1.0] for n in names})
        for k in range(classes)
    ]  # fmt: skip
    result = AttributionResult(shares, records, {}, 1.0)
    figures.insertion_deletion(result, tmp_path / "attribution.png")
    for axis, area in zip(drawn[0].axes, ("0.80", "0.10"), strict=True):
        curve = axis.lines[0]
        assert list(curve.get_xdata()) == [0, 50, 100]
        mean = sum(k / classes for k in range(classes)) / classes
        assert curve.get_ydata()[1] == pytest.approx(100 * mean)
        assert any(area in text.get_text() for text in axis.get_legend().get_texts())
        assert "%" in axis.get_xlabel()
    assert inside(drawn[0]) is True


def trust_record(index, check, **values):
    details = {"layers": {"conv1": 0.9, "input of the head": 0.99}} if check == "probing" else {}
    if check == "relearning":
        details = {"course": {"retain_only": [0.0, 0.5]}}
    return TrustRecord(
        index, str(index), check, values, dict.fromkeys(values, 1.0), dict.fromkeys(values, 0.1),
        {}, 1, None, details, 0.1, f"{index}{check}",
    )  # fmt: skip


def test_figure_of_trust_checks(figures, drawn, tmp_path):
    records = [
        trust_record(k, check, **values)
        for k in (0, 3)
        for check, values in (
            ("membership", {"auc_confidence": 0.5 + 0.1 * k}),
            ("relearning", {"acc_f_retain_only": 0.5}),
            ("probing", {"probe_last": 0.99}),
            ("closeness", {"kl_forget": 7.0, "tv_forget": 0.4}),
        )
    ]
    figures.trust_checks(TrustResult(records), tmp_path / "trust.png")
    levels = drawn[0].subfigs[0].axes[0]
    names = [text.get_text() for text in levels.get_yticklabels()]
    assert names == ["auc_confidence", "acc_f_retain_only", "probe_last", "tv_forget"]  # no nats
    under_test = levels.collections[-1].get_offsets()
    assert under_test[0, 0] == pytest.approx(0.65)
    assert inside(drawn[0]) is True
    only = TrustResult([trust_record(1, "closeness", tv_forget=0.2)])
    figures.trust_checks(only, tmp_path / "some.png")
    with pytest.raises(ValueError, match="no records"):
        figures.trust_checks(TrustResult([]), tmp_path / "none.png")


def test_gates_above_one_have_colours_of_their_own(figures):
    pytest.importorskip("matplotlib")
    colors, norm = figures._gate_colors(105.0)
    assert norm.vmax == 100
    colors, norm = figures._gate_colors(373.0)
    assert norm(100.0) == pytest.approx(0.5)
    assert (norm.vmin, norm.vmax) == (0, 373)
    closed, same, amplified = (colors(float(norm(v)))[:3] for v in (0.0, 100.0, 373.0))
    assert closed[2] > closed[0]  # blue
    assert min(same) > 0.9  # white
    assert amplified[0] > amplified[2]  # orange
    assert figures._gate_colors(130.0)[1].vmax == 200  # 30% more does not look like four times
    assert all(100 < tick <= 373 for tick in figures._ticks_above(373))
    assert not math.isnan(norm(50.0))
