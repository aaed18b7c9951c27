"""Whole kernels on the emulated device, through their launchers, against PyTorch in fp64.

The emulation (csrc/emulation/) runs every thread, decodes tensor maps and matrix descriptors,
completes copies and wgmma as late or as early as allowed, and checks that every output byte is
written once, inside of its tensor. Fresh memory is NaN: what is forgotten shows.
"""

import itertools

import pytest
import torch
from masked_products import Backward, Forward, sizes

from wfnet.backends import cuda_launch

BF16 = torch.bfloat16
pytestmark = pytest.mark.usefixtures("nan_memory", "emulated_cuda")


@pytest.fixture
def schedule(emulated_cuda, monkeypatch):
    """Says how the next launches run: thread blocks of the grid, order, completion of copies."""

    def choose(processors=4, seed=0, completion="LATE"):
        emulated_cuda.set_schedule(seed, getattr(emulated_cuda.Completion, completion))
        monkeypatch.setattr(cuda_launch, "_EMULATED_PROCESSORS", processors)

    choose()
    return choose


def check(case):
    case.check(cuda_launch.conv2d if isinstance(case, Forward) else cuda_launch.conv2d_dgrad)


def bits(case):
    """All results of a run."""
    if isinstance(case, Forward):
        return case.run(cuda_launch.conv2d)[:2]
    found, below = case.run(cuda_launch.conv2d_dgrad)
    return found.grad, found.scaled_grad, below.t1, below.t0


def fails(case):
    """Whether the emulation reports an error, or the result is wrong."""
    try:
        check(case)
    except (RuntimeError, AssertionError):
        return True
    return False


# name: batch, height, width, in, out, filter, stride, pad, dilation
CONVS = {
    "1x1, ragged everywhere": (3, 10, 9, 72, 136, (1, 1), (1, 1), (0, 0), (1, 1)),
    "1x1 stride 2": (3, 9, 8, 64, 72, (1, 1), (2, 2), (0, 0), (1, 1)),
    "1x1 padded": (2, 5, 6, 16, 24, (1, 1), (1, 1), (1, 1), (1, 1)),
    "3x3": (3, 9, 11, 40, 72, (3, 3), (1, 1), (1, 1), (1, 1)),
    "3x3 stride 2": (3, 13, 11, 72, 40, (3, 3), (2, 2), (1, 1), (1, 1)),
    "3x3 stride 2, even size": (3, 12, 10, 72, 40, (3, 3), (2, 2), (1, 1), (1, 1)),
    "3x3 stride 2, no padding": (2, 11, 8, 8, 200, (3, 3), (2, 2), (0, 0), (1, 1)),
    "3x3 stride 2 dilation 2": (2, 13, 11, 64, 72, (3, 3), (2, 2), (2, 2), (2, 2)),
    "3x3 stride 2 dilation 3": (2, 14, 11, 16, 16, (3, 3), (2, 2), (3, 3), (3, 3)),
    "2x4 filter, stride (2, 1)": (2, 9, 8, 24, 40, (2, 4), (2, 1), (1, 1), (1, 1)),
    "7x7 stride 2": (2, 14, 13, 16, 40, (7, 7), (2, 2), (3, 3), (1, 1)),
    "many samples in a tile": (37, 2, 3, 72, 40, (3, 3), (1, 1), (1, 1), (1, 1)),
    "one pixel": (130, 1, 1, 64, 72, (1, 1), (1, 1), (0, 0), (1, 1)),
    "smaller than the filter": (5, 2, 1, 16, 16, (3, 3), (2, 2), (1, 1), (1, 1)),
}
CASES = [pytest.param(sizes, id=name) for name, sizes in CONVS.items()]


@pytest.mark.parametrize(
    ("direction", "case"),
    [
        (Forward, sizes(3, 9, 11, 72, 248, 3)),
        (Backward, sizes(3, 9, 11, 248, 72, 3)),
        (Backward, sizes(1, 17, 13, 256, 456, 3, 2)),
    ],
    ids=["forward", "gradient", "gradient, stride 2"],
)
def test_tiles_that_both_consumers_share(schedule, emulated_cuda, direction, case):
    """256 columns, of which a consumer has 64 rows."""
    schedule(processors=2, completion="RANDOM")
    made = direction(case, BF16)
    shapes = direction is Backward, made.in_shape, tuple(made.weight.shape), made.geometry
    assert cuda_launch.tile_columns(*shapes, "cpu") == 256
    check(made)


@pytest.mark.parametrize("direction", [Forward, Backward])
@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_convolution(schedule, direction, case):
    schedule(completion="RANDOM")
    how = {"mask": "kept"} if direction is Backward and case[0] % 2 else {}
    check(direction(case, BF16, **how))


