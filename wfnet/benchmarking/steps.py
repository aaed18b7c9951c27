"""Columns of the step benchmark: the same untraining step as several people would write it."""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

import wfnet
from wfnet import backends
from wfnet.benchmarking import roofline, step_baselines
from wfnet.benchmarking.timing import (
    KernelTime,
    graph_pool_mebibytes,
    kernels_of,
    peak_mebibytes,
)
from wfnet.gate_tables import flatten_filters
from wfnet.services.clock import interleaved, reason_of, timed
from wfnet.services.seeds import generator_for
from wfnet.untraining.expansion import ExpandedBatch, expand
from wfnet.untraining.objectives import BalancedObjective, full_precision
from wfnet.untraining.optimizers import RowAdam
from wfnet.untraining.step import UntrainingStep

logger = logging.getLogger("wfnet")

Step = Callable[[], Tensor]  # one step; returns its loss

BASELINES = ("loop", "grouped", "vmap", "eager", "compile", "unmasked", "unmasked_compiled")
_FUSE = {
    "unfused": False,
    "fused": True,
    "captured": True,
    "compiled": "compile",
    "compiled_captured": "compile",
}
OURS = tuple(
    f"wfnet/{backend}/{how}"
    for backend in backends.KERNELS
    for how in _FUSE
    if backend == "eager" or _FUSE[how] != "compile"  # kernels leave nothing to compile
)
# What a user gets who asks for no backend: one of the above.
AUTO = tuple(f"wfnet/auto/{how}" for how, fuse in _FUSE.items() if fuse != "compile")
COLUMNS = (*BASELINES, *OURS, *AUTO)
_OBJECTIVE = BalancedObjective(distil=False)
_LR = 1e-3
# GiB of masked weight copies that `loop`, `grouped` and `vmap` may make; 2 on a CPU.
_MOST_COPIED = {"cuda": 24}


@dataclass(frozen=True)
class StepSettings:
    """What is measured: random images of a size, n of them in a minibatch, M rows of each.

    A 16-bit dtype is that of autocast; ``seed`` is that of weights, filters, images and labels.

    Raises:
        ValueError: for an odd batch or no repeats.
    """

    image_size: int = 32
    batch_size: int = 32
    label_expansion: int = 3
    classes: int = 10
    share_images: bool = True
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    channels_last: bool = True
    repeats: int = 15
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 2 or self.batch_size % 2:
            raise ValueError(f"-b must be an even number of at least 2, got {self.batch_size}")
        if self.repeats < 1:
            raise ValueError(f"--repeats must be at least 1, got {self.repeats}")


@dataclass
class Problem:
    """A network and a minibatch on the device."""

    net: wfnet.WFNet
    images: Tensor  # [n, C, H, W]
    expanded: Tensor  # [B, C, H, W]
    batch: ExpandedBatch
    settings: StepSettings

    @property
    def device(self) -> torch.device:
        return self.images.device

    def autocast(self) -> torch.autocast:
        dtype = self.settings.dtype
        return torch.autocast(self.device.type, dtype, enabled=dtype is not torch.float32)


# -- the network and its steps ---------------------------------------------------------------------


def make_problem(model: nn.Module, settings: StepSettings) -> Problem:
    """Random filters on ``model``, random images (of three channels) and labels.

    Args:
        model: a classifier of ``settings.classes`` classes.
    """
    torch.manual_seed(settings.seed)
    device = torch.device(settings.device)
    net = wfnet.WFNet(model.eval(), settings.classes)
    for parameter in net.filter_parameters():
        nn.init.normal_(parameter, 2.0, 1.0)
    layout = torch.channels_last if settings.channels_last else torch.contiguous_format
    net = net.to(device).to(memory_format=layout)
    n = settings.batch_size // 2 if settings.share_images else settings.batch_size
    generator = generator_for(settings.seed, 0)
    labels = torch.randint(settings.classes, (n,), generator=generator)
    batch = expand(
        labels, settings.classes, settings.label_expansion, generator, settings.share_images
    ).to(device)
    images = torch.randn(n, 3, settings.image_size, settings.image_size, device=device)
    images = images.contiguous(memory_format=layout)
    expanded = images[batch.source].contiguous(memory_format=layout)
    return Problem(net, images, expanded, batch, settings)


