"""The compiled kernels on a device for the first time, in small steps.

    python tests/cuda/first_steps.py                all steps, easiest first
    python tests/cuda/first_steps.py "im2col 3x3"   these steps, in this process (for a sanitizer)

Every step adds one thing that only a device can settle (a descriptor, an order of corners, a
barrier). One that hangs is ended after a minute, and the rest still run. The first step that
fails names what to look at; the line below it says which reading of the manual it rests on. Without
a device, WFNET_CUDA_EMULATE runs the portable kernels' part of the steps on the emulation.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from wfnet.backends import cuda_launch
from wfnet.backends.cuda_launch import Axis, Layer, Want

DEVICE = "cpu" if cuda_launch.library().emulated else "cuda"
SECONDS = 60
BOUND = 6e-3  # of bf16 results that are rounded once or twice, over a whole tensor


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).bfloat16()


def nan(*shape: int) -> torch.Tensor:
    return torch.full(shape, float("nan"), device=DEVICE)


def error(result: torch.Tensor, truth: torch.Tensor) -> float:
    if not result.isfinite().all():
        return float("inf")
    return ((result.double() - truth.double()).norm() / truth.double().norm()).item()


def axes(size, filter_size, stride, pad, dilation) -> list[Axis]:
    return [
        Axis(n, (n + 2 * p - d * (k - 1) - 1) // s + 1, k, s, p, d)
        for n, k, s, p, d in zip(size, filter_size, stride, pad, dilation, strict=True)
    ]


class Case:
    """A convolution with random operands, channels last."""

    def __init__(
        self, batch, size, channels, columns, filter_size=(1, 1), stride=(1, 1), pad=(0, 0),
        dilation=(1, 1),
    ):  # fmt: skip
        torch.manual_seed(0)
        self.axes = axes(size, filter_size, stride, pad, dilation)
        self.how = {"stride": stride, "padding": pad, "dilation": dilation}
        self.x = randn(batch, *size, channels)
        depth = channels * filter_size[0] * filter_size[1]
        self.weight = (torch.randn(columns, *filter_size, channels) / depth**0.5).bfloat16()
        self.weight = self.weight.to(DEVICE)
        self.out_shape = (batch, self.axes[0].output, self.axes[1].output, columns)
        sizes = {"batch": batch, "in_channels": channels, "out_channels": columns,
                 "height": self.axes[0], "width": self.axes[1]}  # fmt: skip
        processors = cuda_launch.hopper_processors(self.x.device)
        for backward in (False, True):  # the steps are about those kernels: none may evade them
            reason = cuda_launch.hopper_refuses(backward, processors, sizes)
            if processors and reason:
                raise RuntimeError(f"the Hopper kernels refuse this step: {reason}")

    def convolved(self, samples=slice(None)) -> torch.Tensor:
        x, weight = (t.double().permute(0, 3, 1, 2) for t in (self.x[samples], self.weight))
        return F.conv2d(x, weight, **self.how).permute(0, 2, 3, 1)

    def forward(self, residual=False, relu=False, save=False) -> float:
        batch, columns = self.out_shape[0], self.out_shape[3]
        scale = torch.rand(batch, columns, device=DEVICE) + 0.5
        shift = torch.randn(batch, columns, device=DEVICE)
        added = randn(*self.out_shape) if residual else None
        out, branch = cuda_launch.conv_fprop(
            self.x, self.weight, *self.axes, scale, shift, residual=added, relu=relu,
            save_branch=save,
        )  # fmt: skip
        truth = self.convolved() * scale[:, None, None].double()
        worst = error(branch, truth) if save else 0.0
        truth = (truth.bfloat16().double() if save else truth) + shift[:, None, None]
        truth = truth if added is None else truth + added.double()
        return max(worst, error(out, truth.relu() if relu else truth))

    def gradient(self, fused=False) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(1)
        ag = randn(*self.out_shape)
        if not fused:
            result = cuda_launch.conv_dgrad(ag, self.weight, *self.axes, Layer(), Want(grad=True))
            return ag, result.grad
        shape = tuple(self.x.shape)
        branch, skip = randn(*shape), randn(*shape)
        scale = torch.rand(shape[0], shape[3], device=DEVICE) + 0.5
        shift = torch.randn(shape[0], shape[3], device=DEVICE)
        t0, t1 = nan(shape[0], shape[3]), nan(shape[0], shape[3])
        below = Layer(branch, scale, shift, None, skip, True)
        want = Want(True, True, t0, t1)
        result = cuda_launch.conv_dgrad(ag, self.weight, *self.axes, below, want)
        return ag, result.grad, result.scaled_grad, t0, t1, branch, skip, scale, shift

    def exact_gradient(self, ag: torch.Tensor) -> torch.Tensor:
        size = (self.x.shape[0], self.x.shape[3], *self.x.shape[1:3])
        weight, ag = (t.double().permute(0, 3, 1, 2) for t in (self.weight, ag))
        return torch.nn.grad.conv2d_input(size, weight, ag, **self.how).permute(0, 2, 3, 1)

    def backward(self) -> float:
        ag, grad = self.gradient()
        return error(grad, self.exact_gradient(ag))

    def chain(self) -> float:
        """Skip, mask, both column sums and scaled gradient of the layer below."""
        ag, *found, branch, skip, scale, shift = self.gradient(fused=True)
        g = self.exact_gradient(ag) + skip.double()
        g = g * (branch.float() + shift[:, None, None] > 0)
        sums = g.sum((1, 2)), (g * branch.double()).sum((1, 2))
        truth = (g, g * scale[:, None, None].double(), *sums)
        return max(error(*pair) for pair in zip(found, truth, strict=True))

    def repeats(self) -> float:
        """0 if ten runs give the same bits."""
        first, *others = ([t.clone() for t in self.gradient(fused=True)[1:5]] for _ in range(10))
        same = all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
        return 0.0 if same else float("inf")


def large(samples: int, size: int) -> float:
    """Tensors above 2**31 bytes: the first and the last sample, forward and backward."""
    case = Case(samples, (size, size), 64, 64, (3, 3), pad=(1, 1))
    scale = torch.ones(samples, 64, device=DEVICE)
    out, _ = cuda_launch.conv_fprop(case.x, case.weight, *case.axes, scale)
    ag, grad = case.gradient()
    ends = torch.tensor([0, samples // 2, samples - 1], device=DEVICE)
    worst = error(out[ends], case.convolved(ends))
    case.x = case.x[ends]
    return max(worst, error(grad[ends], case.exact_gradient(ag[ends])))


def in_another_thread(run: Callable[[], float]) -> float:
    """On a thread that has not called into CUDA before, as autograd's may be."""
    found: list[float] = []
    thread = threading.Thread(target=lambda: found.append(run()))
    thread.start()
    thread.join()
    return found[0] if found else float("inf")


