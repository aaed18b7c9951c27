"""Every kernel of one backend once, at the smallest shapes, against fp64 on the CPU.

    python benchmarks/device_smoke.py triton                 all families, one process
    python benchmarks/device_smoke.py cuda chain linear      two of them
    python benchmarks/device_smoke.py cuda --kernels hopper  fails where those kernels do not run

The first thing to run on a new device: seconds for each family, and a kernel that reads where it
must not takes down its own process only if families run one by one (device_run.py does that). Fresh
memory is NaN, so that what a kernel forgets to write is found. Each case prints one line, and is
written to --output with its errors (numerics.py counts them); status 1 if a case fails. Errors are
relative to the norm; the limits catch wrong results, not lost digits: tests/gpu compares with
eager's error.

Without a device: `triton` with TRITON_INTERPRET=1, `cuda --emulated`, `eager`.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from wfnet import backends
from wfnet.backends import Backend, Below, ConvGeometry, PoolGeometry, cuda_launch
from wfnet.benchmarking.steps import COLUMNS, StepSettings, make_problem, make_step
from wfnet.cli.classifier import create_classifier
from wfnet.gate_tables import GatedLayer, GateTables
from wfnet.services.files import write_json
from wfnet.untraining.optimizers import RowAdam

# Found and true, by name.
Results = dict[str, tuple[Tensor, Tensor]]
Case = tuple[str, Callable[[], Results]]

LIMITS = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 3e-3}  # fp32: may be tf32
DTYPES = {
    "eager": (torch.bfloat16, torch.float32),
    "triton": (torch.bfloat16, torch.float16, torch.float32),
    "cuda": (torch.bfloat16, torch.float16),
}
# Samples, pixels a side, channels in and out, filter, stride.
CONVOLUTIONS = {
    "3x3": (2, 7, 64, 64, 3, 1),
    "3x3/2": (2, 8, 64, 128, 3, 2),
    "1x1": (3, 7, 128, 64, 1, 1),
    "1x1/2": (2, 8, 64, 128, 1, 2),
    "stem 7x7/2": (2, 16, 3, 64, 7, 2),
    "odd channels": (2, 5, 72, 24, 3, 1),
}
CLASSES = 5


@dataclass(frozen=True)
class Place:
    """Where and with what a family runs."""

    backend: Backend
    dtype: torch.dtype
    device: str

    def draw(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Random values that the dtype holds exactly, on the CPU in fp64."""
        return (torch.randn(shape) * scale).to(self.dtype).double()

    def pixels(self, tensor: Tensor) -> Tensor:
        """``[B, C, H, W]`` on the device, channels-last."""
        return tensor.to(self.device, self.dtype).contiguous(memory_format=torch.channels_last)

    def tokens(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype)

    def table(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, torch.float32)

    def tables(self, samples: int, columns: int) -> tuple[Tensor, Tensor]:
        """Scale and shift ``[B, O]``, fp64 on the CPU."""
        return (torch.rand(samples, columns) + 0.1).double(), torch.randn(samples, columns).double()

    def sums(self, samples: int, columns: int) -> tuple[Tensor, Tensor]:
        t1, t0 = torch.empty(2, samples, columns, device=self.device).unbind()
        return t1, t0


def _wide(table: Tensor) -> Tensor:
    """``[B, O]`` beside pixels."""
    return table[:, :, None, None]


