"""Whole kernels on the emulated device, through their launchers, against PyTorch in fp64.

The emulation (csrc/emulation/) runs every thread, decodes tensor maps and matrix descriptors,
completes copies and wgmma as late or as early as allowed, and checks that every output byte is
written once, inside of its tensor. Fresh memory is NaN: what is forgotten shows.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from wfnet.backends import cuda_launch
from wfnet.backends.contract import ConvGeometry, Epilogue, LayerBelow

# A rounding of the stored dtype, as relative error of a whole tensor.
TOLERANCE = {torch.bfloat16: 3e-3, torch.float16: 4e-4}
DTYPES = [torch.bfloat16, torch.float16]
COMPLETIONS = ["LATE", "EARLY", "RANDOM"]

pytestmark = pytest.mark.usefixtures("poisoned", "emulated_cuda")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def error(result, truth):
    assert not result.isnan().any()
    return ((result.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


def schedule(processors=4, seed=0, completion="LATE"):
    """How the next launches run: thread blocks of the grid, order, completion of copies."""
    module = cuda_launch.library().module
    module.set_schedule(seed, getattr(module.Completion, completion))
    cuda_launch.processors = lambda device: processors


@pytest.fixture(autouse=True)
def own_processors(monkeypatch):
    """Undoes what :func:`schedule` sets."""
    monkeypatch.setattr(cuda_launch, "processors", lambda device: 4)


class Convolution:
    """Operands in a dtype; sizes as in ``CONVS``."""

    def __init__(self, sizes, dtype):
        self.batch, height, width, channels, columns, kernel, stride, padding, dilation = sizes
        self.dtype, self.geometry = dtype, ConvGeometry(stride, padding, dilation)
        self.options = (None, stride, padding, dilation)
        self.in_shape = (self.batch, channels, height, width)
        self.weight_shape = (columns, channels, *kernel)
        size = self.geometry.output_size(height, width, kernel)
        self.out_shape = (self.batch, columns, *size)

    def weight(self, depth):
        spread = (depth * self.weight_shape[2] * self.weight_shape[3]) ** 0.5
        return (torch.randn(self.weight_shape) / spread).to(self.dtype)

    def randn(self, shape):
        return torch.randn(shape).to(self.dtype)


class Forward(Convolution):
    """A forward convolution; ``run`` returns out and branch."""

    def __init__(self, sizes, dtype, residual=True, shift=True, relu=True, branch=True):
        super().__init__(sizes, dtype)
        self.x, self.w = self.randn(self.in_shape), self.weight(self.in_shape[1])
        table = self.out_shape[:2]
        self.epilogue = Epilogue(
            scale=torch.rand(table) + 0.5,
            shift=torch.randn(table) if shift else None,
            residual=self.randn(self.out_shape) if residual else None,
            relu=relu,
            save=branch,
        )

    def truth(self):
        e = self.epilogue
        v = F.conv2d(self.x.double(), self.w.double(), *self.options)
        v = v * e.scale[:, :, None, None].double()
        out = v.to(self.dtype).double() if e.save else v
        if e.shift is not None:
            out = out + e.shift[:, :, None, None]
        if e.residual is not None:
            out = out + e.residual.double()
        return out.relu() if e.relu else out, v

    def run(self, **how):
        schedule(**how)
        return cuda_launch.conv2d(self.x, self.w, self.geometry, self.epilogue)[:2]

    def check(self, **how):
        for result, truth in zip(self.run(**how), self.truth(), strict=True):
            assert result is None or error(result, truth) < TOLERANCE[self.dtype]


class Backward(Convolution):
    """An input gradient; ``run`` returns g, scale * g, t0 and t1."""

    def __init__(self, sizes, dtype, mask="branch", skip=True, sums=True, shift=True):
        super().__init__(sizes, dtype)
        self.ag, self.w = self.randn(self.out_shape), self.weight(self.out_shape[1])
        self.skip = self.randn(self.in_shape) if skip else None
        table = self.in_shape[:2]
        self.below = LayerBelow(
            branch=self.randn(self.in_shape) if sums or mask == "branch" else None,
            mask=self.randn(self.in_shape) if mask == "activation" else None,
            scale=torch.rand(table) + 0.5,
            shift=torch.randn(table) if shift else None,
            relu=mask != "none",
            t1=torch.empty(table) if sums else None,
            t0=torch.empty(table) if sums else None,
            need_grad=True,
        )

    def truth(self):
        below = self.below
        operands = (self.w.double(), self.ag.double(), *self.options[1:])
        g = torch.nn.grad.conv2d_input(self.in_shape, *operands)
        g = g if self.skip is None else g + self.skip.double()
        if below.relu and below.mask is not None:
            g = g * (below.mask > 0)
        elif below.relu:
            alive = below.branch.float()
            alive = alive if below.shift is None else alive + below.shift[:, :, None, None]
            g = g * (alive > 0)
        scaled = g * below.scale[:, :, None, None].double()
        if below.t1 is None:
            return g, scaled, None, None
        return g, scaled, g.sum((2, 3)), (g * below.branch.double()).sum((2, 3))

    def run(self, **how):
        schedule(**how)
        sums = [None if t is None else torch.empty_like(t) for t in (self.below.t0, self.below.t1)]
        below = replace(self.below, t0=sums[0], t1=sums[1])
        arguments = (self.ag, self.w, self.in_shape, self.geometry, self.skip)
        found = cuda_launch.conv2d_dgrad(*arguments, below)
        return found.grad, found.scaled_grad, *sums

    def check(self, **how):
        for result, truth in zip(self.run(**how), self.truth(), strict=True):
            if truth is not None:
                exact = result.dtype == torch.float32
                assert error(result, truth) < (1e-6 if exact else TOLERANCE[self.dtype])


# name: batch, height, width, in, out, filter, stride, pad, dilation
CONVS = {
    "1x1, ragged everywhere": (3, 10, 9, 72, 136, (1, 1), (1, 1), (0, 0), (1, 1)),
    "1x1, whole tiles": (2, 8, 16, 128, 64, (1, 1), (1, 1), (0, 0), (1, 1)),
    "1x1, many slices": (1, 9, 7, 712, 8, (1, 1), (1, 1), (0, 0), (1, 1)),
    "1x1 stride 2": (3, 9, 8, 64, 72, (1, 1), (2, 2), (0, 0), (1, 1)),
    "1x1 padded": (2, 5, 6, 16, 24, (1, 1), (1, 1), (1, 1), (1, 1)),
    "3x3": (3, 9, 11, 40, 72, (3, 3), (1, 1), (1, 1), (1, 1)),
    "3x3, no padding": (2, 12, 7, 64, 136, (3, 3), (1, 1), (0, 0), (1, 1)),
    "3x3 stride 2": (3, 13, 11, 72, 40, (3, 3), (2, 2), (1, 1), (1, 1)),
    "3x3 stride 2, even size": (3, 12, 10, 72, 40, (3, 3), (2, 2), (1, 1), (1, 1)),
    "3x3 stride 2, no padding": (2, 11, 8, 8, 200, (3, 3), (2, 2), (0, 0), (1, 1)),
    "3x3 stride (1, 2)": (2, 7, 12, 24, 40, (3, 3), (1, 2), (1, 1), (1, 1)),
    "3x3 dilation 2": (2, 9, 10, 40, 64, (3, 3), (1, 1), (2, 2), (2, 2)),
    "3x3 stride 2 dilation 2": (2, 13, 11, 64, 72, (3, 3), (2, 2), (2, 2), (2, 2)),
    "3x3 stride 2 dilation 3": (2, 14, 11, 16, 16, (3, 3), (2, 2), (3, 3), (3, 3)),
    "1x5 filter": (2, 6, 11, 40, 40, (1, 5), (1, 1), (0, 2), (1, 1)),
    "2x4 filter, stride (2, 1)": (2, 9, 8, 24, 40, (2, 4), (2, 1), (1, 1), (1, 1)),
    "7x7 stride 2": (2, 14, 13, 16, 40, (7, 7), (2, 2), (3, 3), (1, 1)),
    "many samples in a tile": (37, 2, 3, 72, 40, (3, 3), (1, 1), (1, 1), (1, 1)),
    "one pixel": (130, 1, 1, 64, 72, (1, 1), (1, 1), (0, 0), (1, 1)),
    "smaller than the filter": (5, 2, 1, 16, 16, (3, 3), (2, 2), (1, 1), (1, 1)),
}
CASES = [pytest.param(sizes, id=name) for name, sizes in CONVS.items()]


def sizes(batch, height, width, channels, columns, kernel=1, stride=1):
    """Of a convolution with as much padding as keeps its size at stride 1."""
    square = (kernel, kernel), (stride, stride), (kernel // 2,) * 2, (1, 1)
    return (batch, height, width, channels, columns, *square)


@pytest.mark.parametrize("case", CASES)
def test_forward(case):
    Forward(case, torch.bfloat16).check(completion="RANDOM")


@pytest.mark.parametrize("case", CASES)
def test_backward(case):
    Backward(case, torch.bfloat16).check(completion="RANDOM")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("relu", [False, True], ids=["identity", "relu"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("shift", [False, True], ids=["", "shift"])
@pytest.mark.parametrize("branch", [False, True], ids=["", "branch"])
def test_forward_epilogue_family(dtype, relu, residual, shift, branch):
    Forward(sizes(3, 5, 6, 72, 40), dtype, residual, shift, relu, branch).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", ["none", "branch", "activation"])
@pytest.mark.parametrize("skip", [False, True], ids=["", "skip"])
@pytest.mark.parametrize("sums", [False, True], ids=["", "sums"])
@pytest.mark.parametrize("shift", [False, True], ids=["", "shift"])
def test_backward_epilogue_family(dtype, mask, skip, sums, shift):
    Backward(sizes(3, 5, 6, 72, 40, 1, 2), dtype, mask, skip, sums, shift).check()


@pytest.mark.parametrize(
    ("channels", "columns"),
    [(64, 64), (136, 64), (136, 128)],
    ids=["filter kept", "block_n 64", "block_n 128"],
)
@pytest.mark.parametrize("completion", COMPLETIONS)
def test_ring_wraps_around_and_order_does_not_matter(channels, columns, completion):
    """Four tiles for each block of one cluster, of 9 or 27 slices: the ring of 6 or 8 wraps."""
    forward = Forward(sizes(7, 10, 13, channels, columns, 3), torch.bfloat16)
    reference = forward.run(processors=2, seed=1, completion=completion)
    for result, truth in zip(reference, forward.truth(), strict=True):
        assert error(result, truth) < TOLERANCE[torch.bfloat16]
    again = forward.run(processors=2, seed=2, completion=completion)
    assert all(torch.equal(a, b) for a, b in zip(again, reference, strict=True))


@pytest.mark.parametrize("processors", [1, 2, 4, 7])
def test_column_sums_are_bitwise_the_same_for_any_schedule(processors):
    backward = Backward(sizes(3, 14, 14, 40, 72, 3, 2), torch.float16)
    expected = backward.run(processors=12, seed=7, completion="EARLY")
    found = backward.run(processors=processors, seed=processors, completion="RANDOM")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_not_a_number_survives_the_relu():
    """Tables of a sample whose forget label is out of range are NaN, and so is all its output."""
    forward = Forward(sizes(2, 4, 4, 16, 16), torch.bfloat16, branch=False)
    forward.epilogue.scale[1] = float("nan")
    out, _ = forward.run()
    assert out[1].isnan().all()
    assert not out[0].isnan().any()


def fails_or_errs(case, **how):
    """Whether the emulation reports an error, or the result is wrong."""
    try:
        case.check(**how)
    except (RuntimeError, AssertionError):
        return True
    return False


def check_fault(emulated_cuda, convolution, fault, completion="LATE"):
    """The tests above are worth something: with a fault, they fail."""
    case = Forward(convolution, torch.bfloat16)
    assert not fails_or_errs(case, processors=2, completion=completion)
    emulated_cuda.leave_out(getattr(emulated_cuda.Fault, fault))
    assert fails_or_errs(case, processors=2, completion=completion)


@pytest.mark.parametrize("completion", ["LATE", "RANDOM"])
@pytest.mark.parametrize("fault", ["FULL_WAIT", "EMPTY_WAIT", "WGMMA_WAIT"])
def test_a_missing_wait_is_noticed(emulated_cuda, fault, completion):
    check_fault(emulated_cuda, sizes(3, 9, 11, 136, 72, 3), fault, completion)


@pytest.mark.parametrize("fault", ["FULL_WAIT", "EMPTY_WAIT", "FILTER_WAIT"])
def test_a_missing_wait_is_noticed_where_the_filter_is_kept(emulated_cuda, fault):
    check_fault(emulated_cuda, sizes(5, 9, 11, 64, 64, 3), fault)


@pytest.mark.parametrize("fault", ["SUMS_BARRIER", "PEER_ARRIVAL", "BARRIER_FENCE", "JOINT_EXIT"])
def test_a_missing_barrier_is_noticed(emulated_cuda, fault):
    """Between the warps that sum, and between the blocks that share the filter's stages."""
    case = Backward(sizes(3, 9, 11, 136, 72, 3), torch.bfloat16)
    emulated_cuda.leave_out(getattr(emulated_cuda.Fault, fault))
    assert any(fails_or_errs(case, processors=2, seed=seed) for seed in range(3))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"out": 2}, "out is not 16-byte aligned"),
        ({"x": 2}, "operand is not 16-byte aligned"),
        ({"table_stride": 17}, "rows of the tables"),
        ({"scale": 0}, "scale and out are needed"),
        ({"dtype": "float32"}, "not float32"),
        ({"height": (4, 5, 1, 1, 0, 1)}, "the output is 4 x 4, not 5 x 4"),
        ({"height": (4, 4, 1)}, "an axis has 6 numbers"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_refused(emulated_cuda, changed, message):
    axis = (4, 4, 1, 1, 0, 1)
    addresses = dict.fromkeys(("x", "weight", "shift", "residual", "branch"), 0)
    right = {"batch": 1, "in_channels": 16, "out_channels": 16, "height": axis, "width": axis}
    right |= {**addresses, "scale": 16, "out": 16, "table_stride": 16, "relu": False}
    right |= {"dtype": "float16", "processors": 1, "device": 0, "stream": 0}
    with pytest.raises(ValueError, match=message):
        emulated_cuda.fprop(**{**right, **changed})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"height": (8, 2, 4, 4, 0, 1), "width": (8, 2, 4, 4, 0, 1)}, "product is above 4"),
        ({"relu": True}, "need the branch"),
        ({"t0": 16}, "as workspace"),
        ({"scaled_grad": 16}, "scaled_grad needs scale"),
        ({"grad": 8}, "grad is not 16-byte aligned"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_of_gradients_are_refused(emulated_cuda, changed, message):
    axis = (8, 8, 1, 1, 0, 1)
    pixels = ("ag", "weight", "skip", "branch", "activation", "grad", "scaled_grad")
    sums = ("scale", "shift", "table_stride", "partial0", "partial1", "t0", "t1", "total_stride")
    right = {"batch": 1, "in_channels": 16, "out_channels": 16, "height": axis, "width": axis}
    right |= dict.fromkeys((*pixels, *sums, "device", "stream"), 0)
    right |= {"relu": False, "dtype": "bfloat16", "processors": 1}
    with pytest.raises(ValueError, match=message):
        emulated_cuda.dgrad(**{**right, **changed})