def cold_thread() -> float:
    case = Case(2, (16, 16), 64, 64, (3, 3), pad=(1, 1))
    ag = randn(*case.out_shape)
    torch.empty_like(case.x)  # leaves a cached block: the thread need not allocate
    torch.utils.deterministic.fill_uninitialized_memory = False  # nor launch anything before ours

    def gradient() -> float:
        result = cuda_launch.conv_dgrad(ag, case.weight, *case.axes, Layer(), Want(grad=True))
        return error(result.grad, case.exact_gradient(ag))

    found = in_another_thread(gradient)
    torch.utils.deterministic.fill_uninitialized_memory = True
    return found


def graph() -> float:
    """Captured, and replayed with other numbers."""
    case = Case(4, (16, 16), 64, 128, (3, 3), pad=(1, 1))
    scale = torch.ones(4, 128, device=DEVICE)
    run = lambda: cuda_launch.conv_fprop(case.x, case.weight, *case.axes, scale)[0]  # noqa: E731
    if DEVICE == "cpu":
        return error(run(), case.convolved())
    run()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        out = run()
    case.x.copy_(randn(*case.x.shape))
    captured.replay()
    return error(out, case.convolved())


BIG = DEVICE == "cuda"
BATCH, SIZE = (64, 56) if BIG else (2, 9)
THREE = {"filter_size": (3, 3), "pad": (1, 1)}

