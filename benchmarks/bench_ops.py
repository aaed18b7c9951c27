"""One masked layer against its peers: forward and backward at the shapes of real networks.

    python benchmarks/bench_ops.py                                  every layer, every provider
    python benchmarks/bench_ops.py --layers resnet18 vit_tiny --dtype float16
    python benchmarks/bench_ops.py --winners wfnet/backends/winners.json    also store who won
    python benchmarks/bench_ops.py --winners ... --record runs/ops/bench_ops.json    of that run
    python benchmarks/bench_ops.py --fused                          forward with a whole epilogue

Providers, measured in one run, interleaved, medians:

    loop       one masked weight copy and one call per sample (what the authors' code does)
    eager      the ordinary call, then one pass for scale and shift
    compile    torch.compile(mode="max-autotune-no-cudagraphs") of "convolve, then multiply"
    unmasked   the same call without any mask, forward and input gradient: "masks are free" at a tie
    triton     the Triton kernels of this package; "not run" without a CUDA device
    cuda       its compiled kernels; "not run" without a device and wfnet._C
    cudnn      with --fused: cuDNN's runtime fusion engine (nvidia-cudnn-frontend)

Forward and backward of one untraining step: gradients by the input (not for stems) and by both
filter matrices, never by the weight. TFLOP/s count the products of forward and input gradient; GB/s
count what must move at least: x, out, the branch v, dout, v, dx. The floor is the longer of both at
the device's rates of products and copies, measured in the same run (or --tflops and --gbs).

--fused times the forward pass of a fused network's convolution, relu(scale * conv(x) + shift +
residual), for eager, triton, cuda and cudnn: what must move is x, the residual and out.

Without a CUDA device shapes shrink (--scale) so that the run takes minutes; such numbers say
nothing about a GPU. Writes CSV, JSON and a plot with device, versions, commit and command; JSON and
CSV after every layer. A provider that fails at a layer is recorded as failed there, and the run
goes on and ends with status 1.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from wfnet.kernels.config import ConvShape, LinearShape

import wfnet.functional as wf
from wfnet import backends, reference
from wfnet.backends import ConvGeometry
from wfnet.benchmarking.floors import Rates, measure_rates
from wfnet.benchmarking.timing import about, choose_convolutions_by_trial, settings_of
from wfnet.benchmarking.winners import add_winners, refuse_winners
from wfnet.services.files import write_atomically, write_json

PROVIDERS = ("loop", "eager", "compile", "unmasked", "triton", "cuda")
FUSED_PROVIDERS = ("eager", "triton", "cuda", "cudnn")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


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
        """Of forward and, but for stems, the input gradient."""
        per_output = 2 * self.weight[0].numel()
        return self.dout.numel() * per_output * (1 if self.layer.stem else 2)

    def bytes(self) -> float:
        """x, out and v in forward; dout, v and dx in backward; the weight both times."""
        images = self.x.numel() * (1 if self.layer.stem else 2)
        return (images + 4 * self.dout.numel() + 2 * self.weight.numel()) * self.x.element_size()

    def shape_key(self) -> tuple[str, str]:
        """Operation and shape as in the table of winners."""
        layer = self.layer
        if layer.kernel == 0:
            return "linear", LinearShape(*self.x.shape, layer.columns).key()
        pad = layer.kernel // 2
        batch, channels, height, width = self.x.shape
        shape = ConvShape(
            batch, height, width, channels, layer.columns, (layer.kernel,) * 2,
            (layer.stride,) * 2, (pad,) * 2, (1, 1),
        )  # fmt: skip
        return "conv2d", shape.key()


def make_problem(
    layer: Layer, batch: int, scale: int, dtype: torch.dtype, device: str, classes: int
) -> Problem:
    """Random operands; ``scale`` divides sizes and channels (for machines without a device)."""
    torch.manual_seed(0)
    size = max(layer.size // scale, layer.kernel + layer.stride)
    channels = layer.channels if layer.stem else max(layer.channels // scale, 8)
    columns = max(layer.columns // scale, 8)
    layer = Layer(layer.name, size, channels, columns, layer.kernel, layer.stride, layer.bias)
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
    """What a user would write: the layer, then a broadcast product with the gates."""
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


def _masked(problem: Problem, backend: str) -> Tensor:
    arguments = (
        problem.x, problem.weight, problem.bias, problem.alpha_weight, problem.alpha_bias,
        problem.forget,
    )  # fmt: skip
    if problem.layer.kernel == 0:
        return wf.wf_linear(*arguments, backend=backend)
    return wf.wf_conv2d(*arguments, **problem.geometry, backend=backend)


def _loop(problem: Problem) -> Tensor:
    arguments = (
        problem.x, problem.weight, problem.bias, problem.alpha_weight, problem.alpha_bias,
        problem.forget,
    )  # fmt: skip
    if problem.layer.kernel == 0:
        return reference.wf_linear(*arguments)
    return reference.wf_conv2d(*arguments, **problem.geometry)


def _unmasked(problem: Problem) -> Tensor:
    if problem.layer.kernel == 0:
        return F.linear(problem.x, problem.weight, problem.bias)
    return F.conv2d(problem.x, problem.weight, problem.bias, **problem.geometry)


def _refusal(provider: str, problem: Problem) -> str | None:
    """Why a backend of kernels cannot run the problem."""
    if problem.x.device.type != "cuda":  # nor an interpreter's or emulator's time
        return "no CUDA device"
    backend = backends.get(provider)
    if problem.layer.kernel == 0:
        return backend.refuse_linear(problem.x, problem.weight)
    return backend.refuse_conv2d(problem.x, problem.weight, _geometry(problem))


def _geometry(problem: Problem) -> ConvGeometry:
    stride, padding = problem.geometry.values()
    return ConvGeometry((stride,) * 2, (padding,) * 2)


def forward_of(provider: str, problem: Problem) -> Callable[[], Tensor] | None:
    """The provider's forward pass as a function of nothing; None if it cannot run here."""
    if provider in ("triton", "cuda"):
        if _refusal(provider, problem) is not None:
            return None
        return lambda: _masked(problem, provider)
    if provider == "compile":
        return torch.compile(
            lambda: _multiply(problem), mode="max-autotune-no-cudagraphs", dynamic=False
        )
    return {
        "loop": lambda: _loop(problem),
        "eager": lambda: _masked(problem, "eager"),
        "unmasked": lambda: _unmasked(problem),
    }[provider]


