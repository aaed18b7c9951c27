"""The compiled kernels on a device for the first time, in small steps.

    python tests/csrc/first_steps.py                all steps, easiest first
    python tests/csrc/first_steps.py "im2col 3x3"   these steps, in this process (for a sanitizer)

Every step adds one thing that only a device can settle (a descriptor, an order of corners, a
barrier). The first step that fails names what to look at; the lines below it say which reading of
the manual it rests on, and where its result is wrong. One that hangs is ended after half a minute;
after three of these the rest is not begun. Without a device, WFNET_CUDA_EMULATE runs the steps on
the emulated one.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from wfnet.backends import cuda_launch
from wfnet.backends.contract import ConvGeometry, Epilogue, LayerBelow

DEVICE = "cpu" if cuda_launch.library().emulated else "cuda"
START_SECONDS, SECONDS = 60, 30  # until the first step begins, and for each step
MOST_HANGS = 3
BOUND = 6e-3  # of bf16 results that are rounded once or twice, over a whole tensor

HANGS = """\
       A wait without an end. WFNET_CUDA_DEADLINE=2 python csrc/build.py makes waits of more than
       2 s an error, and then the step's error tells them apart:
       "unspecified launch failure": a consumer waits for data. Bytes announced (expect_tx) are not
           the bytes that land, a multicast reaches the wrong block, or a load was never made;
       "misaligned address": the producer waits for a free stage. Arrivals are missing: of the
           other block (mapa), or of a warp;
       still no answer: turns of the consumers (named barriers), setmaxnreg, or sync_cluster()."""

# Which part of a tile something belongs to: rows and columns of the result as a matrix.
PLACES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "row // 128 % 2 (block of the cluster)": lambda row, column: row // 128 % 2,
    "row // 64 % 2 (half of a tile)": lambda row, column: row // 64 % 2,
    "row // 16 % 4 (warp)": lambda row, column: row // 16 % 4,
    "row % 16": lambda row, column: row % 16,
    "column // 64": lambda row, column: column // 64,
    "column // 32 % 2 (chunk of the epilogue)": lambda row, column: column // 32 % 2,
    "column // 8 % 4 (lane of a quad)": lambda row, column: column // 8 % 4,
    "column % 8": lambda row, column: column % 8,
}


def randn(*shape: int) -> Tensor:
    """bf16; four dimensions are channels last in memory."""
    numbers = torch.randn(*shape, device=DEVICE).bfloat16()
    return numbers.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else numbers


def nan(*shape: int) -> Tensor:
    return torch.full(shape, float("nan"), device=DEVICE)


# Where this step's results are wrong.
evidence: list[str] = []


def error(result: Tensor, truth: Tensor) -> float:
    found = ((result.double() - truth.double()).norm() / truth.double().norm()).item()
    found = found if result.isfinite().all() else float("inf")
    if not found <= BOUND:
        evidence.extend(where(result, truth))
    return found


def where(result: Tensor, truth: Tensor) -> list[str]:
    """Which rows (pixels) and columns (channels) are wrong, in terms of tiles."""
    result, truth = (t.double().movedim(1, -1).flatten(0, -2) for t in (result, truth))
    wrong = ~((result - truth).abs() <= 0.05 * (truth.abs() + truth.square().mean().sqrt()))
    if not wrong.any():
        return ["no element is far off: a loss of digits"]
    rows, columns = torch.meshgrid(*(torch.arange(n) for n in truth.shape), indexing="ij")
    wrong = wrong.cpu()
    lines = [
        f"{wrong.double().mean():.2%} of {list(truth.shape)} are wrong, "
        f"{(~result.isfinite()).double().mean():.2%} not finite (never written?)"
    ]
    for name, place in PLACES.items():
        places = place(rows, columns)
        every, some = places.unique().tolist(), places[wrong].unique().tolist()
        if some != every:
            lines.append(f"all of it where {name} is {some} of {every}")
    row, column = (int(i) for i in wrong.nonzero()[0])
    lines.append(
        f"first at row {row}, column {column}: {result[row, column]:.4g}, "
        f"not {truth[row, column]:.4g}"
    )
    return lines


class Case:
    """A convolution with random operands, channels last in memory."""

    def __init__(
        self,
        batch: int,
        size: tuple[int, int],
        channels: int,
        columns: int,
        filter_size: tuple[int, int] = (1, 1),
        stride: tuple[int, int] = (1, 1),
        pad: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
    ):
        torch.manual_seed(0)
        self.geometry = ConvGeometry(stride, pad, dilation)
        self.how = {"stride": stride, "padding": pad, "dilation": dilation}
        self.x = randn(batch, channels, *size)
        depth = channels * filter_size[0] * filter_size[1]
        self.weight = randn(columns, channels, *filter_size) / depth**0.5
        output = self.geometry.output_size(*size, filter_size)
        self.out_shape = (batch, columns, *output)
        for backward in (False, True):  # the steps are about these kernels: none may evade them
            shapes = tuple(self.x.shape), tuple(self.weight.shape)
            reason = cuda_launch.refuse(backward, *shapes, self.geometry)
            if reason:
                raise RuntimeError(f"the kernels refuse this step: {reason}")

    def run(self, x: Tensor, **epilogue: Tensor | bool | None) -> tuple[Tensor, Tensor | None]:
        """The kernel's result and branch."""
        out, branch, _ = cuda_launch.conv2d(x, self.weight, self.geometry, Epilogue(**epilogue))
        return out, branch

    def run_gradient(self, ag: Tensor) -> Tensor:
        """The kernel's input gradient alone."""
        shape = tuple(self.x.shape)
        return cuda_launch.conv2d_dgrad(ag, self.weight, shape, self.geometry).grad

    def convolved(self, samples=slice(None)) -> Tensor:
        return F.conv2d(self.x[samples].double(), self.weight.double(), **self.how)

    def forward(self, residual=False, relu=False, save=False) -> float:
        table = self.out_shape[:2]
        scale = torch.rand(table, device=DEVICE) + 0.5
        shift = torch.randn(table, device=DEVICE)
        added = randn(*self.out_shape) if residual else None
        out, branch = self.run(
            self.x, scale=scale, shift=shift, residual=added, relu=relu, save=save
        )
        truth = self.convolved() * scale[:, :, None, None].double()
        worst = error(branch, truth) if save else 0.0
        truth = (truth.bfloat16().double() if save else truth) + shift[:, :, None, None]
        truth = truth if added is None else truth + added.double()
        return max(worst, error(out, truth.relu() if relu else truth))

    def layer_below(self) -> tuple[LayerBelow, Tensor]:
        """A layer that all of the epilogue is wanted of, and a skip gradient."""
        torch.manual_seed(2)
        shape = tuple(self.x.shape)
        below = LayerBelow(
            branch=randn(*shape),
            scale=torch.rand(shape[:2], device=DEVICE) + 0.5,
            shift=torch.randn(shape[:2], device=DEVICE),
            relu=True,
            t1=nan(*shape[:2]),
            t0=nan(*shape[:2]),
            need_grad=True,
        )
        return below, randn(*shape)

    def run_chain(self) -> tuple[Tensor, ...]:
        """``ag``, ``g``, ``scale * g``, both sums."""
        torch.manual_seed(1)
        ag, (below, skip) = randn(*self.out_shape), self.layer_below()
        arguments = (ag, self.weight, tuple(self.x.shape), self.geometry, skip, below)
        found = cuda_launch.conv2d_dgrad(*arguments)
        return ag, found.grad, found.scaled_grad, below.t0, below.t1

    def exact_gradient(self, ag: Tensor) -> Tensor:
        size, weight = (ag.shape[0], *self.x.shape[1:]), self.weight.double()
        return torch.nn.grad.conv2d_input(size, weight, ag.double(), **self.how)

    def backward(self) -> float:
        ag = randn(*self.out_shape)
        return error(self.run_gradient(ag), self.exact_gradient(ag))

    def chain(self) -> float:
        """Skip, mask, both column sums and scaled gradient of the layer below."""
        ag, *found = self.run_chain()
        below, skip = self.layer_below()
        g = self.exact_gradient(ag) + skip.double()
        g = g * (below.branch.float() + below.shift[:, :, None, None] > 0)
        sums = g.sum((2, 3)), (g * below.branch.double()).sum((2, 3))
        truth = (g, g * below.scale[:, :, None, None].double(), *sums)
        return max(error(*pair) for pair in zip(found, truth, strict=True))

    def repeats(self) -> float:
        """0 if ten runs give the same bits."""
        first, *others = ([t.clone() for t in self.run_chain()[1:]] for _ in range(10))
        same = all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
        return 0.0 if same else float("inf")


