"""The masked convolution's input gradient and what it ends in, against plain PyTorch in fp64."""

from functools import partial

import pytest
import torch
from masked_products import Backward

pytest.importorskip("triton")

from wfnet.kernels.conv_dgrad import conv_dgrad

from wfnet.backends.contract import NO_LAYER, ConvGeometry, LayerBelow


@pytest.mark.interpreter
def test_every_kind_of_convolution(convolution, nan_memory):
    """Skip gradient, ReLU mask of the layer below, its column sums and its A * g."""
    case, config = convolution
    if config is not None and config.path == "box" and case[6] == (2, 2) and case[3] % 16:
        pytest.skip("strided boxes need whole channel tiles")
    kept = config is not None and config.block_m == 64
    how = {"mask": "kept" if kept else "branch", "skip": kept, "shortcut": kept}
    how["unscaled"] = case[0] == 3
    Backward(case, **how).check(partial(conv_dgrad, config=config))


def test_launcher_checks_its_tensors():
    x, w, table = torch.zeros(2, 8, 4, 4), torch.zeros(8, 8, 1, 1), torch.zeros(2, 8)
    for size, below, message in (
        (9, NO_LAYER, "but the output is"),
        (4, LayerBelow(table, t1=table), "t1 is summed from the branch"),
        (4, LayerBelow(table, relu=True), "ReLU mask"),
        (4, LayerBelow(table, branch=x.half()), "branch must be"),
        (4, LayerBelow(table, branch=x, t1=table[:1]), "column sums must be rows"),
    ):
        with pytest.raises(ValueError, match=message):
            conv_dgrad(x, w, (2, 8, size, size), ConvGeometry(), below)