def _convolution(place: Place, name: str) -> tuple[Tensor, Tensor, ConvGeometry]:
    samples, size, channels, columns, kernel, stride = CONVOLUTIONS[name]
    x = place.draw(samples, channels, size, size)
    weight = place.draw(columns, channels, kernel, kernel, scale=(channels * kernel**2) ** -0.5)
    return x, weight, ConvGeometry((stride,) * 2, (kernel // 2,) * 2)


def _conv(x: Tensor, weight: Tensor, geometry: ConvGeometry) -> Tensor:
    return F.conv2d(x, weight, None, geometry.stride, geometry.padding)


def _dgrad(x: Tensor, weight: Tensor, grad: Tensor, geometry: ConvGeometry) -> Tensor:
    return torch.nn.grad.conv2d_input(x.shape, weight, grad, geometry.stride, geometry.padding)


# -- families --------------------------------------------------------------------------------------


def gates(place: Place) -> Iterator[Case]:
    """Rows of filter matrices and their gradients; the tables of a whole network."""

    def layers(move: Callable[[Tensor], Tensor]) -> list[GatedLayer]:
        torch.manual_seed(1)
        return [
            GatedLayer(
                move(torch.randn(CLASSES, width)),
                move(torch.randn(CLASSES, width)) if biased else None,
                bias=move(torch.randn(width)) if biased else None,
                gamma=move(torch.rand(width)), beta=move(torch.randn(width)),
                mean=move(torch.randn(width)), var=move(torch.rand(width) + 0.1),
            )
            for width, biased in ((20, False), (64, True))
        ]  # fmt: skip

    def rows() -> Results:
        alpha = torch.randn(CLASSES, 24)
        forget, t = torch.tensor([[0, 1], [4, -1], [2, 2]]), torch.randn(3, 24)
        mine = [x.to(place.device) for x in (alpha, forget, t)]
        eager = backends.get("eager")
        return {
            "rows": (place.backend.gate_rows(*mine[:2], 1.05),
                     eager.gate_rows(alpha.double(), forget, 1.05)),
            "gradient": (place.backend.gate_rows_backward(mine[2], *mine[:2]),
                         eager.gate_rows_backward(t.double(), alpha.double(), forget)),
        }  # fmt: skip

    def tables() -> Results:
        forget = torch.tensor([[1], [3], [-1]])
        found = place.backend.gate_tables(layers(lambda t: t.to(place.device)))(
            forget.to(place.device), True
        )
        truth = GateTables(layers(torch.Tensor.double))(forget, True)
        results = {}
        for layer in range(2):
            results[f"scale {layer}"] = (found.scales[layer], truth.scales[layer])
            results[f"shift {layer}"] = (found.shifts[layer], truth.shifts[layer])
            for mine, true in (
                (found.t1[layer], truth.t1[layer]),
                (found.t0[layer], truth.t0[layer]),
            ):
                if mine is not None:
                    true.normal_()
                    mine.copy_(true)
        for number, pair in enumerate(zip(found.gradients(), truth.gradients(), strict=True)):
            results[f"gradient {number}"] = pair
        return results

    def row_adam() -> Results:
        """A captured step's kernel, of which two of five rows do not occur."""
        drawn, gradient = torch.randn(CLASSES, 1500), torch.randn(CLASSES, 1500)
        occurred = torch.tensor([True, False, True, True, False])
        moved = []
        for kind, move in ((torch.float32, place.device), (torch.float64, "cpu")):
            parameter = torch.nn.Parameter(drawn.to(move, kind, copy=True))
            optimizer = RowAdam([parameter], lr=0.1)
            for _ in range(3):
                parameter.grad = gradient.to(move, kind)
                optimizer.step(occurred=occurred.to(move))
            moved.append({"filters": parameter.detach(), **optimizer.moments()})
        return {name: (moved[0][name], moved[1][name]) for name in moved[0]}

    yield "rows", rows
    yield "tables", tables
    if place.backend.name == "triton":
        yield "row_adam", row_adam


def conv(place: Place) -> Iterator[Case]:
    """The masked convolution, forward and backward, layer by layer."""

    def case(name: str) -> Results:
        x, weight, geometry = _convolution(place, name)
        samples, columns = x.shape[0], weight.shape[0]
        scale, shift = place.tables(samples, columns)
        u = _conv(x, weight, geometry)
        dout = place.draw(*u.shape)
        mine, filters = place.pixels(x), place.pixels(weight)
        print("   ", place.backend.explain_conv2d(mine, filters, geometry, samples))
        out, saved = place.backend.conv2d(
            mine, filters, place.table(scale), place.table(shift), None, geometry, True
        )
        need_dx = x.shape[1] > 3  # images need no gradient
        dx, t1, t0 = place.backend.conv2d_backward(
            place.pixels(dout), saved, filters, place.table(scale), None, tuple(x.shape), geometry,
            need_dx, True, True,
        )  # fmt: skip
        v = _wide(scale) * u
        results = {
            "out": (out, v + _wide(shift)),
            "t1": (t1, (dout * v).sum((2, 3))),
            "t0": (t0, dout.sum((2, 3))),
        }
        if need_dx:
            results["dx"] = (dx, _dgrad(x, weight, _wide(scale) * dout, geometry))
        return results

    for name in CONVOLUTIONS:
        yield name, lambda name=name: case(name)


def linear(place: Place) -> Iterator[Case]:
    """The masked linear map, forward and backward."""

    def case(tokens: int, expanded: bool) -> Results:
        x, weight = place.draw(3, tokens, 64), place.draw(128, 64, scale=1 / 8)
        source = torch.tensor([0, 2, 2, 1]) if expanded else None
        samples = x if source is None else x[source]
        scale, shift = place.tables(len(samples), 128)
        v = scale[:, None] * (samples @ weight.T)
        dout = place.draw(*v.shape)
        at = None if source is None else source.to(place.device)
        mine, filters = place.tokens(x), place.tokens(weight)
        out, saved = place.backend.linear(
            mine, filters, place.table(scale), place.table(shift), at, True
        )
        dx, t1, t0 = place.backend.linear_backward(
            place.tokens(dout), saved, filters, place.table(scale), at, tuple(x.shape), True, True,
            True,
        )  # fmt: skip
        gradient = (scale[:, None] * dout) @ weight
        if source is not None:
            gradient = torch.zeros_like(x).index_add_(0, source, gradient)
        return {
            "out": (out, v + shift[:, None]),
            "dx": (dx, gradient),
            "t1": (t1, (dout * v).sum(1)),
            "t0": (t0, dout.sum(1)),
        }

    for tokens in (1, 49, 130):
        yield f"{tokens} tokens", lambda tokens=tokens: case(tokens, False)
    yield "label expansion", lambda: case(49, True)


def expansion(place: Place) -> Iterator[Case]:
    """A convolution whose samples share images."""

    def case(name: str) -> Results:
        x, weight, geometry = _convolution(place, name)
        source = torch.tensor([0, 1, 1, 0, 1])
        scale, shift = place.tables(len(source), weight.shape[0])
        v = _wide(scale) * _conv(x, weight, geometry)[source]
        dout = place.draw(*v.shape)
        filters, at = place.pixels(weight), source.to(place.device)
        out, saved = place.backend.conv2d(
            place.pixels(x), filters, place.table(scale), place.table(shift), at, geometry, True
        )
        dx, t1, t0 = place.backend.conv2d_backward(
            place.pixels(dout), saved, filters, place.table(scale), at, tuple(x.shape), geometry,
            True, True, True,
        )  # fmt: skip
        gradient = _dgrad(x[source], weight, _wide(scale) * dout, geometry)
        return {
            "out": (out, v + _wide(shift)),
            "dx": (dx, torch.zeros_like(x).index_add_(0, source, gradient)),
            "t1": (t1, (dout * v).sum((2, 3))),
            "t0": (t0, dout.sum((2, 3))),
        }

    for name in ("3x3", "1x1"):
        yield name, lambda name=name: case(name)


def fused(place: Place) -> Iterator[Case]:
    """Scale, shift, residual and ReLU in the epilogue of a convolution."""

    def case(name: str, with_residual: bool) -> Results:
        x, weight, geometry = _convolution(place, name)
        scale, shift = place.tables(x.shape[0], weight.shape[0])
        exact = _wide(scale) * _conv(x, weight, geometry) + _wide(shift)
        residual = place.draw(*exact.shape) if with_residual else None
        out, _, _ = place.backend.fused_conv2d(
            place.pixels(x), place.pixels(weight), place.table(scale), place.table(shift),
            None if residual is None else place.pixels(residual), True, None, geometry, True,
        )  # fmt: skip
        return {"out": (out, (exact if residual is None else exact + residual).relu())}

    for name in CONVOLUTIONS:
        yield name, lambda name=name: case(name, False)
        yield f"{name} + residual", lambda name=name: case(name, True)


def chain(place: Place) -> Iterator[Case]:
    """A link of the backward chain: a gradient that finishes the layer below it.

    It comes from a convolution (link), from nowhere (top) or through a pooling.
    """

    def case(name: str, with_residual: bool, through: str | PoolGeometry) -> Results:
        x, weight, geometry = _convolution(place, name)  # the upper layer
        samples, channels = x.shape[:2]
        lower = place.draw(channels, channels, 1, 1, scale=channels**-0.5)
        below_x, residual, skip = (place.draw(*x.shape) for _ in range(3))
        scale, shift = place.tables(samples, channels)
        out, branch, mask = place.backend.fused_conv2d(
            place.pixels(below_x), place.pixels(lower), place.table(scale), place.table(shift),
            place.pixels(residual) if with_residual else None, True, None, ConvGeometry(), True,
        )  # fmt: skip
        t1, t0 = place.sums(samples, channels)
        below = Below(branch, mask, place.table(scale), place.table(shift), True, t1, t0,
                      need_grad=True)  # fmt: skip
        if isinstance(through, PoolGeometry):
            pooled, positions = place.backend.max_pool2d(out, through, True)
            leaf = out.double().cpu().requires_grad_()  # as the kernel sees it: ties and all
            exact = F.max_pool2d(leaf, *through)
            dout = place.draw(*exact.shape)
            (dx,) = torch.autograd.grad(exact, leaf, dout)
            found = place.backend.max_pool2d_backward(
                place.pixels(dout), positions, torch.empty_like(out, device="meta"), through,
                place.pixels(skip), below,
            )  # fmt: skip
        elif through == "top":
            dx = place.draw(*x.shape)
            found = place.backend.finish(place.pixels(dx), below, place.pixels(skip))
        else:
            ag = place.draw(*_conv(x, weight, geometry).shape)
            dx = _dgrad(x, weight, ag, geometry)
            found = place.backend.conv2d_dgrad(
                place.pixels(ag), place.pixels(weight), tuple(x.shape), geometry,
                place.pixels(skip), below,
            )  # fmt: skip
        g = (dx + skip) * (out.double().cpu() > 0)  # its own mask: rounding may move it
        v = _wide(scale) * _conv(below_x, lower, ConvGeometry())
        pooled = {"pooled": (pooled, exact)} if isinstance(through, PoolGeometry) else {}
        return pooled | {
            "grad": (found.grad, g),
            "scaled": (found.scaled_grad, _wide(scale) * g),
            "t1": (t1, (g * v).sum((2, 3))),
            "t0": (t0, g.sum((2, 3))),
        }

    for name in CONVOLUTIONS:
        if name.startswith("stem"):
            continue
        yield name, lambda name=name: case(name, False, "link")
        yield f"{name}, mask kept", lambda name=name: case(name, True, "link")
    ways = {
        "top": "top",
        "pooled 3x3/2": PoolGeometry((3, 3), (2, 2), (1, 1)),
        "pooled 2x2/2": PoolGeometry((2, 2), (2, 2)),
    }
    for title, way in ways.items():
        yield title, lambda way=way: case("3x3", False, way)
        yield f"{title}, mask kept", lambda way=way: case("3x3", True, way)


def _losses(place: Place, model: str, ways: Sequence[str]) -> Iterator[Case]:
    """Six steps of a network, beside the eager masks in fp32 on the CPU."""

    def losses(column: str, device: str, dtype: torch.dtype) -> Tensor:
        settings = StepSettings(image_size=32, batch_size=8, label_expansion=2, classes=CLASSES,
                                device=device, dtype=dtype)  # fmt: skip
        made = create_classifier(model, CLASSES, in_channels=3, image_size=32)
        with contextlib.ExitStack() as stack:
            problem = make_problem(made, settings, stack)
            generator = torch.Generator().manual_seed(3)  # a device draws other images
            problem.images.copy_(torch.randn(problem.images.shape, generator=generator))
            problem.expanded.copy_(problem.images[problem.batch.source])
            step = make_step(problem, column)
            return torch.stack([step().double().cpu() for _ in range(6)])

    def case(column: str) -> Results:
        found = losses(column, place.device, place.dtype)
        return {"losses": (found, losses("eager", "cpu", torch.float32))}

    for how in ways:
        column = f"wfnet/{place.backend.name}/{how}"
        if column in COLUMNS and not ("captured" in how and place.device == "cpu"):
            yield f"{model} {how}", lambda column=column: case(column)


def network(place: Place) -> Iterator[Case]:
    """Whole steps: unfused, fused, and as a CUDA graph."""
    yield from _losses(place, "small/resnet", ("unfused", "fused", "captured"))
    yield from _losses(place, "small/vit", ("unfused",))


def compiled(place: Place) -> Iterator[Case]:
    """Whole steps of `eager` in a plan that PyTorch compiles; takes half a minute each."""
    for model in ("small/resnet", "small/vit"):
        yield from _losses(place, model, ("compiled", "compiled_captured"))


FAMILIES = {
    family.__name__: family
    for family in (gates, conv, expansion, linear, fused, chain, network, compiled)
}


# -- running ---------------------------------------------------------------------------------------


def error_of(found: Tensor, truth: Tensor) -> float:
    """Relative to the norm; NaN never passes."""
    difference = (found.detach().double().cpu() - truth).norm()
    return (difference / truth.norm().clamp_min(1e-30)).item()


def run_case(name: str, place: Place, case: Callable[[], Results]) -> dict[str, object]:
    """Prints one line; JSON of the case: whether it passed, and its errors or why there are none.

    An error that is no finite number is None.
    """
    torch.manual_seed(0)
    start = time.perf_counter()
    try:
        errors = {what: error_of(*pair) for what, pair in case().items()}
    except Exception as error:  # of compilers, drivers and our own code
        traceback.print_exc(file=sys.stdout)
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        print(f"FAILED {name}: {reason}")
        return {"passed": False, "reason": reason, "comparisons": []}
    limit = LIMITS[place.dtype]
    passed = all(error <= limit for error in errors.values())
    shown = ", ".join(f"{what} {error:.1e}" for what, error in errors.items())
    print(f"{'ok' if passed else 'FAILED'} {name}: {shown} ({time.perf_counter() - start:.1f} s)")
    comparisons = [
        {"what": what, "error": error if math.isfinite(error) else None, "passed": error <= limit}
        for what, error in errors.items()
    ]
    return {"passed": passed, "comparisons": comparisons}


def device_is_lost(device: str) -> bool:
    """Whether an error stays with this process: nothing can run here any more."""
    if device == "cpu":
        return False
    try:
        torch.cuda.synchronize()
        torch.ones(1, device=device).item()
    except RuntimeError as error:
        print(f"the device is lost to this process: {next(iter(str(error).splitlines()), '')}")
        return True
    return False


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("backend", choices=backends.KERNELS)
    parser.add_argument("families", nargs="*", metavar="family", help=", ".join(FAMILIES))
    parser.add_argument("--kernels", choices=("portable", "hopper"),
                        help="which compiled kernels must run")  # fmt: skip
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--emulated", action="store_true",
                        help="the compiled kernels on the CPU; builds their emulation")  # fmt: skip
    parser.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--output", type=Path, help="JSON file, written after every case")
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.families if name not in FAMILIES]
    if unknown:
        parser.error(f"no family {', '.join(unknown)}; choose among {', '.join(FAMILIES)}")
    return arguments


