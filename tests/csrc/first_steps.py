"""The compiled kernels on a device for the first time, in small steps.

    python tests/csrc/first_steps.py                all steps, easiest first
    python tests/csrc/first_steps.py "im2col 3x3"   these steps, in this process (for a sanitizer)

Every step adds one thing that only a device can settle (a descriptor, an order of corners, a
barrier). The first step that fails names what to look at; the lines below it say which reading of
the manual it rests on, and where its result is wrong. One that hangs is ended after half a minute.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from wfnet.backends import cuda_launch
from wfnet.backends.contract import Epilogue

sys.path.insert(0, str(Path(__file__).parents[1]))
from masked_products import Backward, Forward, sizes

DEVICE = "cpu" if cuda_launch.library().emulated else "cuda"
SECONDS = 30  # for each step
HUNG, MOST_HANGS = 3, 3  # exit status; after so many the rest is not begun
BOUND = 6e-3  # of bf16 results that are rounded once or twice, over a whole tensor

HANGS = f"""\
no answer within {SECONDS} s: a wait without an end. A consumer that waits for data:
       bytes announced (expect_tx) are not the bytes that land, a multicast reaches the wrong block,
       or a load was never made. The producer that waits for a free stage: arrivals are missing, of
       the other block (mapa) or of a warp. Else turns of the consumers (named barriers),
       setmaxnreg, or sync_cluster(). cuda-gdb says where each warp is."""

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
    """A convolution with random operands; what is compared is what its tests compare."""

    def __init__(self, batch, height, width, channels, columns, kernel=(1, 1), **geometry):
        torch.manual_seed(0)
        how = [geometry.get(name, default) for name, default in _GEOMETRY.items()]
        self.sizes = (batch, height, width, channels, columns, kernel, *how)

    def forward(self, **epilogue: bool) -> float:
        plain = {"residual": False, "relu": False, "save": False, **epilogue}
        case = Forward(self.sizes, torch.bfloat16, DEVICE, **plain)
        self.accepted(case, backward=False)
        found, (out, branch) = case.run(cuda_launch.conv2d), case.truth()
        worst = error(found.branch, branch) if case.epilogue.save else 0.0
        return max(worst, error(found.out, out))

    def backward(self) -> float:
        """The product alone."""
        case = Backward(self.sizes, torch.bfloat16, DEVICE, skip=False)
        self.accepted(case, backward=True)
        where = case.weight, case.in_shape, case.geometry
        return error(cuda_launch.conv2d_dgrad(case.ag, *where).grad, case.gradient())

    def chain(self) -> float:
        """Skip, mask, both column sums and scaled gradient of the layer below."""
        case = Backward(self.sizes, torch.bfloat16, DEVICE, mask="kept")
        found, below = case.run(cuda_launch.conv2d_dgrad)
        g = (case.gradient() + case.skip.double()) * (below.mask > 0)
        truth = (g, g * below.scale[:, :, None, None].double(), g.sum((2, 3)))
        sums = error(below.t1, (g * below.branch.double()).sum((2, 3)))
        return max(sums, *map(error, (found.grad, found.scaled_grad, below.t0), truth))

    def repeats(self) -> float:
        """0 if ten runs give the same bits."""
        case = Backward(self.sizes, torch.bfloat16, DEVICE, mask="kept")
        runs = [case.run(cuda_launch.conv2d_dgrad) for _ in range(10)]
        first, *others = ([f.grad, f.scaled_grad, b.t0, b.t1] for f, b in runs)
        same = all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
        return 0.0 if same else float("inf")

    @staticmethod
    def accepted(case: Forward | Backward, backward: bool) -> None:
        """The steps are about these kernels: none may evade them."""
        shapes = case.in_shape, tuple(case.weight.shape)
        reason = cuda_launch.refuse(backward, *shapes, case.geometry)
        if reason:
            raise RuntimeError(f"the kernels refuse this step: {reason}")


def large(samples: int, size: int) -> float:
    """Tensors above 2**31 bytes: the first and the last sample."""
    case = Forward(sizes(samples, size, size, 64, 64, 3), torch.bfloat16, DEVICE, residual=False)
    out = case.run(cuda_launch.conv2d).out
    ends = torch.tensor([0, samples // 2, samples - 1], device=DEVICE)
    tables = (t[ends] for t in (case.epilogue.scale, case.epilogue.shift))
    case.x, case.epilogue = case.x[ends], Epilogue(*tables, relu=True, save=True)
    return error(out[ends], case.truth()[0])


def cold_thread() -> float:
    """A gradient on a thread that has not called into CUDA before, as autograd's may be."""
    case = Backward(sizes(2, 16, 16, 64, 64, 3), torch.bfloat16, DEVICE, skip=False)
    where = case.weight, case.in_shape, case.geometry
    torch.empty(case.in_shape, device=DEVICE).bfloat16()  # a cached block: nothing is allocated
    torch.utils.deterministic.fill_uninitialized_memory = False  # nor launched before ours
    found: list[Tensor] = []
    run = lambda: found.append(cuda_launch.conv2d_dgrad(case.ag, *where).grad)  # noqa: E731
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    torch.utils.deterministic.fill_uninitialized_memory = True
    return error(found[0], case.gradient()) if found else float("inf")