def step_of(provider: str, problem: Problem) -> tuple[Callable, Callable] | None:
    """Forward as a function of nothing, backward as a function of its result."""
    forward = forward_of(provider, problem)
    if forward is None:
        return None
    inputs = problem.inputs if provider != "unmasked" else problem.inputs[: -1 - problem.layer.bias]

    def backward(y: Tensor) -> None:
        if inputs:
            torch.autograd.grad(y, inputs, problem.dout)

    return forward, backward


def fused_of(provider: str, problem: Problem) -> Callable[[], Tensor] | None:
    """``relu(scale * conv(x) + shift + residual)`` by a provider; None if it cannot run here."""
    x, columns = problem.x.detach(), problem.weight.shape[0]
    scale = torch.rand(x.shape[0], columns, device=x.device)
    shift = torch.randn(x.shape[0], columns, device=x.device)
    residual = problem.dout
    if provider == "cudnn":
        if x.device.type != "cuda":
            return None
        import cudnn_fused

        try:
            return cudnn_fused.fused_convolution(
                x, problem.weight, scale, shift, residual, *problem.geometry.values()
            )
        except cudnn_fused.Unsupported as error:
            print(f"cudnn: {error}")
            return None
    if provider != "eager" and _refusal(provider, problem) is not None:
        return None
    backend, geometry = backends.get(provider), _geometry(problem)
    return lambda: backend.fused_conv2d(
        x, problem.weight, scale, shift, residual, True, None, geometry, False
    )[0]


