"""Whole untraining runs from JPEG files, by the commands that a user gives.

    python benchmarks/whole_run.py --classes 100 --networks resnet18 resnet50     with quality
    python benchmarks/whole_run.py --classes 1000 --networks resnet50             wall time alone
    python benchmarks/whole_run.py --classes 10 --networks small/resnet --image-size 32 \\
        --per-class 40 --device cpu                                               a rehearsal

Up to 100 classes are rendered characters, which `wfnet train` learns first, and `wfnet evaluate`
judges afterwards. More classes are images that show nothing, on a network of random weights whose
BatchNorms know these images; every minibatch has images that were never read before.

    images      JPEG files of --file-size, written by all cores (benchmarks/image_folders.py)
    untrain     the whole process, from the start of Python to its end, and where the time went:
                  program     Python, network, list of images, a look at the original network's
                              answers before, curves after
                  start       of the run, until everything is compiled and captured
                  data        images that the device had to wait for
                  steps       the rest: the steps themselves
                  validation, checkpoints
    loop        one masked weight copy and one convolution per sample, as the authors' code does, on
                a few minibatches in memory: how far it would get in the time of the whole process.
                That is extrapolated, and says so.

Writes JSON after everything that has ended, and a picture beside it. Images and runs go into
--scratch, never beside the results; images stay there for the next call. They were just written, so
what is measured is decoding them, not a disk.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import image_folders
import torch
from image_folders import ImageFolder
from torch import nn

import wfnet
from wfnet import UntrainConfig, backends
from wfnet.benchmarking import peers
from wfnet.benchmarking.steps import StepSettings, make_problem, make_step
from wfnet.benchmarking.timing import about, timed
from wfnet.cli.classifier import create_classifier
from wfnet.cli.train import BASE_NAME
from wfnet.data import open_data
from wfnet.data.glyphs import HUNDRED
from wfnet.services.files import write_json, write_tensors

SAMPLES = 1_400_000  # expanded ones that 1,000 classes cost, by what a class costs of 10 and 100
PURPOSES = ("program", "start", "data", "steps", "validation", "checkpoints")
COLOURS = ("#9aa0a6", "#c5b3e6", "#e8710a", "#1a73e8", "#34a853", "#fbbc04")
# wfnet/BACKEND/HOW: what `wfnet untrain` is told.
HOWS = {"captured": (), "compiled_captured": ("--torchcompile",)}
_RENEWED = 5.0  # seconds


class Failed(RuntimeError):
    """A command that ended with an error; its own messages are above."""


def say(text: str) -> None:
    print(f"[{time.perf_counter() - _BEGUN:6.1f} s] {text}", flush=True)


_BEGUN = time.perf_counter()


class Report:
    """The JSON file: renewed as the runs go on, so that one that is killed keeps what it has."""

    def __init__(self, args: argparse.Namespace, wanted: ImageFolder, config: UntrainConfig):
        self.output, self.scratch = args.output, args.scratch
        self.content: dict[str, Any] = {
            "benchmark": "whole_run",
            **about(args.device, ["benchmarks/whole_run.py", *self.shown(args.words)]),
            "units": "seconds of wall time; accuracies in %",
            "settings": {
                "classes": args.classes, "image_size": args.image_size, "workers": args.workers,
                "cpus": os.cpu_count(), "batch_size": config.batch_size,
                "label_expansion": config.label_expansion, "steps": config.steps,
                "column": args.column, "amp": args.amp,
            },
            "files": asdict(wanted),
            "runs": [],
        }  # fmt: skip

    def shown(self, words: list[str]) -> list[str]:
        """A command without the folders of this machine."""
        places = {str(self.scratch): "SCRATCH", str(self.output): Path(self.output or "").name}
        for place, name in places.items():
            words = [str(word).replace(place, name) for word in words]
        return words

    def write(self) -> None:
        if self.output is not None:
            write_json(self.output, self.content)


# -- commands --------------------------------------------------------------------------------------


def command(report: Report, record: dict[str, Any], name: str, words: list[Any]) -> float:
    """Runs a command of wfnet; its seconds, from the start of Python to the end of the process.

    Raises:
        Failed: if it ends with an error.
    """
    words = [str(word) for word in words]
    say(f"wfnet {shlex.join(words)}")
    entry = {"command": shlex.join(["wfnet", *report.shown(words)]), "status": "running"}
    record.setdefault("commands", {})[name] = entry
    started = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", "wfnet", *words], stdin=subprocess.DEVNULL)
    try:
        while True:
            entry["seconds"] = round(time.perf_counter() - started, 2)
            report.write()
            try:
                code = child.wait(_RENEWED)
                break
            except subprocess.TimeoutExpired:
                continue
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
    entry["seconds"] = seconds = time.perf_counter() - started
    entry["status"] = "passed" if code == 0 else f"failed with status {code}"
    report.write()
    if code:
        raise Failed(f"wfnet {words[0]} ended with status {code}")
    return seconds


def computing(args: argparse.Namespace) -> list[str]:
    """Options of every command."""
    found = ["--device", args.device, "-j", str(args.workers), *(["--amp"] if args.amp else [])]
    if args.threads:
        found += ["--threads", str(args.threads)]
    return found


def reading(args: argparse.Namespace, images: Path) -> list[str]:
    """Options that say how images become the network's input."""
    found = ["--data-dir", str(images), "--img-size", str(args.image_size)]
    if args.file_size == [args.image_size, args.image_size]:
        found += ["--crop-pct", "1"]  # stored as they are needed
    return found


