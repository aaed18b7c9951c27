"""Adam over the rows that occurred, in one kernel, against the tensor operations in fp64."""

import pytest
import torch
from masked_products import check

pytest.importorskip("triton")

from wfnet.gate_tables import flatten_filters
from wfnet.untraining.optimizers import RowAdam


@pytest.mark.interpreter
@pytest.mark.parametrize(("width", "shrink"), [(40, 0.0), (1500, 0.0), (40, 0.3)])
def test_steps_of_some_rows(width, shrink, monkeypatch):
    """The others do not move, and their gradients are not read."""

    def params(dtype):
        generator = torch.Generator().manual_seed(1)
        drawn = torch.randn(6, width, generator=generator).to(dtype)
        return [torch.nn.Parameter(part) for part in drawn.split([width - 8, 8], 1)]

    mine, exact = params(torch.float32), params(torch.float64)
    settings = {"lr": 0.1, "shrink": shrink, "starts": [0.5, -1.0]}
    ours, theirs = RowAdam(mine, **settings), RowAdam(exact, **settings)
    monkeypatch.setattr(ours, "_fused", lambda grad: True)
    monkeypatch.setattr(theirs, "_fused", lambda grad: False)
    with flatten_filters(mine), flatten_filters(exact):
        start = torch.cat(list(exact), 1).clone()
        for step in range(5):
            gradient = torch.randn(6, width)
            occurred = torch.tensor([True, False, step < 2, False, step % 2 == 0, True])
            gradient[~occurred] = torch.nan  # never read
            for group, drawn in ((mine, gradient), (exact, gradient.nan_to_num().double())):
                for parameter, part in zip(group, drawn.split([width - 8, 8], 1), strict=True):
                    parameter.grad = part
            ours.param_groups[0]["lr"] = torch.tensor(0.1)
            ours.step(occurred=occurred)
            theirs.step(occurred=occurred)
        found, truth = torch.cat(list(mine), 1), torch.cat(list(exact), 1)
        assert torch.equal(found[[1, 3]].double(), start[[1, 3]])
        assert torch.equal(found == 0.5, truth == 0.5)
        assert bool((truth == 0.5).any()) == (shrink > 0)
        check(found - start.float(), truth - start)
    for name, moment in ours.moments().items():
        check(moment, theirs.moments()[name])
