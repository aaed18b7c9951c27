"""Moments taken in a product's epilogue, and the passes around them, against PyTorch in fp64."""

import pytest
import torch
import torch.nn.functional as F
from masked_products import Forward, check, sizes

pytest.importorskip("triton")

from wfnet.kernels.conv_fprop import conv_moments
from wfnet.kernels.moments import combine

pytestmark = pytest.mark.interpreter


def check_moments(x, weight, geometry, config=None):
    """Of what is stored: its own moments."""
    u, mean, var = conv_moments(x, weight, geometry, config=config)
    truth, middle = torch.var_mean(u.double(), (2, 3), correction=0)
    check(mean, middle)
    check(var, truth)
    return u


def test_every_kind_of_convolution(convolution, nan_memory):
    case, config = convolution
    made = Forward(case, residual=False, shift=False, relu=False)
    how = made.geometry.stride, made.geometry.padding, made.geometry.dilation
    u = check_moments(made.x, made.weight, made.geometry, config)
    check(u, F.conv2d(made.x.double(), made.weight.double(), None, *how), bound=made.bound)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (7, 7), (13, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_linear_maps_and_images_of_a_few_pixels(size, dtype, nan_memory):
    """Also those whose tiles meet too many samples to take moments."""
    made = Forward(sizes(5, *size, 16, 24), dtype)
    check_moments(made.x, made.weight, made.geometry)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ["box", "packed", "gather", "flat"])
def test_a_mean_of_100_leaves_a_variance_of_1(kind, dtype, tiles):
    """The difference of mean squares and squared means would be off by a thousandth."""
    kernel = 1 if kind == "flat" else 3
    made = Forward(sizes(3, 12, 12, 16, 16, kernel), dtype)
    made.weight.zero_()
    made.weight[:, :, kernel // 2, kernel // 2] = torch.eye(16)
    # What bf16 can hold, of mean 100 and deviation 1: products are exact, sums are fp32.
    x = (100 + torch.randn(made.in_shape)).bfloat16().to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    u = check_moments(x, made.weight, made.geometry, tiles[kind])
    assert torch.equal(u, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("given", ["", "shift", "other", "shift other factor"])
@pytest.mark.parametrize("relu", [False, True])
def test_combinations(dtype, given, relu, nan_memory):
    x, other = torch.randn(2, 3, 20, 7, 5).to(dtype)
    tables = dict(zip(("scale", "shift", "factor"), torch.randn(3, 3, 20), strict=True))
    scale, shift, factor = (t.double()[:, :, None, None] for t in tables.values())
    truth = scale * x.double() + (shift if "shift" in given else 0)
    if "other" in given:
        truth = truth + other.double() * (factor if "factor" in given else 1)
    options = {name: {**tables, "other": other}[name] for name in given.split()}
    for may_overwrite in (False, True):
        found = combine(x, tables["scale"], relu=relu, may_overwrite=may_overwrite, **options)
        check(found, truth.relu() if relu else truth)