def graph() -> float:
    """Captured, and replayed with other numbers."""
    case = Forward(sizes(4, 16, 16, 64, 128, 3), torch.bfloat16, DEVICE)
    out = case.run(cuda_launch.conv2d).out
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            out = case.run(cuda_launch.conv2d).out
        case.x.copy_(case.randn(case.in_shape))
        captured.replay()
    return error(out, case.truth()[0])


BIG = DEVICE == "cuda"
BATCH, SIZE = (64, 56) if BIG else (2, 9)
_GEOMETRY = {"stride": (1, 1), "pad": (0, 0), "dilation": (1, 1)}
THREE = {"kernel": (3, 3), "pad": (1, 1)}
ALL = {"residual": True, "relu": True, "save": True}


def product(*numbers: int, **geometry: tuple[int, int]) -> Callable[[], float]:
    return lambda: Case(*numbers, **geometry).forward()


def gradient(*numbers: int, **geometry: tuple[int, int]) -> Callable[[], float]:
    return lambda: Case(*numbers, **geometry).backward()


# Name: what it rests on, and the step itself, which returns the largest relative error.
STEPS: dict[str, tuple[str, Callable[[], float]]] = {
    "one slice": (
        "wgmma descriptors (K-major, 128-byte swizzle), multicast of the filter, fragment layout",
        product(1, 16, 16, 64, 64),
    ),
    "many slices": (
        "parities of full and empty over the ring of stages",
        product(1, 16, 16, 712, 64),
    ),
    "128 columns": ("the second half of the filter's stage", product(1, 16, 16, 128, 128)),
    "ragged": ("boxes beyond the tensor are zeros that count", product(3, 10, 9, 72, 136)),
    "im2col 3x3": (
        "corners of the box of filter bases, offsets, the order of rows and images",
        product(3, 9, 9, 64, 64, **THREE),
    ),
    "im2col past the end": (
        "a tile that begins behind the last image, in the second block, is zeros that count",
        product(1, 10, 9, 64, 64, **THREE),
    ),
    "im2col 1x5": (
        "corners are {W, H}, as CUTLASS and Triton pass them; the manual writes {H, W}",
        product(2, 6, 11, 64, 64, kernel=(1, 5), pad=(0, 2)),
    ),
    "im2col stride (1, 2)": (
        "element strides, and which filter base is the last of a row",
        product(2, 8, 13, 64, 64, stride=(1, 2), **THREE),
    ),
    "im2col dilation 2": (
        "offsets are in pixels",
        product(2, 12, 11, 64, 64, kernel=(3, 3), pad=(2, 2), dilation=(2, 2)),
    ),
    "epilogue": (
        "residual, branch and ReLU",
        lambda: Case(3, 9, 9, 64, 64, **THREE).forward(**ALL),
    ),
    "dgrad 64 columns": ("the N-major operand of wgmma (tnspB)", gradient(1, 16, 16, 64, 64)),
    "dgrad 128 columns": ("its leading byte offset", gradient(1, 16, 16, 128, 128)),
    "dgrad 3x3": ("filter bases of a gradient", gradient(3, 9, 9, 64, 128, **THREE)),
    "dgrad 3x3 stride 2": ("phases", gradient(3, 13, 12, 64, 64, stride=(2, 2), **THREE)),
    "dgrad 1x1 stride 2": (
        "phases without taps: tiles without a slice",
        gradient(3, 9, 8, 64, 64, stride=(2, 2)),
    ),
    "chain": (
        "masks, and column sums between the warps of a consumer",
        lambda: Case(3, 9, 9, 64, 64, **THREE).chain(),
    ),
    "cold thread": ("cuTensorMapEncode needs a context on its thread", cold_thread),
    "graph": ("tensor maps are parameters of the launch", graph),
    "persistent 64": (
        "turns of the consumers over many tiles",
        lambda: Case(BATCH, SIZE, SIZE, 64, 64, **THREE).forward(**ALL),
    ),
    "persistent 128": (
        "the same with 128 columns, backward",
        lambda: Case(BATCH, SIZE // 2, SIZE // 2, 128, 128, **THREE).chain(),
    ),
    "repeats": (
        "no race moves a bit",
        lambda: Case(BATCH, SIZE, SIZE, 64, 64, **THREE).repeats(),
    ),
    "above 2**31 bytes": (
        "offsets of 64 bits, strides of tensor maps",
        lambda: large(*((512, 224) if BIG else (2, 9))),
    ),
}


def run_steps(names: list[str]) -> int:
    """Runs steps in this process; ends at an exception (CUDA may be beyond use) and at a hang."""
    # Fresh memory is NaN: a kernel that forgets an element fails.
    torch.use_deterministic_algorithms(True, warn_only=True)
    warnings.simplefilter("ignore")
    status = 0
    for name in names:
        print(f"begins {name}", flush=True)
        evidence.clear()
        start = time.monotonic()
        timer = threading.Timer(SECONDS, os._exit, [HUNG])
        timer.start()
        try:
            found = STEPS[name][1]()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
        except Exception as failure:
            print(f"FAILED {name}: {str(failure).strip().splitlines()[0]}", flush=True)
            return 2
        finally:
            timer.cancel()
        good = found <= BOUND
        verdict = "ok    " if good else "FAILED"
        print(f"{verdict} {name}: error {found:.2e} ({time.monotonic() - start:.1f} s)", flush=True)
        if not good:
            status = 1
            evidence.insert(0, f"rests on: {STEPS[name][0]}")
            print(*(f"       {line}" for line in evidence), sep="\n", flush=True)
    return status


def supervise() -> int:
    """Runs all steps in a second process; one that hangs or ends it costs that step alone."""
    rest, failed, hangs = list(STEPS), False, 0
    while rest and hangs < MOST_HANGS:
        command, begun = [sys.executable, str(Path(__file__).resolve()), *rest], ""
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for line in child.stdout:
            if line.startswith("begins "):
                begun = line.removeprefix("begins ").strip()
                rest.remove(begun)
            else:
                print(line, end="", flush=True)
        status = child.wait()
        failed |= status != 0
        if not begun:
            print(f"FAILED: no step has begun, status {status}", flush=True)
            return 1
        hangs += status == HUNG
        if status not in (0, 1, 2):
            what = HANGS if status == HUNG else f"the process ended, {status}"
            print(f"FAILED {begun}: {what}\n       rests on: {STEPS[begun][0]}", flush=True)
    if rest:
        print(f"not begun, after {hangs} that hang: {', '.join(rest)}", flush=True)
    return int(failed)


def main() -> int:
    return run_steps(sys.argv[1:]) if len(sys.argv) > 1 else supervise()


if __name__ == "__main__":
    sys.exit(main())
