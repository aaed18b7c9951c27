"""RowAdam against torch.optim.Adam, rows that must not move, and filters in bfloat16."""

import math

import pytest
import torch
from torch import nn

from wfnet.gate_tables import flatten_filters
from wfnet.untraining.optimizers import RowAdam, stochastic_round

BF16 = torch.bfloat16


def make_params(dtype=torch.float64, widths=(3, 4)):
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(5, width, dtype=torch.float64, generator=generator) for width in widths]
    return [nn.Parameter(values.bfloat16().to(dtype)) for values in drawn]


def set_grads(params, seed, rows):
    """Gradients of some rows; the same for every dtype."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.zeros(5, 1).index_fill(0, rows, 1)
    for p in params:
        p.grad = (keep * (0.3 + torch.randn(p.shape, generator=generator))).bfloat16().to(p.dtype)


def step(optimizer, rows, named):
    """A step with the rows named on the host, or found on the device."""
    occurred = torch.zeros(5, dtype=torch.bool).index_fill(0, rows, True)
    optimizer.step(**({"rows": rows} if named else {"occurred": occurred}))


@pytest.mark.parametrize("named", [True, False])
def test_each_row_is_adam_over_the_steps_in_which_it_occurred(named):
    params = make_params()
    ours = RowAdam(params, lr=0.1)
    alone = {}  # row -> a parameter of its own under dense Adam
    for row in range(5):
        own = [nn.Parameter(p[row : row + 1].detach().clone()) for p in params]
        alone[row] = own, torch.optim.Adam(own, lr=0.1, betas=(0.9, 0.99))
    with flatten_filters(params):
        for number in range(12):
            order = torch.randperm(5, generator=torch.Generator().manual_seed(number))
            rows = order[: 1 + number % 5]
            set_grads(params, number, rows)
            for row in rows.tolist():
                own, adam = alone[row]
                for p, q in zip(params, own, strict=True):
                    q.grad = p.grad[row : row + 1].clone()
                adam.step()
            step(ours, rows, named)
    for row, (own, _) in alone.items():
        for p, q in zip(params, own, strict=True):
            torch.testing.assert_close(p[row : row + 1], q, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="flatten_filters"):
        ours.step()


def test_where_the_kernel_does_not_run_the_tensor_operations_do(monkeypatch, caplog):
    """Triton may be there and have no C compiler: nothing is lost, and it is tried once."""
    pytest.importorskip("triton")
    from wfnet.kernels import row_adam

    calls = []

    def fails(*arguments):
        calls.append(arguments)
        raise RuntimeError("Failed to find C compiler\nmore")

    monkeypatch.setattr(row_adam, "row_adam", fails)
    params = make_params(torch.float32)
    ours = RowAdam(params, lr=0.1)
    monkeypatch.setattr(ours, "_fused", lambda grad: ours._kernel_works)
    with flatten_filters(params):
        for number in range(3):
            set_grads(params, number, torch.arange(3))
            step(ours, torch.arange(3), named=False)
    assert ours.moments()["steps"].flatten().tolist() == [3, 3, 3, 0, 0]
    assert len(calls) == 1
    assert "tensor operations: Failed to find C compiler" in caplog.text


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, BF16])
def test_rows_that_moved_shrink_towards_their_start(named, dtype):
    """The step is Adam's, then each entry is drawn to its start by lr * shrink, and not past it."""
    starts, rows = [3.0, -1.0], torch.tensor([0, 3])
    params, plain = make_params(dtype), make_params(dtype)
    for group in (params, plain):
        for p, start in zip(group, starts, strict=True):
            p.data.mul_(0.02).add_(start)
    before = [p.detach().clone() for p in params]
    ours, adam = RowAdam(params, lr=0.01, shrink=9.0, starts=starts), RowAdam(plain, lr=0.01)
    ours.param_groups[0]["shrink"] = torch.tensor(0.5, dtype=torch.float64)
    with flatten_filters(params), flatten_filters(plain):
        for optimizer, group in ((ours, params), (adam, plain)):
            set_grads(group, 1, rows)
            step(optimizer, rows, named)
    for p, old, moved, start in zip(params, before, plain, starts, strict=True):
        assert torch.equal(p[[1, 2, 4]], old[[1, 2, 4]])
        distance = (moved - start).double()
        if dtype is torch.float64:
            shrunk = start + distance.sign() * (distance.abs() - 0.005).clamp_min(0)
            torch.testing.assert_close(p[rows], shrunk[rows], rtol=1e-12, atol=1e-12)
            assert torch.equal(p[rows] == start, (distance.abs() <= 0.005)[rows])
    found = torch.cat([(p == s)[rows] for p, s in zip(params, starts, strict=True)], 1)
    assert found.any()
    assert not found.all()


# -- filters in bfloat16 --------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1.003, -0.7071, 3.0001, 1e-20, -250.3])
def test_rounding_is_right_in_the_mean(value):
    values = torch.full((8, 20_000), value)
    key = torch.arange(8).unsqueeze(1), torch.ones(8, 1), 0
    found = stochastic_round(values, BF16, *key).double()
    low, high = found.unique()
    assert low < value < high
    error = (found.mean(1) - values[0, 0].double()).abs() / (high - low)
    assert error.max() < 5 * 0.5 / math.sqrt(20_000)  # five standard deviations, of each row
    held = torch.tensor([[value, 0.0, -0.0, math.inf, math.nan]] * 8).bfloat16()
    assert torch.equal(stochastic_round(held.float(), BF16, *key).nan_to_num(7), held.nan_to_num(7))


def test_updates_below_half_a_unit_count_and_so_do_steps_beyond_256():
    """3 + 300 x 0.002: to nearest, bfloat16 (spacing 2^-6 there) would stay at 3 forever."""
    weight = nn.Parameter(torch.full((1, 20_000), 3.0, dtype=BF16))
    optimizer = RowAdam([weight], lr=0.002)
    for _ in range(300):
        weight.grad = torch.full_like(weight, -1.0)
        optimizer.step(rows=torch.tensor([0]))
    assert weight.double().mean().item() == pytest.approx(3.6, abs=0.01)
    assert optimizer.moments()["steps"].item() == 300
