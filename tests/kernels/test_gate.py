"""Rows of gates and their gradients, by kernels, against the definition in fp64."""

import pytest
import torch
from masked_products import check

pytest.importorskip("triton")

from wfnet.kernels.gate import gate_rows, gate_rows_bwd

from wfnet import gates

LABELS = {
    "one": [[0], [4], [-1], [2], [2], [3]],
    "several": [[0, 1, -1], [1, 1, 1], [-1, -1, -1], [-1, 3, 3], [4, 2, 0], [2, 0, 2]],
}


@pytest.mark.interpreter
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("columns", [7, 140])
@pytest.mark.parametrize("normalised", [True, False])
def test_rows_and_their_gradient(labels, columns, normalised):
    alpha = torch.randn(5, columns) * 3
    alpha[0] = 3.0
    forget = torch.tensor(LABELS[labels])
    gate_scale = gates.gate_scale(3.0, normalised)
    rows = gate_rows(alpha, forget, gate_scale)
    check(rows, gates.gate_rows(alpha.double(), forget, gate_scale))
    assert (rows[2] == 1).all()  # no label
    if normalised and labels == "one":
        assert (rows[0] == 1).all()  # a fresh gate
    t = torch.randn(6, columns)
    dalpha = gate_rows_bwd(t, alpha, forget)
    check(dalpha, gates.gate_rows_backward(t.double(), alpha.double(), forget))


@pytest.mark.interpreter
def test_labels_out_of_range():
    alpha = torch.randn(4, 20)
    forget = torch.tensor([[4], [-2], [1], [2**40]])
    rows = gate_rows(alpha, forget, 1.0)
    assert rows[[0, 1, 3]].isnan().all()
    assert rows[2].isfinite().all()
    dalpha = gate_rows_bwd(torch.ones(4, 20), alpha, forget)
    assert (dalpha[[0, 2, 3]] == 0).all()
    check(dalpha[1], torch.sigmoid(-alpha[1].double()))
