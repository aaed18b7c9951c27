import torch

from wfnet.benchmarking import steps
from wfnet.benchmarking.timing import KernelTime


def test_columns_that_differ_are_wrong_and_not_timed():
    columns = {
        "eager": steps.Column(first_loss=1.0),
        "loop": steps.Column(first_loss=1.1),
        "grouped": steps.Column(first_loss=float("nan")),
        "vmap": steps.Column(first_loss=1.0005),
        "unmasked": steps.Column(first_loss=9.0),
    }
    steps.check_losses(columns, torch.float32)
    assert [name for name, column in columns.items() if column.wrong] == ["loop", "grouped"]
    assert "its loss is 1.1000, expected 1.0000" in columns["loop"].impossible


def test_kernels_are_written_and_copies_are_no_launches(capsys):
    kernels = [KernelTime("gemm", 3, 30.0), KernelTime("Memcpy DtoD", 2, 5.0)]
    column = steps.Column(milliseconds=[6.0, 8.0], peak_mebibytes=1.0, kernels=kernels)
    result = steps.summary({"eager": column}, 6, {})
    row = result["columns"]["eager"]
    assert row["kernel_launches"] == 3
    assert row["kernels"][0] == {"name": "gemm", "launches": 3, "microseconds": 30.0}
    steps.print_table("net", result)
    assert "eager: 3 kernels in 7.000 ms" in capsys.readouterr().out