class Clock:
    """Milliseconds of forward and backward: CUDA events after flushing L2, or the wall clock."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"
        if self.cuda:
            self.flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")

    def __call__(self, forward: Callable, backward: Callable) -> tuple[float, float]:
        if not self.cuda:
            start = time.perf_counter()
            y = forward()
            middle = time.perf_counter()
            backward(y)
            return (middle - start) * 1e3, (time.perf_counter() - middle) * 1e3
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
        self.flush.zero_()
        marks[0].record()
        y = forward()
        marks[1].record()
        self.flush.zero_()
        marks[2].record()
        backward(y)
        marks[3].record()
        marks[3].synchronize()
        return marks[0].elapsed_time(marks[1]), marks[2].elapsed_time(marks[3])


class Failures:
    """Why providers failed at one layer; what failed once is not called again."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}

    def attempt(self, name: str, call: Callable, *arguments: object) -> object:
        """``call(*arguments)``; None if it raises or ``name`` had failed before."""
        if name in self.reasons:
            return None
        try:
            return call(*arguments)
        except Exception as error:  # compilers and drivers have errors of many kinds
            traceback.print_exc()
            first = next(iter(str(error).splitlines()), "")
            self.reasons[name] = f"{type(error).__name__}: {first}"
            return None

    def status(self, name: str, runs: bool) -> str:
        """Of a row: ok, not run, or failed with the reason."""
        if name in self.reasons:
            return f"failed: {self.reasons[name]}"
        return "ok" if runs else "not run"


def measure(
    problem: Problem, providers: list[str], repeats: int, clock: Clock
) -> list[dict[str, object]]:
    """One row per provider: medians of interleaved repeats."""
    failures = Failures()
    steps = {name: failures.attempt(name, step_of, name, problem) for name in providers}
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in providers}
    for repeat in range(-2, repeats):  # two rounds to warm up, compile and tune
        for name, step in steps.items():
            found = failures.attempt(name, clock, *step) if step is not None else None
            if found is not None and repeat >= 0:
                for series, value in zip(times[name], found, strict=True):
                    series.append(value)
    op, key = problem.shape_key()
    rows = []
    for name in providers:
        status = failures.status(name, steps[name] is not None)
        row = {"layer": problem.layer.name, "op": op, "shape": key, "provider": name,
               "status": status}  # fmt: skip
        if status == "ok":
            forward, backward = (statistics.median(series) for series in times[name])
            step_ms = forward + backward
            row |= {
                "forward_ms": forward,
                "backward_ms": backward,
                "step_ms": step_ms,
                "tflops": problem.flops() / step_ms / 1e9,
                "gbs": problem.bytes() / step_ms / 1e6,
            }
        rows.append(row)
    return rows


def measure_fused(
    problem: Problem, providers: list[str], repeats: int, clock: Clock
) -> list[dict[str, object]]:
    """One row per provider: the median of interleaved forward passes."""
    failures = Failures()
    calls = {name: failures.attempt(name, fused_of, name, problem) for name in providers}
    times: dict[str, list[float]] = {name: [] for name in providers}
    for repeat in range(-2, repeats):
        for name, call in calls.items():
            found = None
            if call is not None:
                found = failures.attempt(name, clock, call, lambda y: None)
            if found is not None and repeat >= 0:
                times[name].append(found[0])
    op, key = problem.shape_key()
    elements = problem.x.numel() + 2 * problem.dout.numel() + problem.weight.numel()
    flops = 2 * problem.dout.numel() * problem.weight[0].numel()
    rows = []
    for name in providers:
        status = failures.status(name, calls[name] is not None)
        row = {"layer": problem.layer.name, "op": f"fused {op}", "shape": key, "provider": name,
               "status": status}  # fmt: skip
        if status == "ok":
            forward = statistics.median(times[name])
            row |= {
                "forward_ms": forward,
                "backward_ms": 0.0,
                "step_ms": forward,
                "tflops": flops / forward / 1e9,
                "gbs": elements * problem.x.element_size() / forward / 1e6,
            }
        rows.append(row)
    return rows