def baseline_step(problem: Problem, model: nn.Module) -> Step:
    """Returns the step of a model of :mod:`wfnet.benchmarking.step_baselines`."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    learned = [p for p in parameters if p.dim() == 2]  # not the offset that starts a gradient
    optimizer = torch.optim.Adam(learned, lr=_LR, betas=(0.9, 0.99)) if learned else None

    def run() -> Tensor:
        with problem.autocast():
            logits = model(problem.expanded)
        loss = _OBJECTIVE(full_precision(logits), problem.batch, None, problem.net).total
        for parameter in parameters:
            parameter.grad = None
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        return loss.detach()

    return run


def on_backend(problem: Problem, backend: str, fuse: bool | str) -> wfnet.WFNet:
    """Returns a copy of the network that runs on ``backend``, tried with one image.

    Raises:
        ValueError, RuntimeError: with the reason if it cannot, or would run unfused against
            ``fuse``.
    """
    net = copy.deepcopy(problem.net)
    for layer in net.masked_layers.values():
        layer.backend = backend
    net.fuse = fuse
    with problem.autocast(), torch.no_grad():
        net(problem.images[:1], 0)  # a backend that refuses says so here
        if net.fuse and net.fused_network(problem.images) is None:
            raise ValueError("the network runs unfused; the log says why")
    return net


def our_step(problem: Problem, backend: str, how: str, stack: contextlib.ExitStack) -> Step:
    """Returns the step of a column of this package, to be run until ``stack`` is left.

    Raises:
        ValueError, RuntimeError: with the reason if it is impossible.
    """
    net = on_backend(problem, backend, _FUSE[how])
    params = net.filter_parameters()
    stack.enter_context(flatten_filters(params))
    dtype = problem.settings.dtype
    step = UntrainingStep(
        net,
        _OBJECTIVE,
        RowAdam(params, lr=_LR),
        None if dtype is torch.float32 else dtype,
        problem.settings.channels_last,
        capture=how.endswith("captured"),
    )
    rows = problem.batch.forget.unique().cpu() if problem.device.type == "cpu" else None
    return lambda: step([(problem.images, problem.batch)], _LR, rows).total


def make_step(problem: Problem, name: str, stack: contextlib.ExitStack) -> Step:
    """Returns the step of one column, to be run until ``stack`` is left.

    Raises:
        ValueError, RuntimeError: with the reason if the column is impossible here.
    """
    if name.startswith("wfnet/"):
        _, backend, how = name.split("/")
        return our_step(problem, backend, how, stack)
    kind = {"compile": "eager", "unmasked_compiled": "unmasked"}.get(name, name)
    if kind in step_baselines.COPYING:
        # The copy itself, and its gradient while the layer's backward runs.
        needed = step_baselines.copied_bytes(problem.net, len(problem.batch)) / 2**30
        most = _MOST_COPIED.get(problem.device.type, 2)
        if needed > most:
            raise ValueError(
                f"one masked weight copy per sample needs {needed:.1f} GiB, more than {most}"
            )
    model = step_baselines.baseline(problem.net, kind, problem.batch.forget)
    if name != kind:
        mode = "max-autotune" if problem.device.type == "cuda" else None
        model = torch.compile(model, mode=mode)
    return baseline_step(problem, model)


# -- measuring -------------------------------------------------------------------------------------

_KERNELS_WRITTEN, _KERNELS_SHOWN = 40, 10


def measure(problem: Problem, names: list[str], rates: roofline.Rates) -> dict:
    """Times the columns, interleaved.

    Returns:
        JSON of one network: its expanded samples, the rates of its rooflines, and per column the
        numbers, or under ``impossible`` why there are none: it cannot run here, failed, or
        (``wrong``) computes something else than the others.
    """
    with contextlib.ExitStack() as stack:
        return _measure(problem, names, rates, stack)


def _measure(
    problem: Problem, names: list[str], rates: roofline.Rates, stack: contextlib.ExitStack
) -> dict:
    steps: dict[str, Step] = {}
    columns: dict[str, dict] = {}
    losses: dict[str, float] = {}
    torch._dynamo.reset()  # what earlier networks compiled; not between columns, which stay in use
    for name in names:
        logger.info("preparing %s", name)
        before, start = graph_pool_mebibytes(problem.device), time.perf_counter()
        with _or_impossible(columns, name):
            step = make_step(problem, name, stack)
            losses[name] = step().item()
            for _ in range(1 if name in step_baselines.COPYING else 4):
                step()
            steps[name] = step
            columns[name] = {
                "prepare_seconds": time.perf_counter() - start,
                "pool_mebibytes": graph_pool_mebibytes(problem.device) - before,
            }
    for name, reason in wrong_losses(losses, problem.settings.dtype).items():
        columns[name] = {"impossible": reason, "wrong": True}
        steps.pop(name, None)
    repeats = problem.settings.repeats
    few = dict.fromkeys(step_baselines.COPYING, max(3, repeats // 5))
    milliseconds, failed = interleaved(
        steps, repeats, lambda step: timed(step, problem.device), at_most=few
    )
    floors = roofline_of(problem, rates)
    for name, step in steps.items():
        gc.collect()
        with _or_impossible(columns, name):
            if name in failed:
                raise ValueError(failed[name])
            rate = len(problem.batch) / statistics.median(milliseconds[name]) * 1e3
            floor = floors.get("fused_with_v")
            peak = peak_mebibytes(step, problem.device)
            columns[name] |= {
                "median_ms": statistics.median(milliseconds[name]),
                "least_ms": min(milliseconds[name]),
                "largest_ms": max(milliseconds[name]),
                "samples_per_second": rate,
                "share_of_floor": rate / floor if floor else None,
                "peak_mebibytes": peak + columns[name]["pool_mebibytes"],
                "milliseconds": milliseconds[name],
                **launches_of(kernels_of(step, problem.device)),
            }
    return {
        "expanded_samples": len(problem.batch),
        "floor_samples_per_second": floors,
        "columns": columns,
    }


@contextlib.contextmanager
def _or_impossible(columns: dict[str, dict], name: str) -> Iterator[None]:
    """Notes of a column that fails inside why it does."""
    try:
        yield
    except Exception as error:  # of compilers, drivers and our own code
        logger.info("%s failed", name, exc_info=True)
        columns[name] = {"impossible": reason_of(error)}


def wrong_losses(losses: dict[str, float], dtype: torch.dtype) -> dict[str, str]:
    """Returns the masked columns that compute something else than most do, and what they do."""
    masked = {name: loss for name, loss in losses.items() if not name.startswith("unmasked")}
    limit = 1e-3 if dtype is torch.float32 else 5e-2
    expected = masked.get("eager", statistics.median_low(masked.values()) if masked else 0.0)
    return {
        name: f"computes something else: its loss is {loss:.4f}, expected {expected:.4f}"
        for name, loss in masked.items()
        if not abs(loss - expected) <= limit
    }


def launches_of(kernels: list[KernelTime] | None) -> dict[str, object]:
    """Returns JSON of the kernels of a step; copies and fills of memory are no launches."""
    if kernels is None:
        return {"kernel_launches": None}
    started = [kernel for kernel in kernels if not kernel.name.startswith(("Memcpy", "Memset"))]
    return {
        "kernel_launches": sum(kernel.launches for kernel in started),
        "kernels": [asdict(kernel) for kernel in kernels[:_KERNELS_WRITTEN]],
    }


def roofline_of(problem: Problem, rates: roofline.Rates) -> dict[str, float | str]:
    """Returns expanded samples per second that each roofline allows, or why it is not counted."""
    samples, sources = len(problem.batch), problem.images.shape[0]
    try:
        counted = {
            kind: roofline.operations_of(problem.net, problem.settings.image_size, kind)
            for kind in roofline.KINDS
        }
    except ValueError as error:
        return {"none": str(error)}
    return {
        kind: samples / roofline.least_seconds(operations, samples, sources, rates)
        for kind, operations in counted.items()
    }


def print_table(name: str, result: dict) -> None:
    """Prints the columns of one network, then the longest kernels of each."""
    samples, rows = result["expanded_samples"], result["columns"]
    eager = rows.get("eager", {}).get("median_ms")
    print(f"\n{name}: {samples} expanded samples", flush=True)
    for kind, rate in result["floor_samples_per_second"].items():
        shown = f"{rate:,.0f} samples/s" if isinstance(rate, float) else rate
        print(f"  roofline {kind}: {shown}")
    heads = ("ms", "least", "largest", "samples/s", "x eager", "of roof", "MiB")
    print(f"{'column':26}" + "".join(f"{head:>10}" for head in heads))
    for column, row in rows.items():
        if "impossible" in row:
            print(f"{column:26}impossible: {row['impossible']}")
            continue
        ratio = f"{eager / row['median_ms']:.2f}" if eager else ""
        share = "" if row["share_of_floor"] is None else f"{row['share_of_floor']:.0%}"
        print(
            f"{column:26}{row['median_ms']:10.1f}{row['least_ms']:10.1f}{row['largest_ms']:10.1f}"
            f"{row['samples_per_second']:10,.0f}{ratio:>10}{share:>10}{row['peak_mebibytes']:10.1f}"
        )
    for column, row in rows.items():
        if "kernels" in row:
            print(f"\n{column}: {row['kernel_launches']:,} kernels in {row['median_ms']:.3f} ms")
            for one in row["kernels"][:_KERNELS_SHOWN]:
                print(f"{one['microseconds']:12,.1f} us {one['launches']:6,} x {one['name']}")
