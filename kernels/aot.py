"""Compiles every default config ahead of time, without a device, and reads what the compiler made.

    python -m wfnet.kernels.aot                 one line per representative kernel and target
    python -m wfnet.kernels.aot --all           the complete matrix
    python -m wfnet.kernels.aot --all --arch 90

Exits with 1 if a kernel spills, uses a stack, lacks its tensor-core instruction, needs more shared
memory than the device has (the compiler accepts that silently), or multiplies out of registers
that it may overwrite before an asynchronous product has read them. The launches are the launchers'
own, on tensors that have no memory.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor
from wfnet.kernels.config import TARGETS, Device, full_precision
from wfnet.kernels.conv_dgrad import conv_dgrad
from wfnet.kernels.conv_fprop import conv_fprop, conv_moments
from wfnet.kernels.epilogue_bwd import epilogue_bwd
from wfnet.kernels.gate import gate_rows, gate_rows_bwd
from wfnet.kernels.launch import Launch, keep_launches
from wfnet.kernels.max_pool import max_pool, max_pool_bwd
from wfnet.kernels.moments import combine
from wfnet.kernels.row_adam import row_adam

from wfnet.backends.contract import NO_LAYER, ConvGeometry, Epilogue, LayerBelow, PoolGeometry

_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}
_BATCH = 512
# Height and width, channels in and out, filter, stride; of linear maps tokens and 1. The first ones
# are what the test suite compiles: every default config at least once.
LAYERS = {
    "resnet18.layer1 3x3": ((56, 56), 64, 64, 3, 1),
    "resnet18.layer2.0 3x3/2": ((56, 56), 64, 128, 3, 2),
    "resnet50.layer3 3x3": ((14, 14), 256, 256, 3, 1),
    "resnet18.conv1 7x7/2": ((224, 224), 3, 64, 7, 2),
    "odd channels 3x3": ((28, 28), 36, 20, 3, 1),
    "vit_tiny.qkv": ((197, 1), 192, 576, 1, 1),
    "resnet50.layer4 1x1 reduce": ((7, 7), 2048, 512, 1, 1),
    "features without tokens": ((1, 1), 512, 512, 1, 1),
    "resnet18.layer2 3x3": ((28, 28), 128, 128, 3, 1),
    "resnet18.layer2.0 1x1/2": ((56, 56), 64, 128, 1, 2),
    "resnet18.layer4 3x3": ((7, 7), 512, 512, 3, 1),
    "resnet50.layer3.0 3x3/2": ((28, 28), 256, 256, 3, 2),
    "vgg16.conv1_2 3x3": ((224, 224), 64, 64, 3, 1),
    "vgg16.conv4 3x3": ((28, 28), 512, 512, 3, 1),
    "vgg16.conv1_1 3x3": ((224, 224), 3, 64, 3, 1),
    "odd size 3x3/2": ((15, 15), 64, 64, 3, 2),
    "vit_small.qkv": ((197, 1), 384, 1152, 1, 1),
    "resnet50.layer1 1x1 expand": ((56, 56), 64, 256, 1, 1),
}
REPRESENTATIVE = 8
# Layers whose input gradient finishes one with a projection shortcut.
BELOW_PROJECTIONS = ("resnet50.layer3 3x3", "resnet50.layer4 1x1 reduce")
# Layers that take moments of their product where not all of them are compiled: one of each tiling.
WITH_MOMENTS = ("resnet18.layer1 3x3", "resnet18.conv1 7x7/2", "resnet50.layer4 1x1 reduce")
# What a product's epilogue has to do; `source` expands images to samples, `shortcut` concerns the
# backward pass alone; `moments` takes them, and the gradient reaches a layer whose branch is `u`.
KINDS = ("plain", "branch", "residual", "source", "moments", "shortcut")


@dataclass(frozen=True)
class Case:
    """A launch to compile; ``tensor_cores`` says whether its products must run on them."""

    name: str
    launch: Launch
    tensor_cores: bool


@dataclass(frozen=True)
class Report:
    """What the compiler made of a case; ``problems`` is empty for a good kernel."""

    kernel: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    instruction: str
    problems: tuple[str, ...]


def _meta(dtype: torch.dtype, *shape: int) -> Tensor:
    """A tensor without memory; pixels are channels-last."""
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)


def _below(pixels: Tensor, kind: str) -> LayerBelow:
    """A layer whose output a gradient reaches."""
    if kind in ("plain", "source"):
        return NO_LAYER
    scale, shift, t1, t0 = (_meta(torch.float32, *pixels.shape[:2]) for _ in range(4))
    if kind == "moments":
        below = LayerBelow(scale, shift, pixels, None, True, pixels, t1, t0, need_grad=True)
        return replace(below, need_scaled_grad=False, unscaled=True)
    other = LayerBelow(scale, branch=pixels, t1=t1) if kind == "shortcut" else None
    added = None if kind == "branch" else pixels
    options = {"need_grad": kind == "residual", "shortcut": other}
    return LayerBelow(scale, shift, pixels, added, True, added, t1, t0, **options)


def _cases(what: str, launches: list[Launch], products: bool = False) -> list[Case]:
    """One case per kernel: column sums run several times."""
    named = {f"{what} {launch.name}": launch for launch in launches}
    return [Case(n, launch, products and "column_" not in n) for n, launch in named.items()]


def layer_cases(name: str, dtype: torch.dtype, device: Device, kinds: Sequence[str]) -> list[Case]:
    """Forward and input gradient of one of ``LAYERS``; ``kinds`` of epilogues for each."""
    size, channels, columns, kernel, stride = LAYERS[name]
    linear = kernel == 1 and "1x1" not in name
    geometry = ConvGeometry((stride,) * 2, (kernel // 2,) * 2, linear=linear)
    x = _meta(dtype, _BATCH, channels, *size)
    weight = _meta(dtype, columns, channels, kernel, kernel)
    out = _meta(dtype, _BATCH, columns, *geometry.output_size(*size, (kernel, kernel)))
    table, found = _meta(torch.float32, _BATCH, columns), []
    for kind in kinds:
        source = _meta(torch.int64, _BATCH) if kind == "source" else None
        residual = out if kind == "residual" else None
        relu = kind in ("branch", "residual")
        epilogue = Epilogue(table, table, residual, relu, source, save=kind != "plain")
        with keep_launches(device) as launches:
            if kind == "moments":
                conv_moments(x, weight, geometry)
            elif kind != "shortcut":
                conv_fprop(x, weight, geometry, epilogue)
            if kind != "source" and channels != 3:
                below = _below(x, "plain" if size == (1, 1) else kind)
                conv_dgrad(out, weight, tuple(x.shape), geometry, below)
        found += _cases(f"{name} {kind}", launches, not full_precision(dtype, linear))
    return found


def elementwise_cases(dtype: torch.dtype, device: Device) -> list[Case]:
    """The kernels without a matrix product."""
    small, large = ((_BATCH, 64, size, size) for size in (56, 112))
    source, found = _meta(torch.int64, _BATCH), []
    for kind in ("branch", "residual"):
        below = _below(_meta(dtype, *small), kind)
        for expands in (False, True):
            layer = replace(below, source=source, images=256) if expands else below
            with keep_launches(device) as launches:
                epilogue_bwd(_meta(dtype, *small), layer)
            found += _cases(f"{kind} source={expands}", launches)
    alpha, forget = _meta(torch.float32, 1000, 4800), _meta(torch.int64, _BATCH, 1)
    table = _meta(torch.float32, *small[:2])
    row, scalar, start = (_meta(torch.float32, *n) for n in ((1000,), (), (4800,)))
    step = (*[alpha] * 4, row, row, _meta(torch.bool, 1000), scalar, (0.9, 0.99), 1e-8)
    window, below = PoolGeometry((3, 3), (2, 2), (1, 1)), _below(_meta(dtype, *large), "branch")
    with keep_launches(device) as launches:
        _, positions = max_pool(_meta(dtype, *large), window)
        max_pool_bwd(_meta(dtype, *small), positions, large[2:], window, below)
        combine(_meta(dtype, *small), table, table, _meta(dtype, *small), table)
        gate_rows_bwd(gate_rows(alpha, forget, 1.0), alpha, forget)
        row_adam(*step)
    found += _cases("plain", launches)
    with keep_launches(device) as launches:
        row_adam(*step, start, scalar)
    return found + _cases("shrinking", launches)


def cases(device: Device, complete: bool) -> Iterator[Case]:
    """Every case, or the representative ones, for one target."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32)[: None if complete else 1]:
        for name in list(LAYERS)[: None if complete else REPRESENTATIVE]:
            kinds = KINDS[:5] if complete else ("residual",)
            kinds += ("moments",) if name in WITH_MOMENTS and not complete else ()
            kinds += KINDS[5:] if name in BELOW_PROJECTIONS else ()
            yield from layer_cases(name, dtype, device, kinds)
        yield from elementwise_cases(dtype, device)
    if not complete:
        yield from layer_cases("resnet50.layer3 3x3", torch.float32, device, ("branch",))
        yield from layer_cases("vit_tiny.qkv", torch.float32, device, ("plain",))


