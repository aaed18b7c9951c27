"""tests/gpu/test_triton_gpu.py on a pretended device, at small sizes: the tests themselves run.

Time on a device is short: a mistake in a test must not be found there.
"""

import importlib.util
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import pretended_cuda
from wfnet.kernels import gate
from wfnet.kernels.launch import interpreted

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real device: tests/gpu"),
    pytest.mark.skipif(interpreted(gate.gate_rows_kernel), reason="TRITON_INTERPRET=1"),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
CONVS = {
    "resnet18.conv1": (2, 12, 3, 16, 7, 2),
    "resnet18.layer1": (2, 7, 16, 16, 3, 1),
    "resnet18.layer2.0": (2, 8, 16, 32, 3, 2),
    "resnet50.layer4.reduce": (3, 7, 32, 16, 1, 1),
    "odd": (2, 5, 12, 20, 3, 2),
}
LINEARS = {"vit_tiny.qkv": (2, 13, 16, 48), "features": (5, 1, 32, 16)}


@pytest.fixture
def gpu(monkeypatch):
    """The module with the tests, on the pretended device."""
    path = Path(__file__).parent / "gpu/test_triton_gpu.py"
    monkeypatch.syspath_prepend(str(path.parent))
    specification = importlib.util.spec_from_file_location("rehearsed_triton_gpu", path)
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CONVS)
def test_convolutions(gpu, name, dtype):
    gpu.test_conv2d_error(name, dtype, True, lambda tf32: None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LINEARS)
def test_linear_maps(gpu, name, dtype):
    gpu.test_linear_error(name, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["resnet18.layer1", "resnet18.layer2.0", "resnet50.layer4.reduce"])
def test_epilogues(gpu, name, dtype):
    gpu.test_fused_epilogues_error(name, dtype)


OTHERS = [
    "test_200_repeats_are_bitwise_equal", "test_fused_column_sums_repeat_bitwise",
    "test_labels_change_under_a_captured_graph", "test_compiles_without_graph_breaks",
    "test_autocast_runs_in_16_bit", "test_labels_out_of_range_give_nan_and_touch_nothing",
    "test_gate_tables_of_a_network",
]  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_the_others(gpu, name):
    getattr(gpu, name)()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sources(gpu, dtype):
    gpu.test_source_indices(dtype)


def test_every_test_is_rehearsed(gpu):
    """But for the one that needs 40 GB."""
    ran = {*OTHERS, "test_conv2d_error", "test_linear_error", "test_fused_epilogues_error",
           "test_source_indices", "test_offsets_past_32_bits"}  # fmt: skip
    assert {name for name in vars(gpu) if name.startswith("test_")} == ran


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
