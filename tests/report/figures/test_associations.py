import pytest
import torch

from wfnet.report.figures import association_graph
from wfnet.report.figures.associations import associations


def test_associations_are_the_lowest_gates():
    gates = torch.tensor([[0.9, 0.1, 0.5, 0.1], [0.2, 0.2, 0.2, 0.9]])
    links = associations(gates, 2)
    assert links.tolist() == [[False, True, False, True], [True, True, False, False]]
    assert associations(gates, 9).all()


@pytest.mark.parametrize("classes", [5, 300])
def test_a_graph_keeps_shared_filters(make_net, drawn, tmp_path, classes):
    net = make_net(classes, layers=1, channels=32)
    names = [f"class {k}" for k in range(classes)]
    association_graph(net, tmp_path / "graph.png", range(classes), names)
    axis = drawn[0].axes[0]
    shown = [text.get_text() for text in axis.texts]
    rows = [k for k, name in enumerate(names) if name in shown]
    assert len(rows) == min(classes, 20)
    links = associations(net.masked_layers["0"].gates())[rows]
    shared = (links.sum(0) >= 2).nonzero().squeeze(1)
    assert len(axis.lines) == int(links[:, shared].sum())
    assert set(map(str, shared.tolist())) <= set(shown)
    assert f"{len(shared)} of 32 filters are shared" in drawn[0].get_suptitle()