def source_of(launch: Launch) -> ASTSource:
    """The compiler's view of a launch: types, constants, alignment, as in a real call."""
    kernel = launch.kernel
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(kernel.params):
        name = parameter.name
        value = launch.arguments[name]
        counts = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (counts and value == 1):
            signature[name] = "constexpr"
            constants[name] = value
        elif isinstance(value, TensorDescriptor):
            block = ", ".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{_TYPES[value.base.dtype]}[{block}]>"
        elif isinstance(value, Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32" if value < 2**31 else "i64"
            if counts and value % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    return ASTSource(kernel, signature, constants, attributes)


# Bytes a thread: two registers are no reason for another tile (Triton 3.9 keeps two of one config
# for sm_100 there); what spills in earnest spills hundreds.
MOST_STACK = 8


def compile_case(case: Case, device: Device) -> Report:
    """Compiles one case for one target and judges the result."""
    launch = case.launch
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    target = GPUTarget("cuda", device.arch, 32)
    compiled = triton.compile(source_of(launch), target=target, options=options)
    registers, stack = _resources(compiled.asm["cubin"])
    instruction = _tensor_core_instruction(compiled.asm["ptx"])
    shared = compiled.metadata.shared
    problems = []
    if stack > MOST_STACK:
        problems.append(f"{stack} bytes of stack (spills)")
    if shared > device.shared_memory:
        problems.append(f"{shared} bytes of shared memory, {device.shared_memory} available")
    if case.tensor_cores and instruction == "none":
        problems.append("no tensor-core instruction")
    exposed = products_of_registers(compiled.asm["ptx"])
    if exposed:
        problems.append(f"{exposed} asynchronous products read their left operand from registers")
    return Report(launch.name, registers, stack, shared, instruction, tuple(problems))


def _tensor_core_instruction(ptx: str) -> str:
    for instruction in ("tcgen05.mma", "wgmma.mma_async", "mma.sync"):
        if instruction in ptx:
            return instruction
    return "none"


# An accumulator in braces, then the left operand: a descriptor, or registers in braces.
_LEFT_IN_REGISTERS = re.compile(r"wgmma\.mma_async[^;{]*\{[^}]*\},\s*\{")


def products_of_registers(ptx: str) -> int:
    """Counts asynchronous products whose left operand is in registers.

    What is written to these before a wait races with the product (PTX manual, wgmma.fence), and
    Triton's pipelined loops write them: the loads of the next round.
    """
    return len(_LEFT_IN_REGISTERS.findall(ptx))


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of stack, read by the cuobjdump that ships with Triton."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text!r}")
    return int(found[1]), int(found[2]) + int(found[3])


def main(argv: list[str] | None = None) -> int:
    """Compiles and prints a table; the exit status counts as a test."""
    parser = argparse.ArgumentParser(prog="python -m wfnet.kernels.aot", description=__doc__)
    parser.add_argument("--all", action="store_true", help="the complete matrix")
    parser.add_argument("--arch", type=int, action="append", choices=sorted(TARGETS))
    parser.add_argument("--only", default="", help="cases whose name contains this")
    arguments = parser.parse_args(argv)
    failed = False
    for arch in arguments.arch or sorted(TARGETS):
        device = TARGETS[arch]
        for case in cases(device, arguments.all):
            if arguments.only not in case.name:
                continue
            report = compile_case(case, device)
            failed |= bool(report.problems)
            print(
                f"sm_{arch} {report.registers:3d} regs {report.stack_bytes:4d} stack "
                f"{report.shared_bytes / 1024:5.1f} KB {report.instruction:16s} {case.name}"
                + "".join(f"  !! {problem}" for problem in report.problems),
                flush=True,
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
