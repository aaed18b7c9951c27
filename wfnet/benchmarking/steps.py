"""Columns of the step benchmark: the same untraining step as several people would write it."""

import contextlib
import copy
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType

import wfnet
from wfnet import backends
from wfnet.backends import autotune
from wfnet.benchmarking import roofline, step_baselines
from wfnet.gate_tables import flatten_filters
from wfnet.services import settings
from wfnet.services.clock import Call, interleaved, reason_of, timed
from wfnet.services.log import logger
from wfnet.services.peak_memory import peak_bytes
from wfnet.services.seeds import generator_for
from wfnet.services.settings import check_settings, setting
from wfnet.untraining.expansion import ExpandedBatch, expand
from wfnet.untraining.objectives import BalancedObjective, full_precision
from wfnet.untraining.optimizers import RowAdam
from wfnet.untraining.step import UntrainingStep

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
_LR = 1e-3
# A column's filter gradients may be off by twice as much as those of `eager` in the same dtype, or
# by this; relative to `eager` in fp32 (whose products may be in TF32 on a device).
_LEAST_ERROR = 2e-3
_TOGETHER = 64  # samples of a pass of `eager` that only checks
# Columns that take more than this part of the device's memory are timed by themselves, before the
# next one is made.
_ALONE = 0.25
# GiB of masked weight copies that `loop`, `grouped` and `vmap` may make; 2 on a CPU.
_MOST_COPIED = {"cuda": 24}


@dataclass(frozen=True)
class StepSettings:
    """What is measured; ``wfnet bench --help`` explains its options with these texts.

    Attributes:
        image_size: of the random images
        classes: rows of the filters
        batch_size: images of a minibatch, even
        label_expansion: rows that each retained image goes through
        share_images: the same n / 2 images serve both halves (default: yes)
        distil: retain by distillation, as the default recipe: a second forward pass, of the
            original network
        tune: seconds in which the columns of auto measure on a CUDA device, for each size of a
            batch
        repeats: timed steps
        seed: of weights, filters, images and labels
        device, dtype, channels_last: of the network; a 16-bit dtype is that of autocast

    Raises:
        ValueError: for values out of range.
    """

    image_size: int = setting(224, settings.image_size, flags="--img-size", metavar="PIXELS")
    classes: int = setting(1000, settings.class_count, flags="--num-classes")
    batch_size: int = setting(32, settings.pair_batch_size, flags="-b --batch-size")
    label_expansion: int = setting(3, settings.positive_int, flags="-M --label-expansion")
    share_images: bool = setting(True, bool)
    distil: bool = setting(False, bool)
    tune: float = setting(autotune.DEFAULT_SECONDS, settings.non_negative_float)
    repeats: int = setting(10, settings.positive_int)
    seed: int = setting(0, settings.seed)
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    channels_last: bool = True

    def __post_init__(self) -> None:
        check_settings(self)
        if self.batch_size % 2:
            raise ValueError(f"-b must be an even number, got {self.batch_size}")


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
        return self.autocast_to(self.settings.dtype)

    def autocast_to(self, dtype: torch.dtype) -> torch.autocast:
        return torch.autocast(self.device.type, dtype, enabled=dtype is not torch.float32)

    @property
    def objective(self) -> BalancedObjective:
        return BalancedObjective(distil=self.settings.distil)


@dataclass
class Step:
    """One column: a call is one step at a learning rate and returns its loss.

    Attributes:
        gradient: returns the filter gradients ``[K, total]`` of the last step; None without masks.
        chosen: returns lines that say who ran what and why, where that was chosen by measuring.
    """

    run: Callable[[float], Tensor]
    gradient: Callable[[], Tensor | None]
    chosen: Callable[[], list[str]] = list

    def __call__(self, lr: float = _LR) -> Tensor:
        return self.run(lr)


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


def original_logits(problem: Problem, model: nn.Module | None) -> Tensor | None:
    """Returns what a plain ``model`` says of the images, ``[n, K]``; None where none is wanted."""
    if model is None:
        return None
    with torch.no_grad():
        return full_precision(model(problem.images))


def original_of(problem: Problem) -> nn.Module | None:
    """Returns the plain network to distil from; None where the objective wants none."""
    if not problem.settings.distil:
        return None
    model = problem.net.bake(None).eval()
    return model.to(memory_format=torch.channels_last) if problem.settings.channels_last else model


