"""Pooling kernels against PyTorch: values bit by bit, gradients in fp64, the layer below."""

import pytest
import torch
import torch.nn.functional as F
from masked_products import check, check_gradient, layer_below

pytest.importorskip("triton")

from wfnet.kernels.max_pool import max_pool, max_pool_bwd

from wfnet.backends.contract import PoolGeometry

WINDOWS = {
    "3x3/2": (2, 9, 10, 24, PoolGeometry((3, 3), (2, 2), (1, 1))),
    "2x2/2": (2, 8, 6, 72, PoolGeometry((2, 2), (2, 2))),
    "3x2/1, 2": (1, 7, 11, 8, PoolGeometry((3, 2), (1, 2), (1, 0), ceil_mode=True)),
    "2x2/3": (1, 11, 12, 8, PoolGeometry((2, 2), (3, 3), ceil_mode=True)),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", WINDOWS)
def test_values_and_gradients(case, dtype):
    """Ties included; g, A * g and both sums of the layer below, as in a pass of their own."""
    batch, height, width, channels, window = WINDOWS[case]
    x = torch.randn(batch, channels, height, width).to(dtype).relu()  # many are 0 and equal
    out, positions = max_pool(x, window)
    leaf = x.double().requires_grad_()
    truth = F.max_pool2d(leaf, *window)
    assert torch.equal(out, truth.to(dtype))
    assert positions.dtype == torch.uint8
    assert max_pool(x, window, save=False)[1] is None
    dout = torch.randn(truth.shape).to(dtype)
    (dx,) = torch.autograd.grad(truth, leaf, dout.double())
    size, skip = (height, width), torch.randn(x.shape).to(dtype)
    check(max_pool_bwd(dout, positions, size, window).grad, dx)
    below = layer_below(tuple(x.shape), lambda shape: torch.randn(shape).to(dtype), skip=skip)
    check_gradient(max_pool_bwd(dout, positions, size, window, below), dx, below)


@pytest.mark.interpreter
def test_nan_is_above_all():
    x = torch.randn(1, 8, 6, 6)
    x[0, 0, 2, 2] = torch.nan
    x[0, 1] = -torch.inf
    window = PoolGeometry((3, 3), (2, 2), (1, 1))
    out, _ = max_pool(x, window)
    torch.testing.assert_close(out, F.max_pool2d(x, *window), equal_nan=True, rtol=0, atol=0)
