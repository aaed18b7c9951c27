"""Filters and moments in bfloat16: rounded stochastically, repeatable, as good as fp32."""

import math
from contextlib import nullcontext

import pytest
import torch
from small_runs import assert_same_run, config, images, network
from torch import nn

from wfnet.gate_tables import flatten_filters
from wfnet.untraining import untrain
from wfnet.untraining.optimizers import RowAdam, stochastic_round

BF16 = torch.bfloat16


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


@pytest.mark.parametrize("fuse", [True, False])
def test_runs_repeat_and_resume_bitwise(tmp_path, fuse):
    class Interrupted(BaseException):
        pass

    def go(folder=None, resume=False, stop=None):
        def log(record):
            if record["step"] == stop:
                raise Interrupted

        net = network(filter_dtype=BF16)
        settings = config(steps=18, fuse=fuse)
        return net, untrain(net, images(), images(4, 1), settings, folder, resume, False, log=log)

    net, result = go()
    assert all(p.dtype == BF16 for p in net.filter_parameters())
    assert any((p != 3).any() for p in net.filter_parameters())
    with pytest.raises(Interrupted):
        go(tmp_path, stop=12)
    assert_same_run(*go(tmp_path, resume=True), net, result)
    with pytest.raises(ValueError, match="another filters"):
        untrain(network(), images(), images(4, 1), config(steps=18, fuse=fuse), tmp_path, True)
