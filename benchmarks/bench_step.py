"""One whole untraining step beside its peers: expanded batch in, filters moved.

    python benchmarks/bench_step.py --models resnet18 vit_tiny_patch16_224 --image-size 64 -b 16

A step is forward and backward over the label-expanded batch and one optimiser step. Columns, with
the same weights, filters, images, labels, objective, dtype and layout for all:

    loop               a masked weight copy and a convolution per sample
    grouped            the batch folded into one grouped convolution (transformers: one batched
                       product) with masked copies
    vmap               torch.func.vmap over masked copies
    eager              the ordinary layer, then broadcast multiplies, in PyTorch with autograd
    compile            torch.compile of `eager` (mode max-autotune on a CUDA device)
    unmasked           the same frozen network without masks: forward and gradients down to the
                       first masked layer, no optimiser
    unmasked_compiled  torch.compile of it
    wfnet/BACKEND/unfused, /fused, /captured
                       this package; fused: one plan with the backward chain; captured: the same
                       as a CUDA graph (CUDA devices only)

Everything runs in one process, interleaved; medians with the least and the largest value, peak
memory that a step adds, expanded samples per second, and the share of the floor (floors.py, with
this device's measured matrix product and copy). A column that is impossible says why. Writes JSON
(raw timings, versions, commit, command) and a picture.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import floors
import peers
import torch
from torch import Tensor, nn

import wfnet
from wfnet import backends
from wfnet.expansion import ExpandedBatch, expand, generator_for
from wfnet.objectives import BalancedObjective, full_precision
from wfnet.optimizers import RowAdam
from wfnet.step import UntrainingStep, refuse_capture
from wfnet.tables import flatten_filters

Step = Callable[[], Tensor]  # one step; returns its loss

PEERS = ("loop", "grouped", "vmap", "eager", "compile", "unmasked", "unmasked_compiled")
OURS = tuple(
    f"wfnet/{backend}/{how}"
    for backend in backends.KERNELS
    for how in ("unfused", "fused", "captured")
)
COLUMNS = (*PEERS, *OURS)
_OBJECTIVE = BalancedObjective(distil=False)
_LR = 1e-3


@dataclass
class Problem:
    """A network and a minibatch on the device; ``stack`` holds what must be undone at the end."""

    net: wfnet.WFNet
    images: Tensor  # [n, C, H, W]
    expanded: Tensor  # [B, C, H, W]
    batch: ExpandedBatch
    args: argparse.Namespace
    stack: contextlib.ExitStack

    @property
    def device(self) -> torch.device:
        return self.images.device

    def autocast(self) -> torch.autocast:
        dtype = getattr(torch, self.args.dtype)
        return torch.autocast(self.device.type, dtype, enabled=dtype is not torch.float32)


@dataclass
class Column:
    """What one column of a network came to."""

    impossible: str | None = None
    milliseconds: list[float] = field(default_factory=list)
    peak_mebibytes: float | None = None
    first_loss: float | None = None


# -- the network and its steps ---------------------------------------------------------------------


def make_model(name: str, classes: int, image_size: int) -> nn.Module:
    """A timm model, ``torchvision/NAME``, or ``small/NAME`` of this package."""
    if name.startswith("small/"):
        from wfnet.models import create

        return create(name.removeprefix("small/"), classes, in_channels=3)
    if name.startswith("torchvision/"):
        import torchvision

        return torchvision.models.get_model(name.removeprefix("torchvision/"), num_classes=classes)
    import timm

    try:
        return timm.create_model(name, num_classes=classes, img_size=image_size)
    except TypeError:  # no transformer
        return timm.create_model(name, num_classes=classes)


def make_problem(name: str, args: argparse.Namespace, stack: contextlib.ExitStack) -> Problem:
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    net = wfnet.WFNet(make_model(name, args.classes, args.image_size).eval(), args.classes)
    for parameter in net.filter_parameters():
        nn.init.normal_(parameter, 2.0, 1.0)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    net = net.to(device).to(memory_format=layout)
    n = args.batch_size // 2 if args.share_images else args.batch_size
    generator = generator_for(args.seed, 0)
    labels = torch.randint(args.classes, (n,), generator=generator)
    batch = expand(labels, args.classes, args.label_expansion, generator, args.share_images).to(
        device
    )
    images = torch.randn(n, 3, args.image_size, args.image_size, device=device)
    images = images.contiguous(memory_format=layout)
    expanded = images[batch.source].contiguous(memory_format=layout)
    return Problem(net, images, expanded, batch, args, stack)


def peer_step(problem: Problem, model: nn.Module) -> Step:
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


def our_step(problem: Problem, backend: str, how: str) -> Step:
    """Raises ValueError or RuntimeError with the reason if it is impossible."""
    net = copy.deepcopy(problem.net)
    for layer in net.masked_layers.values():
        layer.backend = backend
    net.fuse = how != "unfused"
    params = net.filter_parameters()
    optimizer = RowAdam(params, lr=_LR)
    if how == "captured":
        reason = refuse_capture(net, optimizer)
        if reason is not None:
            raise ValueError(reason)
    with problem.autocast(), torch.no_grad():
        net(problem.images[:1], 0)  # a backend that refuses says so here
    if net.fuse and net.fused_network(problem.images) is None:
        raise ValueError("the network runs unfused; the log says why")
    problem.stack.enter_context(flatten_filters(params))
    dtype = getattr(torch, problem.args.dtype)
    step = UntrainingStep(
        net,
        _OBJECTIVE,
        optimizer,
        None if dtype is torch.float32 else dtype,
        problem.args.channels_last,
        capture=how == "captured",
    )
    rows = problem.batch.forget.unique().cpu() if problem.device.type == "cpu" else None
    return lambda: step([(problem.images, problem.batch)], _LR, rows).total


def make_step(problem: Problem, name: str) -> Step:
    """The step of one column.

    Raises:
        ValueError, RuntimeError: with the reason if the column is impossible here.
    """
    if name.startswith("wfnet/"):
        _, backend, how = name.split("/")
        return our_step(problem, backend, how)
    kind = {"compile": "eager", "unmasked_compiled": "unmasked"}.get(name, name)
    if kind in peers.COPYING:
        # The copy itself, and its gradient while the layer's backward runs.
        needed = peers.copied_bytes(problem.net, len(problem.batch)) / 2**30
        if needed > problem.args.copy_limit:
            raise ValueError(
                f"one masked weight copy per sample needs {needed:.1f} GiB "
                f"(--copy-limit {problem.args.copy_limit:g})"
            )
    model = peers.peer(problem.net, kind, problem.batch.forget)
    if name != kind:
        torch._dynamo.reset()
        mode = "max-autotune" if problem.device.type == "cuda" else None
        model = torch.compile(model, mode=mode)
    return peer_step(problem, model)


# -- measuring -------------------------------------------------------------------------------------


def timed(step: Step, device: torch.device) -> float:
    """Milliseconds of one step."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    start = time.perf_counter()
    step()
    return (time.perf_counter() - start) * 1e3


