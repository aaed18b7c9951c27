"""Backend ``cuda`` on a Hopper device, emulated: which kernels run, and that results agree."""

from types import SimpleNamespace

import cuda_modules
import pytest
import torch
import torch.nn.functional as F

from wfnet.backends import cuda, cuda_launch
from wfnet.backends.contract import ConvGeometry, Epilogue, LayerBelow

TOLERANCE = 4e-4  # roundings to fp16


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that were launched, on a device of six multiprocessors."""
    torch.manual_seed(0)
    module = cuda_modules.emulated_kernels()
    monkeypatch.setattr(cuda_launch, "library", lambda: cuda_launch.Library(module, None))
    monkeypatch.setattr(cuda_launch, "hopper_processors", lambda device: 6)
    names, launch = [], cuda_launch._launch

    def record(function, *arguments, **numbers):
        names.append(function)
        launch(function, *arguments, **numbers)

    monkeypatch.setattr(cuda_launch, "_launch", record)
    return names


def check(result, truth):
    error = (result.double() - truth).norm() / truth.norm()
    assert error < TOLERANCE, f"relative error {error:.1e}"


def operands(n, c, o, size, kernel):
    x = torch.randn(n, c, *size).half()
    weight = (torch.randn(o, c, kernel, kernel) / (c * kernel * kernel) ** 0.5).half()
    return x, weight, torch.rand(n, o) + 0.5, torch.randn(n, o)


@pytest.mark.parametrize(("stride", "kernel"), [(1, 3), (2, 3), (2, 1), (1, 1)])
def test_fused_convolution_and_its_chain(launched, stride, kernel):
    pad = kernel // 2
    geometry = ConvGeometry((stride, stride), (pad, pad))
    x, weight, scale, shift = operands(3, 40, 72, (9, 8), kernel)
    u = F.conv2d(x.double(), weight.double(), None, stride, pad)
    residual = torch.randn(u.shape).half()
    epilogue = Epilogue(scale, shift, residual, relu=True, save=True)
    out, branch, mask = cuda.backend.conv2d(x, weight, geometry, epilogue)
    v = u * scale[:, :, None, None]
    check(branch, v)
    check(out, (v.half().double() + shift[:, :, None, None] + residual.double()).relu())
    assert mask is out
    assert launched == ["sm90.fprop"]

    ag, skip = torch.randn(u.shape).half(), torch.randn(x.shape).half()
    below_v = torch.randn(x.shape).half()
    tables = torch.rand(3, 80)
    tables[:, 40:] = torch.randn(3, 40)
    sums = torch.full((3, 80), float("nan"))
    below = LayerBelow(
        branch=below_v,
        mask=None,
        scale=tables[:, :40],
        shift=tables[:, 40:],
        relu=True,
        t1=sums[:, :40],
        t0=sums[:, 40:],
        need_grad=True,
    )
    done = cuda.backend.conv2d_dgrad(ag, weight, tuple(x.shape), geometry, skip, below)
    dx = torch.nn.grad.conv2d_input(x.shape, weight.double(), ag.double(), stride, pad)
    g = (dx + skip.double()) * (below_v.float() + tables[:, 40:, None, None] > 0)
    check(done.grad, g)
    check(done.scaled_grad, g * tables[:, :40, None, None])
    check(sums[:, 40:], g.sum((2, 3)))
    check(sums[:, :40], (g * below_v.double()).sum((2, 3)))
    assert launched == ["sm90.fprop", "sm90.dgrad"]


def test_linear_maps(launched):
    x, weight = torch.randn(3, 7, 64).half(), (torch.randn(192, 64) / 8).half()
    scale = torch.rand(3, 192)
    out, saved, _ = cuda.backend.linear(x, weight, Epilogue(scale, save=True))
    truth = scale[:, None] * (x.double() @ weight.double().T)
    check(out, truth)
    check(saved, truth)
    dout = torch.randn(3, 7, 192).half()
    t1, t0 = torch.full((2, 3, 192), torch.nan).unbind()
    layer = LayerBelow(scale, branch=saved, t1=t1, t0=t0)
    dx = cuda.backend.linear_backward(dout, layer, weight, tuple(x.shape))
    scaled = (dout.double() * scale[:, None]).half().double()
    check(dx, scaled @ weight.double())
    check(t1, (dout.double() * saved.double()).sum(1))
    check(t0, dout.double().sum(1))
    assert [name for name in launched if name.startswith("sm90")] == ["sm90.fprop", "sm90.dgrad"]


def test_what_they_refuse_takes_the_portable_kernels(launched):
    """Label expansion, thin inputs and strides of 3: another kernel, the same result."""
    x, weight, scale, _ = operands(2, 40, 16, (5, 5), 1)
    source = torch.tensor([1, 0, 1])
    scale = torch.rand(3, 16)
    out, _, _ = cuda.backend.conv2d(x, weight, ConvGeometry(), Epilogue(scale, source=source))
    check(out, F.conv2d(x[source].double(), weight.double()) * scale[:, :, None, None])
    x, weight, scale, _ = operands(2, 8, 16, (5, 5), 3)
    out, _, _ = cuda.backend.conv2d(x, weight, ConvGeometry(), Epilogue(scale))
    check(out, F.conv2d(x.double(), weight.double()) * scale[:, :, None, None])
    x, weight, _, _ = operands(2, 40, 40, (7, 7), 3)
    ag = torch.randn(2, 40, 2, 2).half()
    done = cuda.backend.conv2d_dgrad(ag, weight, tuple(x.shape), ConvGeometry((3, 3)))
    check(done.grad, torch.nn.grad.conv2d_input(x.shape, weight.double(), ag.double(), 3))
    assert launched == ["conv_fprop", "conv_fprop", "conv_dgrad"]


def test_explains_which_kernels_run(launched):
    def explain(c, o, stride=1, batch=None):
        x, weight, _, _ = operands(1, c, o, (6, 6), 3)
        geometry = ConvGeometry((stride, stride), (1, 1))
        return cuda.backend.explain_conv2d(x, weight, geometry, batch).split("; ")

    forward, backward = explain(64, 64)
    assert forward == "forward: persistent implicit GEMM (TMA, wgmma, clusters of two blocks)"
    assert "wgmma" in backward
    forward, backward = explain(64, 64, batch=5)
    assert "mma.sync" in forward
    assert "label expansion" in forward
    assert "wgmma" in backward
    forward, backward = explain(3, 64)
    assert "less than half of a 64-deep slice" in forward
    assert "padded to 8" in forward
    assert "wgmma" in backward
    forward, backward = explain(64, 64, stride=3)
    assert "wgmma" in forward
    assert "product is above 4" in backward
    x, weight = torch.randn(2, 7, 64).half(), torch.randn(192, 64).half()
    assert cuda.backend.explain_linear(x, weight).count("wgmma") == 2
    assert launched == []


def test_hopper_devices_are_recognised(monkeypatch):
    device = torch.device("cuda", 0)

    def processors(capability, archs="8.0 9.0a"):
        module = SimpleNamespace(emulated=False, archs=archs)
        found = SimpleNamespace(major=capability[0], minor=capability[1], multi_processor_count=132)
        monkeypatch.setattr(cuda_launch, "library", lambda: cuda_launch.Library(module, None))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
        cuda_launch._hopper_processors.cache_clear()
        return cuda_launch.hopper_processors(device)

    assert processors((9, 0)) == 132
    assert processors((9, 0), "8.0 9.0") == 0
    assert processors((8, 0)) == processors((10, 0)) == 0
    monkeypatch.setenv("WFNET_CUDA_HOPPER", "0")
    assert processors((9, 0)) == 0
    cuda_launch._hopper_processors.cache_clear()


def test_other_devices_take_the_portable_kernels(monkeypatch):
    module = cuda_modules.emulated_kernels()
    monkeypatch.setattr(cuda_launch, "library", lambda: cuda_launch.Library(module, None))
    assert cuda_launch.hopper_processors(torch.device("cpu")) == 0
    x, weight, _, _ = operands(1, 64, 64, (4, 4), 1)
    text = cuda.backend.explain_conv2d(x, weight, ConvGeometry(), None)
    assert text.count("mma.sync") == 2
    assert "compute capability" not in text