def rates_of(arguments: argparse.Namespace, device: str) -> Rates:
    """What --tflops and --gbs say of the device, else what it does now."""
    dtype = DTYPES[arguments.dtype]
    if arguments.tflops is None:
        return measure_rates(torch.device(device), dtype)
    return Rates(arguments.tflops * 1e12, arguments.gbs * 1e9, dtype.itemsize)


def floor_ms(problem: Problem, rates: Rates) -> float:
    """The longer of products and bytes at the device's rates."""
    return rates.seconds(problem.flops(), problem.bytes()) * 1e3


def write_csv(path: Path, rows: list[dict[str, object]]) -> None:
    """One line per layer and provider."""
    fields = (
        "layer", "op", "shape", "provider", "status", "forward_ms", "backward_ms", "step_ms",
        "tflops", "gbs", "floor_ms",
    )  # fmt: skip
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fields, restval="")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda temporary: temporary.write_text(text.getvalue()))


def write_plot(path: Path, rows: list[dict[str, object]], title: str) -> None:
    """Time of every provider relative to the unmasked layer (--fused: to eager), layer by layer."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed (pip install 'wfnet[viz]')")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    layers = list(dict.fromkeys(row["layer"] for row in rows))
    timed = {(row["layer"], row["provider"]): row.get("step_ms") for row in rows}
    shown = [p for p in (*PROVIDERS, "cudnn") if any(timed.get((layer, p)) for layer in layers)]
    norm = "unmasked" if "unmasked" in shown else "eager"
    figure, axes = plt.subplots(figsize=(2 + 0.6 * len(layers), 4), layout="constrained")
    for i, provider in enumerate(shown):
        heights = []
        for layer in layers:
            own, base = timed.get((layer, provider)), timed.get((layer, norm))
            heights.append(own / base if own and base else float("nan"))
        places = [n + (i - len(shown) / 2) * 0.8 / len(shown) for n in range(len(layers))]
        axes.bar(places, heights, 0.8 / len(shown), label=provider, align="edge")
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_yscale("log")
    axes.set_ylabel(f"time / {norm}")
    axes.set_xticks(range(len(layers)), layers, rotation=60, ha="right", fontsize=7)
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def measurements(record: dict[str, object]) -> list[dict[str, object]]:
    """Entries for the table of winners: what a run's backends took for each shape."""
    by_shape: dict[tuple[str, str], dict[str, float]] = {}
    for row in record["rows"]:
        if row["status"] == "ok" and row["provider"] in backends.KERNELS:
            by_shape.setdefault((row["op"], row["shape"]), {})[row["provider"]] = row["step_ms"]
    with_what = {name: record[name] for name in ("device", "torch", "triton", "commit")}
    return [
        {"op": op, "shape": shape, "dtype": record["settings"]["dtype"], "ms": ms, **with_what}
        for (op, shape), ms in by_shape.items()
    ]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command line; sizes default to what the device can do."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = torch.cuda.is_available()
    parser.add_argument("--layers", nargs="+", default=[""], help="name prefixes")
    parser.add_argument("--providers", nargs="+", choices=(*PROVIDERS, "cudnn"))
    parser.add_argument("--fused", action="store_true", help="forward with a whole epilogue only")
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32", choices=DTYPES)
    parser.add_argument("-b", "--batch", type=int, default=512 if cuda else 4)
    parser.add_argument("--scale", type=int, default=1 if cuda else 4, help="divides all sizes")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=20 if cuda else 5)
    parser.add_argument("--tflops", type=float, help="the device's rate, for the floor; "
                        "without it and --gbs both are measured")  # fmt: skip
    parser.add_argument("--gbs", type=float, help="the device's memory rate, for the floor")
    parser.add_argument("--output", type=Path, default=Path("runs/bench_ops"))
    parser.add_argument("--winners", type=Path, help="the table of winners to update")
    parser.add_argument("--record", type=Path, metavar="JSON",
                        help="with --winners: those of an earlier run")  # fmt: skip
    arguments = parser.parse_args(argv)
    known = FUSED_PROVIDERS if arguments.fused else PROVIDERS
    arguments.providers = arguments.providers or list(known)
    wrong = [name for name in arguments.providers if name not in known]
    if wrong:
        parser.error(f"{', '.join(wrong)}: {'not' if arguments.fused else 'only'} with --fused")
    if arguments.fused and arguments.winners:
        parser.error("--winners wants forward and backward; leave --fused out")
    if arguments.record and not arguments.winners:
        parser.error("--record comes with --winners")
    if (arguments.tflops is None) != (arguments.gbs is None):
        parser.error("--tflops and --gbs come together")
    if arguments.tflops is not None and min(arguments.tflops, arguments.gbs) <= 0:
        parser.error("--tflops and --gbs must be positive")
    if min(arguments.batch, arguments.scale, arguments.repeats, arguments.classes) < 1:
        parser.error("--batch, --scale, --repeats and --classes must be positive")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Measures, prints a table and writes the results."""
    arguments = parse(argv)
    if arguments.record:
        record = json.loads(arguments.record.read_text())
        refusal = refuse_winners("cuda" if record["cuda"] else "cpu", record["commit"])
        if refusal:
            raise SystemExit(refusal)
        add_winners(arguments.winners, measurements(record))
        print(f"{arguments.winners} has the winners of {arguments.record}")
        return 0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    choose_convolutions_by_trial(torch.device(device))
    measured_with = about(
        device, ["benchmarks/bench_ops.py", *(sys.argv[1:] if argv is None else argv)]
    )
    refusal = arguments.winners and refuse_winners(device, measured_with["commit"])
    if refusal:
        raise SystemExit(refusal)
    layers = [layer for layer in LAYERS if layer.name.startswith(tuple(arguments.layers))]
    if arguments.fused:
        layers = [layer for layer in layers if layer.kernel > 0]
    if not layers:
        raise SystemExit(f"no layer starts with {' or '.join(arguments.layers)}")
    rates = rates_of(arguments, device)
    clock, rows = Clock(device), []
    title = (
        f"{measured_with['device']}, {arguments.dtype}, batch {arguments.batch}, scale "
        f"{arguments.scale}"
    )
    record = {
        "benchmark": "ops",
        "settings": settings_of(arguments),
        **measured_with,
        "rates": {"flops_per_second": rates.flops, "bytes_per_second": rates.bandwidth},
        "layers": [asdict(layer) for layer in layers],
        "rows": rows,
    }
    print(f"{title}: {rates.flops / 1e12:,.1f} TFLOP/s, {rates.bandwidth / 1e9:,.1f} GB/s")
    for layer in layers:
        problem = make_problem(
            layer, arguments.batch, arguments.scale, DTYPES[arguments.dtype], device,
            arguments.classes,
        )  # fmt: skip
        torch.compiler.reset()
        floor = None if arguments.fused else floor_ms(problem, rates)
        timed = measure_fused if arguments.fused else measure
        for row in timed(problem, arguments.providers, arguments.repeats, clock):
            rows.append({**row, "floor_ms": floor})
            timing = row["status"]
            if timing == "ok":
                timing = (
                    f"{row['forward_ms']:9.3f} + {row['backward_ms']:9.3f} ms "
                    f"{row['tflops']:8.2f} TFLOP/s {row['gbs']:8.1f} GB/s"
                    + ("" if floor is None else f"  floor {floor:.3f} ms")
                )
            print(f"{layer.name:30s} {row['provider']:9s} {timing}", flush=True)
        write_csv(arguments.output / "bench_ops.csv", rows)
        write_json(arguments.output / "bench_ops.json", record)
        if arguments.winners:
            add_winners(arguments.winners, measurements(record))
    write_plot(arguments.output / "bench_ops.png", rows, title)
    print(f"written to {arguments.output}")
    return int(any(row["status"].startswith("failed") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