def peak_mebibytes(step: Step, device: torch.device) -> float:
    """Largest amount of tensor memory that one step adds to what is allocated before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    changes = [
        (event.start_ns(), event.nbytes())
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    now = peak = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        now += change
        peak = max(peak, now)
    return peak / 2**20


def first_steps(problem: Problem, names: list[str]) -> tuple[dict[str, Step], dict[str, Column]]:
    """Makes every column and runs it a few times: compiles, warms up, checks its first loss."""
    steps, columns = {}, {}
    for name in names:
        columns[name] = column = Column()
        try:
            step = make_step(problem, name)
            column.first_loss = step().item()
            for _ in range(1 if name in peers.COPYING else 4):
                step()
        except (ValueError, RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
            column.impossible = str(error).splitlines()[0]
            continue
        steps[name] = step
    return steps, columns


def check_losses(columns: dict[str, Column], dtype: str) -> None:
    """Raises SystemExit if masked columns do not compute the same thing."""
    losses = {
        name: column.first_loss
        for name, column in columns.items()
        if column.first_loss is not None and not name.startswith("unmasked")
    }
    limit = 1e-3 if dtype == "float32" else 5e-2
    if losses and max(losses.values()) - min(losses.values()) > limit:
        raise SystemExit(f"the columns do not compute the same thing: losses {losses}")


def measure(problem: Problem, names: list[str]) -> dict[str, Column]:
    steps, columns = first_steps(problem, names)
    check_losses(columns, problem.args.dtype)
    repeats = problem.args.repeats
    for repeat in range(repeats):
        for name, step in steps.items():
            few = name in peers.COPYING and repeat >= max(3, repeats // 5)
            if not few:
                columns[name].milliseconds.append(timed(step, problem.device))
    for name, step in steps.items():
        gc.collect()
        columns[name].peak_mebibytes = peak_mebibytes(step, problem.device)
    return columns


def floors_of(problem: Problem, rates: floors.Rates) -> dict[str, float | str]:
    """Expanded samples per second that each floor allows, or why it is not counted."""
    samples, sources = len(problem.batch), problem.images.shape[0]
    try:
        return {
            kind: samples
            / floors.floor_seconds(
                floors.operations_of(problem.net, problem.args.image_size, kind),
                samples, sources, rates,
            )
            for kind in floors.KINDS
        }  # fmt: skip
    except ValueError as error:
        return {"none": str(error)}


# -- results ---------------------------------------------------------------------------------------


def summary(columns: dict[str, Column], samples: int, floor: dict[str, float | str]) -> dict:
    """JSON of one network: per column its numbers, or why there are none."""
    rows: dict[str, dict] = {}
    for name, column in columns.items():
        if column.impossible is not None:
            rows[name] = {"impossible": column.impossible}
            continue
        median = statistics.median(column.milliseconds)
        rate = samples / median * 1e3
        rows[name] = {
            "median_ms": median,
            "least_ms": min(column.milliseconds),
            "largest_ms": max(column.milliseconds),
            "samples_per_second": rate,
            "share_of_floor": rate / floor["fused_with_v"] if "fused_with_v" in floor else None,
            "peak_mebibytes": column.peak_mebibytes,
            "milliseconds": column.milliseconds,
        }
    return {"expanded_samples": samples, "floor_samples_per_second": floor, "columns": rows}


def print_table(name: str, result: dict) -> None:
    samples, rows = result["expanded_samples"], result["columns"]
    eager = rows.get("eager", {}).get("median_ms")
    print(f"\n{name}: {samples} expanded samples")
    for kind, rate in result["floor_samples_per_second"].items():
        shown = f"{rate:,.0f} samples/s" if isinstance(rate, float) else rate
        print(f"  floor {kind}: {shown}")
    print(f"{'column':26}{'ms':>9}{'least':>9}{'largest':>9}{'samples/s':>11}{'x eager':>9}"
          f"{'of floor':>9}{'MiB':>9}")  # fmt: skip
    for column, row in rows.items():
        if "impossible" in row:
            print(f"{column:26}impossible: {row['impossible']}")
            continue
        ratio = f"{eager / row['median_ms']:9.2f}" if eager else " " * 9
        share = row["share_of_floor"]
        share = " " * 9 if share is None else f"{share:9.0%}"
        print(
            f"{column:26}{row['median_ms']:9.1f}{row['least_ms']:9.1f}{row['largest_ms']:9.1f}"
            f"{row['samples_per_second']:11,.0f}{ratio}{share}{row['peak_mebibytes']:9.1f}"
        )


def draw(results: dict[str, dict], title: str, path: Path) -> None:
    """Expanded samples per second of every column, one panel per network."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = {
        name: {c: r for c, r in result["columns"].items() if "impossible" not in r}
        for name, result in results.items()
    }
    tallest = max(len(rows) for rows in shown.values())
    figure, axes = pyplot.subplots(
        1, len(shown), figsize=(2.2 + 3.6 * len(shown), 1.2 + 0.3 * tallest), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, (name, rows) in zip(axes[0], shown.items(), strict=True):
        values = [row["samples_per_second"] for row in rows.values()]
        low = [v - results[name]["expanded_samples"] / r["largest_ms"] * 1e3
               for v, r in zip(values, rows.values(), strict=True)]  # fmt: skip
        high = [results[name]["expanded_samples"] / r["least_ms"] * 1e3 - v
                for v, r in zip(values, rows.values(), strict=True)]  # fmt: skip
        colours = ["tab:orange" if c.startswith("wfnet/") else "tab:gray" for c in rows]
        axis.barh(list(rows), values, xerr=[low, high], color=colours, ecolor="black", height=0.7)
        axis.invert_yaxis()
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("expanded samples per second")
        floor = results[name]["floor_samples_per_second"].get("fused_with_v")
        if floor is not None:
            axis.axvline(floor, color="tab:blue", linestyle="--", label="floor, fused with v")
            axis.legend(fontsize=8, loc="lower right")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        )
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True
        )
    except OSError:
        return "unknown"
    return head.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.partition(':')[2].strip()}, {torch.get_num_threads()} threads"
    return f"{platform.processor()}, {torch.get_num_threads()} threads"


