"""CUDA kernels on the emulated device (csrc/emulation.h): the kernel source, thread by thread."""

import functools
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import cuda_modules
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import wfnet
import wfnet.functional as wf
from wfnet import gate_tables as tables
from wfnet import gates
from wfnet.backends import cuda, cuda_launch
from wfnet.backends.contract import ConvGeometry, LayerBelow, PoolGeometry
from wfnet.backends.cuda_launch import Axis, Layer, Want
from wfnet.gate_tables import GatedLayer


@pytest.fixture(scope="module")
def faults():
    return cuda_modules.emulated("faults", "tests/cuda/faults.cpp")


def aligned(count):
    """``[count]`` uint32 on a 16-byte boundary."""
    raw = np.zeros(count + 4, np.uint32)
    start = -raw.ctypes.data % 16 // 4
    return raw[start : start + count]


def run_fault(faults, name, seed=0, completion=0):
    source, target = aligned(128), aligned(128)
    source[:] = np.arange(128)
    counts = faults.run(name, source.ctypes.data, target.ctypes.data, seed, completion)
    return target, counts


@pytest.mark.parametrize("completion", [0, 1, 2], ids=["late", "early", "random"])
@pytest.mark.parametrize("seed", [0, 1])
def test_correct_kernels_run_in_any_order(faults, seed, completion):
    exchanged, counts = run_fault(faults, "exchange", seed, completion)
    assert list(exchanged[:64]) == list(range(63, -1, -1))
    assert counts == (4, 4)
    copied, _ = run_fault(faults, "copy", seed, completion)
    expected = np.arange(64)
    expected[28:32] = 0  # an invalid copy fills with zeros
    assert list(copied[:64]) == list(expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing barrier", "race on shared byte"),
        ("missing wait", "copy in flight"),
        ("reads outside", "outside of registered global memory"),
        ("writes input", "write of 4 bytes outside"),
        ("writes twice", "byte 0 of output is written twice"),
        ("shared outside", r"shared bytes \[1024, 1028\) of 1024"),
        ("misaligned", "not aligned to 16"),
        ("deadlock", "32 threads .first 0. wait at sync_block"),
        ("diverged", "shuffle_xor while others of its group are at sync_warp"),
    ],
)
def test_emulation_names_faults(faults, name, message):
    with pytest.raises(RuntimeError, match=message):
        run_fault(faults, name, seed=3)


def test_shared_memory_starts_as_nan(faults):
    target, _ = run_fault(faults, "uninitialised")
    assert np.isnan(target[:64].view(np.float32)).all()


def test_bank_conflicts_are_counted(faults):
    _, (ideal, passes) = run_fault(faults, "conflicting")
    assert (ideal, passes) == (1, 8)


# --- the kernels of the extension, through their launchers ---------------------------------------

TOLERANCE = {torch.bfloat16: 3e-3, torch.float16: 4e-4}  # norms: one rounding of the result, or two
SUMS = 2e-6  # sums of fp32 numbers
DTYPES = list(TOLERANCE)
LATE, EARLY, RANDOM = range(3)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def kernels(monkeypatch):
    """Backend ``cuda`` on CPU tensors; fresh memory is NaN, so that what stays unwritten fails."""
    module = cuda_modules.emulated_kernels()
    monkeypatch.setattr(cuda_launch, "library", lambda: cuda_launch.Library(module, None))
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    module.set_schedule(0, LATE, False)
    yield module
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(False)


def check(result, truth, tolerance):
    error = (result.double() - truth).norm() / truth.norm().clamp_min(1e-30)
    assert error < tolerance, f"relative error {error:.1e}"


def nchw(t):
    return t.double().permute(0, 3, 1, 2)


def nhwc(t):
    return t.permute(0, 2, 3, 1)


