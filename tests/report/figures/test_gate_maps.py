import pytest
import torch

from wfnet.report.figures import gate_heatmap, gate_maps


@pytest.mark.parametrize("classes", [10, 300])
def test_cells_are_the_gates(tmp_path, drawn, make_net, classes):
    net = make_net(classes)
    names = [f"class number {i}" for i in range(classes)]
    gate_heatmap(net, tmp_path / "gates.png", range(classes), names)
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


@pytest.mark.parametrize(("layers", "places"), [(1, ["first"]), (2, ["first", "last"])])
def test_chosen_classes_of_few_masked_layers(tmp_path, drawn, make_net, layers, places):
    gate_heatmap(make_net(10, layers), tmp_path / "gates.png", [7, 2], list("abcdefghij"))
    *maps, _ = drawn[0].axes
    assert [axis.get_title().partition(":")[0] for axis in maps] == places
    assert [text.get_text() for text in maps[0].get_yticklabels()] == ["h", "c"]


def test_gates_above_one_have_colours_of_their_own():
    assert gate_maps._gate_colors(105.0)[1].vmax == 100
    assert gate_maps._gate_colors(130.0)[1].vmax == 200  # 30% more does not look like four times
    norm = gate_maps._gate_colors(373.0)[1]
    assert (norm(0.0), norm(100.0), norm(373.0)) == pytest.approx((0, 0.5, 1))
