import pytest
import torch

from wfnet.report.figures import gate_heatmap, gate_maps


@pytest.mark.parametrize("classes", [10, 300])
def test_cells_are_the_gates(tmp_path, drawn, make_net, overlapping, outside, classes):
    net = make_net(classes)
    names = [f"class number {i}" for i in range(classes)]
    gate_heatmap(net, tmp_path / "gates.png", names=names)
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
    assert overlapping(first.get_yticklabels()) == []
    assert outside(drawn[0]) == []


def test_chosen_classes_in_sorted_channels(tmp_path, drawn, make_net):
    net = make_net(10)
    gate_heatmap(net, tmp_path / "gates.png", classes=[7, 2], sort=True)
    axis = drawn[0].axes[0]
    assert [text.get_text() for text in axis.get_yticklabels()] == ["7", "2"]
    mean = torch.from_numpy(axis.images[0].get_array().data).mean(0)
    assert torch.equal(mean.sort().values, mean)
    with pytest.raises(ValueError, match="class 10 is out of range"):
        gate_heatmap(net, tmp_path / "b.png", classes=[10])
    with pytest.raises(ValueError, match="at least one class"):
        gate_heatmap(net, tmp_path / "b.png", classes=[])


@pytest.mark.parametrize(("layers", "places"), [(1, ["first"]), (2, ["first", "last"])])
def test_few_masked_layers(tmp_path, drawn, make_net, layers, places):
    gate_heatmap(make_net(3, layers), tmp_path / "gates.png")
    assert [axis.get_title().partition(":")[0] for axis in drawn[0].axes[:-1]] == places


def test_gates_above_one_have_colours_of_their_own():
    assert gate_maps._gate_colors(105.0)[1].vmax == 100
    assert gate_maps._gate_colors(130.0)[1].vmax == 200  # 30% more does not look like four times
    colors, norm = gate_maps._gate_colors(373.0)
    assert norm(100.0) == pytest.approx(0.5)
    assert (norm.vmin, norm.vmax) == (0, 373)
    closed, same, amplified = (colors(float(norm(v)))[:3] for v in (0.0, 100.0, 373.0))
    assert closed[2] > closed[0]  # blue
    assert min(same) > 0.9  # white
    assert amplified[0] > amplified[2]  # orange
    assert all(100 < tick <= 373 for tick in gate_maps._ticks_above(373))
