import torch

from wfnet.report.figures import association_graph
from wfnet.report.figures.associations import associations


def test_associations_are_the_lowest_gates():
    gates = torch.tensor([[0.9, 0.1, 0.5, 0.1], [0.2, 0.2, 0.2, 0.9]])
    links = associations(gates, 2)
    assert links.tolist() == [[False, True, False, True], [True, True, False, False]]
    assert associations(gates, 9).all()


def test_a_graph_keeps_shared_filters(make_net, drawn, tmp_path):
    net = make_net(5, layers=1, channels=16)
    association_graph(net, tmp_path / "graph.png", range(5), list("abcde"))
    links = associations(net.masked_layers["0"].gates())
    shared = (links.sum(0) >= 2).nonzero().squeeze(1)
    axis = drawn[0].axes[0]
    assert len(axis.lines) == int(links[:, shared].sum())
    assert {*"abcde", *map(str, shared.tolist())} <= {text.get_text() for text in axis.texts}
    assert f"{len(shared)} of 16 filters are shared" in drawn[0].get_suptitle()


def test_many_classes_have_no_crowd_of_names(make_net, drawn, tmp_path):
    net = make_net(300, layers=1, channels=40)
    names = [f"a class with a long name, {k}" for k in range(300)]
    association_graph(net, tmp_path / "graph.png", range(300), names)
    left, right = drawn[0].axes
    assert len(left.get_yticks()) <= 30
    assert len(right.get_yticks()) == 30  # of names that begin alike
    links = associations(net.masked_layers["0"].gates())
    assert left.patches[0].get_width() == links.sum(0).max()
