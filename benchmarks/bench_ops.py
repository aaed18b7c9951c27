"""One masked layer by every provider: forward and backward at the shapes of real networks.

    python benchmarks/bench_ops.py                                  every layer, every provider
    python benchmarks/bench_ops.py --layers resnet18 vit_tiny --dtype float16

Providers, measured in one run, interleaved, medians:

    loop       one masked weight copy and one call per sample (what the authors' code does)
    eager      the ordinary call, then one pass for scale and shift
    compile    torch.compile(mode="max-autotune-no-cudagraphs") of "convolve, then multiply"
    unmasked   the same call without any mask, forward and input gradient: "masks are free" at a tie
    triton     the Triton kernels of this package; "not run" without a CUDA device
    cuda       its compiled kernels; "not run" without a device and wfnet._C

Forward, and forward with backward as in one untraining step: gradients by the input (not for stems)
and by both filter matrices, never by the weight. TFLOP/s count the products of forward and input
gradient; GB/s count what must move at least: x, out, the branch v, dout, v, dx. The roofline
(floor_ms) is the longer of both at the device's rates, measured in the same run.

Without a CUDA device shapes shrink (--scale) so that the run takes minutes; such numbers say
nothing about a GPU. Writes JSON with device, versions, commit and command after every layer.
A provider that fails at a layer is recorded as failed there, and the run goes on and ends
with status 1.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from script import CUDA, begin, make_parser
from torch import Tensor

import wfnet.functional as wf
from wfnet import backends
from wfnet.backends.contract import ConvGeometry
from wfnet.benchmarking.roofline import measure_rates
from wfnet.benchmarking.timing import ColdCacheClock, interleaved, reason_of
from wfnet.services.files import write_json

PROVIDERS = ("loop", "eager", "compile", "unmasked", "triton", "cuda")


@dataclass(frozen=True)
class Layer:
    """A masked layer: pixels a side (or tokens), channels in and out; kernel 0: a linear map."""

    name: str
    size: int
    channels: int
    columns: int
    kernel: int
    stride: int = 1
    bias: bool = False

    @property
    def stem(self) -> bool:
        """Reads images, which need no gradient."""
        return self.channels == 3


LAYERS = [
    Layer("resnet18.conv1", 224, 3, 64, 7, 2),
    Layer("resnet18.layer1.conv", 56, 64, 64, 3),
    Layer("resnet18.layer2.0.conv1", 56, 64, 128, 3, 2),
    Layer("resnet18.layer2.0.downsample", 56, 64, 128, 1, 2),
    Layer("resnet18.layer2.conv", 28, 128, 128, 3),
    Layer("resnet18.layer3.0.conv1", 28, 128, 256, 3, 2),
    Layer("resnet18.layer3.conv", 14, 256, 256, 3),
    Layer("resnet18.layer4.0.conv1", 14, 256, 512, 3, 2),
    Layer("resnet18.layer4.conv", 7, 512, 512, 3),
    Layer("resnet50.layer1.conv1", 56, 256, 64, 1),
    Layer("resnet50.layer1.conv3", 56, 64, 256, 1),
    Layer("resnet50.layer2.0.conv2", 56, 128, 128, 3, 2),
    Layer("resnet50.layer2.conv1", 28, 512, 128, 1),
    Layer("resnet50.layer2.conv3", 28, 128, 512, 1),
    Layer("resnet50.layer3.conv1", 14, 1024, 256, 1),
    Layer("resnet50.layer3.conv3", 14, 256, 1024, 1),
    Layer("resnet50.layer4.conv1", 7, 2048, 512, 1),
    Layer("resnet50.layer4.conv3", 7, 512, 2048, 1),
    Layer("vgg16.conv1_1", 224, 3, 64, 3, bias=True),
    Layer("vgg16.conv1_2", 224, 64, 64, 3, bias=True),
    Layer("vgg16.conv2_2", 112, 128, 128, 3, bias=True),
    Layer("vgg16.conv3_2", 56, 256, 256, 3, bias=True),
    Layer("vgg16.conv4_2", 28, 512, 512, 3, bias=True),
    Layer("vgg16.conv5_1", 14, 512, 512, 3, bias=True),
    Layer("vit_tiny.qkv", 197, 192, 576, 0, bias=True),
    Layer("vit_small.qkv", 197, 384, 1152, 0, bias=True),
]


@dataclass
class Problem:
    """The tensors of one layer's step."""

    layer: Layer
    x: Tensor  # [B, C, H, W] channels-last, or [B, T, C]
    weight: Tensor
    bias: Tensor | None
    alpha_weight: Tensor
    alpha_bias: Tensor | None
    forget: Tensor  # [B, 1]
    dout: Tensor

    @property
    def geometry(self) -> dict[str, int]:
        return {"stride": self.layer.stride, "padding": self.layer.kernel // 2}

    @property
    def inputs(self) -> list[Tensor]:
        """What gradients are taken by."""
        found = [] if self.layer.stem else [self.x]
        return found + [a for a in (self.alpha_weight, self.alpha_bias) if a is not None]

    def flops(self) -> float:
        """Returns those of forward and, but for stems, the input gradient."""
        per_output = 2 * self.weight[0].numel()
        return self.dout.numel() * per_output * (1 if self.layer.stem else 2)

    def bytes(self) -> float:
        """Returns x, out and v in forward; dout, v and dx in backward; the weight both times."""
        element = self.x.element_size()
        images = self.x.numel() * (1 if self.layer.stem else 2)
        return (images + 4 * self.dout.numel() + 2 * self.weight.numel()) * element


def make_problem(
    layer: Layer, batch: int, scale: int, dtype: torch.dtype, device: str, classes: int
) -> Problem:
    """Returns random operands; ``scale`` divides sizes and channels."""
    torch.manual_seed(0)
    size = max(layer.size // scale, layer.kernel + layer.stride)
    channels = layer.channels if layer.stem else max(layer.channels // scale, 8)
    columns = max(layer.columns // scale, 8)
    layer = replace(layer, size=size, channels=channels, columns=columns)
    like = {"device": device, "dtype": dtype}
    if layer.kernel == 0:
        x = torch.randn(batch, size, channels, **like)
        weight = torch.randn(columns, channels, **like) / channels**0.5
        dout = torch.randn(batch, size, columns, **like)
    else:
        layout = {"memory_format": torch.channels_last}
        depth = channels * layer.kernel**2
        x = torch.randn(batch, channels, size, size, **like).contiguous(**layout)
        weight = torch.randn(columns, channels, layer.kernel, layer.kernel, **like) / depth**0.5
        weight = weight.contiguous(**layout)
        out = F.conv2d(x[:1], weight, stride=layer.stride, padding=layer.kernel // 2)
        dout = torch.randn(batch, *out.shape[1:], **like).contiguous(**layout)
    alphas = [torch.randn(classes, columns, device=device, requires_grad=True) for _ in range(2)]
    bias = torch.randn(columns, **like) if layer.bias else None
    return Problem(
        layer,
        x if layer.stem else x.requires_grad_(),
        weight,
        bias,
        alphas[0],
        alphas[1] if layer.bias else None,
        torch.randint(0, classes, (batch, 1), device=device),
        dout,
    )


def _multiply(problem: Problem) -> Tensor:
    """Computes what a user would write: the layer, then a broadcast product with the gates."""
    x, weight, forget = problem.x, problem.weight, problem.forget[:, 0]
    gate = torch.sigmoid(problem.alpha_weight)[forget].to(x.dtype)
    shift = None
    if problem.bias is not None:
        shift = torch.sigmoid(problem.alpha_bias)[forget].to(x.dtype) * problem.bias
    if problem.layer.kernel == 0:
        y = F.linear(x, weight) * gate[:, None]
        return y if shift is None else y + shift[:, None]
    y = F.conv2d(x, weight, None, **problem.geometry) * gate[:, :, None, None]
    return y if shift is None else y + shift[:, :, None, None]


def _operands(problem: Problem) -> tuple:
    alphas = problem.alpha_weight, problem.alpha_bias
    return problem.x, problem.weight, problem.bias, *alphas, problem.forget


def _masked(problem: Problem, backend: str) -> Tensor:
    if problem.layer.kernel == 0:
        return wf.wf_linear(*_operands(problem), backend=backend)
    return wf.wf_conv2d(*_operands(problem), **problem.geometry, backend=backend)


def _unmasked(problem: Problem) -> Tensor:
    if problem.layer.kernel == 0:
        return F.linear(problem.x, problem.weight, problem.bias)
    return F.conv2d(problem.x, problem.weight, problem.bias, **problem.geometry)


def _refusal(provider: str, problem: Problem) -> str | None:
    """Returns why a backend of kernels cannot run the problem."""
    if problem.x.device.type != "cuda":  # nor an interpreter's or emulator's time
        return "no CUDA device"
    backend = backends.get(provider)
    if problem.layer.kernel == 0:
        return backend.refuse_linear(problem.x, problem.weight)
    stride, padding = problem.geometry.values()
    geometry = ConvGeometry((stride,) * 2, (padding,) * 2)
    return backend.refuse_conv2d(problem.x, problem.weight, geometry)


def forward_of(provider: str, problem: Problem) -> Callable[[], Tensor] | None:
    """Returns the provider's forward pass as a function of nothing; None if it cannot run here."""
    if provider in ("triton", "cuda") and _refusal(provider, problem) is not None:
        return None
    if provider == "compile":
        return torch.compile(
            lambda: _multiply(problem), mode="max-autotune-no-cudagraphs", dynamic=False
        )
    if provider == "unmasked":
        return lambda: _unmasked(problem)
    backend = "reference" if provider == "loop" else provider
    return lambda: _masked(problem, backend)


def step_of(provider: str, problem: Problem, forward: Callable[[], Tensor]) -> Callable[[], None]:
    """Returns forward and backward as a function of nothing."""
    inputs = problem.inputs if provider != "unmasked" else problem.inputs[: -1 - problem.layer.bias]

    def step() -> None:
        y = forward()
        if inputs:
            torch.autograd.grad(y, inputs, problem.dout)

    return step


def measure(
    problem: Problem, providers: list[str], repeats: int, clock: ColdCacheClock
) -> list[dict[str, object]]:
    """Returns one row per provider: medians of interleaved repeats."""
    calls: dict[str, Callable] = {}
    statuses = dict.fromkeys(providers, "ok")
    for name in providers:
        try:
            forward = forward_of(name, problem)
        except Exception as error:  # of compilers, drivers and our own code
            statuses[name] = f"failed: {reason_of(error)}"
            continue
        if forward is None:
            statuses[name] = "not run"
            continue
        calls[f"{name} forward_ms"] = forward
        calls[f"{name} step_ms"] = step_of(name, problem, forward)
    times, failed = interleaved(calls, repeats, clock, warm_up=2)  # compile and tune
    for call, reason in failed.items():
        statuses[call.split()[0]] = f"failed: {reason}"
    rows = []
    for name, status in statuses.items():
        row = {"layer": problem.layer.name, "provider": name, "status": status}
        if status == "ok":
            medians = {what: statistics.median(ms) for what, ms in times.items() if ms}
            row["forward_ms"] = medians[f"{name} forward_ms"]
            row["step_ms"] = medians[f"{name} step_ms"]
            row["tflops"] = problem.flops() / row["step_ms"] / 1e9
            row["gbs"] = problem.bytes() / row["step_ms"] / 1e6
        rows.append(row)
    return rows


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command line; sizes default to what the device can do."""
    parser = make_parser(__doc__, 20 if CUDA else 5, "bfloat16" if CUDA else "float32")
    add = parser.add_argument
    add("--layers", nargs="+", default=[""], help="name prefixes")
    add("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    add("-b", "--batch", type=int, default=512 if CUDA else 4)
    add("--scale", type=int, default=1 if CUDA else 4, help="divides all sizes")
    add("--classes", type=int, default=1000)
    args = parser.parse_args(argv)
    if min(args.batch, args.scale, args.repeats, args.classes) < 1:
        parser.error("--batch, --scale, --repeats and --classes must be positive")
    return args


def main(argv: list[str] | None = None) -> int:
    """Measures, prints a table and writes the results."""
    args = parse(argv)
    layers = [layer for layer in LAYERS if layer.name.startswith(tuple(args.layers))]
    if not layers:
        raise SystemExit(f"no layer starts with {' or '.join(args.layers)}")
    record = begin("bench_ops", args, argv)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    rates, clock = measure_rates(device, dtype), ColdCacheClock(device)
    rows: list[dict[str, object]] = []
    record |= {"rates": rates.as_json(), "layers": [asdict(one) for one in layers], "rows": rows}
    print(f"{record['device']}: {rates}")
    for layer in layers:
        problem = make_problem(layer, args.batch, args.scale, dtype, args.device, args.classes)
        torch.compiler.reset()
        floor = rates.seconds(problem.flops(), problem.bytes()) * 1e3
        for row in measure(problem, args.providers, args.repeats, clock):
            rows.append({**row, "floor_ms": floor})
            timing = row["status"]
            if timing == "ok":
                timing = (
                    f"{row['forward_ms']:9.3f} forward {row['step_ms']:9.3f} ms "
                    f"{row['tflops']:8.2f} TFLOP/s {row['gbs']:8.1f} GB/s  floor {floor:.3f} ms"
                )
            print(f"{layer.name:30s} {row['provider']:9s} {timing}", flush=True)
        if args.output:
            write_json(args.output, record)
    return int(any(row["status"].startswith("failed") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
