"""Both kinds of kernels on a CUDA device: real sizes, every dtype, every promise of the hardware.

Run by ``make test-gpu``; skipped without a device, and for backend ``cuda`` without ``wfnet._C`` or
on another device than Hopper. Operands and truths are those of the tests on the interpreter and the
emulated device (tests/masked_products.py).
"""

import pytest
import torch
from masked_products import Backward, Forward, check, check_public, sizes

import wfnet.functional as wf
from wfnet import backends, gates
from wfnet.backends import cuda
from wfnet.backends.contract import ConvGeometry, Epilogue, LayerBelow

pytest.importorskip("triton")

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("nan_memory"),
]
CLASSES = 5
# Backend, dtype, whether products of fp32 may run in TF32.
NUMBERS = [
    ("cuda", torch.bfloat16, True),
    ("cuda", torch.float16, True),
    ("triton", torch.bfloat16, True),
    ("triton", torch.float16, True),
    ("triton", torch.float32, True),
    ("triton", torch.float32, False),
]
CONVS = {
    "resnet18.conv1": sizes(16, 224, 224, 3, 64, 7, 2),
    "resnet18.layer1": sizes(16, 56, 56, 64, 64, 3),
    "resnet18.layer2.0": sizes(16, 56, 56, 64, 128, 3, 2),
    "resnet18.layer2.0.downsample": sizes(16, 56, 56, 64, 128, 1, 2),
    "resnet50.layer3": sizes(17, 14, 14, 256, 256, 3),
    "resnet18.layer4": sizes(33, 7, 7, 512, 512, 3),
    "resnet50.layer1.expand": sizes(16, 56, 56, 64, 256),
    "resnet50.layer4.reduce": sizes(33, 7, 7, 2048, 512),
    "vgg16.conv2_2": sizes(4, 112, 112, 128, 128, 3),
    "odd": sizes(5, 15, 15, 40, 24, 3, 2),
    "one pixel": sizes(300, 1, 1, 72, 200),
    "patches": (8, 64, 64, 16, 192, (16, 16), (16, 16), (0, 0), (1, 1)),
}
# Samples, tokens, features in and out.
LINEARS = {
    "vit_tiny.qkv": (16, 197, 192, 576),
    "vit_small.qkv": (16, 197, 384, 1152),
    "swin.window": (16, 49, 96, 288),
    "features": (64, 1, 512, 512),
}


def usable(name: str) -> backends.Backend:
    """The backend; skips where it cannot run."""
    if name == "cuda":
        refusal = cuda._refuse_tensor(randn(0))
        if refusal:
            pytest.skip(refusal)
    return backends.get(name)


@pytest.fixture(params=["cuda", "triton"])
def backend(request):
    """The name of a backend that runs here."""
    usable(request.param)
    return request.param


@pytest.fixture(autouse=True)
def products(request):
    """Seeds, and allows or forbids TF32, as the test's parameter ``tf32`` says."""
    torch.manual_seed(0)
    # PyTorch's flags cannot be patched, they are attributes of modules.
    flags = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [flag.allow_tf32 for flag in flags]
    parameters = getattr(getattr(request.node, "callspec", None), "params", {})
    for flag in flags:
        flag.allow_tf32 = parameters.get("tf32", True)
    yield
    for flag, value in zip(flags, before, strict=True):
        flag.allow_tf32 = value


def randn(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device=DEVICE).to(dtype)


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize(("backend", "dtype", "tf32"), NUMBERS, ids=str)
def test_conv2d_error(backend, name, dtype, tf32):
    """Forward, with residual, ReLU and branch, at the sizes of real layers."""
    Forward(CONVS[name], dtype, DEVICE).check(usable(backend).conv2d)


@pytest.mark.parametrize("name", list(CONVS)[1:])  # images need no gradient
@pytest.mark.parametrize(("backend", "dtype", "tf32"), NUMBERS, ids=str)
@pytest.mark.parametrize("mask", ["branch", "kept"])
def test_chain_error(backend, name, dtype, tf32, mask):
    """A link of the backward chain; a layer with its output kept has a projection shortcut, too."""
    shortcut = mask == "kept"
    case = Backward(CONVS[name], dtype, DEVICE, mask=mask, shortcut=shortcut)
    case.check(usable(backend).conv2d_dgrad)


@pytest.mark.parametrize(("backend", "dtype", "tf32"), NUMBERS, ids=str)
@pytest.mark.parametrize("name", LINEARS)
def test_linear_error(backend, name, dtype, tf32):
    batch, tokens, features, columns = LINEARS[name]
    usable(backend)
    weight = (torch.randn(columns, features, device=DEVICE) / features**0.5).to(dtype)
    forget = torch.randint(-1, CLASSES, (batch, 2), device=DEVICE)
    check_public(backend, randn(batch, tokens, features, dtype=dtype), weight, forget)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_source_indices(backend, dtype):
    """An image is convolved once for all its samples; their gradients meet in it."""
    source = torch.randint(0, 8, (24,), device=DEVICE)
    forget = torch.randint(0, CLASSES, (24,), device=DEVICE)
    x, weight = randn(8, 64, 28, 28, dtype=dtype), randn(128, 64, 3, 3, dtype=dtype) / 24
    check_public(backend, x, weight, forget, (1, 1), source)


