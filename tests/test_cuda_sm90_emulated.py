"""Whole Hopper kernels on the emulated device, against PyTorch in fp64.

The emulation (csrc/emulation.h, csrc/sm90_primitives.h) runs every thread, decodes tensor maps and
matrix descriptors, completes copies and wgmma as late or as early as allowed, and checks that every
output byte is written once, inside of its tensor. Outputs start as NaN: what is forgotten shows.
"""

import pytest
import torch
import torch.nn.functional as F
from cuda_sm90 import Conv, sm90

torch.set_num_threads(1)

LATE, EARLY, RANDOM = 0, 1, 2
# A rounding of the stored dtype, as relative error of a whole tensor.
TOLERANCE = {torch.bfloat16: 3e-3, torch.float16: 4e-4}
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def clean():
    torch.manual_seed(0)
    sm90().schedule(0, LATE)
    sm90().break_primitive("")
    yield
    sm90().break_primitive("")


def nhwc(t):
    return t.permute(0, 2, 3, 1).contiguous()


def nan(*shape, dtype=torch.float32):
    return torch.full(shape, float("nan"), dtype=dtype)


def register(inputs=(), outputs=()):
    """Tells the emulation which memory exists; writes to inputs are errors."""
    sm90().clear_memory()
    for writable, tensors in ((False, inputs), (True, outputs)):
        for i, t in enumerate(tensors):
            if t is not None:
                name = f"{'output' if writable else 'input'} {i} {list(t.shape)}"
                sm90().add_memory(t.data_ptr(), t.numel() * t.element_size(), writable, name)


