"""RowAdam against torch.optim.Adam, rows that must not move, and filters in bfloat16."""

import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from wfnet import untrain
from wfnet.gate_tables import flatten_filters
from wfnet.untraining.optimizers import RowAdam, clip_filters, stochastic_round

BF16 = torch.bfloat16


def make_params(rows=5, widths=(3, 4), dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        nn.Parameter(torch.randn(rows, width, dtype=dtype, generator=generator)) for width in widths
    ]


def set_grads(params, seed, rows=None):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        grad = torch.randn(p.shape, dtype=p.dtype, generator=generator)
        if rows is not None:
            keep = torch.zeros(p.shape[0], 1, dtype=p.dtype)
            keep[rows] = 1
            grad = grad * keep
        p.grad = grad


@pytest.mark.parametrize("named", [True, False])
def test_equals_adam_where_all_rows_occur(named):
    params, twin = make_params(), make_params()
    ours = RowAdam(params, lr=0.1, betas=(0.9, 0.99))
    theirs = torch.optim.Adam(twin, lr=0.1, betas=(0.9, 0.99))
    for step in range(20):
        set_grads(params, step)
        set_grads(twin, step)
        ours.step(rows=torch.arange(5) if named else None)
        theirs.step()
    for a, b in zip(params, twin, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("named", [True, False])
def test_each_row_is_adam_over_the_steps_in_which_it_occurred(named):
    params = make_params()
    ours = RowAdam(params, lr=0.1)
    alone = {}  # row -> a parameter of its own under dense Adam
    for row in range(5):
        own = [nn.Parameter(p[row : row + 1].detach().clone()) for p in params]
        alone[row] = own, torch.optim.Adam(own, lr=0.1, betas=(0.9, 0.99))
    for step in range(12):
        occurring = torch.randperm(5, generator=torch.Generator().manual_seed(step))[: 1 + step % 3]
        set_grads(params, step, occurring)
        for row in occurring.tolist():
            own, adam = alone[row]
            for p, q in zip(params, own, strict=True):
                q.grad = p.grad[row : row + 1].clone()
            adam.step()
        ours.step(rows=occurring if named else None)
    for row, (own, _) in alone.items():
        for p, q in zip(params, own, strict=True):
            torch.testing.assert_close(p[row : row + 1], q, rtol=1e-12, atol=1e-12)


def test_state_goes_through_state_dict():
    params, twin = make_params(), make_params()
    first = RowAdam(params, lr=0.1)
    for step in range(3):
        set_grads(params, step, torch.tensor([0, step]))
        first.step()
    second = RowAdam(twin, lr=0.5)
    second.load_state_dict(first.state_dict())
    for p, q in zip(params, twin, strict=True):
        q.data.copy_(p.data)
    for optimizer, some in ((first, params), (second, twin)):
        set_grads(some, 9)
        optimizer.step()
    assert second.param_groups[0]["lr"] == 0.1
    for a, b in zip(params, twin, strict=True):
        assert torch.equal(a, b)


def test_a_learning_rate_schedule_of_torch_works():
    params = make_params()
    optimizer = RowAdam(params, lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    set_grads(params, 0)
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_a_parameter_without_gradient_stays():
    params = make_params()
    optimizer = RowAdam(params)
    set_grads(params, 0)
    params[1].grad = None
    before = params[1].detach().clone()
    optimizer.step()
    assert torch.equal(params[1], before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"params": [nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(3, 3))]}, "same K"),
        ({"params": [nn.Parameter(torch.zeros(4))]}, "must be \\[K, O\\]"),
        ({"params": make_params(), "lr": -1.0}, "lr=-1.0"),
        ({"params": make_params(), "betas": (1.0, 0.9)}, "out of range"),
        ({"params": [{"params": make_params()}, {"params": make_params()}]}, "parameter groups"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        RowAdam(**arguments)


def test_foreign_state_is_refused():
    optimizer = RowAdam(make_params(rows=5))
    with pytest.raises(ValueError, match="does not fit: expected"):
        optimizer.load_moments(RowAdam(make_params(rows=6)).moments())


def test_clipping():
    params = [nn.Parameter(torch.tensor([[-5.0, 0.5, 9.0]]))]
    clip_filters(params, 3)
    assert params[0].tolist() == [[-3.0, 0.5, 3.0]]


def test_where_the_kernel_does_not_run_the_tensor_operations_do(monkeypatch, caplog):
    """Triton may be there and have no C compiler: nothing is lost, and it is tried once."""
    pytest.importorskip("triton")
    from wfnet.kernels import row_adam

    calls = []

    def fails(*arguments):
        calls.append(arguments)
        raise RuntimeError("Failed to find C compiler\nmore")

    monkeypatch.setattr(row_adam, "row_adam", fails)
    params, twin = make_params(dtype=torch.float32), make_params(dtype=torch.float32)
    ours, theirs = RowAdam(params, lr=0.1), RowAdam(twin, lr=0.1)
    monkeypatch.setattr(ours, "_fused", lambda grad: ours._kernel_works)
    occurred = torch.tensor([True, False, True, True, False])
    with flatten_filters(params):
        for step in range(3):
            set_grads(params, step)
            set_grads(twin, step)
            ours.step(occurred=occurred)
            theirs.step(occurred=occurred)
    for a, b in zip(params, twin, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(ours.moments()["steps"], theirs.moments()["steps"])
    assert len(calls) == 1
    assert "tensor operations: Failed to find C compiler" in caplog.text
    lr = calls[0][7]
    assert lr.shape == ()


# -- shrinking towards the start ------------------------------------------------------------------


@pytest.mark.parametrize("how", ["rows", "all", "occurred", "grad", "flat", "flat_occurred"])
def test_rows_that_moved_shrink_towards_their_start(how):
    """The step is Adam's, then each entry is drawn to its start by lr * shrink, and not past it."""
    starts = [3.0, -1.0]
    params, plain = make_params(), make_params()
    for group in (params, plain):
        for p, start in zip(group, starts, strict=True):
            p.data.mul_(0.02).add_(start)
    ours = RowAdam(params, lr=0.01, shrink=0.5, starts=starts)
    adam = RowAdam(plain, lr=0.01)
    rows = torch.arange(5) if how == "all" else torch.tensor([0, 3])
    set_grads(params, 1, rows)
    set_grads(plain, 1, rows)
    occurred = torch.zeros(5, dtype=torch.bool).index_fill_(0, rows, True)
    before = [p.detach().clone() for p in params]
    with flatten_filters(params) if "flat" in how else nullcontext():
        if "occurred" in how:
            ours.step(occurred=occurred)
        else:
            ours.step(rows=None if how == "grad" else rows)
    adam.step(rows=rows)
    for p, old, moved, start in zip(params, before, plain, starts, strict=True):
        distance = moved.detach() - start
        shrunk = start + distance.sign() * (distance.abs() - 0.005).clamp_min(0)
        torch.testing.assert_close(p[rows].detach(), shrunk[rows], rtol=1e-12, atol=1e-12)
        assert torch.equal(p[~occurred], old[~occurred])
        assert torch.equal(p[rows] == start, (distance.abs() <= 0.005)[rows])
    found = torch.cat([(p == s)[rows] for p, s in zip(params, starts, strict=True)], 1)
    assert found.any()
    assert not found.all()


def test_shrinking_of_bfloat16_and_by_a_tensor():
    params = make_params(dtype=BF16)
    ours = RowAdam(params, lr=0.125, shrink=100.0, starts=[3.0, -1.0])
    ours.param_groups[0]["shrink"] = torch.tensor(0.0)
    plain = make_params(dtype=BF16)
    adam = RowAdam(plain, lr=0.125)
    for optimizer, group in ((ours, params), (adam, plain)):
        set_grads(group, 0)
        optimizer.step(rows=torch.tensor([1]))
    for a, b in zip(params, plain, strict=True):
        assert torch.equal(a, b)
    ours.param_groups[0]["shrink"] = torch.tensor(100.0)
    ours.step(occurred=torch.tensor([False, True, False, False, False]))
    for p, old, start in zip(params, plain, [3.0, -1.0], strict=True):
        assert (p[1] == start).all()
        assert torch.equal(p[2:], old[2:])
    with pytest.raises(ValueError, match="one start for each filter matrix"):
        RowAdam(params, shrink=0.1, starts=[3.0])


# -- filters in bfloat16 --------------------------------------------------------------------------


def rounded(values, steps=1, stream=0, rows=None):
    rows = torch.arange(len(values)) if rows is None else rows
    counts = torch.full((len(values), 1), float(steps))
    return stochastic_round(values, BF16, rows.unsqueeze(1), counts, stream)


def test_rounding_is_right_in_the_mean():
    for value in (1.003, -0.7071, 3.0001, 1e-20, -250.3):
        values = torch.full((8, 20_000), value)
        found = rounded(values).double()
        both = found.unique()
        assert len(both) == 2
        assert both[0] < value < both[1]
        spacing = both[1] - both[0]
        error = (found.mean(1) - values[0, 0].double()).abs() / spacing
        assert error.max() < 5 * 0.5 / math.sqrt(20_000)  # five standard deviations, of each row


def test_what_bfloat16_holds_stays():
    values = torch.randn(3, 1000).bfloat16().float()
    special = torch.tensor([[0.0, -0.0, math.inf, -math.inf, math.nan, 3.0, 2.0**-126]])
    assert torch.equal(rounded(values), values.bfloat16())
    assert torch.equal(rounded(special).float().nan_to_num(7), special.nan_to_num(7))
    double = torch.randn(2, 2, dtype=torch.float64)
    assert torch.equal(stochastic_round(double, torch.float64, None, None, 0), double)


def test_random_bits_depend_on_row_step_stream_and_column_alone():
    values = torch.full((4, 4096), 1.003)
    once = rounded(values)
    assert torch.equal(once, rounded(values))
    part = torch.tensor([2, 0])
    assert torch.equal(rounded(values[:2], rows=part), once[part])
    for other in (rounded(values, steps=2), rounded(values, stream=1), once[[1, 2, 3, 0]]):
        equal = (other == once).double().mean().item()
        up = (once.float() > 1.003).double().mean().item()
        assert equal == pytest.approx(up**2 + (1 - up) ** 2, abs=0.02)  # as of independent bits


def params_of(dtype, rows=5, widths=(300, 500)):
    generator = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(torch.randn(rows, width, generator=generator).bfloat16().to(dtype))
        for width in widths
    ]


@pytest.mark.parametrize("named", ["rows", "occurred", "neither"])
@pytest.mark.parametrize("flat", [True, False])
def test_it_follows_fp32(named, flat):
    """At each step the mean over entries differs by little; absent rows keep every bit."""
    ours, theirs = params_of(BF16), params_of(torch.float32)
    before = [p[4].clone() for p in ours]
    with flatten_filters(ours) if flat else nullcontext():
        optimizers = [RowAdam(params, lr=0.05) for params in (ours, theirs)]
        for step in range(30):
            generator = torch.Generator().manual_seed(step)
            rows = torch.randperm(4, generator=generator)[:3]
            occurred = torch.zeros(5, dtype=torch.bool).index_fill(0, rows, True)
            for p, q in zip(ours, theirs, strict=True):
                gradient = 0.3 + torch.randn(p.shape, generator=generator)
                gradient = (gradient * occurred.unsqueeze(1)).bfloat16()
                p.grad, q.grad = gradient, gradient.float()
            given = {"rows": {"rows": rows}, "occurred": {"occurred": occurred}, "neither": {}}
            for optimizer in optimizers:
                optimizer.step(**given[named])
    assert optimizers[0].moments()["exp_avg"].dtype == BF16
    assert optimizers[0].moments()["steps"].dtype == torch.float32
    assert torch.equal(optimizers[0].moments()["steps"], optimizers[1].moments()["steps"])
    for p, q, old in zip(ours, theirs, before, strict=True):
        assert p.dtype == BF16
        assert torch.equal(p[4], old)
        torch.testing.assert_close(p.float(), q, rtol=0.05, atol=0.06)
        assert (p.float() - q).mean().abs() < 0.002


def test_updates_below_half_a_unit_count():
    """3 + 100 x 0.002: to nearest, bfloat16 (spacing 2^-6 there) would stay at 3 forever."""
    weight = nn.Parameter(torch.full((2, 20_000), 3.0, dtype=BF16))
    optimizer = RowAdam([weight], lr=0.002)
    for _ in range(100):
        weight.grad = torch.full_like(weight, -1.0)
        optimizer.step(rows=torch.tensor([0]))
    assert (weight[1] == 3).all()
    assert weight[0].double().mean().item() == pytest.approx(3.2, abs=0.005)
    assert (torch.tensor(3.0, dtype=BF16) + 0.002).item() == 3.0


def test_step_counts_go_beyond_256():
    weight = nn.Parameter(torch.zeros(1, 4, dtype=BF16))
    optimizer = RowAdam([weight], lr=1e-3)
    for _ in range(300):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert optimizer.moments()["steps"].item() == 300


def test_runs_repeat_and_resume_bitwise(runs, tmp_path):
    def go(folder=None, resume=False, stop=None):
        def log(record):
            if record["step"] == stop:
                raise runs.Interrupted

        net = runs.network(filter_dtype=BF16)
        data = runs.images(), runs.images(4, 1)
        return net, untrain(net, *data, runs.config(steps=18), folder, resume, False, log=log)

    net, result = go()
    assert all(p.dtype == BF16 for p in net.filter_parameters())
    assert any((p != 3).any() for p in net.filter_parameters())
    with pytest.raises(runs.Interrupted):
        go(tmp_path, stop=12)
    runs.assert_same_run(*go(tmp_path, resume=True), net, result)
    with pytest.raises(ValueError, match="another filters"):
        untrain(
            runs.network(), runs.images(), runs.images(4, 1), runs.config(steps=18), tmp_path, True
        )
