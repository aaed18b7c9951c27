"""A whole untraining run from JPEG files, by the command that a user gives: its wall time.

    python benchmarks/whole_run.py --classes 1000 --network resnet50
    python benchmarks/whole_run.py --classes 10 --network small/resnet --image-size 32 --device cpu
    python benchmarks/whole_run.py --recipe quick --mask-from layer4.2 --classes 16 --steps 2 -b 256
        -M 5 --network resnet50 --device cpu     two steps: what a part costs for each image

Images show nothing: noise with the spectrum of photographs, whose files decode as photographs do.
The network has random weights, and BatchNorms that know the images; every minibatch of recipe
balanced has images that were never read before.

What is measured is the whole process of `wfnet untrain`, from the start of Python to its end, and
where the time went:

    program       Python, network, list of images, a look at the original network's answers before,
                  curves after
    start         of the run, until everything is compiled and captured
    features      in front of the first mask, with their images: decoded, computed once, kept
    data          images that the device had to wait for
    steps         the rest: the steps themselves
    validation, checkpoints

Writes JSON. Images and runs go into --scratch; images stay there for the next call. They were just
written, so what is measured is decoding them, not a disk.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import os
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

import wfnet
from wfnet import UntrainConfig, backends
from wfnet.benchmarking.provenance import provenance
from wfnet.cli.classifier import create_classifier
from wfnet.cli.train import BASE_NAME
from wfnet.data import open_data
from wfnet.services.files import write_json, write_tensors

SAMPLES = 1_400_000  # expanded ones that 1,000 classes cost, by what a class costs of 10 and 100
_PICTURES = 32  # of which all images are made
PURPOSES = ("program", "start", "features", "data", "steps", "validation", "checkpoints")


def image_folder(args: argparse.Namespace) -> Path:
    """Returns a folder with the images that the run needs, made by all cores unless it is there."""
    counts = {"train": args.images_per_class, "val": 2, "test": 1}
    root = args.scratch / f"images-{args.classes}x{args.images_per_class}-{args.image_size}"
    if root.exists():
        return root
    unfinished = root.with_suffix(".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    names = [
        f"{part}/{label:04d}/{number:05d}.jpg"
        for part, count in counts.items()
        for label in range(args.classes)
        for number in range(count)
    ]
    for folder in {(unfinished / name).parent for name in names}:
        folder.mkdir(parents=True)
    write = functools.partial(_write_image, unfinished, args.image_size)
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        for _ in pool.imap_unordered(write, enumerate(names), chunksize=64):
            pass
    unfinished.rename(root)
    return root


def _write_image(root: Path, pixels: int, numbered: tuple[int, str]) -> None:
    """Writes one of a few pictures, moved, mirrored, its colours exchanged."""
    number, name = numbered
    rng = np.random.default_rng(number)
    image = _drawn(pixels)[rng.integers(_PICTURES)][:, :, rng.permutation(3)]
    image = np.roll(image, rng.integers(pixels, size=2), (0, 1))[:, :: rng.choice((-1, 1))]
    Image.fromarray(np.ascontiguousarray(image)).save(root / name, quality=90)


@functools.lru_cache(1)
def _drawn(pixels: int) -> list[np.ndarray]:
    """Returns pictures [pixels, pixels, 3] uint8 with the spectrum of photographs.

    Noise whose amplitude falls with frequency. It goes on at the opposite edge where it ends.
    """
    rng = np.random.default_rng(0)
    down, across = np.fft.fftfreq(pixels)[:, None], np.fft.rfftfreq(pixels)[None]
    amplitude = 1 / np.maximum(np.hypot(down, across), 1 / pixels)
    pictures = []
    for _ in range(_PICTURES):
        spectrum = amplitude * np.exp(2j * np.pi * rng.random((3, *amplitude.shape)))
        image = np.fft.irfft2(spectrum, (pixels, pixels))
        image = 128 + 50 * image / image.std() + rng.normal(0, 8, image.shape)
        pictures.append(image.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
    return pictures


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


def run_wfnet(words: list[str]) -> None:
    """Runs a command of wfnet in a process of its own.

    Raises:
        SystemExit: if it ends with an error.
    """
    print(f"wfnet {shlex.join(words)}", flush=True)
    status = subprocess.run([sys.executable, "-m", "wfnet", *words], check=False).returncode
    if status:
        raise SystemExit(f"wfnet {words[0]} ended with status {status}")


def untrain(args: argparse.Namespace, images: Path, base: Path, run: Path) -> dict[str, Any]:
    """Runs `wfnet untrain`; returns its seconds with the start of Python, and where they went."""
    config = args.config
    words = ["--model", args.network, "--checkpoint", base / BASE_NAME, "--backend", args.backend]
    words += [
        "--recipe",
        args.recipe,
        "--steps",
        config.steps,
        "-b",
        config.batch_size,
        "-M",
        config.label_expansion,
    ]
    words += ["--log-interval", 5, "--output", run, "--force"]
    words += ["--data-dir", images, "--img-size", args.image_size, "--crop-pct", 1]
    words += ["--device", args.device, "-j", args.workers]
    words += ["--validations-per-epoch", 2, "--patience", 100] if args.recipe == "balanced" else []
    words += ["--mask-from", args.mask_from] if args.mask_from else []
    words += [*(["--amp"] if args.amp else []), *(["--torchcompile"] if args.torchcompile else [])]
    words += ["--threads", args.threads] if args.threads else []
    started = time.perf_counter()
    run_wfnet(["untrain", *map(str, words)])
    whole = time.perf_counter() - started
    result = json.loads((run / "config.json").read_text())["result"]
    spent = {"program": max(0.0, whole - result["seconds"]), **result["spent"]}
    return {
        "seconds": whole,
        "spent": {name: spent[name] for name in PURPOSES},
        "steps": result["steps"],
        "stopped_early": result["stopped_early"],
        "samples": result["samples"],
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss,
        "samples_per_second": result["samples"] / whole,
        "samples_per_second_of_steps": result["samples"] / max(spent["steps"], 1e-9),
    }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, help="CPU threads")
    add("--output", type=Path, help="JSON file to write")
    add("--classes", type=int, default=100)
    add("--network", default="resnet18", metavar="NAME")
    add("--recipe", default="balanced", choices=("balanced", "quick"))
    add("--mask-from", metavar="STAGE", help="as of wfnet untrain")
    add("--steps", type=int, help="(default: 1,400 expanded samples a class; quick: the recipe's)")
    add("--image-size", type=int, default=224)
    add("-b", "--batch-size", type=int, help="images of a minibatch (default: the recipe's)")
    add("-M", "--label-expansion", type=int, help="rows of a retained image (the recipe's)")
    add("--backend", default="auto", choices=backends.NAMES)
    add("--torchcompile", action="store_true", help="as of wfnet untrain")
    add("--amp", action=argparse.BooleanOptionalAction, help="bfloat16 (default: on a GPU)")
    add("--workers", type=int, help="that read images (default: all cores but one)")
    add("--scratch", type=Path, default=Path(tempfile.gettempdir(), "wfnet-whole-run"))
    args = parser.parse_args(argv)
    args.scratch = args.scratch.absolute()
    args.workers = max(1, (os.cpu_count() or 1) - 1) if args.workers is None else args.workers
    args.amp = args.device.startswith("cuda") if args.amp is None else args.amp
    try:
        args.config, args.images_per_class = plan(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def plan(args: argparse.Namespace) -> tuple[UntrainConfig, int]:
    """Returns the settings of the run, and how many images of each class are read.

    Raises:
        ValueError: for settings that make no sense.
    """
    names = "batch_size", "label_expansion", "steps"
    changes = {n: getattr(args, n) for n in names if getattr(args, n) is not None}
    if args.classes < 2:
        raise ValueError(f"--classes must be at least 2, not {args.classes}")
    config = UntrainConfig.recipe(args.recipe, args.classes, **changes)
    if args.recipe == "quick":
        return config, config.images_per_class
    images = config.batch_size // 2
    steps = math.ceil(SAMPLES * args.classes // 1000 / (images * (1 + config.label_expansion)))
    config = UntrainConfig.recipe("balanced", args.classes, **{"steps": steps, **changes})
    return config, math.ceil(config.steps * images / args.classes)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    words = sys.argv[1:] if argv is None else argv
    settings = {n: str(v) if isinstance(v, Path) else v for n, v in vars(args).items()}
    del settings["config"]
    record: dict[str, Any] = {"benchmark": "whole_run", "settings": settings}
    record |= provenance(args.device, ["benchmarks/whole_run.py", *words])
    images = image_folder(args)
    folder = args.scratch / f"{args.network.replace('/', '-')}-{args.classes}"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        random_base(args, images, folder / "base")
        ours = record["untraining"] = untrain(args, images, folder / "base", folder / "run")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if args.output:
        write_json(args.output, record)
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in ours["spent"].items())
    print(f"{ours['samples']:,} expanded samples in {ours['seconds']:.1f} s ({parts})")
    return record


if __name__ == "__main__":
    main()