def small_layer(batch=8):
    """Arguments of ``wf_conv2d`` up to the labels; image and filters learn."""
    x, weight = randn(batch, 64, 28, 28), randn(128, 64, 3, 3) / 24
    alphas = [randn(CLASSES, 128, dtype=torch.float32).requires_grad_() for _ in range(2)]
    return x.requires_grad_(), weight, randn(128), *alphas


def call(backend, layer, forget, source=None):
    return wf.wf_conv2d(*layer, forget, padding=1, source=source, backend=backend)


def gradients(y, layer, dout):
    return torch.autograd.grad(y, (layer[0], *layer[3:]), dout)


def test_200_repeats_are_bitwise_equal(backend):
    layer = small_layer()
    source = torch.randint(0, 8, (24,), device=DEVICE)
    forget = torch.randint(0, 3, (24,), device=DEVICE)  # many samples share a row
    chain = Backward(CONVS["resnet50.layer3"], torch.bfloat16, DEVICE)
    dout = first = None
    for _ in range(200):
        y = call(backend, layer, forget, source)
        dout = torch.randn_like(y) if dout is None else dout
        found, below = chain.run(backends.get(backend).conv2d_dgrad)
        values = (y, *gradients(y, layer, dout), found.scaled_grad, below.t1, below.t0)
        first = values if first is None else first
        assert all(torch.equal(a, b) for a, b in zip(values, first, strict=True))


def test_runs_on_the_current_stream_and_device(backend):
    """Work queued before on a side stream is seen; nothing leaks onto the default stream."""
    layer, forget = small_layer(), torch.arange(8, device=DEVICE) % CLASSES
    expected = call(backend, layer, forget)
    late = torch.zeros_like(layer[0].detach())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.copy_(layer[0].detach())
        y = call(backend, (late, *layer[1:]), forget)
    stream.synchronize()
    assert torch.equal(y, expected)


def test_compiles_without_graph_breaks(backend):
    layer = small_layer()
    compiled = torch.compile(call, fullgraph=True)
    for _ in range(2):  # new labels do not recompile
        forget = torch.randint(0, CLASSES, (8,), device=DEVICE)
        found, plain = compiled(backend, layer, forget), call(backend, layer, forget)
        assert torch.equal(found, plain)
        dout = torch.randn_like(found)
        pairs = zip(gradients(found, layer, dout), gradients(plain, layer, dout), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_labels_and_sources_out_of_range_give_nan_and_touch_nothing(backend):
    forget, source = torch.zeros(8, device=DEVICE).long(), torch.arange(8, device=DEVICE)
    forget[3], forget[5], source[6] = CLASSES, -(2**40), 2**40
    y = call(backend, small_layer(), forget, source)
    bad = torch.isin(torch.arange(8), torch.tensor([3, 5, 6]))
    assert y[bad].isnan().all()
    assert y[~bad].isfinite().all()


@pytest.mark.parametrize("bad", ["dtype", "device"])
def test_a_refusal_leaves_the_device_usable(backend, bad):
    """No launch happens, so no error can stick."""
    layer, forget = small_layer(), torch.zeros(8, device=DEVICE).long()
    good = call(backend, layer, forget)
    wrong = [t.double() if bad == "dtype" else t.cpu() for t in layer]
    with pytest.raises(RuntimeError, match=f"backend '{backend}' cannot run this call"):
        call(backend, wrong, 0)
    torch.cuda.synchronize()
    assert torch.equal(call(backend, layer, forget), good)


def test_offsets_past_32_bits(backend):
    """More than 2^31 elements in one activation."""
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GB")
    batch = 172  # 172 * 224 * 224 * 256 > 2^31
    x = torch.zeros(batch, 224, 224, 64, device=DEVICE, dtype=torch.bfloat16)
    x[-1].normal_()
    weight = randn(256, 64, 1, 1) / 8
    scale, geometry = torch.rand(batch, 256, device=DEVICE), ConvGeometry()
    truth = scale[-1] * (x[-1].float() @ weight[:, :, 0, 0].float().T)
    kernels = backends.get(backend)
    out, _, _ = kernels.conv2d(x.permute(0, 3, 1, 2), weight, geometry, Epilogue(scale))
    check(out[-1].permute(1, 2, 0), truth, bound=1e-2)
    assert (out[0] == 0).all()
    t0 = torch.empty(batch, 256, device=DEVICE)
    below = LayerBelow(scale, branch=out, t1=torch.empty_like(t0), t0=t0, need_scaled_grad=False)
    kernels.epilogue_backward(out, below)
    check(t0[-1], out[-1].double().sum((1, 2)), bound=1e-3)
    dx = kernels.conv2d_dgrad(out, weight, (batch, 64, 224, 224), geometry).grad
    truth = out[-1].double().permute(1, 2, 0) @ weight[:, :, 0, 0].double()
    check(dx[-1].permute(1, 2, 0), truth, bound=1e-2)


@pytest.mark.parametrize("labels", [1, 3])
def test_gates_of_a_network(labels):
    """All layers in one launch each way, a thousand classes, labels that repeat and are missing."""
    kernels = usable("triton")
    alpha, t = (randn(rows, 704, dtype=torch.float32) for rows in (1000, 512))
    forget = torch.randint(-1, 1000, (512, labels), device=DEVICE)
    check(kernels.gate_rows(alpha, forget, 1.05), gates.gate_rows(alpha.double(), forget, 1.05))
    found = kernels.gate_rows_backward(t, alpha, forget)
    check(found, gates.gate_rows_backward(t.double(), alpha.double(), forget))
