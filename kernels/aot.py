"""Compiles every default config ahead of time, without a device, and reads what the compiler made.

    python -m wfnet.kernels.aot                 one line per representative kernel and target
    python -m wfnet.kernels.aot --all           the complete matrix
    python -m wfnet.kernels.aot --all --arch 90 --json report.json

Exits with 1 if a kernel spills, uses a stack, lacks its tensor-core instruction, needs more shared
memory than the device has (the compiler accepts that silently), or multiplies out of registers
that it may overwrite before an asynchronous product has read them. The launches are those that the
launchers would run: the same planning functions, with tensors that have no memory.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor
from wfnet.kernels import gate as gates
from wfnet.kernels import max_pool as pooling
from wfnet.kernels import row_adam as optimizer
from wfnet.kernels.config import (
    TARGETS,
    ConvShape,
    Device,
    LinearShape,
    conv_choice,
    full_precision,
    linear_choice,
)
from wfnet.kernels.conv_dgrad import plan_conv_dgrad, with_slots
from wfnet.kernels.conv_fprop import plan_conv_fprop
from wfnet.kernels.epilogue_arguments import (
    BackwardArguments,
    ForwardArguments,
    channels_first,
    plan_column_sums,
)
from wfnet.kernels.epilogue_bwd import plan_epilogue_bwd
from wfnet.kernels.launch import Launch
from wfnet.kernels.linear import plan_linear_dgrad, plan_linear_fprop

from wfnet.backends.contract import ConvGeometry, Epilogue, LayerBelow

_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}

# Samples, pixels, channels in and out, filter, stride: one of each kind of layer.
CONVS = {
    "resnet18.layer1 3x3": (512, 56, 64, 64, 3, 1),
    "resnet18.layer2 3x3": (512, 28, 128, 128, 3, 1),
    "resnet18.layer2.0 3x3/2": (512, 56, 64, 128, 3, 2),
    "resnet18.layer2.0 1x1/2": (512, 56, 64, 128, 1, 2),
    "resnet18.layer4 3x3": (512, 7, 512, 512, 3, 1),
    "resnet50.layer3 3x3": (512, 14, 256, 256, 3, 1),
    "resnet50.layer3.0 3x3/2": (512, 28, 256, 256, 3, 2),
    "vgg16.conv1_2 3x3": (512, 224, 64, 64, 3, 1),
    "vgg16.conv4 3x3": (512, 28, 512, 512, 3, 1),
    "resnet18.conv1 7x7/2": (512, 224, 3, 64, 7, 2),
    "vgg16.conv1_1 3x3": (512, 224, 3, 64, 3, 1),
    "odd channels 3x3": (512, 28, 36, 20, 3, 1),
    "odd size 3x3/2": (512, 15, 64, 64, 3, 2),
}
# Samples, tokens, features in and out.
LINEARS = {
    "vit_tiny.qkv": (512, 197, 192, 576),
    "vit_small.qkv": (512, 197, 384, 1152),
    "resnet50.layer1 1x1 expand": (512, 56 * 56, 64, 256),
    "resnet50.layer4 1x1 reduce": (512, 49, 2048, 512),
    "features without tokens": (512, 1, 512, 512),
}
# Convolutions whose input gradient finishes a layer with a projection shortcut.
BELOW_PROJECTIONS = {"resnet50.layer3 3x3", "resnet50.layer4 1x1 reduce"}
# The part that the test suite compiles: every default config at least once.
REPRESENTATIVE = {
    "resnet18.layer1 3x3",
    "resnet18.layer2.0 3x3/2",
    "resnet50.layer3 3x3",
    "resnet18.conv1 7x7/2",
    "odd channels 3x3",
    "vit_tiny.qkv",
    "resnet50.layer4 1x1 reduce",
    "features without tokens",
}


@dataclass(frozen=True)
class Case:
    """A launch to compile; ``tensor_cores`` says whether its products must run on them."""

    name: str
    launch: Launch
    tensor_cores: bool


@dataclass(frozen=True)
class Report:
    """What the compiler made of a case; ``problems`` is empty for a good kernel."""

    name: str
    arch: int
    kernel: str
    config: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    instruction: str
    problems: tuple[str, ...]


def _meta(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _table(*shape: int) -> Tensor:
    return _meta(torch.float32, *shape)


def _backward(shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> BackwardArguments:
    """What a gradient of ``[B, H, W, C]`` ends in.

    Args:
        kind: ``plain`` (nothing), or a layer: ``branch``, with a ``residual``, or also a projection
            ``shortcut``.
    """
    like, columns = _meta(dtype, *shape), (shape[0], shape[-1])
    if kind == "plain":
        return BackwardArguments.of(None, None, like, shape)
    pixels = channels_first(like)
    shortcut = LayerBelow(_table(*columns), branch=pixels, t1=_table(*columns))
    below = LayerBelow(
        scale=_table(*columns),
        shift=_table(*columns),
        branch=pixels,
        mask=None if kind == "branch" else pixels,
        relu=True,
        t1=_table(*columns),
        t0=_table(*columns),
        need_grad=kind == "residual",
        shortcut=shortcut if kind == "shortcut" else None,
    )
    return BackwardArguments.of(below, None if kind == "branch" else pixels, like, shape)


def _forward(shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> ForwardArguments:
    """Arguments of a forward epilogue over ``[B, P, Q, O]``."""
    like, columns = _meta(dtype, *shape), (shape[0], shape[-1])
    epilogue = Epilogue(
        _table(*columns),
        _table(*columns),
        residual=channels_first(like) if kind == "residual" else None,
        relu=kind in ("branch", "residual"),
        save=kind != "plain",
    )
    return ForwardArguments.of(epilogue, like, shape)


def conv_cases(name: str, dtype: torch.dtype, device: Device, kinds: tuple) -> Iterator[Case]:
    """Forward and input gradient of one of ``CONVS``; ``kinds`` of epilogues for each."""
    batch, size, channels, columns, kernel, stride = CONVS[name]
    weight = _meta(dtype, columns, channels, kernel, kernel)
    geometry = ConvGeometry((stride,) * 2, (kernel // 2,) * 2)
    shape = ConvShape.of(batch, (size, size), weight, geometry)
    x, weight = _meta(dtype, batch, size, size, channels), weight.permute(0, 2, 3, 1).contiguous()
    out = _meta(dtype, batch, shape.out_height, shape.out_width, columns)
    rows = (channels * dtype.itemsize) % 16 == 0 and (columns * dtype.itemsize) % 16 == 0
    cores = not full_precision(dtype, "conv")
    for kind in kinds:
        expanded = kind == "source"
        config = conv_choice(
            "fprop", shape, dtype, device, describable=rows, single_sample=expanded
        ).config
        source = _meta(torch.int64, batch) if expanded else None
        forward = _forward(tuple(out.shape), dtype, kind)
        if kind != "shortcut":  # a matter of the backward pass alone
            launch = plan_conv_fprop(x, weight, forward, source, shape, config)
            yield Case(f"{name} fprop {kind} {config}", launch, cores)
        if expanded or channels == 3:
            continue
        backward = _backward(tuple(x.shape), dtype, kind)
        config = conv_choice(
            "dgrad", shape, dtype, device, describable=rows, column_sums=backward.summing
        ).config
        launch = plan_conv_dgrad(out, weight, with_slots(backward, shape, config), shape, config)
        yield Case(f"{name} dgrad {kind} {config}", launch, cores)


def linear_cases(name: str, dtype: torch.dtype, device: Device, kinds: tuple) -> Iterator[Case]:
    """Forward and input gradient of one of ``LINEARS``; ``kinds`` of epilogues for each."""
    batch, tokens, features, columns = LINEARS[name]
    shape = LinearShape(batch, tokens, features, columns)
    op = "conv" if "1x1" in name else "linear"
    x, weight = _meta(dtype, batch, tokens, 1, features), _meta(dtype, columns, features)
    out = _meta(dtype, batch, tokens, 1, columns)
    cores = not full_precision(dtype, op)
    for kind in kinds:
        if kind == "source":
            continue
        config = linear_choice(
            shape, dtype, device, columns=columns, describable=True, op=op
        ).config
        forward = _forward(tuple(out.shape), dtype, kind)
        if kind != "shortcut":  # a matter of the backward pass alone
            launch = plan_linear_fprop(x, weight, forward, shape, config, op, device)
            yield Case(f"{name} fprop {kind} {config}", launch, cores)
        backward = _backward(tuple(x.shape), dtype, "plain" if tokens == 1 else kind)
        config = linear_choice(
            shape,
            dtype,
            device,
            columns=features,
            describable=True,
            column_sums=backward.summing,
            op=op,
        ).config
        slotted = backward.with_slots(4, grouped=False)
        launch = plan_linear_dgrad(out, weight, slotted, shape, config, op, device)
        yield Case(f"{name} dgrad {kind} {config}", launch, cores)


def elementwise_cases(dtype: torch.dtype) -> Iterator[Case]:
    """The kernels without a matrix product."""
    shape = (512, 56, 56, 64)
    dout = _meta(dtype, *shape)
    for kind in ("branch", "residual"):
        backward = _backward(shape, dtype, kind).with_slots(512 * 49, grouped=True)
        for grouping in (None, (_meta(torch.int64, 512), _meta(torch.int64, 257))):
            launch = plan_epilogue_bwd(dout, backward, grouping, 512)
            yield Case(f"epilogue_bwd {kind} source={grouping is not None}", launch, False)
    for block_m in (0, 128):
        launch = plan_column_sums(
            _table(49 * 512, 64), _table(512, 64), 3136, 49, block_m, 2 if block_m else 0
        )
        yield Case(f"column_sums {'flat' if block_m else 'grouped'}", launch, False)
    for launch in (
        launch
        for module in (gates, pooling, optimizer)
        for launch in module.example_launches(_meta)
    ):
        yield Case(launch.kernel.fn.__name__, launch, False)


def cases(device: Device, complete: bool) -> Iterator[Case]:
    """Every case, or the representative ones, for one target."""
    dtypes = [torch.bfloat16, torch.float16, torch.float32] if complete else [torch.bfloat16]
    for dtype in dtypes:
        for name in CONVS:
            if complete or name in REPRESENTATIVE:
                kinds = ("plain", "branch", "residual", "source") if complete else ("residual",)
                kinds = (*kinds, "shortcut") if name in BELOW_PROJECTIONS else kinds
                yield from conv_cases(name, dtype, device, kinds)
        for name in LINEARS:
            if complete or name in REPRESENTATIVE:
                kinds = ("plain", "branch", "residual") if complete else ("residual",)
                kinds = (*kinds, "shortcut") if name in BELOW_PROJECTIONS else kinds
                yield from linear_cases(name, dtype, device, kinds)
        yield from elementwise_cases(dtype)
    if not complete:
        yield from conv_cases("resnet50.layer3 3x3", torch.float32, device, ("branch",))
        yield from linear_cases("vit_tiny.qkv", torch.float32, device, ("plain",))


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
    compiled = triton.compile(
        source_of(launch),
        target=GPUTarget("cuda", device.arch, 32),
        options={
            "num_warps": launch.warps,
            "num_stages": launch.stages,
            "enable_fp_fusion": True,
        },
    )
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
    return Report(
        case.name,
        device.arch,
        launch.kernel.fn.__name__,
        f"{launch.warps} warps, {launch.stages} stages",
        registers,
        stack,
        shared,
        instruction,
        tuple(problems),
    )


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
    parser.add_argument("--json", type=Path, help="write the table here too")
    arguments = parser.parse_args(argv)
    reports = []
    for arch in arguments.arch or sorted(TARGETS):
        device = TARGETS[arch]
        for case in cases(device, arguments.all):
            if arguments.only not in case.name:
                continue
            report = compile_case(case, device)
            reports.append(report)
            print(
                f"sm_{arch} {report.registers:3d} regs {report.stack_bytes:4d} stack "
                f"{report.shared_bytes / 1024:5.1f} KB {report.instruction:16s} {report.name}"
                + "".join(f"  !! {problem}" for problem in report.problems),
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(report) for report in reports], indent=1))
    return 1 if any(report.problems for report in reports) else 0


if __name__ == "__main__":
    sys.exit(main())
