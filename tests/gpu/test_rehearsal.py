"""test_kernels_gpu.py on a pretended device, at small sizes: the tests themselves run.

Time on a device is short: a mistake in a test must not be found there.
"""

import importlib.util
import inspect
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import pretended_cuda
from wfnet.kernels import gate
from wfnet.kernels.launch import interpreted

from wfnet.backends import cuda_launch

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real device"),
    pytest.mark.skipif(interpreted(gate.gate_rows_kernel), reason="TRITON_INTERPRET=1"),
]
MISSING = cuda_launch.library().missing
_BUILT = pytest.mark.skipif(MISSING is not None, reason=f"wfnet._C: {MISSING}")
BACKENDS = ["triton", pytest.param("cuda", marks=_BUILT)]
CONVS = {
    "resnet18.conv1": (2, 12, 3, 16, 7, 2),
    "resnet18.layer1": (2, 7, 40, 40, 3, 1),
    "resnet18.layer2.0": (2, 8, 40, 32, 3, 2),
    "resnet50.layer4.reduce": (3, 7, 32, 16, 1, 1),
    "odd": (2, 5, 12, 20, 3, 2),
}
LINEARS = {"vit_tiny.qkv": (2, 13, 40, 48), "features": (5, 1, 32, 16)}
# What a pretended device cannot do: 40 GB, streams that run late.
NOT_REHEARSED = {"test_offsets_past_32_bits", "test_runs_on_the_current_stream_and_device"}


@pytest.fixture
def gpu(monkeypatch):
    """The module with the tests, on the pretended device."""
    path = Path(__file__).with_name("test_kernels_gpu.py")
    specification = importlib.util.spec_from_file_location("rehearsed_kernels_gpu", path)
    with pretended_cuda.pretended_cuda():
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        assert set(module.CONVS) > set(CONVS)
        assert set(module.LINEARS) > set(LINEARS)
        monkeypatch.setattr(module, "CONVS", CONVS)
        monkeypatch.setattr(module, "LINEARS", LINEARS)
        monkeypatch.setattr(module, "range", lambda count: range(min(count, 3)), raising=False)
        torch.manual_seed(0)
        yield module


def dtypes(backend):
    return [torch.bfloat16, torch.float16, torch.float32][: 2 if backend == "cuda" else 3]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CONVS)
def test_convolutions(gpu, name, backend):
    for dtype in dtypes(backend):
        gpu.test_conv2d_error(backend, name, dtype, True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LINEARS)
def test_linear_maps(gpu, name, backend):
    for dtype in dtypes(backend):
        gpu.test_linear_error(backend, name, dtype, True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["resnet18.layer1", "resnet18.layer2.0", "resnet50.layer4.reduce"])
def test_chains(gpu, name, backend):
    for dtype in dtypes(backend):
        for masked in (False, True):
            gpu.test_chain_error(backend, name, dtype, True, masked)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_others(gpu, backend):
    """Every test of the file, with each value of its own parameter."""
    values = {"dtype": [torch.bfloat16], "bad": ["dtype", "groups"], "labels": [1, 3]}
    ran = {"test_conv2d_error", "test_linear_error", "test_chain_error", *NOT_REHEARSED}
    others = {name for name in vars(gpu) if name.startswith("test_")} - ran
    assert len(others) == 7
    for name in sorted(others):
        test = getattr(gpu, name)
        own = [word for word in inspect.signature(test).parameters if word != "backend"]
        given = [backend] if "backend" in inspect.signature(test).parameters else []
        for value in values[own[0]] if own else [None]:
            test(*given, *([value] if own else []))


def test_wrong_numbers_are_found(gpu):
    truth = torch.randn(8, 8, dtype=torch.float64)
    rounded = truth.bfloat16()
    gpu.assert_as_good(rounded, rounded, truth, "out", 64)
    with pytest.raises(AssertionError, match="out: error"):
        gpu.assert_as_good(rounded * 1.01, rounded, truth, "out", 64)
    # Operands of fp32 that are truncated to TF32 are not wrong, one of bf16 would be.
    gpu.assert_as_good(truth.float() * (1 - 2**-11), truth.float(), truth, "out", 64, tf32=True)
    with pytest.raises(AssertionError, match="out: error"):
        gpu.assert_as_good(truth.float() * (1 - 2**-11), truth.float(), truth, "out", 64)