def large(samples: int, size: int) -> float:
    """Tensors above 2**31 bytes: the first and the last sample, forward and backward."""
    case = Case(samples, (size, size), 64, 64, (3, 3), pad=(1, 1))
    out, _ = case.run(case.x, scale=torch.ones(samples, 64, device=DEVICE))
    ends = torch.tensor([0, samples // 2, samples - 1], device=DEVICE)
    worst = error(out[ends], case.convolved(ends))
    ag = randn(*case.out_shape)
    return max(worst, error(case.run_gradient(ag)[ends], case.exact_gradient(ag[ends])))


def cold_thread() -> float:
    """A gradient on a thread that has not called into CUDA before, as autograd's may be."""
    case = Case(2, (16, 16), 64, 64, (3, 3), pad=(1, 1))
    ag = randn(*case.out_shape)
    torch.empty_like(case.x)  # leaves a cached block: the thread need not allocate
    torch.utils.deterministic.fill_uninitialized_memory = False  # nor launch anything before ours
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(case.run_gradient(ag)))
    thread.start()
    thread.join()
    torch.utils.deterministic.fill_uninitialized_memory = True
    return error(found[0], case.exact_gradient(ag)) if found else float("inf")


def graph() -> float:
    """Captured, and replayed with other numbers."""
    case = Case(4, (16, 16), 64, 128, (3, 3), pad=(1, 1))
    scale = torch.ones(4, 128, device=DEVICE)
    run = lambda: case.run(case.x, scale=scale)[0]  # noqa: E731
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
    "im2col past the end": (
        "a tile that begins behind the last image, in the second block, is zeros that count",
        lambda: Case(1, (10, 9), 64, 64, **THREE).forward(),
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
        evidence.clear()
        start = time.monotonic()
        try:
            found = STEPS[name][1]()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
        except Exception as failure:
            print(f"FAILED {name}: {str(failure).strip().splitlines()[0]}", flush=True)
            return 2
        good = found <= BOUND
        seconds = time.monotonic() - start
        verdict = "ok    " if good else "FAILED"
        print(f"{verdict} {name}: error {found:.2e} ({seconds:.1f} s)", flush=True)
        if good:
            continue
        status = 1
        for line in evidence:
            print(f"       {line}", flush=True)
    return status


def follow(words: list[str], seen: Callable[[str], None]) -> tuple[str, int]:
    """Runs this file with ``words`` and shows its lines; the step it ended in, and its status.

    It is ended where it says nothing for START_SECONDS, or for SECONDS within a step.
    """
    command = [sys.executable, str(Path(__file__).resolve()), *words]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    begun = ""
    while True:
        timer = threading.Timer(SECONDS if begun else START_SECONDS, child.kill)
        timer.start()
        line = child.stdout.readline()
        timer.cancel()
        if not line:
            return begun, child.wait()
        if line.startswith("begins "):
            begun = line.removeprefix("begins ").strip()
            continue
        print(line, end="", flush=True)
        if line.startswith(("ok ", "FAILED")):
            if line.startswith("FAILED"):
                print(f"       rests on: {STEPS[begun][0]}", flush=True)
            seen(begun)
            begun = ""


def supervise() -> int:
    """Runs all steps in a second process; one that hangs or ends it costs that step alone."""
    rest, failed, hangs = list(STEPS), False, 0
    while rest and hangs < MOST_HANGS:
        left = len(rest)
        begun, status = follow(rest, rest.remove)
        failed |= status != 0
        if begun:
            rest.remove(begun)
            hung = status == -signal.SIGKILL
            hangs += hung
            what = f"no answer within {SECONDS} s" if hung else f"the process ended, {status}"
            print(f"FAILED {begun}: {what}", flush=True)
            print(f"       rests on: {STEPS[begun][0]}", flush=True)
            if hung:
                print(HANGS, flush=True)
        elif len(rest) == left:
            print(f"FAILED: no step has begun, status {status}", flush=True)
            return 1
    if rest:
        print(f"not begun, after {hangs} that hang: {', '.join(rest)}", flush=True)
    return int(failed)


def main() -> int:
    return run_steps(sys.argv[1:]) if len(sys.argv) > 1 else supervise()


if __name__ == "__main__":
    sys.exit(main())