def baseline_step(problem: Problem, model: nn.Module, original: nn.Module | None) -> Step:
    """Returns the step of a model of :mod:`wfnet.benchmarking.step_baselines`.

    Args:
        original: the plain network to distil from, or None.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    learned = [p for p in parameters if p.dim() == 2]  # not the offset that starts a gradient
    optimizer = torch.optim.Adam(learned, lr=_LR, betas=(0.9, 0.99)) if learned else None

    def run(lr: float) -> Tensor:
        with problem.autocast():
            target = original_logits(problem, original)
            logits = model(problem.expanded)
        loss = problem.objective(full_precision(logits), problem.batch, target, problem.net).total
        for parameter in parameters:
            parameter.grad = None
        loss.backward()
        if optimizer is not None:
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
        return loss.detach()

    return Step(run, lambda: torch.cat([p.grad for p in learned], 1) if learned else None)


def eager_gradient(problem: Problem, dtype: torch.dtype) -> Tensor:
    """Returns filter gradients ``[K, total]`` of `eager` in ``dtype``, a few samples at a time."""
    batch = problem.batch
    model = step_baselines.baseline(problem.net, "eager", batch.forget)
    layers = [m for m in model.modules() if isinstance(m, step_baselines.Baseline)]
    parts = torch.arange(len(batch), device=problem.device).split(_TOGETHER)

    def logits(part: Tensor) -> Tensor:
        for layer in layers:
            layer.labels = batch.forget[part]
        with problem.autocast_to(dtype):
            return full_precision(model(problem.expanded[part]))

    with torch.no_grad():
        whole = torch.cat([logits(part) for part in parts]).requires_grad_()
        with problem.autocast_to(dtype):
            target = original_logits(problem, original_of(problem))
    loss = problem.objective(whole.requires_grad_(), batch, target, problem.net).total
    (dout,) = torch.autograd.grad(loss, whole)
    for part in parts:
        logits(part).backward(dout[part])
    return torch.cat([p.grad for p in model.parameters() if p.dim() == 2 and p.requires_grad], 1)


def relative_error(found: Tensor, truth: Tensor) -> float:
    return ((found.double() - truth.double()).norm() / truth.double().norm()).item()


def on_backend(problem: Problem, backend: str, fuse: bool | str) -> wfnet.WFNet:
    """Returns a copy of the network that runs on ``backend``, tried with one image.

    Raises:
        ValueError, RuntimeError: with the reason if it cannot, or would run unfused against
            ``fuse``.
    """
    net = copy.deepcopy(problem.net)
    for layer in net.masked_layers.values():
        layer.backend = backend
    net.fuse, net.tune = fuse, problem.settings.tune
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
        problem.objective,
        RowAdam(params, lr=_LR),
        None if dtype is torch.float32 else dtype,
        problem.settings.channels_last,
        capture=how.endswith("captured"),
    )
    rows = problem.batch.forget.unique().cpu() if problem.device.type == "cpu" else None

    def chosen() -> list[str]:
        made = getattr(net._fusion.network, "backend", None)
        return made.report() if isinstance(made, autotune.TunedBackend) else []

    run = lambda lr: step([(problem.images, problem.batch)], lr, rows).total  # noqa: E731
    return Step(run, lambda: step.gradient, chosen)


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
    original = original_of(problem)
    if name != kind:
        mode = "max-autotune" if problem.device.type == "cuda" else None
        model = torch.compile(model, mode=mode)
        original = None if original is None else torch.compile(original, mode=mode)
    return baseline_step(problem, model, original)


# -- measuring -------------------------------------------------------------------------------------

_KERNELS_WRITTEN, _KERNELS_SHOWN, _NAME_LENGTH = 40, 10, 120


class WrongGradient(ValueError):
    """A column computes something else than `eager`."""


def measure(problem: Problem, names: list[str], rates: roofline.Rates) -> dict:
    """Times the columns, interleaved; those that take much memory, one by one.

    Every column's filter gradients are compared with those of `eager` in fp32 first.

    Returns:
        JSON of one network: its expanded samples, the rates of its rooflines, the largest error of
        gradients, and per column the numbers, or under ``impossible`` why there are none: it
        cannot run here, failed, or (``wrong``) computes something else.
    """
    torch._dynamo.reset()  # what earlier networks compiled; not between columns, which stay in use
    truth, limit = eager_gradient(problem, torch.float32), _LEAST_ERROR
    if problem.settings.dtype is not torch.float32:
        mine = eager_gradient(problem, problem.settings.dtype)
        limit = max(limit, 2 * relative_error(mine, truth))
    floors = roofline_of(problem, rates)
    steps: dict[str, Step] = {}
    columns: dict[str, dict] = {}
    with contextlib.ExitStack() as stack:
        for name in names:
            logger.info("preparing %s", name)
            _free_memory(problem.device)
            with _or_impossible(columns, name):
                step = make_step(problem, name, stack)
                columns[name] = _prepared(problem, name, step, truth, limit)
                if _is_large(columns[name]["peak_mebibytes"], problem.device):
                    columns[name]["alone"] = True
                    _time(problem, {name: step}, columns, floors)
                else:
                    steps[name] = step
                del step
        _time(problem, steps, columns, floors)
    return {
        "expanded_samples": len(problem.batch),
        "floor_samples_per_second": floors,
        "largest_gradient_error": limit,
        "columns": columns,
    }


def _free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _is_large(mebibytes: float, device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    return mebibytes * 2**20 > _ALONE * torch.cuda.get_device_properties(device).total_memory


def _prepared(problem: Problem, name: str, step: Step, truth: Tensor, limit: float) -> dict:
    """Runs the first steps of a column, which move no filter; returns what is known then.

    Raises:
        WrongGradient: if its gradients differ from ``truth`` by more than ``limit``.
    """
    before, start = graph_pool_mebibytes(problem.device), time.perf_counter()
    for _ in range(2 if name in step_baselines.COPYING else 5):
        step(0.0)
    seconds, gradient, error = time.perf_counter() - start, step.gradient(), None
    if gradient is not None:
        error = relative_error(gradient, truth)
        if not error <= limit:
            raise WrongGradient(
                f"computes something else: its filter gradients are off by {error:.1e}, more than "
                f"{limit:.1e}"
            )
    pool = graph_pool_mebibytes(problem.device) - before
    return {
        "prepare_seconds": seconds,
        "gradient_error": error,
        "peak_mebibytes": peak_bytes(step, problem.device) / 2**20 + pool,
        "chosen": step.chosen(),
    }


def _time(problem: Problem, steps: dict[str, Step], columns: dict[str, dict], floors: dict) -> None:
    """Times steps in turn, and adds what was measured to their columns."""
    device, repeats = problem.device, problem.settings.repeats
    few = dict.fromkeys(step_baselines.COPYING, max(3, repeats // 5))
    times, failed = interleaved(steps, repeats, lambda step: timed(step, device), at_most=few)
    for name, step in steps.items():
        gc.collect()
        with _or_impossible(columns, name):
            if name in failed:
                raise ValueError(failed[name])
            rate = len(problem.batch) / statistics.median(times[name]) * 1e3
            floor = floors.get("fused_with_v")
            columns[name] |= {
                "median_ms": statistics.median(times[name]),
                "least_ms": min(times[name]),
                "largest_ms": max(times[name]),
                "samples_per_second": rate,
                "share_of_floor": rate / floor if floor else None,
                "milliseconds": times[name],
                **launches_of(kernels_of(step, device)),
            }


@contextlib.contextmanager
def _or_impossible(columns: dict[str, dict], name: str) -> Iterator[None]:
    """Notes of a column that fails inside why it does."""
    try:
        yield
    except Exception as error:  # of compilers, drivers and our own code
        logger.info("%s failed", name, exc_info=True)
        columns[name] = {"impossible": reason_of(error)}
        if isinstance(error, WrongGradient):
            columns[name]["wrong"] = True


def graph_pool_mebibytes(device: torch.device) -> float:
    """Returns the memory that all CUDA graphs of the process keep: a replay allocates nothing."""
    if device.type != "cuda":
        return 0.0
    pools = (
        segment["total_size"]
        for segment in torch.cuda.memory_snapshot()
        if tuple(segment.get("segment_pool_id", (0, 0))) != (0, 0)
    )
    return sum(pools) / 2**20


@dataclass(frozen=True)
class KernelTime:
    """All launches of one kernel within a step; copies and fills of memory are rows too."""

    name: str  # cut after 120 letters
    launches: int
    microseconds: float


def kernels_of(call: Call, device: torch.device) -> list[KernelTime] | None:
    """Returns the kernels that one call starts, those of a graph's replay too, the longest first.

    None on a CPU, or where the profiler sees no kernel.
    """
    if device.type != "cuda":
        return None
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        events = profile.key_averages()
    except (AssertionError, RuntimeError) as error:  # the call itself has run many times
        logger.info("kernels are not counted: %s", error)
        return None
    found = [
        KernelTime(event.key[:_NAME_LENGTH], event.count, event.self_device_time_total)
        for event in events
        # Ranges that the program names are laid over the device's time line as well.
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    return sorted(found, key=lambda kernel: -kernel.microseconds) or None


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
    """Returns expanded samples per second that the roofline allows, or why it is not counted."""
    samples, sources = len(problem.batch), problem.images.shape[0]
    try:
        operations = roofline.operations_of(problem.net, problem.settings.image_size)
    except ValueError as error:
        return {"none": str(error)}
    return {"fused_with_v": samples / roofline.least_seconds(operations, samples, sources, rates)}


def print_table(name: str, result: dict) -> None:
    """Prints the columns of one network, then the longest kernels of each."""
    samples, rows = result["expanded_samples"], result["columns"]
    eager = rows.get("eager", {}).get("median_ms")
    print(f"\n{name}: {samples} expanded samples", flush=True)
    for kind, rate in result["floor_samples_per_second"].items():
        shown = f"{rate:,.0f} samples/s" if isinstance(rate, float) else rate
        print(f"  roofline {kind}: {shown}")
    print(f"  filter gradients are off by at most {result['largest_gradient_error']:.1e}")
    heads = ("ms", "least", "largest", "samples/s", "x eager", "of roof", "MiB", "error")
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
            + ("" if row["gradient_error"] is None else f"{row['gradient_error']:10.1e}")
        )
    for column, row in rows.items():
        for line in row.get("chosen", ()):
            print(f"{column}: {line}")
    for column, row in rows.items():
        if "kernels" in row:
            print(f"\n{column}: {row['kernel_launches']:,} kernels in {row['median_ms']:.3f} ms")
            for one in row["kernels"][:_KERNELS_SHOWN]:
                print(f"{one['microseconds']:12,.1f} us {one['launches']:6,} x {one['name']}")