def axes(size, kernel, stride=1, padding=0, dilation=1):
    numbers = zip(
        *(n if isinstance(n, tuple) else (n, n) for n in (size, kernel, stride, padding, dilation)),
        strict=True,
    )
    return tuple(
        Axis(n, (n + 2 * p - d * (k - 1) - 1) // s + 1, k, s, p, d) for n, k, s, p, d in numbers
    )


def geometry_of(height, width):
    pairs = ((a.stride, a.padding, a.dilation) for a in (height, width))
    return zip(*pairs, strict=True)


def conv(x, weight, height, width):
    """``[B, P, Q, O]`` fp64 of NHWC operands."""
    stride, padding, dilation = geometry_of(height, width)
    return nhwc(F.conv2d(nchw(x), nchw(weight), None, stride, padding, dilation))


def conv_gradient(ag, weight, shape, height, width):
    stride, padding, dilation = geometry_of(height, width)
    size = (shape[0], shape[3], shape[1], shape[2])
    arguments = (nchw(weight), nchw(ag), stride, padding, dilation)
    return nhwc(torch.nn.grad.conv2d_input(size, *arguments))


# name: batch, channels in and out, size, filter, stride, padding, dilation
CONVS = {
    "3x3": (3, 16, 24, (7, 9), 3, 1, 1, 1),
    "3x3, two column tiles": (1, 24, 136, (5, 5), 3, 1, 1, 1),
    "3x3 stride 2": (2, 40, 16, (9, 8), 3, 2, 1, 1),
    "3x3 stride 2, no padding": (2, 64, 64, (6, 7), 3, 2, 0, 1),
    "1x1": (5, 72, 200, (4, 1), 1, 1, 0, 1),
    "1x1 stride 2": (3, 32, 16, (5, 6), 1, 2, 0, 1),
    "1x1 padded": (2, 16, 16, (3, 3), 1, 1, 1, 1),
    "7x7 stride 2, 3 channels": (2, 3, 16, (9, 10), 7, 2, 3, 1),
    "5x5 dilation 2": (2, 16, 8, (6, 5), 5, 1, 4, 2),
    "3x3 stride 3 dilation 2": (2, 8, 8, (9, 9), 3, 3, 2, 2),
    "filter 3x1, stride 1x2": (2, 16, 24, (6, 5), (3, 1), (1, 2), (1, 0), 1),
    "one pixel, many samples": (150, 16, 16, (1, 1), 1, 1, 0, 1),
    "few pixels": (40, 16, 24, (2, 2), 3, 1, 1, 1),
}


@pytest.fixture(params=CONVS)
def case(request):
    batch, channels, columns, size, *rest = CONVS[request.param]
    height, width = axes(size, *rest)
    return batch, channels, columns, height, width


def operands(case, dtype):
    batch, channels, columns, height, width = case
    x = torch.randn(batch, height.input, width.input, channels).to(dtype)
    weight = torch.randn(columns, height.kernel, width.kernel, channels)
    return x, (weight / (height.kernel * width.kernel * channels) ** 0.5).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conv_fprop(kernels, case, dtype):
    """Branch, tables, residual and ReLU, under a schedule of its own for every shape."""
    x, weight = operands(case, dtype)
    batch, _, columns, height, width = case
    scale, shift = torch.rand(batch, columns) + 0.5, torch.randn(batch, columns)
    residual = torch.randn(batch, height.output, width.output, columns).to(dtype)
    kernels.set_schedule(columns, columns // 8 % 3, True)
    out, branch = cuda_launch.conv_fprop(
        x, weight, height, width, scale, shift, residual=residual, relu=True, save_branch=True
    )
    ideal, passes = kernels.conflicts()
    assert ideal == passes > 0, "bank conflicts"
    v = scale[:, None, None] * conv(x, weight, height, width)
    check(branch, v, TOLERANCE[dtype])
    check(out, (v + shift[:, None, None] + residual).relu(), TOLERANCE[dtype])


def test_conv_fprop_bare(kernels):
    """No shift, residual, ReLU or branch."""
    x, weight = torch.randn(2, 5, 5, 16).bfloat16(), torch.randn(24, 3, 3, 16).bfloat16() / 12
    scale = torch.randn(2, 24)
    height, width = axes((5, 5), 3, padding=1)
    out, branch = cuda_launch.conv_fprop(x, weight, height, width, scale)
    assert branch is None
    check(out, scale[:, None, None] * conv(x, weight, height, width), 3e-3)


@pytest.mark.parametrize("source", [[2, 0, 2, 2], [1, 1], [0, 1, 2], [0] * 9], ids=str)
@pytest.mark.parametrize("size", [(6, 6), (2, 1)], ids=str)
def test_an_image_of_many_samples(kernels, source, size):
    """Samples in any order, images that nobody uses, more images than samples."""
    x, weight = torch.randn(3, *size, 16).half(), torch.randn(24, 1, 1, 16).half() / 4
    source = torch.tensor(source)
    samples = len(source)
    scale, shift = torch.rand(samples, 24) + 0.5, torch.randn(samples, 24)
    height, width = axes(size, 1)
    residual = torch.randn(samples, *size, 24).half()
    out, branch = cuda_launch.conv_fprop(
        x, weight, height, width, scale, shift, residual=residual, source=source, save_branch=True
    )
    v = scale[:, None, None] * conv(x, weight, height, width)[source]
    check(branch, v, 4e-4)
    check(out, v + shift[:, None, None] + residual, 4e-4)


def test_sources_and_labels_out_of_range_are_nan_for_their_sample(kernels):
    x, weight = torch.randn(2, 4, 4, 16).half(), torch.randn(16, 3, 3, 16).half() / 12
    height, width = axes((4, 4), 3, padding=1)
    scale = torch.ones(4, 16)
    scale[2] = torch.nan  # what gate_rows gives for a label out of range
    out, _ = cuda_launch.conv_fprop(
        x, weight, height, width, scale, relu=True, source=torch.tensor([0, 7, 1, -3])
    )
    assert [bool(o.isnan().all()) for o in out] == [False, True, True, True]
    check(out[:1], conv(x, weight, height, width)[:1].relu(), 4e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conv_dgrad_finishes_the_layer_below(kernels, case, dtype):
    """Skip gradient, ReLU mask from the branch, both results and both column sums."""
    batch, channels, columns, height, width = case
    channels = max(channels, 8)
    _, weight = operands((batch, channels, columns, height, width), dtype)
    ag = torch.randn(batch, height.output, width.output, columns).to(dtype)
    shape = (batch, height.input, width.input, channels)
    skip, branch = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    scale, shift = torch.rand(batch, channels) + 0.5, torch.randn(batch, channels)
    t0, t1 = torch.full((2, batch, channels), torch.nan)
    kernels.set_schedule(columns, columns // 8 % 3, True)
    found = cuda_launch.conv_dgrad(
        ag, weight, height, width, Layer(branch, scale, shift, skip=skip, relu=True),
        Want(True, True, t0, t1),
    )  # fmt: skip
    ideal, passes = kernels.conflicts()
    assert ideal == passes > 0, "bank conflicts"
    g = conv_gradient(ag, weight, shape, height, width) + skip
    g = g * (branch.float() + shift[:, None, None] > 0)
    check(found.grad, g, TOLERANCE[dtype])
    check(found.scaled_grad, scale[:, None, None] * g, TOLERANCE[dtype])
    check(t0, g.sum((1, 2)), SUMS)
    check(t1, (g * branch).sum((1, 2)), SUMS)


@pytest.mark.parametrize("what", ["plain", "skip", "activation", "t1", "scaled"])
def test_conv_dgrad_parts(kernels, what):
    """Each part of the epilogue without the others; input channels may be any number then."""
    channels = 3 if what in ("plain", "skip") else 16
    height, width = axes((6, 5), 3, 2, 1)
    weight = torch.randn(24, 3, 3, channels).half() / 12
    ag = torch.randn(2, height.output, width.output, 24).half()
    shape = (2, 6, 5, channels)
    g = conv_gradient(ag, weight, shape, height, width)
    pixels, table = torch.randn(shape).half(), torch.randn(2, channels)
    below, want = Layer(), Want(grad=True)
    if what == "skip":
        below, g = Layer(skip=pixels), g + pixels
    elif what == "activation":
        below, g = Layer(activation=pixels, relu=True), g * (pixels > 0)
    elif what == "t1":
        want = Want(t1=torch.full((2, channels), torch.nan))
        below = Layer(branch=pixels)
    elif what == "scaled":
        below, want = Layer(scale=table), Want(scaled_grad=True)
    found = cuda_launch.conv_dgrad(ag, weight, height, width, below, want)
    if what == "t1":
        check(want.t1, (g * pixels).sum((1, 2)), SUMS)
    elif what == "scaled":
        check(found.scaled_grad, table[:, None, None] * g, 4e-4)
    else:
        check(found.grad, g, 4e-4)
        assert found.grad.shape == shape


def test_tables_and_sums_that_are_columns_of_wider_ones(kernels):
    """Read and written in place, neighbours untouched; odd offsets are copied."""
    ag, weight = torch.randn(2, 3, 3, 16).half(), torch.randn(16, 1, 1, 16).half() / 4
    height, width = axes((3, 3), 1)
    branch = torch.randn(2, 3, 3, 16).half()
    g = conv_gradient(ag, weight, (2, 3, 3, 16), height, width)
    for start in (8, 3):
        wide, sums = torch.randn(2, 40), torch.zeros(2, 40)
        part = slice(start, start + 16)
        found = cuda_launch.conv_dgrad(
            ag, weight, height, width, Layer(branch, wide[:, part]),
            Want(scaled_grad=True, t1=sums[:, part]),
        )  # fmt: skip
        check(found.scaled_grad, wide[:, part][:, None, None] * g, 4e-4)
        check(sums[:, part], (g * branch).sum((1, 2)), SUMS)
        assert not sums[:, :start].any()
        assert not sums[:, start + 16 :].any()


def test_results_do_not_depend_on_the_schedule(kernels):
    """Bitwise equal whatever the order of threads and blocks and the arrival of copies."""
    height, width = axes((9, 8), 3, 2, 1)
    x, weight = torch.randn(3, 9, 8, 32).bfloat16(), torch.randn(72, 3, 3, 32).bfloat16() / 17
    scale = torch.rand(3, 72)
    ag, branch = torch.randn(3, 5, 4, 72).bfloat16(), torch.randn(3, 9, 8, 32).bfloat16()
    seen = []
    for number, completion in enumerate((LATE, EARLY, RANDOM, RANDOM)):
        kernels.set_schedule(number, completion, False)
        out, _ = cuda_launch.conv_fprop(x, weight, height, width, scale)
        t1 = torch.empty(3, 32)
        cuda_launch.conv_dgrad(ag, weight, height, width, Layer(branch), Want(t1=t1))
        seen.append((out, t1))
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))


@pytest.mark.parametrize(
    ("batch", "height", "width", "columns"),
    [(3, 5, 7, 24), (1, 1, 1, 8), (70, 1, 1, 72), (5, 3, 3, 136), (2, 13, 11, 16)],
)
@pytest.mark.parametrize("mask", ["branch", "activation", "none"])
def test_epilogue_bwd(kernels, batch, height, width, columns, mask):
    shape = (batch, height, width, columns)
    dout, skip, branch, activation = (torch.randn(shape).bfloat16() for _ in range(4))
    scale, shift = torch.randn(batch, columns), torch.randn(batch, columns)
    t0, t1 = torch.full((2, batch, columns), torch.nan)
    found = cuda_launch.epilogue_bwd(
        dout,
        Layer(
            branch, scale, shift, activation if mask == "activation" else None, skip, mask != "none"
        ),
        Want(True, True, t0, t1),
    )
    g = dout.double() + skip
    if mask != "none":
        alive = branch.float() + shift[:, None, None] if mask == "branch" else activation
        g = g * (alive > 0)
    check(found.grad, g, 3e-3)
    check(found.scaled_grad, scale[:, None, None] * g, 3e-3)
    check(t0, g.sum((1, 2)), SUMS)
    check(t1, (g * branch).sum((1, 2)), SUMS)


@pytest.mark.parametrize("layout", ["mean", "rows", "strided", "planes"])
def test_epilogue_bwd_reads_gradients_as_they_lie(kernels, layout):
    """A mean's gradient is one pixel broadcast; others are copied only where pixels are uneven."""
    dout = {
        "mean": lambda: torch.randn(2, 1, 1, 16).half().expand(2, 4, 6, 16),
        "rows": lambda: torch.randn(2, 4, 1, 16).half().expand(2, 4, 6, 16),
        "strided": lambda: torch.randn(2, 4, 6, 32).half()[..., 8:24],
        "planes": lambda: torch.randn(2, 16, 4, 6).half().permute(0, 2, 3, 1),
    }[layout]()
    in_place = cuda_launch._pixel_strides(dout) is not None
    assert in_place == (layout in ("mean", "strided"))
    scale = torch.randn(2, 16)
    found = cuda_launch.epilogue_bwd(dout, Layer(scale=scale), Want(scaled_grad=True))
    check(found.scaled_grad, scale[:, None, None] * dout.double(), 4e-4)


def test_sum_by_source(kernels):
    dout, scale = torch.randn(5, 3, 2, 24).half(), torch.randn(5, 24)
    source = torch.tensor([3, 0, 3, 3, 9])  # image 1 and 2 have no sample, sample 4 no image
    scaled = (scale[:, None, None] * dout.double())[:4]
    truth = torch.zeros(4, 3, 2, 24, dtype=torch.float64).index_add(0, source[:4], scaled)
    check(cuda_launch.sum_by_source(dout, scale, source, 4), truth, 4e-4)


LABELS = {
    "one": [[0], [4], [2], [2], [-1]],
    "two": [[0, 3], [4, -1], [2, 2], [-1, -1], [1, 0]],
    "padded, repeated": [[3, -1, 3], [-1, 0, 0], [1, 2, 1], [4, 4, 4], [0, 1, 2]],
    "out of range": [[0, 9], [-2, 1], [5, 5], [1, -1], [2**40, 0]],
}


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("columns", [4, 24, 1032])
def test_gates(kernels, labels, columns):
    alpha, forget = torch.randn(5, columns), torch.tensor(LABELS[labels])
    found = cuda_launch.gate_rows(alpha, forget, 1.3)
    torch.testing.assert_close(
        found, gates.gate_rows(alpha, forget, 1.3), rtol=1e-6, atol=0, equal_nan=True
    )
    t = torch.randn(5, columns)
    gradient = cuda_launch.gate_rows_bwd(t, alpha, forget)
    check(gradient, gates.gate_rows_backward(t.double(), alpha.double(), forget), SUMS)


def test_gates_of_columns_with_factors_in_place(kernels):
    """Columns of a wider matrix, a gate scale and a factor per column, chosen products."""
    wide, forget = torch.randn(5, 64), torch.randint(-1, 5, (70, 2))
    alpha, scales, factor = wide[:, 8:48], torch.rand(40) + 1, torch.randn(40)
    rows = cuda_launch.gate_rows(alpha, forget, scales, factor)
    truth = gates.gate_rows(alpha.double(), forget, scales.double()) * factor
    check(rows, truth, SUMS)
    chosen = (torch.arange(40) % 3 == 0).float()
    t, into = torch.randn(70, 40), torch.zeros(5, 44)
    t[:, 0] = 0
    rows[:, 1] = torch.nan  # not chosen: not read into the sum
    given = cuda_launch.gate_rows_bwd(t, alpha, forget, rows, chosen, into[:, :40])
    assert given.data_ptr() == into.data_ptr()
    t = t.double() * torch.where(chosen > 0, rows.double(), 1)
    check(into[:, :40], gates.gate_rows_backward(t, alpha.double(), forget), SUMS)
    assert not into[:, 40:].any()


def test_a_fresh_gate_is_exactly_one(kernels):
    """Whatever the rounding of the sigmoid: within 4 ulp of 1 it is 1."""
    for start in (-1.0, 0.0, 0.3, 2.0, 3.0, 7.5):
        alpha = torch.full((3, 8), start)
        rows = cuda_launch.gate_rows(alpha, torch.tensor([[0, 2]]), gates.gate_scale(start, True))
        assert (rows == 1).all()


def test_empty_batches(kernels):
    height, width = axes((4, 4), 3, padding=1)
    weight, scale = torch.randn(16, 3, 3, 8).half(), torch.randn(0, 16)
    out, _ = cuda_launch.conv_fprop(torch.randn(0, 4, 4, 8).half(), weight, height, width, scale)
    assert out.shape == (0, 4, 4, 16)
    found = cuda_launch.conv_dgrad(out, weight, height, width, Layer(), Want(grad=True))
    assert found.grad.shape == (0, 4, 4, 8)
    assert cuda_launch.gate_rows(torch.randn(3, 8), torch.empty(0, 1).long(), 1.0).shape == (0, 8)
    t = torch.randn(0, 8)
    assert not cuda_launch.gate_rows_bwd(t, torch.randn(3, 8), torch.empty(0, 1).long()).any()


def launch_with(**changes):
    """A forward and a backward launch of tensors that fit, but for ``changes``."""
    given = {
        "x": torch.randn(2, 4, 4, 8).half(),
        "weight": torch.randn(16, 3, 3, 8).half(),
        "scale": torch.randn(2, 16),
        "residual": torch.randn(2, 4, 4, 16).half(),
        "ag": torch.randn(2, 4, 4, 16).half(),
        "branch": torch.randn(2, 4, 4, 8).half(),
        "below": torch.randn(2, 8),
        "t1": torch.empty(2, 8),
    }
    t = {**given, **changes}
    height, width = axes((4, 4), 3, padding=1)
    cuda_launch.conv_fprop(
        t["x"], t["weight"], height, width, t["scale"], residual=t["residual"],
        source=t.get("source"),
    )  # fmt: skip
    below = Layer(t["branch"], t["below"], relu=True)
    cuda_launch.conv_dgrad(
        t["ag"], t["weight"], height, width, below, Want(scaled_grad=True, t1=t["t1"])
    )


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("weight", torch.randn(16, 3, 3, 8), "weight must be .* torch.float16, not .*float32"),
        ("weight", torch.randn(16, 3, 3, 16).half(), r"must be \[16, 3, 3, 8\]"),
        ("scale", torch.randn(3, 16), r"scale must be \[2, 16\]"),
        ("scale", torch.randn(2, 16).double(), "float32, not .* torch.float64"),
        ("residual", torch.randn(2, 3, 4, 16).half(), r"residual must be \[2, 4, 4, 16\]"),
        ("source", torch.tensor([0.0, 1.0]), "source must be .* torch.int64"),
        ("ag", torch.randn(2, 4, 5, 16).half(), r"ag must be \[2, 4, 4, 16\]"),
        ("branch", torch.randn(2, 4, 4, 16).half(), r"branch must be \[2, 4, 4, 8\]"),
        ("branch", None, "t1 is summed from the branch"),
        ("below", None, "scaled_grad needs the layer's table"),
        ("t1", torch.empty(2, 16), r"t1 must be \[2, 8\]"),
        ("residual", torch.empty(2, 4, 4, 16, device="meta").half(), "residual is on meta"),
    ],
)
def test_launchers_check_shapes_types_and_devices(kernels, name, tensor, message):
    launch_with()
    with pytest.raises(ValueError, match=message):
        launch_with(**{name: tensor})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_channels": 12}, "multiples of 8, not 12 and 16"),
        ({"height": (4, 3, 3, 1, 1, 1)}, "height: 4 pixels give 4, not 3"),
        ({"out": 8}, "out does not begin on 16 bytes"),
        ({"scale": 0}, "scale is missing"),
        ({"table_stride": 18}, "table rows must be 16-byte aligned"),
        ({"batch": 2**27, "samples": 2**27}, "past 32-bit indexing"),
        ({"dtype": "float32"}, "bfloat16 and float16, not float32"),
        ({"samples": 3}, "without order every sample is an image"),
    ],
)
def test_the_extension_checks_what_it_is_told(kernels, change, message):
    arguments = {
        "x": 16, "weight": 16, "batch": 2, "order": 0, "first_of": 0, "samples": 2,
        "in_channels": 8, "out_channels": 16, "height": (4, 4, 3, 1, 1, 1), "width": (4, 4, 3,
        1, 1, 1), "scale": 16, "shift": 0, "table_stride": 16, "residual": 0, "branch": 0,
        "out": 16, "relu": False, "dtype": "float16", "device": 0, "stream": 0,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        kernels.conv_fprop(**{**arguments, **change})


# --- the backend ---------------------------------------------------------------------------------


def relative_error(result, truth):
    return ((result.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


def assert_as_good(mine, theirs, truth):
    """At most twice the error of the eager path in the same dtype, for every result."""
    for name in truth:
        error, bound = (relative_error(r[name], truth[name]) for r in (mine, theirs))
        assert error <= max(2 * bound, 1e-6), f"{name}: error {error:.1e}, eager {bound:.1e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize(("channels", "kernel", "stride"), [(16, 3, 1), (3, 7, 2), (40, 1, 1)])
def test_masked_convolution(kernels, dtype, expanded, channels, kernel, stride):
    """wf_conv2d and every gradient, against the reference's masked weight copies in fp64."""
    x = torch.randn(3, channels, 9, 8).to(dtype)
    weight = (torch.randn(24, channels, kernel, kernel) / (channels * kernel**2) ** 0.5).to(dtype)
    bias, alpha = torch.randn(24).to(dtype), torch.randn(2, 5, 24)
    source = torch.tensor([0, 2, 2, 0]) if expanded else None
    forget = torch.tensor([[0, 3], [4, -1], [2, 2], [-1, -1]])[: 4 if expanded else 3]
    dout = None

    def run(backend, kind):
        nonlocal dout
        tables = torch.float64 if kind == torch.float64 else torch.float32
        leaves = [t.to(k).clone().requires_grad_() for t, k in
                  ((x, kind), (alpha[0], tables), (alpha[1], tables))]  # fmt: skip
        y = wf.wf_conv2d(
            leaves[0], weight.to(kind), bias.to(kind), *leaves[1:], forget, stride=stride,
            padding=kernel // 2, gate_scale=1.05, source=source, backend=backend,
        )  # fmt: skip
        if dout is None:
            dout = torch.randn(y.shape).to(dtype)
        gradients = torch.autograd.grad(y, leaves, dout.to(kind))
        return dict(zip(("y", "dx", "dweight", "dbias"), (y, *gradients), strict=True))

    truth = run("reference", torch.float64)
    assert_as_good(run("cuda", dtype), run("eager", dtype), truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize("tokens", [1, 13])
def test_masked_linear_map(kernels, dtype, expanded, tokens):
    x, weight = torch.randn(2, tokens, 24).to(dtype), (torch.randn(72, 24) / 5).to(dtype)
    bias, alpha = torch.randn(72).to(dtype), torch.randn(2, 5, 72)
    source = torch.tensor([1, 0, 1]) if expanded else None
    forget = torch.tensor([0, 4, -1])[: 3 if expanded else 2]
    dout = torch.randn(len(forget), tokens, 72).to(dtype)

    def run(backend, kind):
        tables = torch.float64 if kind == torch.float64 else torch.float32
        leaves = [t.to(k).clone().requires_grad_() for t, k in
                  ((x, kind), (alpha[0], tables), (alpha[1], tables))]  # fmt: skip
        y = wf.wf_linear(
            leaves[0], weight.to(kind), bias.to(kind), *leaves[1:], forget, source=source,
            backend=backend,
        )  # fmt: skip
        gradients = torch.autograd.grad(y, leaves, dout.to(kind))
        return dict(zip(("y", "dx", "dweight", "dbias"), (y, *gradients), strict=True))

    truth = run("reference", torch.float64)
    assert_as_good(run("cuda", dtype), run("eager", dtype), truth)


WINDOWS = {
    "3x3/2": (2, 9, 10, 24, PoolGeometry((3, 3), (2, 2), (1, 1))),
    "2x2/2": (2, 8, 6, 72, PoolGeometry((2, 2), (2, 2))),
    "3x2/1, 2": (1, 7, 11, 8, PoolGeometry((3, 2), (1, 2), (1, 0), ceil_mode=True)),
    "2x2/3": (3, 11, 12, 16, PoolGeometry((2, 2), (3, 3), ceil_mode=True)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", WINDOWS)
def test_max_pool(kernels, case, dtype):
    """Values as PyTorch's bit by bit, ties included; gradients against fp64, and fused ones."""
    batch, height, width, channels, window = WINDOWS[case]
    kernels.set_schedule(channels, RANDOM, False)
    x = torch.randn(batch, channels, height, width).to(dtype).relu()  # many are 0 and equal
    x = x.contiguous(memory_format=torch.channels_last)
    out, positions = cuda.backend.max_pool2d(x, window, True)
    leaf = x.double().requires_grad_()
    truth = F.max_pool2d(leaf, *window)
    assert torch.equal(out, truth.to(dtype))
    assert positions.dtype == torch.uint8
    assert cuda.backend.max_pool2d(x, window, False)[1] is None
    dout = torch.randn(truth.shape).to(dtype)
    (dx,) = torch.autograd.grad(truth, leaf, dout.double())
    like = torch.empty_like(x, device="meta")
    found = cuda.backend.max_pool2d_backward(dout, positions, like, window)
    check(found.grad, dx, TOLERANCE[dtype])
    skip = torch.randn(x.shape).to(dtype)

    # The layer below: g, A * g and both sums, as in a pass of their own.
    table = (batch, channels)
    scale, shift = torch.rand(table) + 0.5, torch.randn(table)
    branch = torch.randn(x.shape).to(dtype)
    t1, t0 = torch.full(table, torch.nan), torch.full(table, torch.nan)
    below = LayerBelow(scale, shift, branch, None, True, t1, t0, need_grad=True)
    finished = cuda.backend.max_pool2d_backward(dout, positions, like, window, skip, below)
    v = branch.double()
    g = (dx + skip) * (v + shift.double()[:, :, None, None] > 0)
    check(finished.grad, g, TOLERANCE[dtype])
    check(finished.scaled_grad, g * scale[:, :, None, None], TOLERANCE[dtype])
    check(t1, (g * v).sum((2, 3)), SUMS)
    check(t0, g.sum((2, 3)), SUMS)


def test_max_pool_of_nan_and_of_what_the_kernels_refuse(kernels):
    x = torch.randn(1, 8, 6, 6).half()
    x[0, 0, 2, 2] = torch.nan
    x[0, 1] = -torch.inf
    window = PoolGeometry((3, 3), (2, 2), (1, 1))
    out, _ = cuda.backend.max_pool2d(x, window, True)
    torch.testing.assert_close(out, F.max_pool2d(x, *window), equal_nan=True, rtol=0, atol=0)
    for channels, window in (
        (8, PoolGeometry((2, 2), (2, 2), dilation=(2, 2))),
        (8, PoolGeometry((17, 16), (1, 1), (8, 8))),
        (12, PoolGeometry((2, 2), (2, 2))),
    ):
        x = torch.randn(1, channels, 18, 18).half()
        out, positions = cuda.backend.max_pool2d(x, window, True)
        leaf = x.float().requires_grad_()
        truth = F.max_pool2d(leaf, *window)
        assert torch.equal(out, truth.half())
        dout = torch.randn(out.shape).half()
        (dx,) = torch.autograd.grad(truth, leaf, dout.float())
        like = torch.empty_like(x, device="meta")
        found = cuda.backend.max_pool2d_backward(dout, positions, like, window)
        check(found.grad, dx.double(), 3e-3)  # PyTorch sums in fp16


def test_a_layer_of_other_channels_is_not_finished(kernels):
    """Kernels of 8 channels would read past its tables. Without a layer any number will do."""
    ag, weight = torch.randn(1, 4, 4, 16).half(), torch.randn(16, 1, 1, 12).half()
    axis, scale = Axis(4, 4, 1), torch.rand(1, 12)
    below = Layer(branch=torch.randn(1, 4, 4, 12).half(), scale=scale)
    with pytest.raises(ValueError, match="multiple of 8 channels, not 12"):
        cuda_launch.conv_dgrad(ag, weight, axis, axis, below, Want(scaled_grad=True))
    with pytest.raises(ValueError, match="multiple of 8 channels, not 12"):
        cuda_launch.epilogue_bwd(torch.randn(1, 4, 4, 12).half(), below, Want(scaled_grad=True))
    found = cuda_launch.conv_dgrad(ag, weight, axis, axis, Layer(), Want(grad=True)).grad
    check(found, (ag.double() @ weight[:, 0, 0].double()), TOLERANCE[torch.float16])


def test_a_window_that_does_not_fit_is_refused(kernels):
    x = torch.zeros(1, 4, 4, 8).half()
    axis = cuda_launch.Axis(4, 4, 2, 2)  # three windows would begin outside
    with pytest.raises(ValueError, match="does not fit"):
        cuda_launch.max_pool(x, axis, axis)
    wide = cuda_launch.Axis(4, 1, 16, 1, 8)
    with pytest.raises(ValueError, match="more than 255 taps"):
        cuda_launch.max_pool(x, wide, wide)


class Blocks(torch.nn.Module):
    """A stem, a bottleneck with a projection shortcut, a pooling, an identity block."""

    def __init__(self, bias):
        super().__init__()
        conv = functools.partial(torch.nn.Conv2d, bias=bias)
        self.stem, self.norm = conv(3, 16, 3, padding=1), torch.nn.BatchNorm2d(16)
        self.reduce, self.middle = conv(16, 16, 1), conv(16, 16, 3, stride=2, padding=1)
        self.grow, self.project = conv(16, 32, 1), conv(16, 32, 1, stride=2)
        self.pool, self.last = torch.nn.MaxPool2d(2), conv(32, 32, 3, padding=1)
        self.head = torch.nn.Linear(32, 5)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = (self.grow(self.middle(self.reduce(x).relu()).relu()) + self.project(x)).relu()
        x = self.pool(x)
        x = (self.last(x) + x).relu()
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("bias", [False, True])
def test_fused_network(kernels, bias):
    """The chain of input gradients and the tables of all layers, against fp64 and eager bf16."""
    model = Blocks(bias).eval()
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 1.5)
    images, source = torch.randn(2, 3, 12, 12), torch.tensor([0, 1, 1])
    labels, weights = torch.tensor([[0, 3], [4, -1], [2, 2]]), torch.randn(3, 5)
    networks = {}
    for name in ("cuda", "eager", "reference"):
        torch.manual_seed(1)
        networks[name] = wfnet.WFNet(model, 5, backend=name)
        for parameter in networks[name].filter_parameters():
            parameter.data.normal_(1, 2)

    def gradients(name, kind):
        network = networks[name].to(kind)
        network.fuse = name != "reference"
        with torch.autocast("cpu", torch.bfloat16, enabled=kind != torch.float64):
            out = network(images.to(kind), labels, source)
        found = torch.autograd.grad(out, network.filter_parameters(), weights.to(out.dtype))
        return {"logits": out.detach(), "gradients": torch.cat([g.flatten() for g in found])}

    truth = gradients("reference", torch.float64)
    mine = gradients("cuda", torch.float32)
    assert networks["cuda"]._fusion.network is not None, "the network runs unfused"
    assert_as_good(mine, gradients("eager", torch.float32), truth)
    kernels.set_schedule(5, RANDOM, False)
    assert torch.equal(mine["gradients"], gradients("cuda", torch.float32)["gradients"])


def test_gate_tables_take_one_launch_each_way(kernels, monkeypatch):
    """Whatever the number of layers; filters that are columns of one matrix are read in place."""
    names, launch = [], cuda_launch._launch
    monkeypatch.setattr(
        cuda_launch, "_launch", lambda name, *a, **k: (names.append(name), launch(name, *a, **k))
    )
    flat = torch.randn(5, 48)
    layers = [
        GatedLayer(flat[:, :16], flat[:, 16:32], torch.randn(16), gate_scale=1.1),
        GatedLayer(flat[:, 32:], gamma=torch.randn(16), mean=torch.randn(16), var=torch.rand(16)),
    ]
    forget = torch.tensor([[0, 3], [4, -1], [2, 2]])
    found = cuda.backend.gate_tables(layers)(forget, save=True)
    truth = tables.GateTables(
        [replace(layer, **{n: t.double() for n, t in vars(layer).items() if torch.is_tensor(t)})
         for layer in layers]
    )(forget, save=True)  # fmt: skip
    for mine, exact in zip(found.scales + found.shifts, truth.scales + truth.shifts, strict=True):
        check(mine, exact, SUMS)
        assert cuda_launch.tables(mine, None)[0] is mine, "copied"
    for mine, exact in ((found.t1, truth.t1), (found.t0[:1], truth.t0[:1])):
        for place, other in zip(mine, exact, strict=True):
            place.normal_()
            other.copy_(place)
    for mine, exact in zip(found.gradients(), truth.gradients(), strict=True):
        check(mine, exact, SUMS)
    assert names == ["gate_rows", "gate_rows_bwd"]


def test_traces_as_one_graph(kernels):
    """torch.compile(fullgraph=True): refusals and operators trace; new labels do not recompile."""
    x, weight = torch.randn(2, 8, 4, 4).half(), torch.randn(16, 8, 3, 3).half() / 8
    alpha = torch.randn(5, 16, requires_grad=True)
    traces = []

    def counting(graph, inputs):
        traces.append(graph)
        return graph.forward

    def call(forget):
        return wf.wf_conv2d(x, weight, None, alpha, None, forget, 1, 1, backend="cuda")

    call(torch.tensor([0, 0]))
    compiled = torch.compile(call, fullgraph=True, backend=counting)
    for labels in ([0, 1], [4, -1]):
        forget = torch.tensor(labels)
        assert torch.equal(compiled(forget), call(forget))
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("x", "weight", "options", "message"),
    [
        (torch.randn(1, 8, 4, 4), (16, 8, 3, 3), {}, "float16 and bfloat16, not torch.float32"),
        (torch.randn(1, 8, 4, 4).half(), (12, 8, 3, 3), {}, "multiples of 8, not 12"),
        (torch.randn(1, 8, 4, 4).half(), (8, 4, 3, 3), {"groups": 2}, "groups=2"),
    ],
)
def test_refusals_name_the_reason(kernels, x, weight, options, message):
    filters = torch.randn(weight).to(x.dtype)
    with pytest.raises(RuntimeError, match=message):
        wf.wf_conv2d(
            x, filters, None, torch.randn(3, weight[0]), None, 0, backend="cuda", **options
        )


def test_a_missing_extension_is_refused_with_the_remedy(monkeypatch):
    missing = cuda_launch.Library(None, "wfnet._C is not built; run `python csrc/build.py`")
    monkeypatch.setattr(cuda_launch, "library", lambda: missing)
    x, weight = torch.randn(1, 8, 4, 4).half(), torch.randn(8, 8, 1, 1).half()
    with pytest.raises(RuntimeError, match=r"not built; run `python csrc/build\.py`"):
        wf.wf_conv2d(x, weight, None, torch.randn(3, 8), None, 0, backend="cuda")
    assert not cuda.backend.measured_fastest_conv2d(x, weight, ConvGeometry(), 1)


def test_the_environment_selects_the_emulation(monkeypatch, tmp_path):
    """WFNET_CUDA_EMULATE names a module; a path that is none is a refusal with the reason."""
    path = cuda_modules.emulated_kernels().__file__
    code = (
        "import torch, wfnet.functional as wf\n"
        "x, w = torch.ones(1, 8, 2, 2).half(), torch.ones(8, 8, 1, 1).half()\n"
        "y = wf.wf_conv2d(x, w, None, torch.zeros(2, 8), None, -1, backend='cuda')\n"
        "print(y[0, 0].sum().item())"
    )
    environment = {**os.environ, "WFNET_CUDA_EMULATE": path}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.stdout.strip() == "32.0", done.stderr
    monkeypatch.setenv("WFNET_CUDA_EMULATE", str(tmp_path / "none.so"))
    missing = cuda_launch.library.__wrapped__().missing
    assert missing == f"WFNET_CUDA_EMULATE={tmp_path}/none.so is not an emulated module"


def test_a_stale_extension_is_noticed_in_a_checkout(tmp_path):
    """Never kernels of yesterday behind launchers of today."""
    digest = cuda_modules.build().sources_digest()
    assert cuda_launch._is_current(SimpleNamespace(sources=digest))
    assert not cuda_launch._is_current(SimpleNamespace(sources="0123456789abcdef"))
    assert not cuda_launch._is_current(SimpleNamespace())
    assert cuda_launch._is_current(SimpleNamespace(), tmp_path)  # installed: no sources beside it


@pytest.mark.parametrize(
    ("capability", "archs", "runs"),
    [
        ((8, 0), "8.0 9.0a", True),
        ((8, 9), "8.0 9.0a", True),
        ((9, 0), "8.0 9.0a", True),
        ((9, 0), "9.0a", True),
        ((8, 0), "9.0a", False),
        ((10, 0), "9.0a", False),
        ((7, 5), "8.0 9.0a", False),
        ((12, 0), "8.0 9.0a", True),  # by PTX
        ((8, 0), "8.6", False),
    ],
)
def test_targets_that_run_on_a_device(capability, archs, runs):
    assert cuda._runs_on(capability, archs) == runs


def test_explains_itself(kernels):
    x, weight = torch.randn(1, 3, 8, 8).half(), torch.randn(64, 3, 3, 3).half()
    text = cuda.backend.explain_conv2d(x, weight, ConvGeometry(), None)
    assert "128 x 64" in text
    assert "padded to 8" in text
    assert cuda.backend.explain_conv2d(x.float(), weight, ConvGeometry()).startswith("refused")
