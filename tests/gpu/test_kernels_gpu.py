"""Both kinds of kernels on a CUDA device: real sizes, every dtype, every promise of the hardware.

Run by ``make test-gpu``; skipped without a device, and for backend ``cuda`` without ``wfnet._C`` or
on another device than Hopper. Truth is fp64 on the device; the bound is twice the error of the
eager path in the same dtype.
"""

import closeness
import pytest
import torch
from closeness import assert_within

import wfnet.functional as wf
from wfnet import backends
from wfnet.backends import cuda, cuda_launch
from wfnet.backends.contract import ConvGeometry, Epilogue, LayerBelow
from wfnet.backends.eager import backend as eager
from wfnet.gate_tables import GatedLayer, GateTables

pytest.importorskip("triton")

from wfnet.kernels.config import full_precision

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CLASSES = 20
# Backend, dtype, whether products of fp32 may run in TF32.
NUMBERS = [
    ("cuda", torch.bfloat16, True),
    ("cuda", torch.float16, True),
    ("triton", torch.bfloat16, True),
    ("triton", torch.float16, True),
    ("triton", torch.float32, True),
    ("triton", torch.float32, False),
]

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
    "odd": (5, 15, 40, 24, 3, 2),
    "one pixel": (300, 1, 72, 200, 1, 1),
    "patches": (8, 64, 16, 192, 16, 16),
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


def usable(name: str) -> backends.Backend:
    """The backend; skips where it cannot run."""
    if name == "cuda":
        missing = cuda_launch.library().missing or cuda._refuse_tensor(
            torch.empty(0, device=DEVICE, dtype=torch.bfloat16)
        )
        if missing:
            pytest.skip(missing)
    return backends.get(name)


@pytest.fixture(params=["cuda", "triton"])
def backend(request):
    """The name of a backend that runs here."""
    usable(request.param)
    return request.param


