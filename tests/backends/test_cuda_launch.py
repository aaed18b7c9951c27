"""Launchers of the compiled kernels, on the emulated device: what they make of tensors."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from masked_products import Backward, check, sizes

from wfnet.backends import cuda_launch
from wfnet.backends.contract import NO_LAYER, ConvGeometry, Epilogue, LayerBelow

POINTWISE = ConvGeometry()
pytestmark = pytest.mark.usefixtures("emulated_cuda")


@pytest.mark.parametrize("start", [8, 3], ids=["in place", "copied"])
def test_tables_and_sums_that_are_columns_of_wider_ones(start):
    """Read and written where they lie, neighbours untouched; odd offsets of tables are copied."""
    x, weight = torch.randn(2, 16, 3, 3).half(), torch.randn(16, 16, 1, 1).half() / 4
    wide, sums = torch.randn(2, 80), torch.zeros(2, 40)
    part = slice(start, start + 16)
    scale, shift = wide[:, part], wide[:, 40:][:, part]
    (taken, _), stride = cuda_launch._tables(scale, shift)
    assert (taken is scale) == (start == 8) == (stride == 80)
    u = F.conv2d(x.double(), weight.double())
    out = cuda_launch.conv2d(x, weight, POINTWISE, Epilogue(scale, shift)).out
    check(out, u * scale[:, :, None, None] + shift[:, :, None, None])
    assert out.is_contiguous(memory_format=torch.channels_last)

    branch = torch.randn(2, 16, 3, 3).half()
    below = LayerBelow(scale, branch=branch, t1=sums[:, part])
    found = cuda_launch.conv2d_dgrad(x, weight, (2, 16, 3, 3), POINTWISE, below)
    g = torch.nn.grad.conv2d_input((2, 16, 3, 3), weight.double(), x.double())
    check(found.scaled_grad, scale[:, :, None, None] * g)
    check(sums[:, part], (g * branch).sum((2, 3)))
    assert not sums[:, :start].any()
    assert not sums[:, start + 16 :].any()
    assert found.grad is None


def test_sums_of_different_strides_are_refused():
    case = Backward(sizes(2, 3, 3, 16, 16), torch.float16)
    below = replace(case.below, t0=torch.empty(2, 16), t1=torch.empty(2, 20)[:, :16])
    with pytest.raises(ValueError, match="must be rows of one stride"):
        cuda_launch.conv2d_dgrad(case.ag, case.weight, case.in_shape, POINTWISE, below)


def test_a_gradient_without_a_layer_takes_a_skip_gradient():
    ag, weight = torch.randn(2, 16, 3, 3).half(), torch.randn(16, 24, 1, 1).half() / 4
    skip = torch.randn(2, 24, 3, 3)  # fp32: as a network without autocast between may bring it
    found = cuda_launch.conv2d_dgrad(
        ag, weight, (2, 24, 3, 3), POINTWISE, replace(NO_LAYER, skip=skip)
    )
    g = torch.nn.grad.conv2d_input((2, 24, 3, 3), weight.double(), ag.double())
    check(found.grad, g + skip.half())
    assert found.scaled_grad is None


def test_an_empty_batch_launches_nothing():
    weight = torch.randn(24, 16, 3, 3).half()
    epilogue = Epilogue(torch.rand(0, 24), save=True)
    out, branch, mask = cuda_launch.conv2d(
        weight.new_empty(0, 16, 5, 5), weight, POINTWISE, epilogue
    )
    assert out.shape == branch.shape == (0, 24, 3, 3)
    assert mask is None


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("scale", torch.rand(2, 15), "must be "),
        ("scale", torch.rand(2, 16, device="meta"), "is on meta, the results are on cpu"),
        ("shift", torch.rand(1, 16), "must be "),
        ("residual", torch.zeros(2, 16, 3, 3), "must be "),
        ("residual", torch.zeros(2, 16, 3, 4).half(), "must be "),
        ("weight", torch.zeros(16, 8, 1, 1).half(), "must be "),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tensors_that_do_not_fit_are_refused(name, tensor, message):
    """A kernel would read past them."""
    weight = tensor if name == "weight" else torch.randn(16, 16, 1, 1).half()
    given = {"scale": torch.rand(2, 16)} | ({name: tensor} if name != "weight" else {})
    with pytest.raises(ValueError, match=f"^{name} {message}"):
        cuda_launch.conv2d(torch.randn(2, 16, 3, 3).half(), weight, POINTWISE, Epilogue(**given))
