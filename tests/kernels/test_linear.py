"""Linear maps of pixels and tokens, both directions, against plain PyTorch in fp64."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from masked_products import Backward, Forward, sizes

pytest.importorskip("triton")

from wfnet.kernels.conv_dgrad import conv_dgrad
from wfnet.kernels.conv_fprop import conv_fprop


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", ["flat", "gather", "default"])
@pytest.mark.parametrize("tokens", [1, 2, 11, 16, 70])
def test_both_directions(tokens, kind, nan_memory, tiles):
    """Flat tiles that meet one, several and too many samples to sum their columns.

    Forward's tables are columns of wider ones, of unlike strides.
    """
    forward = Forward(sizes(5, tokens, 1, 16, 40), residual=False, relu=False, save=False)
    scale, shift = torch.rand(5, 80)[:, 16:56], torch.randn(5, 50)[:, 8:48]
    forward.epilogue = replace(forward.epilogue, scale=scale, shift=shift)
    forward.check(partial(conv_fprop, config=tiles[kind]))
    backward = Backward(sizes(5, tokens, 1, 16, 24), mask="kept")
    backward.check(partial(conv_dgrad, config=tiles[kind]))