def cache_of(args: argparse.Namespace) -> list[str]:
    """Characters are read again and again, the others once."""
    if args.classes > len(HUNDRED):
        return []
    return ["--cache", "device" if args.device.startswith("cuda") else "host"]


def train(args: argparse.Namespace, report: Report, record: dict, images: Path, to: Path) -> None:
    record["base_seconds"] = command(report, record, "train", [
        "train", "--model", args.network, *reading(args, images), *cache_of(args), "--epochs",
        args.epochs, "-b", args.base_batch_size, "--lr", args.base_lr, "--output", to, "--force",
        *computing(args),
    ])  # fmt: skip
    trained = json.loads((to / "config.json").read_text())["result"]
    record["base_accuracy"] = {part: 100 * share for part, share in trained["accuracy"].items()}


@torch.no_grad()
def random_base(args: argparse.Namespace, images: Path, to: Path) -> None:
    """Writes a network of random weights whose BatchNorms have the statistics of these images.

    Without them activations would grow from block to block; and branches that start at 0, as
    ResNets' do, would be no work for a backward pass.
    """
    model = create_classifier(args.network, args.classes, in_channels=3, image_size=args.image_size)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = None  # the mean over all batches
        norm.reset_running_stats()
        if not norm.weight.any():
            nn.init.ones_(norm.weight)
    data = open_data(images, image_size=args.image_size, crop_pct=1.0)
    model.train()
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
    for batch in wfnet.data.batches(data.train, order[: 4 * 16].split(16)):
        model(batch.images)
    to.mkdir(parents=True, exist_ok=True)
    write_tensors(to / BASE_NAME, model.state_dict(), {"format": "pt"})


def untrain(
    args: argparse.Namespace, report: Report, record: dict, images: Path, base: Path, to: Path
) -> None:
    """`wfnet untrain`, and where its time went."""
    _, backend, how = args.column.split("/")
    words = [
        "untrain", "--model", args.network, "--checkpoint", base / BASE_NAME,
        *reading(args, images), *cache_of(args), "--steps", args.config.steps, "-b",
        args.config.batch_size, "-M", args.config.label_expansion, "--backend", backend,
        *HOWS[how], "--log-interval", 5, "--output", to, "--force", *computing(args),
    ]  # fmt: skip
    if args.classes > len(HUNDRED):  # two validations; characters have the recipe's
        words += ["--validations-per-epoch", 2, "--patience", 100]
    whole = command(report, record, "untrain", words)
    result = json.loads((to / "config.json").read_text())["result"]
    history = json.loads((to / "history.json").read_text())["history"]
    spent = {"program": max(0.0, whole - result["seconds"]), **result["spent"]}
    record["untraining"] = {
        "seconds": whole,
        "spent": {name: spent[name] for name in PURPOSES},
        "steps": result["steps"],
        "stopped_early": result["stopped_early"],
        "samples": result["samples"],
        "samples_per_second": result["samples"] / whole,
        "samples_per_second_of_steps": result["samples"] / max(spent["steps"], 1e-9),
        "images_per_second": history[-1]["images_per_second"],
        "data_wait": [round(one["data_wait"], 4) for one in history],
    }


