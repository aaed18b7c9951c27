"""Host arithmetic of the compiled kernels: phases, taps, rows, tiles, sizes that fit 32 bits.

The kernels use the same functions (csrc/geometry.h, tensor_map.h).
"""

import itertools
import re
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from wfnet.backends import cuda_launch
from wfnet.backends.contract import ConvGeometry


class Conv(NamedTuple):
    """Sizes of a convolution; pairs are (height, width)."""

    batch: int
    height: int
    width: int
    in_channels: int
    out_channels: int
    filter: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    pad: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def geometry(self):
        return ConvGeometry(self.stride, self.pad, self.dilation)

    def sizes(self):
        """The arguments of the kernels' Python functions that say what is convolved."""
        shape = (self.batch, self.in_channels, self.height, self.width)
        weight = (self.out_channels, self.in_channels, *self.filter)
        return cuda_launch._sizes(shape, weight, self.geometry)


SIZES = [(1, 1), (5, 3), (7, 7), (8, 6), (13, 4)]
FILTERS = [(1, 1), (3, 3), (2, 5), (7, 7)]


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("pad", [0, 1, 3])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (1, 2)])
def test_taps_and_rows_are_those_of_the_definition(inspection, stride, pad, dilation):
    """Every output pixel once, every tap at its distance, whatever the phase; in whole numbers."""
    for (h, w), (r, s) in itertools.product(SIZES, FILTERS):
        if min(h + 2 * pad - dilation * (r - 1), w + 2 * pad - dilation * (s - 1)) < 1:
            continue
        conv = Conv(3, h, w, 72, 136, (r, s), stride, (pad, pad), (dilation, dilation))
        x = torch.randint(-9, 9, (3, 1, h, w)).double().requires_grad_()
        weight = torch.randint(-9, 9, (1, 1, r, s)).double()
        y = F.conv2d(x, weight, None, stride, pad, dilation)
        dout = torch.randint(-9, 9, y.shape).double()
        (dx,) = torch.autograd.grad(y, x, dout)
        for backward, a, truth in ((False, x, y), (True, dout, dx)):
            found = torch.zeros_like(truth)
            operands = (t.data_ptr() for t in (a, weight, found))
            inspection.convolve(conv, backward, *operands)
            assert torch.equal(found, truth), (conv, backward)


