"""Backend ``cuda``: what it refuses, and all of it in a process with Triton's interpreter."""

import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import wfnet.functional as wf
from wfnet.backends import cuda, cuda_launch
from wfnet.backends.contract import ConvGeometry, Epilogue, LayerBelow

pytest.importorskip("triton")


def together(test):
    """Marks a test of the whole backend."""
    return pytest.mark.interpreter(pytest.mark.usefixtures("emulated_cuda")(test))


def test_in_the_interpreter(emulated_kernels, interpreted):
    """The tests of this file that are marked :func:`together`."""
    done = interpreted("-m", "pytest", "-m", "interpreter", __file__)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_the_environment_selects_the_emulation(
    emulated_kernels, interpreted, monkeypatch, tmp_path
):
    """WFNET_CUDA_EMULATE names a module; a path that is none is a refusal with the reason."""
    code = (
        "import torch, wfnet.functional as wf\n"
        "x, w = torch.ones(1, 32, 2, 2).half(), torch.ones(8, 32, 1, 1).half()\n"
        "y = wf.wf_conv2d(x, w, None, torch.zeros(2, 8), None, -1, backend='cuda')\n"
        "print(y[0, 0].sum().item())"
    )
    done = interpreted("-c", code, WFNET_CUDA_EMULATE=emulated_kernels.__file__)
    assert done.stdout.strip() == "128.0", done.stderr
    monkeypatch.setenv("WFNET_CUDA_EMULATE", str(tmp_path / "none.so"))
    missing = cuda_launch.library.__wrapped__().missing
    assert missing == f"WFNET_CUDA_EMULATE={tmp_path}/none.so is not an emulated module"


def refused(message, dtype=torch.float16):
    x, weight = torch.randn(1, 64, 4, 4).to(dtype), torch.randn(64, 64, 1, 1).to(dtype)
    with pytest.raises(RuntimeError, match=message):
        wf.wf_conv2d(x, weight, None, torch.randn(3, 64), None, 0, backend="cuda")


def test_refusals_on_the_emulated_device(emulated_cuda, monkeypatch):
    refused("float16 and bfloat16, not torch.float32", torch.float32)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    refused("WFNET_CUDA_EMULATE needs TRITON_INTERPRET=1")


def test_a_missing_extension_is_refused_with_the_remedy(monkeypatch):
    missing = cuda_launch.Library(None, "wfnet._C is not built; run `python csrc/build.py`")
    monkeypatch.setattr(cuda_launch, "library", lambda: missing)
    refused(r"not built; run `python csrc/build\.py`")


@pytest.mark.parametrize(
    ("capability", "message"),
    [
        ((9, 0), None),
        ((8, 0), "compute capability 9.0 .Hopper., and the device has 8.0; .* 'triton'"),
        ((10, 0), "the device has 10.0"),
    ],
)
def test_other_devices_are_refused_with_the_remedy(monkeypatch, capability, message):
    built = cuda_launch.Library(SimpleNamespace(emulated=False), None)
    monkeypatch.setattr(cuda_launch, "library", lambda: built)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    x = SimpleNamespace(dtype=torch.float16, device=torch.device("cuda", 0))
    found = cuda._refuse_tensor(x)
    assert found is None if message is None else re.search(message, found)
    x = SimpleNamespace(dtype=torch.float16, device=torch.device("cpu"))
    assert cuda._refuse_tensor(x) == "the CUDA kernels need a CUDA tensor, and x is on cpu"