def judge(args: argparse.Namespace, report: Report, record: dict, images: Path, run: Path) -> None:
    """Accuracies of the original network and after untraining, on images of the test part."""
    rows = min(args.retained_rows, args.classes - 1)
    record["evaluation_seconds"] = command(report, record, "evaluate", [
        "evaluate", run, *reading(args, images), "--no-figures", "--retained-rows", rows, "-b", 512,
        *computing(args),
    ])  # fmt: skip
    found = json.loads((run / "evaluation.json").read_text())
    record["quality"] = {
        "original_acc_r": 100 * found["original"]["acc_r"],
        "original_acc_f": 100 * found["original"]["acc_f"],
        "acc_r": 100 * found["mean"]["acc_r"],
        "acc_f": 100 * found["mean"]["acc_f"],
        "acc_f_worst_class": 100 * max(one["acc_f"] for one in found["classes"]),
        "retained_rows": rows,
        "test_images": args.classes * args.test_per_class,
    }


def loop(args: argparse.Namespace, record: dict) -> dict[str, Any]:
    """The same network with a masked weight copy and a convolution per sample.

    On fewer samples at once where so many copies do not fit. Images are in memory, and the
    objective does not ask the original network: both favour it.

    Raises:
        ValueError, RuntimeError: if it cannot run here.
    """
    config = args.config
    model = create_classifier(args.network, args.classes, in_channels=3, image_size=args.image_size)
    settings = StepSettings(
        image_size=args.image_size, batch_size=config.batch_size, classes=args.classes,
        label_expansion=config.label_expansion, device=args.device,
        dtype=torch.bfloat16 if args.amp else torch.float32, repeats=args.loop_steps,
    )  # fmt: skip
    of_one = peers.copied_bytes(wfnet.WFNet(copy.deepcopy(model), args.classes), 1)
    most = int(settings.most_copied * 2**30 / of_one) // (1 + config.label_expansion)
    if most < 1:
        raise ValueError(
            f"the copies of one image's samples need more than {settings.most_copied:g} GiB"
        )
    images = min(config.batch_size // 2, most)
    settings = replace(settings, batch_size=2 * images)
    with ExitStack() as stack:
        problem = make_problem(model, settings, stack)
        step = make_step(problem, "loop")
        step()
        milliseconds = [timed(step, problem.device) for _ in range(args.loop_steps)]
    samples = images * (1 + config.label_expansion)
    rate = samples / statistics.median(milliseconds) * 1e3
    ours = record["untraining"]
    return {
        "measured_steps": args.loop_steps,
        "samples_of_a_step": samples,
        "milliseconds": milliseconds,
        "samples_per_second": rate,
        "extrapolated": {
            "samples_in_the_same_time": rate * ours["seconds"],
            "share_of_the_run": rate * ours["seconds"] / ours["samples"],
            "hours_for_the_run": ours["samples"] / rate / 3600,
        },
    }


# -- runs ------------------------------------------------------------------------------------------


def one_run(args: argparse.Namespace, report: Report, images: Path, network: str) -> None:
    """Base, untraining, evaluation and loop of one network.

    Raises:
        Failed: if a command ends with an error; what came before is in the report.
    """
    args.network = network
    record: dict[str, Any] = {"network": network, "status": "running"}
    report.content["runs"].append(record)
    folder = args.scratch / f"{network.replace('/', '-')}-{args.classes}"
    shutil.rmtree(folder, ignore_errors=True)
    base, run = folder / "base", folder / "run"
    try:
        if args.classes <= len(HUNDRED):
            train(args, report, record, images, base)
        else:
            random_base(args, images, base)
        untrain(args, report, record, images, base, run)
        told(record)
        if args.classes <= len(HUNDRED):
            judge(args, report, record, images, run)
        if args.loop_steps:
            say(f"loop: {args.loop_steps} steps")
            try:
                record["loop"] = loop(args, record)
            except (RuntimeError, ValueError) as error:  # out of memory is one
                record["loop"] = {"impossible": str(error).strip().splitlines()[0]}
        record["status"] = "passed"
    except Failed as error:
        record["status"] = str(error)
        raise
    finally:
        report.write()
        shutil.rmtree(folder, ignore_errors=True)
    told(record)


def told(record: dict[str, Any]) -> None:
    """A run in a few lines."""
    ours = record["untraining"]
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in ours["spent"].items())
    say(f"{record['network']}: {ours['samples']:,} expanded samples in {ours['seconds']:.1f} s "
        f"({parts}), {ours['samples_per_second']:,.0f} samples/s in all, "
        f"{ours['samples_per_second_of_steps']:,.0f} while steps ran")  # fmt: skip
    if "quality" in record:
        found = record["quality"]
        say(f"Acc_r {found['original_acc_r']:.2f} before, {found['acc_r']:.2f} after; Acc_f "
            f"{found['original_acc_f']:.2f} before, {found['acc_f']:.2f} after")  # fmt: skip
    if "loop" in record:
        say(f"loop: {loop_text(record['loop'])}")