# -- command line ----------------------------------------------------------------------------------


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", "--model", nargs="+", default=["resnet18"],
        help="timm names, torchvision/NAME, small/NAME",
    )  # fmt: skip
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("-b", "--batch-size", type=int, default=32, help="images n of a minibatch")
    parser.add_argument("-M", "--label-expansion", type=int, default=3)
    parser.add_argument(
        "--share-images", action=argparse.BooleanOptionalAction, default=True,
        help="the same n / 2 images serve both halves",
    )  # fmt: skip
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--channels-last", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=list(COLUMNS))
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--copy-limit", type=float, metavar="GIB",
                        help="masked weight copies that loop, grouped and vmap may make "
                        "(default: 2 on a CPU, 24 on a device)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file; the picture lies beside it")
    args = parser.parse_args(argv)
    if args.batch_size < 2 or args.batch_size % 2:
        parser.error(f"-b must be an even number of at least 2, got {args.batch_size}")
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {args.repeats}")
    if args.copy_limit is None:
        args.copy_limit = 24 if args.device.startswith("cuda") else 2
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    rates = floors.measure_rates(device, getattr(torch, args.dtype))
    print(f"{device_name(device)}: {rates.flops / 1e9:,.0f} GFLOP/s ({args.dtype} product), "
          f"{rates.bandwidth / 1e9:,.1f} GB/s (copy)")  # fmt: skip
    results = {}
    for name in args.models:
        with contextlib.ExitStack() as stack:
            problem = make_problem(name, args, stack)
            columns = measure(problem, args.columns)
            results[name] = summary(columns, len(problem.batch), floors_of(problem, rates))
        print_table(name, results[name])
    record = {
        "benchmark": "step",
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "device": device_name(device),
        "rates": {"flops_per_second": rates.flops, "bytes_per_second": rates.bandwidth},
        "torch": torch.__version__,
        "wfnet": wfnet.__version__,
        "commit": commit(),
        "command": " ".join(["python", "benchmarks/bench_step.py", *(argv or sys.argv[1:])]),
        "networks": results,
    }
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(record, indent=1) + "\n")
        size = f"{args.image_size} px, {args.dtype}, {record['device']}"
        draw(results, size, args.output.with_suffix(".png"))
    return record


if __name__ == "__main__":
    main()
