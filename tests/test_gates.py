"""Gate tables and their backward (wfnet/gates.py)."""

import pytest
import torch

from wfnet import gates, reference


def naive_rows(alpha, forget, scale):
    rows = []
    for labels in forget.tolist():
        rows.append(reference.masked(torch.ones_like(alpha[0]), alpha, labels, scale))
    return torch.stack(rows) if rows else alpha.new_empty(0, alpha.shape[1])


@pytest.mark.parametrize("classes", [1, 3, 1000])
@pytest.mark.parametrize(("batch", "columns"), [(0, 1), (5, 1), (40, 4)])
def test_rows_and_gradient_equal_the_naive_product(classes, batch, columns):
    alpha = torch.randn(classes, 6, dtype=torch.float64, requires_grad=True)
    forget = torch.randint(-1, min(classes, 3), (batch, columns))
    rows = gates.gate_rows(alpha.detach(), forget, 1.3)
    expected = naive_rows(alpha, forget, 1.3)
    torch.testing.assert_close(rows, expected.detach(), rtol=0, atol=1e-12)
    if expected.requires_grad:
        dout = torch.randn_like(rows)
        (wanted,) = torch.autograd.grad(expected, alpha, dout)
        found = gates.gate_rows_backward(dout * rows, alpha.detach(), forget)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bad", [4, -2, 2**40])
def test_out_of_range_is_nan_for_that_sample_alone(bad):
    alpha = torch.randn(4, 5)
    rows = gates.gate_rows(alpha, torch.tensor([[0, 1], [bad, 1], [3, -1]]), 1.0)
    assert rows[1].isnan().all()
    assert not rows[[0, 2]].isnan().any()
    gradient = gates.gate_rows_backward(torch.ones(3, 5), alpha, torch.tensor([[0], [bad], [3]]))
    assert torch.equal(gradient[1:3], torch.zeros(2, 5))


@pytest.mark.parametrize("value", [3.0, 2.0, -4.0])
def test_gates_keep_their_gradient_even_where_they_are_snapped_to_one(value):
    alpha = torch.full((2, 3), value, dtype=torch.float64, requires_grad=True)
    scale = gates.gate_scale(3.0, True)
    gates.gate(alpha, scale).sum().backward()
    slope = scale * torch.sigmoid(alpha) * torch.sigmoid(-alpha)
    torch.testing.assert_close(alpha.grad, slope.detach())


@pytest.mark.parametrize("low", [-1, 0])
def test_segment_sum_is_right_and_bitwise_repeatable(low):
    values, segment = torch.randn(200, 3, 2), torch.randint(low, 5, (200,))
    first = gates.segment_sum(values, segment, 5)
    assert torch.equal(first, gates.segment_sum(values, segment, 5))
    expected = torch.stack([values[segment == k].sum(0) for k in range(5)])
    torch.testing.assert_close(first, expected)