def test_a_missing_triton_is_refused(emulated_cuda, monkeypatch):
    """Half of the backend runs in Triton's kernels."""
    from wfnet.backends import triton

    monkeypatch.setattr(triton, "triton", None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    refused("the package 'triton' is not installed")


def test_a_stale_extension_is_noticed_in_a_checkout(csrc_build, tmp_path):
    """Never kernels of yesterday behind launchers of today."""
    digest = csrc_build.sources_digest()
    assert cuda_launch._is_current(SimpleNamespace(sources=digest))
    assert not cuda_launch._is_current(SimpleNamespace(sources="0123456789abcdef"))
    assert not cuda_launch._is_current(SimpleNamespace())
    assert cuda_launch._is_current(SimpleNamespace(), tmp_path)  # installed: no sources beside it


# -- all of it: compiled kernels on the emulated device, Triton's interpreted ----------------------
#
# The interpreter's bf16 products are wrong: all is fp16.

TOLERANCE = 4e-4  # roundings to fp16


@pytest.fixture
def launched(monkeypatch):
    """Names of the compiled kernels that were launched."""
    names, launch = [], cuda_launch._launch

    def record(function, *arguments, **numbers):
        names.append(function)
        launch(function, *arguments, **numbers)

    monkeypatch.setattr(cuda_launch, "_launch", record)
    return names


def check(result, truth, tolerance=TOLERANCE):
    error = (result.double() - truth).norm() / truth.norm()
    assert error < tolerance, f"relative error {error:.1e}"


def operands(n, c, o, size, kernel):
    x = torch.randn(n, c, *size).half()
    weight = (torch.randn(o, c, kernel, kernel) / (c * kernel * kernel) ** 0.5).half()
    return x, weight, torch.rand(n, o) + 0.5, torch.randn(n, o)


@together
@pytest.mark.parametrize(("stride", "kernel"), [(1, 3), (2, 3), (2, 1), (1, 1)])
@pytest.mark.parametrize("shortcut", [False, True], ids=["", "shortcut"])
def test_a_layer_and_the_chain_below_it(launched, stride, kernel, shortcut):
    """Tables and sums that are columns of wider ones; a projection shortcut of the layer below."""
    geometry = ConvGeometry((stride, stride), (kernel // 2,) * 2)
    x, weight, scale, shift = operands(3, 40, 72, (9, 8), kernel)
    u = F.conv2d(x.double(), weight.double(), None, stride, kernel // 2)
    residual = torch.randn(u.shape).half()
    epilogue = Epilogue(scale, shift, residual, relu=True, save=True)
    out, branch, mask = cuda.backend.conv2d(x, weight, geometry, epilogue)
    v = u * scale[:, :, None, None]
    check(branch, v)
    check(out, (v.half().double() + shift[:, :, None, None] + residual.double()).relu())
    assert mask is out

    ag, skip, below_v = (torch.randn(s).half() for s in (u.shape, x.shape, x.shape))
    tables, sums = torch.rand(3, 80), torch.full((3, 80), float("nan"))
    tables[:, 40:] = torch.randn(3, 40)
    other = None
    if shortcut:
        t1, t0 = torch.full((2, 3, 40), float("nan")).unbind()
        other_v, other_scale = torch.randn(x.shape).half(), torch.rand(3, 40)
        other = LayerBelow(other_scale, torch.rand(3, 40), branch=other_v, t1=t1, t0=t0)
    below = LayerBelow(
        branch=below_v,
        scale=tables[:, :40],
        shift=tables[:, 40:],
        relu=True,
        t1=sums[:, :40],
        t0=sums[:, 40:],
        need_grad=not shortcut,
        shortcut=other,
    )
    done = cuda.backend.conv2d_dgrad(ag, weight, tuple(x.shape), geometry, skip, below)
    dx = torch.nn.grad.conv2d_input(x.shape, weight.double(), ag.double(), stride, kernel // 2)
    g = (dx + skip.double()) * (below_v.float() + tables[:, 40:, None, None] > 0)
    check(done.scaled_grad, g * tables[:, :40, None, None])
    check(sums[:, 40:], g.sum((2, 3)))
    check(sums[:, :40], (g * below_v.double()).sum((2, 3)))
    if shortcut:
        assert done.grad is None
        check(done.shortcut, g * other_scale[:, :, None, None])
        check(t1, (g * other_v.double()).sum((2, 3)))
        check(t0, g.sum((2, 3)))
    else:
        check(done.grad, g)
    assert launched == ["fprop", "dgrad"]


# name: channels, columns, filter, stride, expanded, compiled kernels forward and backward
LAYERS = {
    "3x3": (40, 72, 3, 1, False, ["fprop", "dgrad"]),
    "3x3, stride 2": (40, 40, 3, 2, False, ["fprop", "dgrad"]),
    "label expansion": (40, 40, 3, 1, True, ["dgrad"]),
    "a stem": (3, 40, 3, 2, False, []),
    "ragged columns": (40, 12, 3, 1, False, []),
    "stride 3": (40, 40, 3, 3, False, ["fprop"]),
    "patches": (3, 32, 4, 4, False, []),
}


@together
@pytest.mark.parametrize("name", LAYERS)
def test_masked_convolution(launched, name):
    """Through the operator, against fp64 and eager; what the kernels refuse, Triton runs."""
    channels, columns, kernel, stride, expanded, names = LAYERS[name]
    source = torch.tensor([0, 2, 2, 0]) if expanded else None
    x = torch.randn(3, channels, 9, 8).half()
    weight = (torch.randn(columns, channels, kernel, kernel) / (channels**0.5 * kernel)).half()
    bias, alpha = torch.randn(columns).half(), torch.randn(2, 5, columns)
    forget = torch.tensor([[0, 3], [4, -1], [2, 2], [-1, -1]])[: 4 if expanded else 3]
    dout = None

    def run(backend, kind):
        nonlocal dout
        table = torch.float64 if kind == torch.float64 else torch.float32
        leaves = [x.to(kind), alpha[0].to(table), alpha[1].to(table)]
        leaves = [t.clone().requires_grad_() for t in leaves]
        y = wf.wf_conv2d(
            leaves[0],
            weight.to(kind),
            bias.to(kind),
            *leaves[1:],
            forget,
            stride=stride,
            padding=0 if kernel == stride else kernel // 2,
            gate_scale=1.05,
            source=source,
            backend=backend,
        )
        dout = torch.randn(y.shape).half() if dout is None else dout
        return y, *torch.autograd.grad(y, leaves, dout.to(kind))

    mine, eager = run("cuda", torch.float16), run("eager", torch.float16)
    assert launched == names
    for result, theirs, truth in zip(mine, eager, run("reference", torch.float64), strict=True):
        bound = 2 * ((theirs.double() - truth).norm() / truth.norm()).item()
        check(result, truth, max(bound, 3e-6))


@together
@pytest.mark.parametrize("tokens", [1, 13])
@pytest.mark.parametrize("expanded", [False, True])
def test_masked_linear_map(launched, tokens, expanded):
    x, weight = torch.randn(2, tokens, 40).half(), (torch.randn(72, 40) / 6).half()
    alpha, source = torch.randn(5, 72), torch.tensor([1, 0, 1]) if expanded else None
    forget = torch.tensor([0, 4, -1])[: 3 if expanded else 2]
    dout = torch.randn(len(forget), tokens, 72).half()

    def run(backend, kind):
        table = torch.float64 if kind == torch.float64 else torch.float32
        leaves = [x.to(kind).clone().requires_grad_(), alpha.to(table).clone().requires_grad_()]
        y = wf.wf_linear(
            leaves[0],
            weight.to(kind),
            None,
            leaves[1],
            None,
            forget,
            source=source,
            backend=backend,
        )
        return y, *torch.autograd.grad(y, leaves, dout.to(kind))

    mine, eager = run("cuda", torch.float16), run("eager", torch.float16)
    assert launched == (["dgrad"] if expanded else ["fprop", "dgrad"])
    for result, theirs, truth in zip(mine, eager, run("reference", torch.float64), strict=True):
        bound = 2 * ((theirs.double() - truth).norm() / truth.norm()).item()
        check(result, truth, max(bound, 3e-6))


# bias, stride of the bottleneck, filter of the pooling, height and width
NETWORKS = {
    "bias, 3x3/2": (True, 2, 2, (12, 8)),
    "no bias, odd sizes, 3x3 pooling": (False, 2, 3, (13, 9)),
    "bias, stride 1, odd sizes": (True, 1, 3, (7, 11)),
}


@together
@pytest.mark.parametrize("name", NETWORKS)
def test_fused_network(emulated_cuda, launched, name, check_fused_network):
    """All of a chain on both devices; the bits repeat, whatever the order of threads."""
    same_bits = check_fused_network("cuda", torch.float16, *NETWORKS[name])
    # Forward of the five convolutions behind the expanded stem; gradients of all of them.
    assert launched[-10:] == ["fprop"] * 5 + ["dgrad"] * 5
    emulated_cuda.set_schedule(5, emulated_cuda.Completion.RANDOM)
    assert same_bits()


@together
def test_explains_which_kernels_run():
    def explain(c, o, stride=1, batch=None):
        x, weight, _, _ = operands(1, c, o, (6, 6), 3)
        geometry = ConvGeometry((stride, stride), (1, 1))
        return cuda.backend.explain_conv2d(x, weight, geometry, batch).split("; ")

    forward, backward = explain(64, 64)
    assert forward == "forward: persistent implicit GEMM (TMA, wgmma, clusters of two blocks)"
    assert "wgmma" in backward
    forward, backward = explain(64, 64, batch=5)
    assert forward == "forward: Triton's kernel (label expansion)"
    assert "wgmma" in backward
    assert "less than half of a 64-deep slice" in explain(3, 64)[0]
    forward, backward = explain(64, 64, stride=3)
    assert "wgmma" in forward
    assert "product is above 4" in backward
    x, weight = torch.randn(2, 7, 64).half(), torch.randn(192, 64).half()
    assert cuda.backend.explain_linear(x, weight).count("wgmma") == 2
    assert cuda.backend.explain_linear(x.float(), weight).startswith("refused: ")


@together
def test_traces_as_one_graph(check_one_graph):
    check_one_graph("cuda", torch.float16)