@pytest.mark.parametrize("channels", [64, 128, 256, 512])
def test_strided_gradient_is_balanced(inspection, channels):
    """Phases of a 3x3 filter have 1, 2, 2, 4 taps: no thread block may get only the long ones."""
    size = 56 * 64 // channels
    conv = Conv(512, 2 * size, 2 * size, channels, 2 * channels, (3, 3), (2, 2), (1, 1), (1, 1))
    slices = inspection.problem(conv, True)["slices"]
    assert sorted(slices) == [s * 2 * channels // 64 for s in (1, 2, 2, 4)]
    work = inspection.work_of(conv, True, 66)
    assert max(work) <= 1.15 * sum(work) / len(work)


THREE = ((3, 3), (1, 1), (1, 1))


@pytest.mark.parametrize(
    ("conv", "forward", "backward"),
    [
        (Conv(512, 14, 14, 256, 256, *THREE), 256, 256),
        (Conv(512, 14, 14, 1024, 256), 128, 128),  # 16 and 4 slices
        (Conv(512, 28, 28, 256, 512, (3, 3), (2, 2), (1, 1)), 256, 256),  # 8 * (1 + 2 + 2 + 4) / 4
        (Conv(512, 28, 28, 256, 448, (3, 3), (2, 2), (1, 1)), 256, 128),  # 7 * 9 / 4
        (Conv(512, 14, 14, 384, 640, *THREE), 128, 128),  # a quarter, a fifth of columns too many
        (Conv(16, 14, 14, 256, 256, *THREE), 128, 128),  # 13 tiles for 66 clusters
    ],
)
def test_wide_tiles_are_for_long_sums_that_fill_the_device(inspection, conv, forward, backward):
    for direction, expected in ((False, forward), (True, backward)):
        wide, narrow = (inspection.problem(conv, direction, clusters) for clusters in (66, 0))
        assert wide["block_n"] == expected
        assert narrow["block_n"] <= 128
        assert wide["partial_rows"] == narrow["partial_rows"]  # which the launcher asks for alone


@pytest.mark.parametrize("stride", [(1, 1), (2, 2)])
def test_numbers_of_tensors_above_two_to_the_31st_fit(inspection, emulated_kernels, stride):
    """Rows are counted in 32 bits, elements and bytes are not: the largest problems taken."""
    pixels = 2**31 - 513
    batch, size = pixels // (224 * 224), 224
    for conv in (
        Conv(batch, size, size, 64, 64, (3, 3), stride, (1, 1)),
        Conv(512, size, size, 64, 64, (3, 3), stride, (1, 1)),
        Conv(pixels, 1, 1, 64, 64),
    ):
        assert emulated_kernels.refuse_fprop(**conv.sizes()) is None
        assert emulated_kernels.refuse_dgrad(**conv.sizes()) is None
        for backward in (False, True):
            problem = inspection.problem(conv, backward)
            rows = problem["rows"]
            height, width = conv.height, conv.width
            if not backward:
                height, width = conv.geometry.output_size(height, width, conv.filter)
            assert sum(rows) == conv.batch * height * width
            assert problem["partial_rows"] > 0
            sample, pixel, begins, h, w = inspection.last_row(conv, backward, len(rows) - 1)
            assert (sample, pixel) == (conv.batch - 1, conv.batch * height * width - 1)
            assert begins == conv.batch - 1
            assert h < conv.height
            assert w < conv.width
    too_many = Conv(pixels + 1, 1, 1, 64, 64).sizes()
    assert re.search("pixels", emulated_kernels.refuse_fprop(**too_many))
    assert re.search("pixels", emulated_kernels.refuse_dgrad(**too_many))


@pytest.mark.parametrize(
    ("sizes", "forward", "backward"),
    [
        ((1, 8, 8, 64, 64, (3, 3), (1, 1), (1, 1), (1, 1)), None, None),
        ((1, 8, 8, 3, 64, (7, 7), (2, 2), (3, 3), (1, 1)), "multiples of 8", "multiples of 8"),
        ((1, 8, 8, 64, 60, (1, 1), (1, 1), (0, 0), (1, 1)), "multiples of 8", "multiples of 8"),
        ((1, 2, 2, 64, 64, (3, 3), (1, 1), (0, 0), (1, 1)), "does not fit", "does not fit"),
        ((1, 32, 32, 64, 64, (4, 4), (4, 4), (0, 0), (1, 1)), None, "product is above 4"),
        ((1, 32, 32, 64, 64, (1, 1), (9, 9), (0, 0), (1, 1)), "above 8", "product is above 4"),
        ((1, 32, 32, 64, 64, (3, 3), (1, 1), (129, 129), (1, 1)), "128 pixels", "128 pixels"),
        ((1, 300, 300, 64, 64, (3, 3), (1, 1), (127, 127), (127, 127)), None, None),
        ((1, 300, 300, 64, 64, (3, 3), (1, 1), (127, 127), (128, 128)), "wider", "wider"),
        ((1, 300, 300, 64, 64, (1, 2), (1, 1), (0, 127), (1, 255)), "wider", "wider"),
        ((65536, 224, 224, 64, 64, (3, 3), (1, 1), (1, 1), (1, 1)), "2..31", "2..31"),
    ],
)
def test_refusals(emulated_kernels, sizes, forward, backward):
    conv = Conv(*sizes)
    for reason, expected in (
        (emulated_kernels.refuse_fprop(**conv.sizes()), forward),
        (emulated_kernels.refuse_dgrad(**conv.sizes()), backward),
    ):
        if expected is None:
            assert reason is None
        else:
            assert re.search(expected, reason), reason
