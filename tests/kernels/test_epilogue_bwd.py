"""The elementwise backward in a pass of its own, against plain PyTorch in fp64."""

import pytest
import torch

pytest.importorskip("triton")

from wfnet.kernels.epilogue_bwd import by_source, epilogue_bwd

from wfnet.backends.contract import LayerBelow


@pytest.mark.interpreter
@pytest.mark.parametrize("tokens", [1, 5, 300])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_layer(tokens, masked, dtype, make_layer, check_gradient, nan_memory):
    dout = torch.randn(3, 20, tokens, 1).to(dtype)
    skip = torch.randn(dout.shape).to(dtype) if masked else None
    below = make_layer(tuple(dout.shape), dtype, masked)
    check_gradient(epilogue_bwd(dout, below, skip), dout.double(), below, skip, dtype)


@pytest.mark.interpreter
def test_sums_in_columns_of_wider_tables(make_layer, check_gradient):
    """Where a sample has several tiles, and where its sums are those of one tile."""
    for tokens in (5, 300):
        dout, sums = torch.randn(3, 20, tokens, 1), torch.full((2, 3, 50), torch.nan)
        layer = make_layer(tuple(dout.shape))
        below = LayerBelow(
            layer.scale, layer.shift, layer.branch, None, True, sums[0, :, 4:24], sums[1, :, 20:40]
        )
        check_gradient(epilogue_bwd(dout, below), dout.double(), below)
        assert sums[0, :, :4].isnan().all()


@pytest.mark.interpreter
def test_projection_shortcut(make_layer, check_gradient, check):
    """A layer whose residual another layer made: it receives the same g."""
    dout, columns = torch.randn(2, 20, 9, 1), (2, 20)
    layer = make_layer(tuple(dout.shape), masked=True)
    other = make_layer(tuple(dout.shape))
    shortcut = LayerBelow(other.scale, branch=other.branch, t1=other.t1, t0=other.t0)
    below = LayerBelow(
        layer.scale,
        layer.shift,
        layer.branch,
        layer.mask,
        True,
        layer.t1,
        layer.t0,
        need_grad=True,
        shortcut=shortcut,
    )
    found = epilogue_bwd(dout, below)
    check_gradient(found, dout.double(), below)
    g = dout.double() * (layer.mask > 0)
    check(found.shortcut, g * other.scale.double()[:, :, None, None])
    check(shortcut.t1, (g * other.branch.double()).sum((2, 3)))
    check(shortcut.t0, below.t0)
    assert shortcut.t0.shape == columns


@pytest.mark.interpreter
def test_samples_of_one_image_are_summed(check, nan_memory):
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


def test_samples_are_grouped_by_source():
    order, first = by_source(torch.tensor([3, 1, 3, 0, 3]), 4)
    assert order.tolist() == [3, 1, 0, 2, 4]
    assert first.tolist() == [0, 1, 2, 2, 5]


def test_sums_over_no_pixels_are_zero(make_layer):
    below = make_layer((3, 8, 0, 1))
    epilogue_bwd(torch.zeros(3, 8, 0, 1), below)
    assert (below.t0 == 0).all()
    assert (below.t1 == 0).all()