def loop_text(found: dict[str, Any]) -> str:
    if "impossible" in found:
        return f"impossible ({found['impossible']})"
    further = found["extrapolated"]
    return (
        f"{found['samples_per_second']:,.0f} samples/s: {further['share_of_the_run']:.2%} of the "
        f"run in the same time (extrapolated; measured steps: {found['measured_steps']})"
    )


def draw(content: dict[str, Any], path: Path) -> None:
    """Where the time of every run went, and how far the loop would have got."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = [run for run in content["runs"] if "untraining" in run]
    figure, axes = plt.subplots(figsize=(9, 1.4 + 0.9 * len(runs)), layout="constrained")
    longest = max(run["untraining"]["seconds"] for run in runs)
    for place, run in enumerate(runs):
        ours, left = run["untraining"], 0.0
        for name, colour in zip(PURPOSES, COLOURS, strict=True):
            seconds = ours["spent"][name]
            axes.barh(place, seconds, 0.5, left, color=colour, label=name if place == 0 else None)
            if seconds > 0.06 * longest:
                axes.text(left + seconds / 2, place, f"{seconds:.0f}", ha="center", va="center",
                          color="white", fontsize=9)  # fmt: skip
            left += seconds
        text = f"{ours['samples']:,} samples, {ours['samples_per_second']:,.0f} a second"
        if "quality" in run:
            found = run["quality"]
            text += (
                f"; Acc_r {found['original_acc_r']:.1f} to {found['acc_r']:.1f}, "
                f"Acc_f {found['original_acc_f']:.1f} to {found['acc_f']:.1f}"
            )
        if "loop" in run:
            text += f"\nloop: {loop_text(run['loop'])}"
        axes.text(0, place + 0.3, text, ha="left", va="top", fontsize=8, color="#3c4043")
    axes.set_yticks(range(len(runs)), [run["network"] for run in runs])
    axes.set_ylim(len(runs) - 0.2, -0.5)
    axes.set_xlim(0, 1.02 * longest)
    axes.set_xlabel("seconds, from the start of the command to its end")
    settings = content["settings"]
    axes.set_title(
        f"All {settings['classes']:,} classes untrained, from JPEG files, {settings['image_size']} "
        f"px, {content['device']}",
        fontsize=10, loc="left",
    )  # fmt: skip
    figure.legend(ncols=len(PURPOSES), fontsize=8, frameon=False, loc="outside lower center")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


# -- the command line ------------------------------------------------------------------------------


def fitting_workers(wanted: int, batch_size: int, image_size: int) -> int:
    """As many data workers as the shared memory holds batches of: each has two on the way."""
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        return wanted
    batch = batch_size * 3 * image_size**2
    fitting = min(wanted, int(0.8 * free / (2 * batch)))
    if fitting < wanted:
        say(f"{fitting} of {wanted} workers: /dev/shm has {free / 2**20:.0f} MiB")
    return fitting


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--classes", type=int, default=100, help="above 100: images that show nothing")
    add("--networks", nargs="+", default=["resnet18", "resnet50"], metavar="NAME")
    add("--samples", type=int, help="expanded samples (default: the recipe's for up to 100 "
        f"classes, else {SAMPLES:,})")  # fmt: skip
    add("--per-class", type=int, default=200, help="images of a character, 20%% to test on, and "
        "8%% to validate on; other images are as many as the run reads")  # fmt: skip
    add("--image-size", type=int, default=224, help="of the network's input")
    add("--file-size", type=int, nargs=2, metavar=("WIDTH", "HEIGHT"),
        help="of the files (default: as the network's input); ImageNet's are 500 375 on average"
        )  # fmt: skip
    add("--noise", type=float, default=0.15, help="on characters")
    add("-b", "--batch-size", type=int, help="images of a minibatch (default: the recipe's)")
    add("-M", "--label-expansion", type=int, help="rows of a retained image (the recipe's)")
    add("--columns", nargs="+", default=["wfnet/auto/captured"], metavar="wfnet/BACKEND/HOW",
        help="ways to run, the best first: the first one is taken; HOW is captured or "
        "compiled_captured, where the device can capture")  # fmt: skip
    add("--epochs", type=int, default=6, help="of the classifier that knows the characters")
    add("--base-batch-size", type=int, default=128)
    add("--base-lr", type=float, default=2e-3)
    add("--retained-rows", type=int, default=10, help="of each image that is evaluated")
    add("--loop-steps", type=int, default=3, help="of the peer; 0: without it")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--amp", action=argparse.BooleanOptionalAction, help="bfloat16 (default: on a GPU)")
    add("--threads", type=int, help="of the CPU, for each command")
    add("--workers", type=int, help="that read images (default: all cores but one)")
    add("--scratch", type=Path, default=Path(tempfile.gettempdir(), "wfnet-whole-run"),
        help="for images and runs; images stay there")  # fmt: skip
    add("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(argv)
    args.words = [str(word) for word in (sys.argv[1:] if argv is None else argv)]
    args.scratch = args.scratch.absolute()
    cores = os.cpu_count() or 1
    args.workers = max(1, cores - 1) if args.workers is None else args.workers
    args.amp = args.device.startswith("cuda") if args.amp is None else args.amp
    args.file_size = args.file_size or [args.image_size, args.image_size]
    args.column = args.columns[0]
    for column in args.columns:
        kind, _, rest = column.partition("/")
        backend, _, how = rest.partition("/")
        if kind != "wfnet" or backend not in backends.NAMES or how not in HOWS:
            parser.error(f"{column} is not wfnet/BACKEND/HOW with a backend of "
                         f"{', '.join(backends.NAMES)} and {' or '.join(HOWS)}")  # fmt: skip
    least = {"--workers": (args.workers, 0), "--loop-steps": (args.loop_steps, 0),
             "--epochs": (args.epochs, 1), "--image-size": (args.image_size, 8),
             "--retained-rows": (args.retained_rows, 1)}  # fmt: skip
    for name, (value, smallest) in least.items():
        if value < smallest:
            parser.error(f"{name} must be at least {smallest}, not {value}")
    if args.output is not None and args.output.resolve().is_relative_to(args.scratch.resolve()):
        parser.error(f"--output {args.output} lies in --scratch, which is no place for results")
    try:
        args.config, args.wanted = plan(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def plan(args: argparse.Namespace) -> tuple[UntrainConfig, ImageFolder]:
    """Settings of the run, and the images that it needs.

    Raises:
        ValueError: for settings that make no sense.
    """
    changes = {"batch_size": args.batch_size, "label_expansion": args.label_expansion}
    changes = {name: value for name, value in changes.items() if value is not None}
    if args.classes < 2:
        raise ValueError(f"--classes must be at least 2, not {args.classes}")
    config = UntrainConfig.recipe("balanced", args.classes, **changes)
    samples = args.samples
    if samples is None and args.classes > len(HUNDRED):
        samples = SAMPLES
    images = config.batch_size // 2
    if samples is not None:
        steps = math.ceil(samples / (images * (1 + config.label_expansion)))
        config = UntrainConfig.recipe("balanced", args.classes, **changes, steps=steps)
    if args.classes > len(HUNDRED):
        parts = (math.ceil(config.steps * images / args.classes), 2, 1)
    else:
        test, val = max(1, args.per_class // 5), max(1, round(0.08 * args.per_class))
        parts = (args.per_class - test - val, val, test)
    args.test_per_class = parts[2]
    width, height = args.file_size
    return config, ImageFolder(args.classes, *parts, width, height, args.noise)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    report = Report(args, args.wanted, args.config)
    args.workers = fitting_workers(args.workers, args.config.batch_size // 2, args.image_size)
    report.content["settings"]["workers"] = args.workers
    report.write()
    images, seconds = image_folders.make(args.wanted, args.scratch, os.cpu_count() or 1, say)
    some = [path.stat().st_size for path in sorted((images / "train").glob("0000/*"))[:100]]
    report.content["files"] |= {
        "number": args.wanted.files,
        "mean_kibibytes": round(statistics.mean(some) / 1024, 1),
        "seconds_to_write": seconds,
    }
    failures = []
    for network in args.networks:
        try:
            one_run(args, report, images, network)
        except Failed as error:
            failures.append(f"{network}: {error}")
            say(failures[-1])
        if args.output is not None and any("untraining" in run for run in report.content["runs"]):
            draw(report.content, args.output.with_suffix(".png"))
    if failures:
        raise SystemExit("; ".join(failures))
    return report.content


if __name__ == "__main__":
    main()
