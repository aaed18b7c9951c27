"""Backend ``cuda``: what it refuses, and all of it in a process with Triton's interpreter."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import wfnet.functional as wf
from wfnet.backends import cuda, cuda_launch

pytest.importorskip("triton")


def interpreted(*words, **environment):
    """Runs Python with Triton's interpreter switched on."""
    return subprocess.run(
        [sys.executable, *words],
        env={**os.environ, "TRITON_INTERPRET": "1", **environment},
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_in_the_interpreter(emulated_kernels, tmp_path):
    """The report of the other process on failure."""
    file = Path(__file__).with_name("cuda_interpreted.py")
    options = ["-q", "--no-header", "--override-ini=addopts=", "-p", "no:cacheprovider"]
    done = interpreted("-m", "pytest", *options, str(file))
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_the_environment_selects_the_emulation(emulated_kernels, monkeypatch, tmp_path):
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