def refuse(arguments: argparse.Namespace) -> str | None:
    """Why the backend cannot run at all."""
    if arguments.backend == "eager":
        return None
    dtype = torch.float16
    x = torch.zeros(1, 64, 4, 4, device=arguments.device, dtype=dtype)
    weight = torch.zeros(64, 64, 1, 1, device=arguments.device, dtype=dtype)
    reason = backends.get(arguments.backend).refuse_conv2d(x, weight, ConvGeometry())
    if reason is None and arguments.kernels:
        hopper = cuda_launch.hopper_processors(x.device) > 0
        if hopper != (arguments.kernels == "hopper"):
            reason = f"the {'Hopper' if hopper else 'portable'} kernels would run"
    return reason


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.emulated:
        script = Path(__file__).resolve().parent.parent / "csrc" / "build.py"
        built = subprocess.check_output([sys.executable, str(script), "--emulated"], text=True)
        os.environ["WFNET_CUDA_EMULATE"] = built.strip()
    reason = refuse(arguments)
    if reason is not None:
        print(f"{arguments.backend} cannot run: {reason}")
        return 1
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory is NaN
    backend = backends.get(arguments.backend)
    dtypes = DTYPES[arguments.backend]
    if arguments.dtypes:
        dtypes = tuple(getattr(torch, name) for name in arguments.dtypes)
    cases: list[dict[str, object]] = []
    for family in arguments.families or FAMILIES:
        for dtype in dtypes:
            place = Place(backend, dtype, arguments.device)
            for name, case in FAMILIES[family](place):
                kind = str(dtype).removeprefix("torch.")
                found = run_case(f"{family} {name} {kind}", place, case)
                cases.append({"family": family, "case": name, "dtype": kind, **found})
                sys.stdout.flush()
                write_cases(arguments, cases)
                if not found["passed"] and device_is_lost(arguments.device):
                    print(f"{summed(cases)} before the device was lost")
                    return 1
    print(summed(cases))
    return int(not all(case["passed"] for case in cases))


def summed(cases: Sequence[dict[str, object]]) -> str:
    return f"{sum(case['passed'] for case in cases)} of {len(cases)} cases passed"


def write_cases(arguments: argparse.Namespace, cases: Sequence[dict[str, object]]) -> None:
    """What has run, for benchmarks/numerics.py."""
    if arguments.output:
        kernels = {"backend": arguments.backend, "kernels": arguments.kernels}
        write_json(arguments.output, {"benchmark": "smoke", **kernels, "cases": list(cases)})


if __name__ == "__main__":
    sys.exit(main())