@pytest.fixture(autouse=True)
def products(request):
    """Allows or forbids TF32, as the test's parameter ``tf32`` says."""
    # PyTorch's flags cannot be patched, they are attributes of modules.
    flags = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [flag.allow_tf32 for flag in flags]
    parameters = getattr(getattr(request.node, "callspec", None), "params", {})
    for flag in flags:
        flag.allow_tf32 = parameters.get("tf32", True)
    yield
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


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def images(*shape, dtype):
    return randn(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


def conv_operands(name, dtype):
    batch, size, channels, columns, kernel, stride = CONVS[name]
    x = images(batch, channels, size, size, dtype=dtype)
    weight = images(columns, channels, kernel, kernel, dtype=torch.float32)
    weight = (weight / (channels * kernel**2) ** 0.5).to(dtype)
    scale = torch.rand(batch, columns, device=DEVICE) + 0.1
    shift = randn(batch, columns)
    pad = 0 if stride == kernel else kernel // 2
    return x, weight, scale, shift, ConvGeometry((stride,) * 2, (pad,) * 2)


def engines(backend, dtype):
    """The kernels, the same in eager, and the truth."""
    return (usable(backend), dtype), (eager, dtype), (eager, torch.float64)


def depth_of(weight):
    """Products that forward or input gradient sums."""
    return weight[0, 0].numel() * max(weight.shape[:2])


def wide(kind):
    return torch.promote_types(kind, torch.float32)


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize(("backend", "dtype", "tf32"), NUMBERS, ids=str)
def test_conv2d_error(backend, name, dtype, tf32):
    """Forward and backward of the backend contract at the sizes of real layers."""
    x, weight, scale, shift, geometry = conv_operands(name, dtype)
    need_dx = name != "resnet18.conv1"  # images need no gradient
    found, dout = [], None
    for engine, kind in engines(backend, dtype):
        tables = scale.to(wide(kind)), shift.to(wide(kind))
        epilogue = Epilogue(*tables, save=True)
        out, saved, _ = engine.conv2d(x.to(kind), weight.to(kind), geometry, epilogue)
        dout = torch.randn_like(out) if dout is None else dout
        t1, t0 = torch.empty_like(tables[0]), torch.empty_like(tables[0])
        layer = LayerBelow(tables[0], branch=saved, t1=t1, t0=t0, need_scaled_grad=need_dx)
        dx = engine.conv2d_backward(dout.to(kind), layer, weight.to(kind), tuple(x.shape), geometry)
        found.append((out, t1, t0, *([dx] if need_dx else [])))
    names = ("out", "t1", "t0", "dx") if need_dx else ("out", "t1", "t0")
    for what, *values in zip(names, *found, strict=True):
        assert_as_good(*values, what, depth_of(weight), in_tf32(dtype))


@pytest.mark.parametrize(("backend", "dtype", "tf32"), NUMBERS, ids=str)
@pytest.mark.parametrize("name", LINEARS)
def test_linear_error(backend, name, dtype, tf32):
    batch, tokens, features, columns = LINEARS[name]
    x = randn(batch, tokens, features, dtype=dtype)
    weight = (randn(columns, features) / features**0.5).to(dtype)
    scale = torch.rand(batch, columns, device=DEVICE) + 0.1
    shift, dout = randn(batch, columns), randn(batch, tokens, columns, dtype=dtype)
    found = []
    for engine, kind in engines(backend, dtype):
        tables = scale.to(wide(kind)), shift.to(wide(kind))
        out, saved, _ = engine.linear(x.to(kind), weight.to(kind), Epilogue(*tables, save=True))
        t1, t0 = torch.empty_like(tables[0]), torch.empty_like(tables[0])
        layer = LayerBelow(tables[0], branch=saved, t1=t1, t0=t0)
        dx = engine.linear_backward(dout.to(kind), layer, weight.to(kind), tuple(x.shape))
        found.append((out, dx, t1, t0))
    for what, *values in zip(("out", "dx", "t1", "t0"), *found, strict=True):
        assert_as_good(*values, what, max(features, columns), in_tf32(dtype, "linear"))


@pytest.mark.parametrize(("backend", "dtype", "tf32"), NUMBERS, ids=str)
@pytest.mark.parametrize("name", ["resnet18.layer1", "resnet18.layer2.0", "resnet50.layer4.reduce"])
@pytest.mark.parametrize("masked", [False, True], ids=["mask from the branch", "mask kept"])
def test_chain_error(backend, name, dtype, tf32, masked):
    """Residual and ReLU in the forward epilogue; a link of the backward chain below it."""
    x, weight, scale, shift, geometry = conv_operands(name, dtype)
    batch, channels = x.shape[:2]
    skip, branch, mask = (images(*x.shape, dtype=dtype) for _ in range(3))
    below_scale = torch.rand(batch, channels, device=DEVICE) + 0.1
    below_shift = randn(batch, channels)
    found, residual, ag = [], None, None
    for engine, kind in engines(backend, dtype):
        epilogue = Epilogue(scale[:1].to(wide(kind)))
        out, _, _ = engine.conv2d(x[:1].to(kind), weight.to(kind), geometry, epilogue)
        if residual is None:
            residual, ag = (images(batch, *out.shape[1:], dtype=dtype) for _ in range(2))
        tables = scale.to(wide(kind)), shift.to(wide(kind))
        epilogue = Epilogue(*tables, residual.to(kind), relu=True, save=True)
        out, _, _ = engine.conv2d(x.to(kind), weight.to(kind), geometry, epilogue)
        kept, open_ = branch.to(kind), mask.to(kind)
        if engine is eager:  # which keeps u where the kernels keep v = scale * u, and its own mask
            kept, open_ = kept / below_scale.to(kind)[:, :, None, None], mask > 0
        t1, t0 = torch.empty(2, batch, channels, device=DEVICE, dtype=wide(kind)).unbind()
        tables = below_scale.to(wide(kind)), below_shift.to(wide(kind))
        mask_ = open_ if masked else None
        below = LayerBelow(*tables, kept, mask_, True, t1, t0, need_grad=True)
        finished = engine.conv2d_dgrad(
            ag.to(kind), weight.to(kind), tuple(x.shape), geometry, skip.to(kind), below
        )
        found.append([out, finished.grad, finished.scaled_grad, t1, t0])
    open_ = mask > 0 if masked else branch.float() + below_shift[:, :, None, None] > 0
    g = (exact_gradient(ag, weight, x.shape, geometry) + skip) * open_
    scaled = below_scale[:, :, None, None] * g
    found[2][1:] = [g, scaled, (g * branch).sum((2, 3)), g.sum((2, 3))]
    for what, *values in zip(("out", "g", "scaled", "t1", "t0"), *found, strict=True):
        assert_as_good(*values, what, depth_of(weight), in_tf32(dtype))


def exact_gradient(ag, weight, shape, geometry):
    """``dx`` in fp64."""
    return torch.nn.grad.conv2d_input(
        tuple(shape), weight.double(), ag.double(), geometry.stride, geometry.padding
    )


def call_conv(backend, alphas, x, weight, bias, forget, source=None):
    return wf.wf_conv2d(
        x,
        weight,
        bias,
        *alphas,
        forget,
        padding=1,
        gate_scale=1.05,
        source=source,
        backend=backend,
    )


def small_layer(dtype=torch.bfloat16, batch=8):
    x = images(batch, 64, 28, 28, dtype=dtype)
    weight = (randn(128, 64, 3, 3) / 24).to(dtype)
    bias = randn(128, dtype=dtype)
    alphas = [randn(CLASSES, 128).requires_grad_() for _ in range(2)]
    forget = torch.randint(0, CLASSES, (batch,), device=DEVICE)
    return alphas, x.requires_grad_(), weight, bias, forget


def test_200_repeats_are_bitwise_equal(backend):
    alphas, x, weight, bias, _ = small_layer()
    source = torch.randint(0, 8, (24,), device=DEVICE)
    forget = torch.randint(0, 3, (24,), device=DEVICE)  # many samples share a row
    dout = first = None
    for _ in range(200):
        y = call_conv(backend, alphas, x, weight, bias, forget, source)
        dout = torch.randn_like(y) if dout is None else dout
        found = (y, *torch.autograd.grad(y, (x, *alphas), dout))
        first = found if first is None else first
        for value, expected in zip(found, first, strict=True):
            assert torch.equal(value, expected)


def test_fused_column_sums_repeat_bitwise(backend):
    ag, branch = (images(16, 256, 14, 14, dtype=torch.bfloat16) for _ in range(2))
    weight = images(256, 256, 3, 3, dtype=torch.bfloat16)
    scale, shift = torch.rand(16, 256, device=DEVICE), randn(16, 256)

    def run():
        t1, t0 = torch.empty(2, 16, 256, device=DEVICE).unbind()
        below = LayerBelow(scale, shift, branch, None, True, t1, t0)
        geometry = ConvGeometry(padding=(1, 1))
        arguments = (ag, weight, tuple(ag.shape), geometry, None, below)
        return backends.get(backend).conv2d_dgrad(*arguments).scaled_grad, t1, t0

    first = run()
    for _ in range(200):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


def test_runs_on_the_current_stream_and_device(backend):
    """Work queued before on a side stream is seen; nothing leaks onto the default stream."""
    alphas, x, weight, bias, forget = small_layer()
    expected = call_conv(backend, alphas, x, weight, bias, forget)
    late = torch.zeros_like(x.detach())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.copy_(x.detach())
        y = call_conv(backend, alphas, late, weight, bias, forget)
    stream.synchronize()
    assert torch.equal(y, expected)


def test_compiles_without_graph_breaks(backend):
    alphas, x, weight, bias, forget = small_layer()
    compiled = torch.compile(call_conv, fullgraph=True)
    for _ in range(2):  # new labels do not recompile
        forget = torch.randint(0, CLASSES, (8,), device=DEVICE)
        found = compiled(backend, alphas, x, weight, bias, forget)
        plain = call_conv(backend, alphas, x, weight, bias, forget)
        assert torch.equal(found, plain)
        dout = torch.randn_like(found)
        for a, b in zip(
            torch.autograd.grad(found, (x, *alphas), dout),
            torch.autograd.grad(plain, (x, *alphas), dout),
            strict=True,
        ):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_source_indices(backend, dtype):
    """An image is convolved once for all its samples; their gradients meet in it."""
    alphas, x, weight, bias, _ = small_layer(dtype)
    source = torch.randint(0, 8, (24,), device=DEVICE)
    forget = torch.randint(0, CLASSES, (24,), device=DEVICE)
    found, dout = [], None
    for name, kind in ((backend, dtype), ("eager", dtype), ("eager", torch.float64)):
        xs = x.detach().to(kind).requires_grad_()
        filters = [a.detach().to(wide(kind)).requires_grad_() for a in alphas]
        y = call_conv(name, filters, xs, weight.to(kind), bias.to(kind), forget, source)
        dout = torch.randn_like(y) if dout is None else dout
        found.append((y, *torch.autograd.grad(y, (xs, *filters), dout.to(kind))))
    for what, *values in zip(("out", "dx", "dalpha_weight", "dalpha_bias"), *found, strict=True):
        assert_as_good(*values, what, depth_of(weight))


def test_labels_and_sources_out_of_range_give_nan_and_touch_nothing(backend):
    alphas, x, weight, bias, forget = small_layer()
    forget[3], forget[5] = CLASSES, -(2**40)
    source = torch.arange(8, device=DEVICE)
    source[6] = 2**40
    y = call_conv(backend, alphas, x, weight, bias, forget, source)
    bad = torch.zeros(8, dtype=torch.bool, device=DEVICE)
    bad[[3, 5, 6]] = True
    assert y[bad].isnan().all()
    assert y[~bad].isfinite().all()


@pytest.mark.parametrize("bad", ["dtype", "groups", "device"])
def test_a_refusal_leaves_the_device_usable(backend, bad):
    """No launch happens, so no error can stick."""
    alphas, x, weight, bias, forget = small_layer()
    good = call_conv(backend, alphas, x, weight, bias, forget)
    calls = {
        "dtype": lambda: call_conv(
            backend, alphas, x.double(), weight.double(), bias.double(), forget
        ),
        "groups": lambda: wf.wf_conv2d(
            x, weight[:, :32], None, alphas[0], None, forget, groups=2, backend=backend
        ),
        "device": lambda: wf.wf_conv2d(
            x.cpu(), weight.cpu(), None, alphas[0].cpu(), None, 0, backend=backend
        ),
    }
    with pytest.raises(RuntimeError, match=f"backend '{backend}' cannot run this call"):
        calls[bad]()
    torch.cuda.synchronize()
    assert torch.equal(call_conv(backend, alphas, x, weight, bias, forget), good)


def test_offsets_past_32_bits(backend):
    """More than 2^31 elements in one activation."""
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GB")
    batch = 172  # 172 * 224 * 224 * 256 > 2^31
    x = torch.zeros(batch, 224, 224, 64, device=DEVICE, dtype=torch.bfloat16)
    x[-1].normal_()
    weight = randn(256, 64, 1, 1, dtype=torch.bfloat16) / 8
    scale, geometry = torch.rand(batch, 256, device=DEVICE), ConvGeometry()
    truth = scale[-1] * (x[-1].float() @ weight[:, :, 0, 0].float().T)
    kernels = backends.get(backend)
    out, _, _ = kernels.conv2d(x.permute(0, 3, 1, 2), weight, geometry, Epilogue(scale))
    assert_within(out[-1].permute(1, 2, 0), truth.double(), "out", 1e-2)
    assert (out[0] == 0).all()
    t0 = torch.empty(batch, 256, device=DEVICE)
    below = LayerBelow(scale, branch=out, t1=torch.empty_like(t0), t0=t0, need_scaled_grad=False)
    kernels.epilogue_backward(out, below)
    assert_within(t0[-1], out[-1].double().sum((1, 2)), "t0", 1e-3)
    dx = kernels.conv2d_dgrad(out, weight, (batch, 64, 224, 224), geometry).grad
    truth = out[-1].double().permute(1, 2, 0) @ weight[:, :, 0, 0].double()
    assert_within(dx[-1].permute(1, 2, 0), truth, "dx", 1e-2)


@pytest.mark.parametrize("labels", [1, 3])
def test_gate_tables_of_a_network(labels):
    """All layers in one launch each way, a thousand classes, labels that repeat and are missing."""

    def layer(width, bias):
        return GatedLayer(
            randn(1000, width),
            randn(1000, width) if bias else None,
            bias=randn(width) if bias else None,
            gamma=randn(width),
            beta=randn(width),
            mean=randn(width),
            var=torch.rand(width, device=DEVICE) + 0.1,
            gate_scale=1.05,
        )

    layers = [layer(width, bias) for width, bias in ((64, False), (128, True), (512, False))]
    exact = [
        GatedLayer(**{n: t.double() if torch.is_tensor(t) else t for n, t in vars(o).items()})
        for o in layers
    ]
    forget = torch.randint(-1, 1000, (512, labels), device=DEVICE)
    kernels = usable("triton")
    found, truth = kernels.gate_tables(layers)(forget, True), GateTables(exact)(forget, True)
    for what in ("scales", "shifts"):
        for a, b in zip(getattr(found, what), getattr(truth, what), strict=True):
            assert_within(a, b, what, 1e-6)
    for a, b in zip(found.t1 + found.t0, truth.t1 + truth.t0, strict=True):
        if a is not None:
            b.copy_(a.normal_())
    for a, b in zip(found.gradients(), truth.gradients(), strict=True):
        assert_within(a, b, "dalpha", 1e-6)
