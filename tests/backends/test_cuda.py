"""Backend ``cuda``: what it refuses, and all of it in a process with Triton's interpreter."""

import re
from types import SimpleNamespace

import pytest
import torch
from masked_products import check_public

import wfnet.functional as wf
from wfnet.backends import cuda, cuda_launch
from wfnet.backends.contract import ConvGeometry

pytest.importorskip("triton")


def together(test):
    """Marks a test of the whole backend."""
    return pytest.mark.interpreter(pytest.mark.usefixtures("emulated_cuda")(test))


def test_in_the_interpreter(emulated_kernels, interpreted):
    """The tests of this file that are marked :func:`together`."""
    done = interpreted("-m", "pytest", "-m", "interpreter", __file__)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def refused(message, dtype=torch.float16):
    x, weight = torch.randn(1, 64, 4, 4).to(dtype), torch.randn(64, 64, 1, 1).to(dtype)
    with pytest.raises(RuntimeError, match=message):
        wf.wf_conv2d(x, weight, None, torch.randn(3, 64), None, 0, backend="cuda")


def test_what_both_parts_refuse(emulated_cuda, monkeypatch):
    """Half of the backend runs in Triton's kernels."""
    from wfnet.backends import triton

    refused("float16 and bfloat16, not torch.float32", torch.float32)
    monkeypatch.setattr(triton, "triton", None)
    refused("the package 'triton' is not installed")
    missing = cuda_launch.Library(None, "wfnet._C is not built; run `python csrc/build.py`")
    monkeypatch.setattr(cuda_launch, "library", lambda: missing)
    refused(r"not built; run `python csrc/build\.py`")


def test_other_devices_are_refused_with_the_remedy(monkeypatch):
    built = cuda_launch.Library(SimpleNamespace(emulated=False), None)
    monkeypatch.setattr(cuda_launch, "library", lambda: built)
    capability = {0: (9, 0), 1: (8, 0)}
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: capability[device.index]
    )

    def refusal(*device):
        return cuda._refuse_tensor(SimpleNamespace(dtype=torch.half, device=torch.device(*device)))

    assert refusal("cuda", 0) is None
    message = "compute capability 9.0 .Hopper., and the device has 8.0; .* 'triton'"
    assert re.search(message, refusal("cuda", 1))
    assert refusal("cpu") == "the CUDA kernels need a CUDA tensor, and x is on cpu"


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


@pytest.fixture
def launched(monkeypatch):
    """Names of the compiled kernels that were launched."""
    names, launch = [], cuda_launch._launch

    def record(function, *arguments, **numbers):
        names.append(function)
        launch(function, *arguments, **numbers)

    monkeypatch.setattr(cuda_launch, "_launch", record)
    return names


# name: channels, columns, filter, stride, expanded, compiled kernels forward and backward
LAYERS = {
    "3x3": (40, 72, 3, 1, False, ["fprop", "dgrad"]),
    "label expansion": (40, 40, 3, 1, True, ["dgrad"]),
    "a stem": (3, 40, 3, 2, False, []),
    "ragged columns": (40, 12, 3, 1, False, []),
    "stride 3": (40, 40, 3, 3, False, ["fprop"]),
}


@together
@pytest.mark.parametrize("name", LAYERS)
def test_masked_convolution(launched, name):
    """Through the operator, against fp64 and eager; what the kernels refuse, Triton runs."""
    channels, columns, kernel, stride, expanded, names = LAYERS[name]
    source = torch.tensor([0, 2, 2, 0]) if expanded else None
    x = torch.randn(3, channels, 9, 8).half()
    weight = (torch.randn(columns, channels, kernel, kernel) / (channels**0.5 * kernel)).half()
    forget = torch.tensor([[0, 3], [4, -1], [2, 2], [-1, -1]])[: 4 if expanded else 3]
    padding = 0 if kernel == stride else kernel // 2
    check_public("cuda", x, weight, forget, (stride, padding), source)
    assert launched == names


@together
@pytest.mark.parametrize("tokens", [1, 13])
@pytest.mark.parametrize("expanded", [False, True])
def test_masked_linear_map(launched, tokens, expanded):
    x, weight = torch.randn(2, tokens, 40).half(), (torch.randn(72, 40) / 6).half()
    source = torch.tensor([1, 0, 1]) if expanded else None
    forget = torch.tensor([0, 4, -1])[: 3 if expanded else 2]
    check_public("cuda", x, weight, forget, (), source)
    assert launched == (["dgrad"] if expanded else ["fprop", "dgrad"])


# Bias, stride of the bottleneck, filter of the pooling, height and width.
@together
@pytest.mark.parametrize("how", [(True, 2, 2, (12, 8)), (False, 2, 3, (13, 9))])
def test_fused_network(emulated_cuda, launched, how, check_fused_network):
    """All of a chain on both devices; the bits repeat, whatever the order of threads."""
    same_bits = check_fused_network("cuda", torch.float16, *how)
    # Forward of the five convolutions behind the expanded stem; gradients of all of them.
    assert launched[-10:] == ["fprop"] * 5 + ["dgrad"] * 5
    emulated_cuda.set_schedule(5, emulated_cuda.Completion.RANDOM)
    assert same_bits()


@together
def test_fused_network_with_tiles_of_256_columns(launched, monkeypatch, check_fused_network):
    """On one cluster, which their last round fills; both ways of them."""
    monkeypatch.setattr(cuda_launch, "_EMULATED_PROCESSORS", 2)
    check_fused_network("cuda", torch.float16, True, 2, 2, (12, 8), wide=256)
    assert launched[-12:] == ["fprop"] * 6 + ["dgrad"] * 6
    columns = []
    for shape in ((256, 72), (72, 256)):
        weight, geometry = torch.zeros(*shape, 3, 3).half(), ConvGeometry(padding=(1, 1))
        x = torch.zeros(3, shape[1], 3, 2).half()
        columns.append(re.findall(r"128 x (\d+)", cuda.backend.explain_conv2d(x, weight, geometry)))
    assert columns == [["256", "128"], ["128", "256"]]


@together
@pytest.mark.parametrize(
    ("channels", "stride", "batch", "forward", "backward"),
    [
        (64, 1, None, "wgmma", "wgmma"),
        (64, 1, 5, "Triton's kernel .label expansion", "wgmma"),
        (3, 1, None, "less than half of a 64-deep slice", "Triton's kernel"),
        (64, 3, None, "wgmma", "product is above 4"),
    ],
)
def test_explains_which_kernels_run(channels, stride, batch, forward, backward):
    x, weight = torch.randn(1, channels, 6, 6).half(), torch.randn(64, channels, 3, 3).half()
    geometry = ConvGeometry((stride, stride), (1, 1))
    found = cuda.backend.explain_conv2d(x, weight, geometry, batch).split("; ")
    assert re.search(forward, found[0])
    assert re.search(backward, found[1])
    assert cuda.backend.explain_conv2d(x.float(), weight, geometry).startswith("refused: ")


@together
def test_traces_as_one_graph(check_one_graph):
    check_one_graph("cuda", torch.float16)