# Name: what it rests on, and the step itself, which returns the largest relative error.
STEPS: dict[str, tuple[str, Callable[[], float]]] = {
    "one slice": (
        "wgmma descriptors (K-major, 128-byte swizzle), multicast of the filter, fragment layout",
        lambda: Case(1, (16, 16), 64, 64).forward(),
    ),
    "many slices": (
        "parities of full and empty over the ring of stages",
        lambda: Case(1, (16, 16), 712, 64).forward(),
    ),
    "128 columns": (
        "the second half of the filter's stage",
        lambda: Case(1, (16, 16), 128, 128).forward(),
    ),
    "ragged": (
        "boxes beyond the tensor are zeros and count in full",
        lambda: Case(3, (10, 9), 72, 136).forward(),
    ),
    "im2col 3x3": (
        "corners of the box of filter bases, offsets, the order of rows and images",
        lambda: Case(3, (9, 9), 64, 64, **THREE).forward(),
    ),
    "im2col 1x5": (
        "corners are {W, H}, as CUTLASS and Triton pass them; the manual writes {H, W}",
        lambda: Case(2, (6, 11), 64, 64, (1, 5), pad=(0, 2)).forward(),
    ),
    "im2col stride (1, 2)": (
        "element strides, and which filter base is the last of a row",
        lambda: Case(2, (8, 13), 64, 64, (3, 3), (1, 2), (1, 1)).forward(),
    ),
    "im2col dilation 2": (
        "offsets are in pixels",
        lambda: Case(2, (12, 11), 64, 64, (3, 3), (1, 1), (2, 2), (2, 2)).forward(),
    ),
    "epilogue": (
        "residual, branch and ReLU",
        lambda: Case(3, (9, 9), 64, 64, **THREE).forward(True, True, True),
    ),
    "dgrad 64 columns": (
        "the N-major operand of wgmma (tnspB)",
        lambda: Case(1, (16, 16), 64, 64).backward(),
    ),
    "dgrad 128 columns": (
        "its leading byte offset",
        lambda: Case(1, (16, 16), 128, 128).backward(),
    ),
    "dgrad 3x3": (
        "filter bases of a gradient",
        lambda: Case(3, (9, 9), 64, 128, **THREE).backward(),
    ),
    "dgrad 3x3 stride 2": (
        "phases",
        lambda: Case(3, (13, 12), 64, 64, (3, 3), (2, 2), (1, 1)).backward(),
    ),
    "dgrad 1x1 stride 2": (
        "phases without taps: tiles without a slice",
        lambda: Case(3, (9, 8), 64, 64, (1, 1), (2, 2)).backward(),
    ),
    "chain": (
        "masks, and column sums between the warps of a consumer",
        lambda: Case(3, (9, 9), 64, 64, **THREE).chain(),
    ),
    "cold thread": ("cuTensorMapEncode needs a context on its thread", cold_thread),
    "graph": ("tensor maps are parameters of the launch", graph),
    "persistent 64": (
        "turns of the consumers over many tiles",
        lambda: Case(BATCH, (SIZE, SIZE), 64, 64, **THREE).forward(True, True, True),
    ),
    "persistent 128": (
        "the same with 128 columns, backward",
        lambda: Case(BATCH, (SIZE // 2, SIZE // 2), 128, 128, **THREE).chain(),
    ),
    "repeats": (
        "no race moves a bit",
        lambda: Case(BATCH, (SIZE, SIZE), 64, 64, **THREE).repeats(),
    ),
    "above 2**31 bytes": (
        "offsets of 64 bits, strides of tensor maps",
        lambda: large(*((512, 224) if BIG else (2, 9))),
    ),
}


def run_steps(names: list[str]) -> int:
    """Runs steps in this process, a line each; ends at an exception, for CUDA may be beyond use."""
    # Fresh memory is NaN: a kernel that forgets an element fails.
    torch.use_deterministic_algorithms(True, warn_only=True)
    warnings.simplefilter("ignore")
    status = 0
    for name in names:
        print(f"begins {name}", flush=True)
        start = time.monotonic()
        try:
            found = STEPS[name][1]()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
        except Exception as failure:
            print(f"FAILED {name}: {str(failure).strip().splitlines()[0]}", flush=True)
            return 2
        verdict = "ok    " if found <= BOUND else "FAILED"
        seconds = time.monotonic() - start
        print(f"{verdict} {name}: error {found:.2e} ({seconds:.1f} s)", flush=True)
        status = status or int(found > BOUND)
    return status


def supervise() -> int:
    """Runs all steps in a second process; one that hangs or ends it costs that step alone."""
    rest, failed = list(STEPS), 0
    while rest:
        command = [sys.executable, str(Path(__file__).resolve()), *rest]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        begun = None
        while True:
            timer = threading.Timer(SECONDS, child.kill)
            timer.start()
            line = child.stdout.readline()
            timer.cancel()
            if not line:
                break
            if line.startswith("begins "):
                begun = line.removeprefix("begins ").strip()
                continue
            print(line, end="", flush=True)
            rest.remove(begun)
            if line.startswith("FAILED"):
                failed += 1
                print(f"       rests on: {STEPS[begun][0]}", flush=True)
            begun = None
        status = child.wait()
        if begun is None and status in (0, 1, 2):
            continue
        stopped = rest.pop(0)
        failed += 1
        print(f"FAILED {stopped}: no answer within {SECONDS} s, or status {status}", flush=True)
        print(f"       rests on: {STEPS[stopped][0]}", flush=True)
    return 1 if failed else 0


def main() -> int:
    if len(sys.argv) > 1:
        return run_steps(sys.argv[1:])
    processors = cuda_launch.hopper_processors(torch.device(DEVICE, 0))
    print("Hopper kernels" if processors else "portable kernels", flush=True)
    return supervise()


if __name__ == "__main__":
    sys.exit(main())
