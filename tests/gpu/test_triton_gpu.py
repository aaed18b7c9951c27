"""Triton kernels on a CUDA device: real sizes, every dtype, every promise that needs hardware.

Run by ``make test-gpu``; skipped without a device. Truth is fp64 on the device; the bound is twice
the error of the eager path in the same dtype.
"""

import functools

import closeness
import pytest
import torch
import torch.nn.functional as F
from closeness import assert_within

import wfnet.functional as wf

pytest.importorskip("triton")

from wfnet.kernels.config import full_precision
from wfnet.kernels.conv_dgrad import conv_dgrad
from wfnet.kernels.conv_fprop import conv_fprop
from wfnet.kernels.epilogue_bwd import LayerBelow, epilogue_bwd
from wfnet.kernels.gate import GatedLayer, GateTables
from wfnet.kernels.linear import linear_dgrad, linear_fprop

from wfnet.backends import contract
from wfnet.backends.contract import ConvGeometry, Epilogue
from wfnet.backends.eager import backend as eager
from wfnet.backends.triton import backend as triton_backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
CLASSES = 20

# Samples, pixels a side, channels in and out, filter, stride.
CONVS = {
    "resnet18.conv1": (16, 224, 3, 64, 7, 2),
    "resnet18.layer1": (16, 56, 64, 64, 3, 1),
    "resnet18.layer2.0": (16, 56, 64, 128, 3, 2),
    "resnet18.layer2.0.downsample": (16, 56, 64, 128, 1, 2),
    "resnet50.layer3": (17, 14, 256, 256, 3, 1),
    "resnet18.layer4": (33, 7, 512, 512, 3, 1),
    "resnet50.layer1.expand": (16, 56, 64, 256, 1, 1),
    "resnet50.layer4.reduce": (33, 7, 2048, 512, 1, 1),
    "vgg16.conv2_2": (4, 112, 128, 128, 3, 1),
    "odd": (5, 15, 36, 20, 3, 2),
}
# Samples, tokens, features in and out.
LINEARS = {
    "vit_tiny.qkv": (16, 197, 192, 576),
    "vit_small.qkv": (16, 197, 384, 1152),
    "swin.window": (16, 49, 96, 288),
    "features": (64, 1, 512, 512),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fill_uninitialised_memory():
    """Every torch.empty on the device is NaN: a kernel that forgets an element fails."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def products():
    """Allows or forbids TF32; PyTorch's flags cannot be patched, they are attributes of modules."""
    flags = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [flag.allow_tf32 for flag in flags]

    def allow(tf32: bool) -> None:
        for flag in flags:
            flag.allow_tf32 = tf32

    yield allow
    for flag, value in zip(flags, before, strict=True):
        flag.allow_tf32 = value


def assert_as_good(mine, theirs, truth, what, depth, tf32=False):
    """At most twice the eager error, but for what rounding costs in another order of the same sums.

    Args:
        depth: products that a result sums; fp32 sums one by one err by about its root.
        tf32: products of fp32 run in TF32. PyTorch rounds operands to it, Triton before 3.7
            truncates them: an error that is 2.6 times as large, and no mistake of ours.
    """
    floor = 2.0**-10 if tf32 else max(2e-7, 2.0**-25 * depth**0.5)
    closeness.assert_as_good(mine, theirs, truth, what, floor)


def in_tf32(dtype, op="conv"):
    """Whether products of ``dtype`` run in TF32."""
    return dtype == torch.float32 and not full_precision(dtype, op)


def conv_operands(name, dtype):
    batch, size, channels, columns, kernel, stride = CONVS[name]
    x = torch.randn(batch, channels, size, size, device="cuda").to(
        dtype=dtype, memory_format=torch.channels_last
    )
    weight = torch.randn(columns, channels, kernel, kernel, device="cuda")
    weight = (weight / (channels * kernel**2) ** 0.5).to(
        dtype=dtype, memory_format=torch.channels_last
    )
    scale = torch.rand(batch, columns, device="cuda") + 0.1
    shift = torch.randn(batch, columns, device="cuda")
    pad = kernel // 2
    return x, weight, scale, shift, ConvGeometry((stride,) * 2, (pad,) * 2)


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize(
    ("dtype", "tf32"), [*((dtype, True) for dtype in DTYPES), (torch.float32, False)], ids=str
)
def test_conv2d_error(name, dtype, tf32, products):
    """Forward and backward of the backend contract at the sizes of real layers."""
    products(tf32)
    x, weight, scale, shift, geometry = conv_operands(name, dtype)
    need_dx = name != "resnet18.conv1"  # images need no gradient
    found, dout = {}, None
    for key, engine, kind in (
        ("mine", triton_backend, dtype),
        ("theirs", eager, dtype),
        ("truth", eager, torch.float64),
    ):
        tables = (
            scale.to(torch.promote_types(kind, torch.float32)),
            shift.to(torch.promote_types(kind, torch.float32)),
        )
        epilogue = Epilogue(*tables, save=True)
        out, saved, _ = engine.conv2d(x.to(kind), weight.to(kind), geometry, epilogue)
        if dout is None:
            dout = torch.randn_like(out)
        t1, t0 = torch.empty_like(tables[0]), torch.empty_like(tables[0])
        layer = contract.LayerBelow(tables[0], branch=saved, t1=t1, t0=t0, need_scaled_grad=need_dx)
        dx = engine.conv2d_backward(dout.to(kind), layer, weight.to(kind), tuple(x.shape), geometry)
        found[key] = (out, t1, t0, *([dx] if need_dx else []))
    names = ("out", "t1", "t0", "dx") if need_dx else ("out", "t1", "t0")
    depth = weight.shape[2] ** 2 * max(weight.shape[:2])
    for what, *values in zip(names, *found.values(), strict=True):
        assert_as_good(*values, what, depth, in_tf32(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LINEARS)
def test_linear_error(name, dtype):
    batch, tokens, features, columns = LINEARS[name]
    x = torch.randn(batch, tokens, features, device="cuda").to(dtype)
    weight = (torch.randn(columns, features, device="cuda") / features**0.5).to(dtype)
    scale = torch.rand(batch, columns, device="cuda") + 0.1
    shift = torch.randn(batch, columns, device="cuda")
    dout = torch.randn(batch, tokens, columns, device="cuda").to(dtype)
    found = {}
    for key, engine, kind in (
        ("mine", triton_backend, dtype),
        ("theirs", eager, dtype),
        ("truth", eager, torch.float64),
    ):
        wide = torch.promote_types(kind, torch.float32)
        table = scale.to(wide)
        epilogue = Epilogue(table, shift.to(wide), save=True)
        out, saved, _ = engine.linear(x.to(kind), weight.to(kind), epilogue)
        t1, t0 = torch.empty_like(table), torch.empty_like(table)
        layer = contract.LayerBelow(table, branch=saved, t1=t1, t0=t0)
        dx = engine.linear_backward(dout.to(kind), layer, weight.to(kind), tuple(x.shape))
        found[key] = (out, dx, t1, t0)
    depth = max(features, columns)
    for what, *values in zip(("out", "dx", "t1", "t0"), *found.values(), strict=True):
        assert_as_good(*values, what, depth, in_tf32(dtype, "linear"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["resnet18.layer1", "resnet18.layer2.0", "resnet50.layer4.reduce"])
def test_fused_epilogues_error(name, dtype):
    """Residual, ReLU and skip gradient in the epilogues, against the same in plain operations."""
    x, weight, scale, shift, geometry = conv_operands(name, dtype)
    images, filters = x.permute(0, 2, 3, 1), weight.permute(0, 2, 3, 1)
    options = dict(stride=geometry.stride, padding=geometry.padding)  # noqa: C408

    def plain(kind):
        wide = torch.promote_types(kind, torch.float32)
        u = F.conv2d(x.to(kind), weight.to(kind), None, geometry.stride, geometry.padding)
        v = (scale.to(wide)[:, :, None, None] * u).to(kind)
        out = (v + shift.to(kind)[:, :, None, None] + residual.to(kind)).relu()
        return v, out

    batch, size = x.shape[0], F.conv2d(x[:1], weight, None, geometry.stride, geometry.padding)
    residual = torch.randn(batch, *size.shape[1:], device="cuda").to(
        dtype=dtype, memory_format=torch.channels_last
    )
    out, branch = conv_fprop(
        images, filters, scale, shift, residual=residual.permute(0, 2, 3, 1), relu=True,
        save_branch=True, **options,
    )  # fmt: skip
    depth, tf32 = weight.shape[2] ** 2 * max(weight.shape[:2]), in_tf32(dtype)
    for mine, theirs, truth in zip((branch, out), plain(dtype), plain(torch.float64), strict=True):
        assert_as_good(mine.permute(0, 3, 1, 2), theirs, truth, "forward", depth, tf32)

    ag = torch.randn_like(out)
    below = LayerBelow(
        branch=torch.randn_like(images),
        scale=torch.rand(batch, x.shape[1], device="cuda"),
        shift=torch.randn(batch, x.shape[1], device="cuda"),
        activation=torch.randn_like(images).relu(),
        skip=torch.randn_like(images),
        relu=True,
    )
    want = ("grad", "scaled_grad", "t0", "t1")
    result = conv_dgrad(ag, filters, tuple(x.shape[2:]), below, want=want, **options)

    def plain_backward(kind):
        g = torch.nn.grad.conv2d_input(
            tuple(x.shape), weight.to(kind), ag.permute(0, 3, 1, 2).to(kind), geometry.stride,
            geometry.padding,
        ).permute(0, 2, 3, 1)  # fmt: skip
        g = (g + below.skip.to(kind)) * (below.activation > 0)
        wide = torch.promote_types(kind, torch.float32)
        scaled = (below.scale.to(wide)[:, None, None] * g).to(kind)
        t1 = (g * below.branch.to(kind)).to(wide).sum((1, 2))
        return g, scaled, g.to(wide).sum((1, 2)), t1

    mine = (result.grad, result.scaled_grad, result.t0, result.t1)
    for what, *values in zip(
        want, mine, plain_backward(dtype), plain_backward(torch.float64), strict=True
    ):
        assert_as_good(*values, what, depth, tf32)


def call_conv(alphas, x, weight, bias, forget, source=None, backend="triton"):
    return wf.wf_conv2d(
        x, weight, bias, *alphas, forget, padding=1, gate_scale=1.05, source=source,
        backend=backend,
    )  # fmt: skip


def small_network_call(dtype=torch.bfloat16, batch=8):
    x = torch.randn(batch, 64, 28, 28, device="cuda").to(
        dtype=dtype, memory_format=torch.channels_last
    )
    weight = (torch.randn(128, 64, 3, 3, device="cuda") / 24).to(dtype)
    bias = torch.randn(128, device="cuda").to(dtype)
    alphas = [torch.randn(CLASSES, 128, device="cuda", requires_grad=True) for _ in range(2)]
    forget = torch.randint(0, CLASSES, (batch,), device="cuda")
    return alphas, x.requires_grad_(), weight, bias, forget


def test_200_repeats_are_bitwise_equal():
    alphas, x, weight, bias, _ = small_network_call()
    source = torch.randint(0, 8, (24,), device="cuda")
    forget = torch.randint(0, 3, (24,), device="cuda")  # many samples share a row
    dout = None
    first = None
    for _ in range(200):
        y = call_conv(alphas, x, weight, bias, forget, source)
        dout = torch.randn_like(y) if dout is None else dout
        found = (y, *torch.autograd.grad(y, (x, *alphas), dout))
        if first is None:
            first = found
        for value, expected in zip(found, first, strict=True):
            assert torch.equal(value, expected)


def test_fused_column_sums_repeat_bitwise():
    ag = torch.randn(16, 14, 14, 256, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(256, 3, 3, 256, device="cuda", dtype=torch.bfloat16)
    below = LayerBelow(
        torch.randn_like(ag),
        torch.rand(16, 256, device="cuda"),
        torch.randn(16, 256, device="cuda"),
        relu=True,
    )
    run = functools.partial(
        conv_dgrad, ag, weight, (14, 14), below, padding=(1, 1), want=("scaled_grad", "t0", "t1")
    )
    first = run()
    for _ in range(200):
        again = run()
        for name in ("scaled_grad", "t0", "t1"):
            assert torch.equal(getattr(again, name), getattr(first, name))


def test_labels_change_under_a_captured_graph():
    alphas, x, weight, bias, forget = small_network_call()
    dout = torch.randn(8, 128, 28, 28, device="cuda", dtype=x.dtype).to(
        memory_format=torch.channels_last
    )

    def step():
        y = call_conv(alphas, x, weight, bias, forget)
        return (y, *torch.autograd.grad(y, (x, *alphas), dout))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        forget.copy_(torch.randint(0, CLASSES, (8,), device="cuda"))
        graph.replay()
        replayed = [value.clone() for value in captured]
        for value, expected in zip(replayed, step(), strict=True):
            assert torch.equal(value, expected)


def test_compiles_without_graph_breaks():
    alphas, x, weight, bias, forget = small_network_call()
    compiled = torch.compile(call_conv, fullgraph=True)
    for _ in range(2):  # new labels do not recompile
        forget = torch.randint(0, CLASSES, (8,), device="cuda")
        mine = compiled(alphas, x, weight, bias, forget)
        plain = call_conv(alphas, x, weight, bias, forget)
        assert torch.equal(mine, plain)
        dout = torch.randn_like(mine)
        for a, b in zip(
            torch.autograd.grad(mine, (x, *alphas), dout),
            torch.autograd.grad(plain, (x, *alphas), dout),
            strict=True,
        ):
            assert torch.equal(a, b)


def test_autocast_runs_in_16_bit():
    alphas, x, weight, bias, forget = small_network_call(torch.float32)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = call_conv(alphas, x, weight, bias, forget)
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_source_indices(dtype):
    """Expanded samples, and the input gradient summed over samples of one image."""
    alphas, x, weight, bias, _ = small_network_call(dtype)
    source = torch.randint(0, 8, (24,), device="cuda")
    forget = torch.randint(0, CLASSES, (24,), device="cuda")
    found, dout = [], None
    for backend, kind in (("triton", dtype), ("eager", dtype), ("eager", torch.float64)):
        xs = x.detach().to(kind).requires_grad_()
        filters = [a.detach().to(torch.promote_types(kind, torch.float32)) for a in alphas]
        filters = [a.requires_grad_() for a in filters]
        y = call_conv(filters, xs, weight.to(kind), bias.to(kind), forget, source, backend)
        dout = torch.randn_like(y) if dout is None else dout
        found.append((y, *torch.autograd.grad(y, (xs, *filters), dout.to(kind))))
    depth = 9 * max(weight.shape[:2])
    for what, *values in zip(("out", "dx", "dalpha_weight", "dalpha_bias"), *found, strict=True):
        assert_as_good(*values, what, depth, in_tf32(dtype))


def test_labels_out_of_range_give_nan_and_touch_nothing():
    alphas, x, weight, bias, forget = small_network_call()
    forget[3] = CLASSES
    forget[5] = -(2**40)
    y = call_conv(alphas, x, weight, bias, forget)
    bad = torch.zeros(8, dtype=torch.bool, device="cuda")
    bad[[3, 5]] = True
    assert y[bad].isnan().all()
    assert y[~bad].isfinite().all()


def test_offsets_past_32_bits():
    """More than 2^31 elements in one activation."""
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GB")
    batch = 172  # 172 * 224 * 224 * 256 > 2^31
    x = torch.zeros(batch, 224, 224, 64, device="cuda", dtype=torch.bfloat16)
    x[-1].normal_()
    weight = torch.randn(256, 1, 1, 64, device="cuda", dtype=torch.bfloat16) / 8
    scale = torch.rand(batch, 256, device="cuda")
    truth = scale[-1] * (x[-1].float() @ weight[:, 0, 0].float().T)
    out, _ = conv_fprop(x, weight, scale)
    assert_within(out[-1], truth.double(), "out", 1e-2)
    assert (out[0] == 0).all()
    del out
    out, _ = linear_fprop(x.flatten(1, 2), weight[:, 0, 0], scale)
    assert_within(out[-1], truth.flatten(0, 1).double(), "out", 1e-2)
    result = epilogue_bwd(out, LayerBelow(scale=scale), want=("t0",))
    assert_within(result.t0[-1], out[-1].double().sum(0), "t0", 1e-3)
    dx = linear_dgrad(out, weight[:, 0, 0]).grad
    truth = out[-1].double() @ weight[:, 0, 0].double()
    assert_within(dx[-1], truth, "dx", 1e-2)


def test_gate_tables_of_a_network():
    """One launch for all layers equals one launch per layer, both ways."""
    layers = [
        GatedLayer(
            torch.randn(1000, width, device="cuda"),
            gamma=torch.rand(width, device="cuda"),
            beta=torch.randn(width, device="cuda"),
            mean=torch.randn(width, device="cuda"),
            var=torch.rand(width, device="cuda") + 0.1,
        )
        for width in (64, 128, 512)
    ]
    tables = GateTables(layers)
    forget = torch.randint(0, 1000, (512, 1), device="cuda")
    t1, t0 = tables.empty(512).normal_(), tables.empty(512).normal_()
    gradients = tables.backward(forget, t1, t0)
    for layer, (scale, shift), dalpha, sums in zip(
        layers, tables.scale_and_shift(forget), gradients, tables.views(t1, 512), strict=True
    ):
        gamma = layer.gamma.double() / (layer.var.double() + layer.eps).sqrt()
        rows = eager.gate_rows(layer.alpha_weight.double(), forget, 1.0)
        assert_within(scale, gamma * rows, "scale", 1e-6)
        beta = layer.beta.double() - layer.mean.double() * gamma
        assert_within(shift, beta.expand_as(shift), "shift", 1e-6)
        truth = eager.gate_rows_backward(sums.double(), layer.alpha_weight.double(), forget)
        assert_within(dalpha, truth, "dalpha", 1e-6)
