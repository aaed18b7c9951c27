"""First rows from one pass: what carries a class is closed in its row, and nowhere else."""

import pytest
import torch

from wfnet import UntrainConfig, WFNet
from wfnet.data import CorruptImages
from wfnet.evaluation.forward import Forward
from wfnet.gate_tables import flatten_filters, side_by_side
from wfnet.untraining.first_rows import start_rows
from wfnet.untraining.objectives import class_gap


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [3, 1]])
def test_closed_gates_cost_the_class_of_the_row_more_than_others(base, runs, rows):
    net, data = WFNet(base, runs.BARS).double(), runs.bars()
    with flatten_filters(net.filter_parameters()):
        about = torch.tensor(rows), 0.25, Forward.of(net), CorruptImages(0)
        start_rows(net, data, data.labels, *about)
    filters = side_by_side(net.filter_parameters())
    closed = (filters == 0).sum(1)
    assert [row for row in range(runs.BARS) if closed[row]] == sorted(rows)
    assert closed.max() <= 10  # a quarter of two gates for each of 20 channels
    assert ((filters == 0) | (filters == 3)).all()
    images = data.images.double()
    for row in rows:
        with torch.no_grad():
            lost = [class_gap(net(images, f), data.labels) for f in (None, row)]
        lost = lost[0] - lost[1]
        own = data.labels == row
        assert lost[own].mean() > 2 * lost[~own].mean().clamp_min(0)
        assert lost[own].mean() > 1


def test_a_run_that_starts_so_needs_fewer_steps(go, runs):
    found = [
        go(None, None, runs.bars(8, 1), steps=6, saliency=share)[1].best for share in (0.0, 0.25)
    ]
    assert found[1].acc_f < found[0].acc_f
    assert found[1].loss < found[0].loss


def test_a_resumed_run_starts_its_rows_once(go, runs, tmp_path):
    with pytest.raises(runs.Interrupted):
        go(tmp_path, runs.interrupting(runs.bars(), 5), saliency=0.2)
    runs.assert_same_run(*go(tmp_path, saliency=0.2), *go(saliency=0.2))


def test_it_is_of_sigmoid_gates():
    with pytest.raises(ValueError, match="saliency is of sigmoid gates"):
        UntrainConfig.recipe("durable", 10, saliency=0.1)
