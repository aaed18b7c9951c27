"""Default configs compile for every target: tensor cores, no spills, shared memory that exists.

The representative part of ``python -m wfnet.kernels.aot --all``; nothing here needs a device.
Compiled kernels are kept in Triton's cache, so that only the first run takes minutes.
"""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from triton.tools.tensor_descriptor import TensorDescriptor
from wfnet.kernels import aot, gate
from wfnet.kernels.config import TARGETS
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
    assert report.instruction == (INSTRUCTION[arch] if case.tensor_cores else "none")


def test_two_blocks_share_a_hopper_multiprocessor():
    """What the default tiles were chosen for: 128 registers and half the shared memory."""
    device = TARGETS[90]
    case = aot.layer_cases("resnet50.layer3 3x3", torch.bfloat16, device, ["branch"])[0]
    report = aot.compile_case(case, device)
    assert report.kernel == "conv_fprop_kernel"
    assert report.registers <= 128
    assert 2 * (report.shared_bytes + 1024) <= 228 * 1024
    assert report.shared_bytes >= 3 * (128 + 128) * 64 * 2  # both operands, three stages


def test_problems_are_found():
    """A device with little shared memory, and a kernel that should use tensor cores but cannot."""
    small = replace(TARGETS[90], shared_memory=16 * 1024)
    case = aot.layer_cases("resnet18.layer1 3x3", torch.bfloat16, TARGETS[90], ["plain"])[0]
    report = aot.compile_case(case, small)
    assert any("shared memory" in problem for problem in report.problems)
    case = aot.elementwise_cases(torch.bfloat16, TARGETS[90])[0]
    report = aot.compile_case(replace(case, tensor_cores=True), TARGETS[90])
    assert report.problems == ("no tensor-core instruction",)


def test_left_operands_in_registers_are_found():
    """The two forms of the instruction, as Triton writes them into PTX."""
    product = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f1,%f2,%f3,%f4}, "
    safe, exposed = (product + left + ", %rd2, %p1;\n" for left in ("%rd1", "{%r1,%r2,%r3,%r4}"))
    assert aot.products_of_registers(2 * (safe + exposed)) == 2


def test_every_kernel_is_compiled():
    """The representative cases reach every kernel of every file."""
    files = Path(aot.__file__).parent.glob("*.py")
    kernels = set(re.findall(r"def (\w+_kernel)\(", "".join(f.read_text() for f in files)))
    compiled = {case.launch.name for case in aot.cases(TARGETS[90], complete=False)}
    assert compiled == kernels


@pytest.mark.parametrize("arch", [90, 100])
def test_descriptors_keep_the_rules_of_the_driver(arch):
    """Those of cuTensorMapEncodeTiled, and that no view reaches beyond its tensor."""
    for case in aot.cases(TARGETS[arch], complete=True):
        for name, view in case.launch.arguments.items():
            if not isinstance(view, TensorDescriptor):
                continue
            size, what = view.base.element_size(), f"{case.name}: {name}"
            assert len(view.shape) == len(view.strides) == len(view.block_shape) <= 5, what
            assert view.strides[-1] == 1, what
            assert all(s * size % 16 == 0 and s * size < 2**40 for s in view.strides[:-1]), what
            assert all(0 < b <= 256 for b in view.block_shape), what
            assert view.block_shape[-1] * size >= 16, what
            last = sum((n - 1) * s for n, s in zip(view.shape, view.strides, strict=True))
            assert last < view.base.numel(), what


def test_another_size_of_a_batch_compiles_nothing(monkeypatch):
    """The last batch of an epoch, for one: sizes are not what kernels are specialised on."""

    def compiled(batch: int) -> dict[str, tuple]:
        monkeypatch.setattr(aot, "_BATCH", batch)
        found = {case.name: case.launch for case in aot.cases(TARGETS[90], complete=False)}
        sources = {name: aot.source_of(launch) for name, launch in found.items()}
        return {name: (s.signature, s.constants, s.attrs) for name, s in sources.items()}

    assert compiled(512) == compiled(500)


def test_command_line(capsys):
    assert aot.main(["--arch", "90", "--only", "source=True column_sums"]) == 0
    assert "column_sums" in capsys.readouterr().out
