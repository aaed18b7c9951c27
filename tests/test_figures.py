import importlib
import itertools
import math
import sys

import pytest
import torch
from torch import nn

import wfnet
from wfnet.evaluation import ClassRecord, EvaluationResult, Scores
from wfnet.report import figures

matplotlib_figure = pytest.importorskip("matplotlib.figure")


def make_result(classes, seed=0, name="class {}"):
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(classes, 4, generator=generator).tolist()
    records = [
        ClassRecord(
            index=i, name=name.format(i), n_forget=5, n_retain=5 * (classes - 1),
            acc_r=0.9 + 0.02 * r, acc_f=0.3 * f if f > 0.8 else 0.0, acc_r_top5=1.0,
            acc_f_top5=0.2, zrf=0.7, original_acc_r=0.93, original_acc_f=0.5 + 0.5 * o,
            original_acc_r_top5=1.0, original_acc_f_top5=1.0, original_zrf=0.5,
        )
        for i, (r, f, o, _) in enumerate(values)
    ]  # fmt: skip
    scores = Scores(0.91, 0.01, 1.0, 0.1, 0.7)
    return EvaluationResult(records, scores, scores, math.e, {"num_classes": classes}, 1.0)


def make_net(classes, layers=4):
    convolutions = [nn.Conv2d(3 if i == 0 else 8, 8, 3) for i in range(layers)]
    net = wfnet.WFNet(nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(8, classes)), classes)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for alpha in net.filter_parameters():
            alpha.copy_(5 * torch.randn(alpha.shape, generator=generator))
    return net


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch):
    monkeypatch.setattr(figures, "_DPI", 60)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, to look inside."""
    seen = []
    save = matplotlib_figure.Figure.savefig

    def spy(self, *args, **kwargs):
        save(self, *args, **kwargs)
        seen.append(self)

    monkeypatch.setattr(matplotlib_figure.Figure, "savefig", spy)
    return seen


def texts_inside(figure, texts):
    """Whether drawn texts lie inside the picture, and none overlaps the next one."""
    boxes = [t.get_window_extent() for t in texts if t.get_text() and t.get_visible()]
    width, height = figure.get_size_inches() * figure.dpi
    inside = all(b.x0 >= -1 and b.y0 >= -1 and b.x1 <= width + 1 and b.y1 <= height + 1
                 for b in boxes)  # fmt: skip
    apart = not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))
    return inside and apart


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("classes", "name"), [(2, "{}"), (10, "{}"), (12, "airplane no. {}"),
                                               (1000, "class {}")])  # fmt: skip
def test_accuracy_per_class(tmp_path, drawn, classes, name):
    result = make_result(classes, name=name)
    figures.accuracy_per_class(result, tmp_path / "accuracy.png")
    assert is_png(tmp_path / "accuracy.png")
    (figure,) = drawn
    upper, lower = figure.axes
    for axis, measure in ((upper, "acc_f"), (lower, "acc_r")):
        assert "%" in axis.get_ylabel()
        if classes <= 40:
            bars = [[bar.get_height() for bar in container] for container in axis.containers]
        else:
            bars = [points.get_offsets()[:, 1].tolist() for points in axis.collections]
        ordered = sorted(result.records, key=lambda r: 0 if classes <= 40 else -r.original_acc_f)
        expected = [100 * getattr(r, f"original_{measure}") for r in ordered]
        assert bars[0] == pytest.approx(expected)
        assert bars[1] == pytest.approx([100 * getattr(r, measure) for r in ordered])
        low, high = axis.get_ylim()
        assert low <= min(bars[1])
        assert high >= max(bars[1])
    right = lower.get_xlim()[1]
    labels = [t for t in lower.get_xticklabels() if 0 <= t.get_position()[0] <= right]
    assert texts_inside(figure, labels) or classes == 12  # slanted boxes overlap, texts do not
    assert len(labels) <= 40


def test_accuracy_can_be_sorted(tmp_path, drawn):
    result = make_result(12)
    figures.accuracy_per_class(result, tmp_path / "a.png", sort="acc_f")
    heights = [bar.get_height() for bar in drawn[0].axes[0].containers[1]]
    assert heights == sorted(heights, reverse=True)
    names = [text.get_text() for text in drawn[0].axes[1].get_xticklabels()]
    assert names[0] == max(result.records, key=lambda r: r.acc_f).name
    with pytest.raises(ValueError, match="sort='size' is unknown"):
        figures.accuracy_per_class(result, tmp_path / "b.png", sort="size")


@pytest.mark.parametrize("classes", [10, 40, 300])
def test_gate_heatmap(tmp_path, drawn, classes):
    net = make_net(classes)
    names = [f"class number {i}" for i in range(classes)]
    figures.gate_heatmap(net, tmp_path / "gates.png", names=names)
    assert is_png(tmp_path / "gates.png")
    first, middle, last, bar = drawn[0].axes
    titles = [axis.get_title() for axis in (first, middle, last)]
    assert titles == ["first: 0", "intermediate: 2", "last: 3"]
    assert "%" in bar.get_ylabel()
    for axis, layer in ((first, "0"), (middle, "2"), (last, "3")):
        shown = torch.from_numpy(axis.images[0].get_array().data)
        gates = 100 * net.masked_layers[layer].gates().detach()
        step_rows, step_columns = shown.shape[0] // classes, shown.shape[1] // 8
        torch.testing.assert_close(shown[::step_rows, ::step_columns], gates)
        assert axis.get_ylim() == (classes - 0.5, -0.5)
    assert texts_inside(drawn[0], first.get_yticklabels())
    assert len(first.get_yticks()) <= 40


def test_gate_heatmap_of_chosen_classes_in_sorted_channels(tmp_path, drawn):
    net = make_net(10)
    figures.gate_heatmap(net, tmp_path / "gates.png", classes=[7, 2], sort=True)
    axis = drawn[0].axes[0]
    assert [text.get_text() for text in axis.get_yticklabels()] == ["7", "2"]
    mean = torch.from_numpy(axis.images[0].get_array().data).mean(0)
    assert torch.equal(mean.sort().values, mean)
    with pytest.raises(ValueError, match="class 10 is out of range"):
        figures.gate_heatmap(net, tmp_path / "b.png", classes=[10])
    with pytest.raises(ValueError, match="at least one class"):
        figures.gate_heatmap(net, tmp_path / "b.png", classes=[])


@pytest.mark.parametrize(("layers", "places"), [(1, ["first"]), (2, ["first", "last"])])
def test_few_masked_layers(tmp_path, drawn, layers, places):
    figures.gate_heatmap(make_net(3, layers), tmp_path / "gates.png")
    titles = [axis.get_title().partition(":")[0] for axis in drawn[0].axes[:-1]]
    assert titles == places


@pytest.mark.parametrize("classes", [10, 100])
def test_overview(tmp_path, drawn, classes):
    figures.overview(make_result(classes), make_net(classes), tmp_path / "overview.png")
    assert is_png(tmp_path / "overview.png")
    width, height = drawn[0].get_size_inches()
    assert width > 2.5 * height
    left = drawn[0].subfigs[0]
    assert f"any of {classes} classes" in left.get_suptitle()
    legend = left.axes[0].get_legend()
    assert len(legend.get_texts()) == 3
    assert texts_inside(drawn[0], legend.get_texts())
    assert texts_inside(drawn[0], [axis.title for axis in drawn[0].subfigs[1].axes])


def test_overview_of_some_classes(tmp_path, drawn):
    result = make_result(10)
    some = EvaluationResult(
        [result.records[7], result.records[2]], result.mean, result.original, 2, {}, 0.0
    )
    figures.overview(some, make_net(10), tmp_path / "overview.png")
    rows = drawn[0].subfigs[1].axes[0].get_yticklabels()
    assert [text.get_text() for text in rows] == ["class 2", "class 7"]


def test_training_curves(tmp_path, drawn):
    history = [{"step": 10 * i, "loss": 2.0 / (i + 1), "lr": 0.1, "epoch": "a"} for i in range(50)]
    history[3]["loss"] = math.nan
    history[0] |= {"acc_r": 1.0, "acc_f": 1.0}
    history[49] |= {"acc_r": torch.tensor(0.5), "acc_f": 0.0}
    figures.training_curves(history, tmp_path / "curves.png")
    losses, accuracies = drawn[0].axes
    assert len(losses.lines[0].get_xdata()) == 49
    assert list(losses.lines[0].get_xdata()[:4]) == [0, 10, 20, 40]
    assert [list(line.get_ydata()) for line in accuracies.lines] == [[100, 50], [100, 0]]
    assert "%" in accuracies.get_ylabel()


def test_training_curves_of_losses_alone(tmp_path, drawn):
    figures.training_curves([{"loss_forget": 1.0}, {"loss_forget": 0.5}], tmp_path / "c.svg")
    (axis,) = drawn[0].axes
    assert axis.get_ylabel() == "loss forget"
    assert (tmp_path / "c.svg").read_text().startswith("<?xml")
    with pytest.raises(ValueError, match="no losses or accuracies"):
        figures.training_curves([{"lr": 1.0}], tmp_path / "d.png")


def test_unknown_format_writes_nothing(tmp_path):
    for name in ("gates", "gates.xyz"):
        with pytest.raises(ValueError, match="no ending that names a picture format"):
            figures.gate_heatmap(make_net(2), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_missing_matplotlib_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install wfnet\[viz\]"):
        figures.gate_heatmap(make_net(2), tmp_path / "gates.png")


def test_importing_figures_needs_no_matplotlib(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    importlib.reload(figures)


def test_pyplot_and_the_random_state_are_left_alone(tmp_path):
    state = torch.get_rng_state()
    before = "matplotlib.pyplot" in sys.modules
    figures.overview(make_result(3), make_net_without_seed(3), tmp_path / "o.png")
    assert ("matplotlib.pyplot" in sys.modules) == before
    assert torch.equal(torch.get_rng_state(), state)


def make_net_without_seed(classes):
    with torch.random.fork_rng():
        return make_net(classes)
