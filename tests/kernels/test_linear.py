"""Linear maps of pixels and tokens, both directions, against plain PyTorch in fp64."""

import pytest
import torch

pytest.importorskip("triton")

from wfnet.kernels.linear import linear_dgrad, linear_fprop

from wfnet.backends.contract import Epilogue, as_pixels


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", ["flat", "gather", "default"])
@pytest.mark.parametrize("tokens", [1, 11, 16, 70])
def test_forward(tokens, kind, check, nan_memory, tiles):
    """Tables are columns of wider ones, of unlike strides."""
    x, weight = torch.randn(5, tokens, 16), torch.randn(40, 16) / 4
    scale, shift = torch.rand(5, 80)[:, 16:56], torch.randn(5, 50)[:, 8:48]
    out = linear_fprop(as_pixels(x), weight, Epilogue(scale, shift), config=tiles[kind]).out
    truth = scale[:, None] * (x.double() @ weight.double().T) + shift[:, None]
    check(out, as_pixels(truth))


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", ["flat", "gather", "default"])
@pytest.mark.parametrize("tokens", [1, 2, 11, 16, 32, 70])
def test_gradient(tokens, kind, make_layer, check_gradient, nan_memory, tiles):
    """Flat tiles that meet one, several and too many samples to sum their columns."""
    weight, ag = torch.randn(24, 16) / 5, torch.randn(5, tokens, 24)
    below, skip = make_layer((5, 16, tokens, 1), masked=True), torch.randn(5, 16, tokens, 1)
    found = linear_dgrad(as_pixels(ag), weight, skip, below, config=tiles[kind])
    check_gradient(found, as_pixels(ag.double() @ weight.double()), below, skip)


def test_launchers_check_their_tensors():
    x, weight = torch.zeros(2, 8, 4, 1), torch.zeros(8, 4)
    with pytest.raises(ValueError, match="does not fit x"):
        linear_fprop(x, weight, Epilogue(torch.zeros(2, 8)))
    with pytest.raises(ValueError, match="does not fit the gradient"):
        linear_dgrad(x, weight.half())
