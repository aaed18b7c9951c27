"""The elementwise backward in a pass of its own, against plain PyTorch in fp64."""

from dataclasses import replace

import pytest
import torch
from masked_products import check, check_gradient, layer_below

pytest.importorskip("triton")

from wfnet.kernels.epilogue_bwd import by_source, epilogue_bwd

from wfnet.backends.contract import LayerBelow


@pytest.mark.interpreter
@pytest.mark.parametrize("tokens", [1, 5, 300])
@pytest.mark.parametrize(
    "how",
    [
        {"mask": "branch"},
        {"mask": "kept", "shortcut": True},
        {"mask": "branch", "shortcut": True, "unscaled": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_layer(tokens, how, dtype, nan_memory):
    """With the gradients of a projection shortcut, which receives the same g."""
    shape = (3, 20, tokens, 1)
    dout, skip = torch.randn(2, *shape).to(dtype)
    how = how | {"skip": skip if "shortcut" in how else None}
    below = layer_below(shape, lambda size: torch.randn(size).to(dtype), **how)
    check_gradient(epilogue_bwd(dout, below), dout.double(), below)


@pytest.mark.interpreter
@pytest.mark.parametrize("tokens", [5, 300])
def test_sums_in_columns_of_wider_tables(tokens):
    """Where a sample has several tiles, and where its sums are those of one tile."""
    dout, sums = torch.randn(3, 20, tokens, 1), torch.full((2, 3, 50), torch.nan)
    below = layer_below(tuple(dout.shape), torch.randn)
    below = replace(below, t1=sums[0, :, 4:24], t0=sums[1, :, 20:40])
    check_gradient(epilogue_bwd(dout, below), dout.double(), below)
    assert sums[0, :, :4].isnan().all()


@pytest.mark.interpreter
def test_samples_of_one_image_are_summed(nan_memory):
    source = torch.tensor([3, 1, 3, 0, 3])  # nobody reads image 2
    dout, branch = torch.randn(5, 20, 70, 1), torch.randn(5, 20, 70, 1)
    scale, t1, t0 = torch.rand(5, 20), torch.empty(5, 20), torch.empty(5, 20)
    below = LayerBelow(scale, branch=branch, t1=t1, t0=t0, source=source, images=4)
    found = epilogue_bwd(dout, below).scaled_grad
    scaled = scale[:, :, None, None].double() * dout.double()
    check(found, torch.zeros(4, 20, 70, 1, dtype=torch.float64).index_add_(0, source, scaled))
    assert (found[2] == 0).all()
    check(t0, dout.double().sum((2, 3)))
    check(t1, (dout.double() * branch).sum((2, 3)))
    order, first = by_source(source, 4)
    assert (order.tolist(), first.tolist()) == ([3, 1, 0, 2, 4], [0, 1, 2, 2, 5])


def test_sums_over_no_pixels_are_zero():
    below = layer_below((3, 8, 0, 1), torch.randn)
    epilogue_bwd(torch.zeros(3, 8, 0, 1), below)
    assert (below.t0 == 0).all()
    assert (below.t1 == 0).all()
