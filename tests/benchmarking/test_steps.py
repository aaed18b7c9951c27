import torch

from wfnet.benchmarking import steps
from wfnet.benchmarking.timing import KernelTime


def test_columns_that_differ_are_wrong():
    losses = {"eager": 1.0, "loop": 1.1, "grouped": float("nan"), "vmap": 1.0005, "unmasked": 9.0}
    wrong = steps.wrong_losses(losses, torch.float32)
    assert list(wrong) == ["loop", "grouped"]
    assert "its loss is 1.1000, expected 1.0000" in wrong["loop"]


def test_copies_are_no_launches():
    found = steps.launches_of([KernelTime("gemm", 3, 30.0), KernelTime("Memcpy DtoD", 2, 5.0)])
    assert found["kernel_launches"] == 3
    assert found["kernels"][0] == {"name": "gemm", "launches": 3, "microseconds": 30.0}
