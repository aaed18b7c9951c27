"""Default configs compile for every target: tensor cores, no spills, shared memory that exists.

The representative part of ``python -m wfnet.kernels.aot --all``; nothing here needs a device.
Compiled kernels are kept in Triton's cache, so that only the first run takes minutes.
"""

import pytest
import torch

pytest.importorskip("triton")

from wfnet.kernels import aot, gate
from wfnet.kernels.config import TARGETS, Device
from wfnet.kernels.launch import interpreted

pytestmark = pytest.mark.skipif(
    interpreted(gate.gate_rows_kernel), reason="TRITON_INTERPRET=1: nothing can be compiled"
)

INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
CASES = [
    pytest.param(arch, case, id=f"sm_{arch}-{case.name}")
    for arch, device in TARGETS.items()
    for case in aot.cases(device, complete=False)
]


@pytest.mark.parametrize(("arch", "case"), CASES)
def test_default_config_compiles(arch, case):
    report = aot.compile_case(case, TARGETS[arch])
    assert report.problems == ()
    assert report.registers <= 255
    assert report.shared_bytes <= TARGETS[arch].shared_memory
    if case.tensor_cores:
        assert report.instruction == INSTRUCTION[arch]
    else:
        assert report.instruction == "none"


def test_two_blocks_share_a_hopper_multiprocessor():
    """What the default tiles were chosen for: 128 registers and half the shared memory."""
    device = TARGETS[90]
    for case in aot.conv_cases("resnet50.layer3 3x3", torch.bfloat16, device, ("branch",)):
        report = aot.compile_case(case, device)
        if "fprop" in report.name:
            assert report.registers <= 128
            assert 2 * (report.shared_bytes + 1024) <= 228 * 1024
            assert report.shared_bytes >= 3 * (128 + 128) * 64 * 2  # both operands, three stages


def test_problems_are_found():
    """A device with little shared memory, and a kernel that should use tensor cores but cannot."""
    small = Device("small", 90, 16 * 1024, 1)
    case = next(
        iter(aot.conv_cases("resnet18.layer1 3x3", torch.bfloat16, TARGETS[90], ("plain",)))
    )
    report = aot.compile_case(case, small)
    assert any("shared memory" in problem for problem in report.problems)
    case = next(aot.elementwise_cases(torch.bfloat16))
    report = aot.compile_case(aot.Case(case.name, case.launch, True), TARGETS[90])
    assert report.problems == ("no tensor-core instruction",)


def test_left_operands_in_registers_are_found():
    """The two forms of the instruction, as Triton writes them into PTX."""
    product = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f1,%f2,%f3,%f4}, "
    rest = "%rd2, %p1, 1, 1, 0, 0;\n"
    safe, exposed = product + "%rd1, " + rest, product + "{%r1,%r2,%r3,%r4}, " + rest
    assert aot.products_of_registers(safe + safe) == 0
    assert aot.products_of_registers(safe + exposed + safe + exposed) == 2


def test_every_kernel_is_compiled():
    """The representative cases reach every kernel file and both tilings."""
    names = {case.launch.kernel.fn.__name__ for case in aot.cases(TARGETS[90], complete=False)}
    assert names == {
        "conv_fprop_kernel",
        "conv_fprop_gather_kernel",
        "conv_dgrad_kernel",
        "conv_dgrad_gather_kernel",
        "linear_fprop_kernel",
        "linear_dgrad_kernel",
        "epilogue_bwd_kernel",
        "column_sums_kernel",
        "gate_rows_kernel",
        "gate_rows_bwd_kernel",
        "max_pool_fwd_kernel",
        "max_pool_bwd_kernel",
        "row_adam_kernel",
    }


def test_command_line(capsys, tmp_path):
    path = tmp_path / "report.json"
    assert aot.main(["--arch", "90", "--only", "column_sums", "--json", str(path)]) == 0
    assert "column_sums flat" in capsys.readouterr().out
    assert '"registers"' in path.read_text()
