"""The masked convolution's input gradient and what it ends in, against plain PyTorch in fp64."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from wfnet.kernels.conv_dgrad import conv_dgrad
from wfnet.kernels.conv_fprop import conv_fprop

from wfnet.backends.contract import ConvGeometry, Epilogue, LayerBelow


@pytest.mark.interpreter
def test_every_kind_of_convolution(convolution, make_layer, check_gradient, nan_memory):
    """Skip gradient, ReLU mask of the layer below, its column sums and its A * g."""
    n, h, w, c, o, k, stride, pad, dil, config = convolution
    if stride == 2 and config.path == "box" and c % config.block_n:
        pytest.skip("strided boxes need whole channel tiles")
    weight = torch.randn(o, c, k, k) / (k * k * c) ** 0.5
    x = torch.zeros(n, c, h, w, dtype=torch.float64, requires_grad=True)
    y = F.conv2d(x, weight.double(), None, stride, pad, dil)
    ag = torch.randn(y.shape)
    (dx,) = torch.autograd.grad(y, x, ag.double())
    masked = config.block_m == 64
    below, skip = make_layer((n, c, h, w), masked=masked), torch.randn(n, c, h, w)
    skip = skip if masked else None
    geometry = ConvGeometry((stride, stride), (pad, pad), (dil, dil))
    found = conv_dgrad(ag, weight, (n, c, h, w), geometry, skip, below, config=config)
    check_gradient(found, dx, below, skip)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_default_configs(dtype, check):
    """The tile sizes that ship, on one tile's worth of work, there and back."""
    x = torch.randn(2, 32, 6, 6).to(dtype)
    weight = (torch.randn(32, 32, 3, 3) / 17).to(dtype)
    scale, geometry = torch.rand(2, 32), ConvGeometry((2, 2), (1, 1))
    out = conv_fprop(x, weight, geometry, Epilogue(scale)).out
    u = F.conv2d(x.double(), weight.double(), stride=2, padding=1)
    check(out, scale[:, :, None, None] * u, dtype)
    dx = conv_dgrad(out, weight, (2, 32, 6, 6), geometry).grad
    truth = torch.nn.grad.conv2d_input((2, 32, 6, 6), weight.double(), out.double(), 2, 1)
    check(dx, truth, dtype)


def test_launcher_checks_its_tensors():
    x, w, table = torch.zeros(2, 8, 4, 4), torch.zeros(8, 8, 1, 1), torch.zeros(2, 8)
    for size, below, message in (
        (9, None, "but the output is"),
        (4, LayerBelow(table, t1=table), "t1 is summed from the branch"),
        (4, LayerBelow(table, relu=True), "ReLU mask"),
        (4, LayerBelow(table, branch=x.half()), "branch must be"),
        (4, LayerBelow(table, branch=x, t1=table[:1]), "column sums must be rows"),
    ):
        with pytest.raises(ValueError, match=message):
            conv_dgrad(x, w, (2, 8, size, size), ConvGeometry(), None, below)