def pointer(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def error(result, truth):
    assert not result.isnan().any()
    return ((result.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


def launch_fprop(forward, output, **changes):
    """Launches with the operands of a :class:`Forward`, some arguments changed."""
    arguments = {
        **forward.conv.sizes(),
        "x": pointer(forward.x),
        "weight": pointer(forward.weight),
        "scale": pointer(forward.scale),
        "shift": pointer(forward.shift),
        "residual": pointer(forward.residual),
        "branch": 0,
        "out": pointer(output),
        "table_stride": forward.conv.out_channels,
        "relu": forward.relu,
        "dtype": str(forward.dtype).removeprefix("torch."),
        "processors": 2,
        "device": 0,
        "stream": 0,
    }
    sm90().fprop(**{**arguments, **changes})


class Forward:
    """Operands of a forward launch; ``run`` returns out and branch."""

    def __init__(self, conv, dtype, residual=True, shift=True, relu=True, branch=True):
        self.conv, self.dtype, self.relu, self.keep = conv, dtype, relu, branch
        n, o = conv.batch, conv.out_channels
        x = torch.randn(n, conv.in_channels, conv.height, conv.width).to(dtype)
        depth = conv.in_channels * conv.filter[0] * conv.filter[1]
        weight = (torch.randn(o, conv.in_channels, *conv.filter) / depth**0.5).to(dtype)
        u = F.conv2d(x.double(), weight.double(), None, conv.stride, conv.pad, conv.dilation)
        self.u = nhwc(u)
        self.x, self.weight = nhwc(x), nhwc(weight)
        self.scale = torch.rand(n, o) + 0.5
        self.shift = torch.randn(n, o) if shift else None
        self.residual = torch.randn(self.u.shape).to(dtype) if residual else None

    def truth(self):
        v = self.u * self.scale[:, None, None].double()
        out = v.to(self.dtype).double() if self.keep else v
        if self.shift is not None:
            out = out + self.shift[:, None, None]
        if self.residual is not None:
            out = out + self.residual.double()
        return out.relu() if self.relu else out, v

    def run(self, processors=4, seed=0, completion=LATE):
        out = nan(*self.u.shape, dtype=self.dtype)
        branch = torch.clone(out) if self.keep else None
        inputs = (self.x, self.weight, self.scale, self.shift, self.residual)
        register(inputs, (out, branch))
        sm90().schedule(seed, completion)
        launch_fprop(self, out, branch=pointer(branch), processors=processors)
        return out, branch

    def check(self, **how):
        out, branch = self.run(**how)
        truth, v = self.truth()
        assert error(out, truth) < TOLERANCE[self.dtype]
        if branch is not None:
            assert error(branch, v) < TOLERANCE[self.dtype]


class Backward:
    """Operands of an input-gradient launch; ``run`` returns g, scale * g, t0 and t1."""

    def __init__(self, conv, dtype, mask="branch", skip=True, sums=True, shift=True):
        self.conv, self.dtype, self.mask = conv, dtype, mask
        n, c = conv.batch, conv.in_channels
        above = torch.randn(n, conv.out_channels, conv.out_height, conv.out_width).to(dtype)
        depth = conv.out_channels * conv.filter[0] * conv.filter[1]
        weight = (torch.randn(conv.out_channels, c, *conv.filter) / depth**0.5).to(dtype)
        size = (n, c, conv.height, conv.width)
        dx = torch.nn.grad.conv2d_input(
            size, weight.double(), above.double(), conv.stride, conv.pad, conv.dilation
        )
        self.dx = nhwc(dx)
        self.above, self.weight = nhwc(above), nhwc(weight)
        self.sums = sums
        self.skip = torch.randn(self.dx.shape).to(dtype) if skip else None
        needs_branch = sums or mask == "branch"
        self.branch = torch.randn(self.dx.shape).to(dtype) if needs_branch else None
        self.activation = torch.randn(self.dx.shape).to(dtype) if mask == "activation" else None
        self.scale = torch.rand(n, c) + 0.5
        self.shift = torch.randn(n, c) if shift else None

    def truth(self):
        g = self.dx if self.skip is None else self.dx + self.skip.double()
        if self.mask == "branch":
            alive = self.branch.float()
            if self.shift is not None:
                alive = alive + self.shift[:, None, None]
            g = g * (alive > 0)
        elif self.mask == "activation":
            g = g * (self.activation > 0)
        scaled = g * self.scale[:, None, None].double()
        if not self.sums:
            return g, scaled, None, None
        return g, scaled, g.sum((1, 2)), (g * self.branch.double()).sum((1, 2))

    def run(self, processors=4, seed=0, completion=LATE):
        n, c = self.conv.batch, self.conv.in_channels
        grad = nan(*self.dx.shape, dtype=self.dtype)
        scaled_grad = torch.clone(grad)
        partials = totals = (None, None)
        if self.sums:
            slots = sm90().dgrad_slots(**self.conv.sizes())
            partials, totals = (nan(slots, c), nan(slots, c)), (nan(n, c), nan(n, c))
        inputs = (self.above, self.weight, self.skip, self.branch, self.activation, self.scale)
        register((*inputs, self.shift), (grad, scaled_grad, *partials, *totals))
        sm90().schedule(seed, completion)
        sm90().dgrad(
            **self.conv.sizes(),
            ag=pointer(self.above),
            weight=pointer(self.weight),
            skip=pointer(self.skip),
            branch=pointer(self.branch),
            activation=pointer(self.activation),
            scale=pointer(self.scale),
            shift=pointer(self.shift),
            grad=pointer(grad),
            scaled_grad=pointer(scaled_grad),
            partial0=pointer(partials[0]),
            partial1=pointer(partials[1]),
            t0=pointer(totals[0]),
            t1=pointer(totals[1]),
            total_stride=c,
            table_stride=c,
            relu=self.mask != "none",
            dtype=str(self.dtype).removeprefix("torch."),
            processors=processors,
            device=0,
            stream=0,
        )
        return grad, scaled_grad, *totals

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


@pytest.mark.parametrize("sizes", CASES)
def test_fprop(sizes):
    Forward(Conv(*sizes), torch.bfloat16).check(completion=RANDOM)


@pytest.mark.parametrize("sizes", CASES)
def test_dgrad(sizes):
    Backward(Conv(*sizes), torch.bfloat16).check(completion=RANDOM)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("relu", [False, True], ids=["identity", "relu"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("shift", [False, True], ids=["", "shift"])
@pytest.mark.parametrize("branch", [False, True], ids=["", "branch"])
def test_forward_epilogue_family(dtype, relu, residual, shift, branch):
    conv = Conv(3, 7, 8, 72, 40, (3, 3), (1, 1), (1, 1), (1, 1))
    Forward(conv, dtype, residual, shift, relu, branch).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", ["none", "branch", "activation"])
@pytest.mark.parametrize("skip", [False, True], ids=["", "skip"])
@pytest.mark.parametrize("sums", [False, True], ids=["", "sums"])
@pytest.mark.parametrize("shift", [False, True], ids=["", "shift"])
def test_backward_epilogue_family(dtype, mask, skip, sums, shift):
    conv = Conv(3, 7, 8, 72, 40, (3, 3), (2, 2), (1, 1), (1, 1))
    Backward(conv, dtype, mask, skip, sums, shift).check()


@pytest.mark.parametrize(
    ("channels", "columns"),
    [(64, 64), (136, 64), (136, 128)],
    ids=["filter kept", "block_n 64", "block_n 128"],
)
@pytest.mark.parametrize("completion", [LATE, EARLY, RANDOM], ids=["late", "early", "random"])
def test_ring_wraps_around_and_order_does_not_matter(channels, columns, completion):
    """Four tiles for each block of one cluster, of 9 or 27 slices: the ring of 6 or 8 wraps."""
    conv = Conv(7, 10, 13, channels, columns, (3, 3), (1, 1), (1, 1), (1, 1))
    assert sm90().problem(conv.native, False)["keep_filter"] == (channels == 64)
    forward = Forward(conv, torch.bfloat16)
    reference = None
    for seed in (1, 2):
        result = forward.run(processors=2, seed=seed, completion=completion)
        if reference is None:
            reference = result
            truth, v = forward.truth()
            assert error(result[0], truth) < TOLERANCE[torch.bfloat16]
            assert error(result[1], v) < TOLERANCE[torch.bfloat16]
        assert torch.equal(result[0], reference[0])
        assert torch.equal(result[1], reference[1])


@pytest.mark.parametrize("processors", [1, 2, 4, 7])
def test_column_sums_are_bitwise_the_same_for_any_schedule(processors):
    conv = Conv(3, 14, 14, 40, 72, (3, 3), (2, 2), (1, 1), (1, 1))
    backward = Backward(conv, torch.float16)
    expected = backward.run(processors=12, seed=7, completion=EARLY)
    for result, other in zip(
        backward.run(processors=processors, seed=processors, completion=RANDOM),
        expected,
        strict=True,
    ):
        assert torch.equal(result, other)


def test_a_not_a_number_survives_the_relu():
    """Tables of a sample whose forget label is out of range are NaN, and so is all its output."""
    forward = Forward(Conv(2, 4, 4, 16, 16), torch.bfloat16, branch=False)
    forward.scale[1] = float("nan")
    out, _ = forward.run()
    assert out[1].isnan().all()
    assert not out[0].isnan().any()


def test_rows_of_wider_tables():
    """Tables of all layers may lie side by side: rows further apart than the channels."""
    forward = Forward(Conv(3, 5, 5, 16, 24), torch.float16)
    table = torch.full((3, 64), float("nan"))
    table[:, 8:32], wide = forward.scale, table
    forward.scale = wide[:, 8:32]
    shifts = torch.full((3, 64), float("nan"))
    shifts[:, 8:32] = forward.shift
    forward.shift = shifts[:, 8:32]
    out = nan(*forward.u.shape, dtype=torch.float16)
    register((forward.x, forward.weight, wide, shifts, forward.residual), (out,))
    launch_fprop(forward, out, table_stride=64)
    forward.keep = False
    assert error(out, forward.truth()[0]) < TOLERANCE[torch.float16]


RIGHT = {"leading": 8192, "stride_a": 1024, "stride_b": 1024}


@pytest.mark.parametrize("transposed", [False, True], ids=["K-major", "N-major"])
@pytest.mark.parametrize(
    ("change", "right"),
    [
        ({}, True),
        ({"stride_a": 512}, False),
        ({"stride_b": 512}, False),
        ({"step_b": 16}, False),
        ({"leading": 16}, True),  # no second group of 64 columns: not read
    ],
    ids=str,
)
def test_emulated_wgmma_follows_its_descriptors(transposed, change, right):
    """A product is right with the right strides, and wrong with wrong ones."""
    a, b = torch.randn(64, 64).bfloat16(), torch.randn(64, 64).bfloat16()
    d = torch.zeros(2, 128, 32)
    register((a, b))
    step = {"step_b": 2048 if transposed else 32}
    numbers = {**RIGHT, **step, **change, "transposed": transposed, "fenced": True}
    sm90().multiply_once(a=pointer(a), b=pointer(b), d=pointer(d), **numbers)
    truth = a.double() @ (b.double() if transposed else b.double().T)
    # Thread t of 128, accumulator 4 * j + 2 * h + i: see wgmma() in csrc/sm90_primitives.h.
    thread, j, h, i = torch.meshgrid(*map(torch.arange, (128, 8, 2, 2)), indexing="ij")
    row = thread // 32 * 16 + h * 8 + thread % 32 // 4
    column = j * 8 + thread % 4 * 2 + i
    expected = truth[row, column].reshape(128, 32)
    for block in d:
        assert (error(block, expected) < 1e-6) == right


def test_a_descriptor_begins_at_the_first_row_of_an_atom():
    """Elsewhere the hardware needs its base offset, which the kernels leave at 0."""
    a, d = torch.randn(64, 64).bfloat16(), torch.zeros(2, 128, 32)
    register((a,))
    numbers = {**RIGHT, "step_b": 128, "transposed": False, "fenced": True}
    with pytest.raises(RuntimeError, match="within an atom"):
        sm90().multiply_once(a=pointer(a), b=pointer(a), d=pointer(d), **numbers)


def test_emulated_wgmma_needs_its_fence():
    a, d = torch.randn(64, 64).bfloat16(), torch.zeros(2, 128, 32)
    register((a,))
    numbers = {**RIGHT, "step_b": 32, "transposed": False, "fenced": False}
    with pytest.raises(RuntimeError, match="no wgmma_fence"):
        sm90().multiply_once(a=pointer(a), b=pointer(a), d=pointer(d), **numbers)


def fails_or_errs(case, **how):
    """Whether the emulation reports an error, or the result is wrong."""
    try:
        case.check(**how)
    except (RuntimeError, AssertionError):
        return True
    return False


@pytest.mark.parametrize("completion", [LATE, RANDOM], ids=["late", "random"])
@pytest.mark.parametrize("primitive", ["full wait", "empty wait", "wgmma wait"])
def test_a_missing_wait_is_noticed(primitive, completion):
    """The tests above are worth something: without a wait, they fail."""
    check_broken(Conv(3, 9, 11, 136, 72, (3, 3), (1, 1), (1, 1)), primitive, completion)


@pytest.mark.parametrize("primitive", ["full wait", "empty wait", "filter wait"])
def test_a_missing_wait_is_noticed_where_the_filter_is_kept(primitive):
    check_broken(Conv(5, 9, 11, 64, 64, (3, 3), (1, 1), (1, 1)), primitive, LATE)


def check_broken(conv, primitive, completion):
    case = Forward(conv, torch.bfloat16)
    assert not fails_or_errs(case, processors=2, completion=completion)
    sm90().break_primitive(primitive)
    assert fails_or_errs(case, processors=2, completion=completion)


@pytest.mark.parametrize(
    "primitive", ["sums barrier", "peer arrival", "barrier fence", "joint exit"]
)
def test_a_missing_barrier_is_noticed(primitive):
    """Between the warps that sum, and between the blocks that share the filter's stages."""
    case = Backward(Conv(3, 9, 11, 136, 72, (3, 3), (1, 1), (1, 1)), torch.bfloat16)
    sm90().break_primitive(primitive)
    assert any(fails_or_errs(case, processors=2, seed=seed) for seed in range(3))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("", None),
        ("unfenced barrier", "initialisation is not visible"),
        ("unannounced barrier", "initialisation is not visible"),
        ("too many bytes", "more bytes"),
        ("named barrier", "barriers are 1 to 7"),
        ("arrival at a named barrier", "barriers are 1 to 7"),
        ("parity", "a parity is 0 or 1"),
        ("half a warp elects", "elect_one"),
        ("lanes apart at a named barrier", "is at .* while others of its group are at"),
        ("lanes apart at a fence", "is at .* while others of its group are at"),
        ("part of a warp", "whole warps"),
        ("three warps give registers", "wait at setmaxnreg.dec"),
        ("registers from nowhere", "deadlock.*wait at setmaxnreg.inc"),
        ("give more registers", "more registers than before"),
        ("arrival at an ended block", "block of the cluster has ended"),
    ],
)
def test_a_misused_primitive_is_named(fault, message):
    """What a device would do wrong in silence, or never finish."""
    sm90().clear_memory()
    if message is None:
        sm90().misuse(fault)
        return
    with pytest.raises(RuntimeError, match=message):
        sm90().misuse(fault)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("out", "out is not 16-byte aligned"),
        ("x", "operand is not 16-byte aligned"),
        ("stride", "rows of the tables"),
        ("scale", "scale and out are needed"),
        ("dtype", "not float32"),
        ("height", "the output is 4 x 4, not 5 x 4"),
    ],
)
def test_bad_arguments_are_refused(broken, message):
    forward = Forward(Conv(1, 4, 4, 16, 16), torch.bfloat16)
    out = nan(*forward.u.shape, dtype=torch.bfloat16)
    changes = {
        "out": {"out": pointer(out) + 2},
        "x": {"x": pointer(forward.x) + 2},
        "stride": {"table_stride": 17},
        "scale": {"scale": 0},
        "dtype": {"dtype": "float32"},
        "height": {"height": (4, 5, 1, 1, 0, 1)},
    }
    with pytest.raises(ValueError, match=message):
        launch_fprop(forward, out, **changes[broken])


def test_unsupported_gradients_are_refused():
    pixels = ("ag", "weight", "skip", "branch", "activation", "grad", "scaled_grad")
    sums = ("scale", "shift", "table_stride", "partial0", "partial1", "t0", "t1", "total_stride")
    absent = dict.fromkeys((*pixels, *sums, "device", "stream"), 0)
    plain = {**absent, "relu": False, "dtype": "bfloat16", "processors": 1}
    conv = Conv(1, 8, 8, 16, 16, (4, 4), (4, 4))
    with pytest.raises(ValueError, match="product is above 4"):
        sm90().dgrad(**conv.sizes(), **plain)
    conv = Conv(1, 8, 8, 16, 16)
    with pytest.raises(ValueError, match="need the branch"):
        sm90().dgrad(**conv.sizes(), **{**plain, "relu": True})
    with pytest.raises(ValueError, match="as workspace"):
        sm90().dgrad(**conv.sizes(), **{**plain, "t0": 16})