def switched(*names):
    """All combinations of options that are on or off."""
    return [
        dict(zip(names, on, strict=True)) for on in itertools.product([0, 1], repeat=len(names))
    ]


@pytest.mark.parametrize("options", switched("relu", "residual", "shift", "save"), ids=str)
def test_forward_epilogue_family(schedule, options):
    check(Forward(sizes(3, 5, 6, 72, 40), torch.float16, **options))


@pytest.mark.parametrize("mask", ["none", "branch", "kept"])
@pytest.mark.parametrize("options", switched("skip", "sums", "shift"), ids=str)
def test_backward_epilogue_family(schedule, mask, options):
    check(Backward(sizes(3, 5, 6, 72, 40, 1, 2), torch.float16, mask=mask, **options))


@pytest.mark.parametrize(
    ("batch", "channels", "columns"),
    [(7, 64, 64), (7, 136, 64), (7, 136, 128), (3, 72, 256)],
    ids=["filter kept", "block_n 64", "block_n 128", "block_n 256"],
)
@pytest.mark.parametrize("completion", ["LATE", "EARLY", "RANDOM"])
def test_ring_wraps_around_and_order_does_not_matter(
    schedule, batch, channels, columns, completion
):
    """Two or four tiles for a block of one cluster, of 9 to 27 slices: the ring of 4 to 8 wraps."""
    case = Forward(sizes(batch, 10, 13, channels, columns, 3), BF16)
    schedule(processors=2, seed=1, completion=completion)
    check(case)
    first = bits(case)
    schedule(processors=2, seed=2, completion=completion)
    assert all(torch.equal(a, b) for a, b in zip(bits(case), first, strict=True))


@pytest.mark.parametrize("processors", [1, 2, 4, 7])
def test_column_sums_are_bitwise_the_same_for_any_schedule(schedule, processors):
    case = Backward(sizes(3, 14, 14, 40, 72, 3, 2), torch.float16, mask="kept")
    schedule(processors=12, seed=7, completion="EARLY")
    expected = bits(case)
    schedule(processors=processors, seed=processors, completion="RANDOM")
    assert all(torch.equal(a, b) for a, b in zip(bits(case), expected, strict=True))


def test_a_not_a_number_survives_the_relu(schedule):
    """Tables of a sample whose forget label is out of range are NaN, and so is all its output."""
    case = Forward(sizes(2, 4, 4, 16, 16), BF16, save=False)
    case.epilogue.scale[1] = float("nan")
    out = case.run(cuda_launch.conv2d).out
    assert out[1].isnan().all()
    assert not out[0].isnan().any()


WAITS = sizes(3, 9, 11, 136, 72, 3)
WIDE = sizes(3, 9, 11, 256, 72, 3)  # tiles of 256 columns in the gradient


@pytest.mark.parametrize(
    ("fault", "direction", "convolution", "completion"),
    [
        *((fault, Forward, WAITS, "LATE") for fault in ("FULL_WAIT", "EMPTY_WAIT", "WGMMA_WAIT")),
        *((fault, Forward, WAITS, "LATE") for fault in ("WGMMA_FENCE", "STRIDE_OF_A")),
        *(("STRIDE_OF_B", direction, WAITS, "LATE") for direction in (Forward, Backward)),
        ("LEADING_OF_B", Backward, sizes(1, 8, 8, 128, 64), "LATE"),
        *((fault, Forward, WAITS, "RANDOM") for fault in ("FULL_WAIT", "EMPTY_WAIT")),
        ("FILTER_WAIT", Forward, sizes(5, 9, 11, 64, 64, 3), "LATE"),
        ("EMPTY_WAIT", Forward, sizes(5, 9, 11, 64, 64, 3), "LATE"),
        *(("SUMS_BARRIER", Backward, conv, "LATE") for conv in (WAITS, WIDE)),
        ("EMPTY_WAIT", Backward, WIDE, "LATE"),
        ("PEER_ARRIVAL", Backward, WAITS, "LATE"),
        ("BARRIER_FENCE", Backward, WAITS, "LATE"),
        ("JOINT_EXIT", Backward, WAITS, "LATE"),
    ],
)
def test_a_fault_is_noticed(emulated_cuda, schedule, fault, direction, convolution, completion):
    """The tests above are worth something: with a fault, they fail."""
    case = direction(convolution, BF16)
    schedule(processors=2, completion=completion)
    assert not fails(case)
    emulated_cuda.leave_out(getattr(emulated_cuda.Fault, fault))
    for seed in range(3):
        schedule(processors=2, seed=seed, completion=completion)
        if fails(case):
            return
    pytest.fail("nobody noticed")
