"""`wfnet untrain`: learn filters for all classes of a classifier."""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from wfnet.cli.chosen_classes import (
    add_classes_option,
    choose_classes,
    network_names,
    with_network_labels,
)
from wfnet.cli.chosen_images import add_list_options, untraining_images
from wfnet.cli.drawing import draw_training
from wfnet.cli.inputs import (
    choose_device,
    count_classes,
    data_name,
    known_classes,
    make_classifier,
    open_images,
    untrained_classes,
)
from wfnet.cli.options import (
    HelpFormatter,
    add_compute_options,
    add_config_options,
    add_data_options,
    add_model_options,
    config_changes,
    fuse_of,
    recorded,
)
from wfnet.cli.runs import RUN_FILES, check_writable, read_run, write_run
from wfnet.data import (
    CorruptImages,
    Dataset,
    Splits,
    batches,
    limit_per_class,
    multi_hot_of,
    select,
)
from wfnet.head import find_head
from wfnet.network import WFNet
from wfnet.services import settings
from wfnet.services.extras import require
from wfnet.services.locks import folder_lock
from wfnet.services.ranks import Ranks, joined, local_device
from wfnet.untraining import UntrainConfig, UntrainResult, untrain
from wfnet.untraining.checkpoints import Checkpoints
from wfnet.untraining.memory import filter_memory, step_memory
from wfnet.untraining.untrain_config import RECIPES
from wfnet.wrapping import DURABLE_ALPHA_INIT, masks_linear_maps, wrap

logger = logging.getLogger("wfnet")

EXAMPLE = """example:
  wfnet untrain --data-dir /data/imagenet --model resnet50 --pretrained -b 256 --output runs/r50
  wfnet untrain --resume runs/r50           (goes on where an interrupted run stopped)
  torchrun --nproc-per-node 8 -m wfnet untrain ...     (the same run, shared by eight GPUs)
  wfnet evaluate runs/r50
  wfnet bake runs/r50 --forget 281"""
# Images that the original network classifies before untraining starts, at most.
_LOOK_AT = 1000
_FILTER_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "untrain",
        help="learn filters for all classes of a timm or torchvision classifier",
        description="Learn filters for all classes of a classifier in one round. Its weights stay "
        "as they are; the output folder gets filters, history, checkpoints and every option.",
        usage="wfnet untrain --data-dir DIR --model NAME [options]",
        epilog=EXAMPLE,
        formatter_class=HelpFormatter,
    )
    parser.set_defaults(run=run, saved=saved)
    add_data_options(parser)
    add_model_options(parser)
    _add_method_options(parser)
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output", metavar="DIR", help="folder of the run (default: runs/MODEL-DATA)"
    )
    group.add_argument("--experiment", metavar="NAME", help="a folder of that name in --output")
    group.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="RUN",
        help="go on with the run in folder RUN and its options; without a name, with the one in "
        "the output folder, if there is one",
    )
    group.add_argument(
        "--force", action="store_true", help="replace a run that is in the output folder"
    )
    group.add_argument(
        "--config",
        metavar="FILE",
        help="options from a YAML or JSON file, a run's config.json, or a recipe by name "
        "(mnist/resnet18)",
    )
    add_config_options(group, UntrainConfig, "checkpoint_every", "keep_checkpoints")
    group.add_argument(
        "--log-interval",
        type=settings.positive_float,
        default=60.0,
        metavar="SECONDS",
        help="least time between lines of progress, where no terminal shows a bar",
    )
    group.add_argument(
        "--log-wandb",
        action="store_true",
        help="log to Weights & Biases, too (TensorBoard events are written where it is installed)",
    )
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, run two small batches, show the plan and the memory it takes",
    )
    add_compute_options(parser)
    return parser


def _add_method_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "untraining", "Options without a default here have that of the recipe."
    )
    group.add_argument(
        "--recipe",
        choices=RECIPES,
        default="balanced",
        help="balanced forgets evenly and retains by distillation; paper has the authors' "
        "settings; durable puts gates behind BatchNorm, so that a baked network withstands "
        "re-estimated statistics and fine-tuning on the other classes",
    )
    group.add_argument(
        "--untrain-split",
        choices=("train", "val"),
        default="train",
        help="val: untrain without the training set, on the validation images (those of val/) that "
        "are not drawn for evaluation",
    )
    add_list_options(group)
    add_classes_option(group)
    group.add_argument(
        "--targets",
        nargs="+",
        metavar="NAME",
        help="layers to mask: names or patterns (default: the linear maps of a transformer's "
        "blocks, else convolutions; the paper masks qkv)",
    )
    add_config_options(group, UntrainConfig, "steps", "epochs", "batch_size", "grad_accum_steps")
    group.add_argument(
        "--filter-dtype",
        choices=tuple(_FILTER_DTYPES),
        default="float32",
        help="of filters and optimiser state; bfloat16 takes half the memory and is rounded "
        "stochastically",
    )
    add_config_options(group, UntrainConfig, "label_expansion", "lr", "optimizer", "schedule")
    add_config_options(
        group,
        UntrainConfig,
        "lambda0",
        "lambda1",
        "lambda2",
        "match",
        "distil",
        "share_images",
        "sampler",
    )
    add_config_options(group, UntrainConfig, "compound", "shrink", "clip")
    group.add_argument(
        "--alpha-init",
        type=settings.filter_entry,
        metavar="X",
        help=f"first value of filter entries (default: 3; of the hard gates of recipe durable "
        f"{DURABLE_ALPHA_INIT:g})",
    )
    group.add_argument(
        "--augment", action="store_true", help="crop and mirror training images at random"
    )
    add_config_options(
        group,
        UntrainConfig,
        "patience",
        "validations_per_epoch",
        "min_validations",
        "validation_images",
        "stop_on",
    )
    add_config_options(group, UntrainConfig, "max_corrupt", "max_nan_steps")
    group.add_argument(
        "--seed", type=settings.seed, default=0, metavar="N", help="of everything random"
    )


def make_config(
    options: argparse.Namespace,
    num_classes: int,
    rows: tuple[int, ...] | None = None,
    transformer: bool = False,
) -> UntrainConfig:
    """Returns the recipe with what the command line changes.

    Args:
        options: of the command line.
        num_classes: of the network.
        rows: that are untrained; None for all. The recipe's length is that for as many classes.
        transformer: whether linear maps alone are masked.
    """
    changes = config_changes(options, UntrainConfig) | {"classes": rows}
    if rows is not None:
        num_classes = max(2, len(rows))
    changes["channels_last"], changes["workers"] = options.channels_last, options.workers
    changes["amp"] = "bfloat16" if options.amp else None
    changes["fuse"] = fuse_of(options)
    changes = {name: value for name, value in changes.items() if value is not None}
    return UntrainConfig.recipe(options.recipe, num_classes, transformer, **changes)


def run_folder(options: argparse.Namespace) -> Path:
    """The folder of the run."""
    if options.resume not in (None, "auto"):
        return Path(options.resume)
    if options.output is None:
        model = (options.model or "network").replace("/", "-").replace(":", "-")
        data = Path(options.data or options.data_dir or "data").resolve().name
        folder = Path("runs", f"{model}-{data}")
    else:
        folder = Path(options.output)
    return folder / options.experiment if options.experiment else folder


def saved(options: argparse.Namespace) -> str:
    """What is on disk when the run was interrupted."""
    folder = run_folder(options)
    if not Checkpoints(folder).exist():
        return "no checkpoint was written yet"
    return (
        f"the last checkpoint is in {folder}: `wfnet untrain --resume {folder}` goes on from "
        "there and ends as if nothing had happened"
    )


def run(options: argparse.Namespace) -> int:
    if options.threads:
        torch.set_num_threads(options.threads)
    wandb = require("wandb", "wandb") if options.log_wandb else None
    with contextlib.ExitStack() as inside:
        ranks = inside.enter_context(joined(local_device(choose_device(options.device))))
        if not ranks.first:
            nowhere = inside.enter_context(open(os.devnull, "w"))
            inside.enter_context(contextlib.redirect_stdout(nowhere))
        _run(options, ranks, wandb, inside)
    return 0


def _run(
    options: argparse.Namespace,
    ranks: Ranks,
    wandb: ModuleType | None,
    inside: contextlib.ExitStack,
) -> None:
    folder = run_folder(options)
    device = local_device(choose_device(options.device))
    found = count_classes(options)
    make_config(options, found)  # what is out of range is refused before work starts
    if not options.dry_run:
        ranks.first_does(lambda: _take_folder(folder, options, inside))
    some = options.classes is not None
    known = known_classes(options)[-1:] if some else []
    expected = found if not some else len(known[0][0]) if known else options.num_classes
    if expected is None and not options.pretrained:
        raise ValueError("--classes needs --num-classes, the number of classes of the network")
    classifier = make_classifier(options, expected, data_name(options))
    num_classes, rows = find_head(classifier)[1].weight.shape[0] if some else found, None
    with ranks.first_ahead():
        resumed = None if options.resume is None else folder
        data = open_images(options, classifier, options.augment, resumed, by_names=not some)
        if some:
            names = network_names(known[0][0] if known else None, num_classes)
            numbers, rows = choose_classes(options.classes, data.classes, num_classes, names)
            data = with_network_labels(data, numbers, num_classes, names)
        data = untraining_images(options, data, folder)
    net = wrap(
        classifier,
        num_classes,
        options.recipe,
        options.alpha_init,
        targets=options.targets,
        backend=options.backend,
        fuse=fuse_of(options),
        filter_dtype=_FILTER_DTYPES[options.filter_dtype],
    ).to(device)
    config = make_config(options, num_classes, rows, masks_linear_maps(net))
    if config.channels_last:
        net.to(memory_format=torch.channels_last)
    _show_plan(options, net, data, config, folder, ranks)
    if options.dry_run:
        _show_memory(net, data.train, config, ranks)
        return
    about = {"untraining": asdict(config), "classes": data.classes}  # with the recipe's settings
    if wandb is not None:
        about["wandb"] = _wandb_id(folder)
    started = ranks.first_does(Checkpoints(folder).exist)
    if ranks.first and not started:
        _check_before(net, data.validation, options, config)
        write_run(folder, "untrain", recorded(options), **about)
    log = contextlib.nullcontext()
    if wandb is not None and ranks.first:
        log = _log_to_wandb(wandb, folder, about)
    with log as log_record:
        result = untrain(
            net,
            data.train,
            data.validation,
            config,
            folder,
            resume=options.resume is not None,
            progress=not options.quiet,
            log=log_record,
            log_interval=options.log_interval,
        )
    if not ranks.first:
        return
    write_run(folder, "untrain", recorded(options), **about, result=summary(result))
    draw_training(result.history, folder)
    _show_result(result, folder)


def _wandb_id(folder: Path) -> str:
    """The run's name at Weights & Biases: a resumed run goes on with its own."""
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError):
        return read_run(folder)["wandb"]
    return uuid.uuid4().hex[:8]


@contextlib.contextmanager
def _log_to_wandb(
    wandb: ModuleType, folder: Path, about: dict[str, Any]
) -> Iterator[Callable[[dict[str, float]], None]]:
    run = wandb.init(
        project="wfnet",
        name=folder.name,
        id=about["wandb"],
        resume="allow",
        dir=str(folder),
        config=about["untraining"],
    )
    try:
        yield lambda record: run.log(record, step=int(record["step"]))
    finally:
        run.finish()


def summary(result: UntrainResult) -> dict[str, Any]:
    """What a run came to, for ``config.json``."""
    return {
        "steps": result.steps,
        "best_step": result.best_step,
        "stopped_early": result.stopped_early,
        "seconds": round(result.seconds, 2),
        "spent": {name: round(seconds, 2) for name, seconds in result.spent.items()},
        "samples": result.samples,
        "corrupt_images": len(result.corrupt_images),
        **(
            {}
            if result.best is None
            else {"validation_acc_r": result.best.acc_r, "validation_acc_f": result.best.acc_f}
        ),
    }


def _take_folder(folder: Path, options: argparse.Namespace, inside: contextlib.ExitStack) -> None:
    """Locks the folder of the run, and removes a run that is to be replaced."""
    check_writable(folder)
    inside.enter_context(folder_lock(folder))
    if options.resume is not None:
        return
    found = [name for name in RUN_FILES if (folder / name).exists()]
    checkpoints = Checkpoints(folder)
    if not found and not checkpoints.exist():
        return
    if not options.force:
        raise FileExistsError(
            f"{folder} holds a run already: --resume goes on with it, --force replaces it, and "
            "another --output or --experiment leaves it alone"
        )
    for name in found:
        (folder / name).unlink()
    checkpoints.remove()


def _show_plan(
    options: argparse.Namespace,
    net: WFNet,
    data: Splits,
    config: UntrainConfig,
    folder: Path,
    ranks: Ranks,
) -> None:
    weights = sum(p.numel() for p in net.model.parameters())
    filters = sum(p.numel() for p in net.filter_parameters())
    accumulated = config.grad_accum_steps
    memory = filter_memory(net, config.optimizer)
    several = f" x {accumulated} minibatches" if accumulated > 1 else ""
    shared = "" if ranks.alone else f", shared by {ranks.size} processes"
    lines = [
        f"data        {data}",
        f"network     {options.model}, {weights - filters:,} frozen weights",
        f"filters     {len(net.masked_layers)} layers, {filters // net.num_classes:,} gates for "
        f"each of {net.num_classes} classes: {_size(memory.filters)} in {options.filter_dtype}, "
        f"with the optimiser's state {_size(memory.filters + memory.moments)}",
        f"untraining  recipe {options.recipe}: up to {config.total_steps(len(data.train)):,} "
        f"steps of {config.images} images{several}, {config.samples} samples each under its row"
        f"{shared}; lr {config.lr:g}, seed {config.seed}",
        f"output      {folder}",
    ]
    print("\n".join(lines), flush=True)


def _show_memory(net: WFNet, images: Dataset, config: UntrainConfig, ranks: Ranks) -> None:
    """What a step takes on one device, from two small ones."""
    few = next(batches(images, torch.arange(len(images)).split(4), config.workers), None)
    if few is None:
        raise ValueError("none of the training images can be read; see the log")
    amp = None if config.amp is None else getattr(torch, config.amp)
    net.fuse = config.fuse
    of_one = math.ceil(config.images / ranks.size)
    measured = step_memory(
        net,
        tuple(few.images.shape[1:]),
        config.label_expansion,
        config.share_images,
        amp,
        config.channels_last,
        most_images=of_one,
        compound=config.compound,
    )
    filters = filter_memory(net, config.optimizer)
    entries = {id(p) for p in net.filter_parameters()}
    weights = sum(
        t.numel() * t.element_size()
        for t in (*net.model.parameters(), *net.model.buffers())
        if id(t) not in entries
    )
    step = measured.of(of_one)
    print(
        f"memory      {_size(weights + filters.total + step)} on each device: {_size(weights)} of "
        f"frozen weights, {_size(filters.total)} of filters (with moments, gradient, the best and "
        f"the last good ones), {_size(step)} of a step over {of_one} images (measured on as "
        f"many, or 8 to 32; {_size(measured.per_image)} each)",
        flush=True,
    )


def _size(count: int) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


@torch.no_grad()
def _check_before(
    net: WFNet, images: Dataset, options: argparse.Namespace, config: UntrainConfig
) -> None:
    """Runs the network, so that a long run does not start with what cannot work.

    A network that cannot classify its images has wrong weights, classes or normalisation.
    """
    per_class = max(1, math.ceil(_LOOK_AT / len(images.classes)))
    few = select(images, limit_per_class(images.labels, per_class, options.seed))
    device = net.filter_parameters()[0].device
    amp = None if config.amp is None else getattr(torch, config.amp)
    correct = seen = 0
    multi_hot = multi_hot_of(few)
    corrupt = CorruptImages(len(few))  # untraining counts them against the limit
    order = torch.arange(len(few)).split(config.batch_size)
    for batch in batches(few, order, config.workers, corrupt):
        part = batch.images.to(device)
        with torch.no_grad(), torch.autocast(device.type, amp, enabled=amp is not None):
            if not seen:
                _refuse_backend(net, part[:2])
            found = net(part, forget=None).argmax(1).cpu()
        if multi_hot is None:
            correct += int((found == batch.labels).sum())
        else:  # one of its labels
            correct += int(multi_hot[batch.indices, found].sum())
        seen += len(batch.labels)
    if not seen:
        return
    share, chance = correct / seen, 1 / len(images.classes)
    print(
        f"before      the original network classifies {share:.2%} of {seen:,} validation images "
        "correctly",
        flush=True,
    )
    if share < max(2 * chance, chance + 0.05):
        logger.warning(
            "this is hardly better than guessing (%.2f%%): check the weights, the order of the "
            "classes, and the normalisation (--mean, --std)",
            100 * chance,
        )


def _refuse_backend(net: WFNet, images: Tensor) -> None:
    """Raises if a layer's backend cannot run here. Unfused: each layer asks its own."""
    fuse, net.fuse = net.fuse, False
    try:
        net(images, forget=0)
    finally:
        net.fuse = fuse


def _show_result(result: UntrainResult, folder: Path) -> None:
    how = ", stopped early" if result.stopped_early else ""
    print(f"\ndone        {result.steps:,} steps in {result.seconds:,.1f} s{how}")
    shares = {name: part / max(result.seconds, 1e-9) for name, part in result.spent.items()}
    print(f"spent on    {', '.join(f'{name} {share:.0%}' for name, share in shares.items())}")
    if result.best is not None:
        print(
            f"validation  Acc_r {result.best.acc_r:.2%}, Acc_f {result.best.acc_f:.2%} "
            f"(filters of step {result.best_step:,})"
        )
    if result.corrupt_images:
        print(f"left out    {len(result.corrupt_images)} corrupt images, named above")
    print(
        f"filters     {folder}\n\nnext:\n"
        f"  wfnet evaluate {folder}\n"
        f"  wfnet bake {folder} --forget {(untrained_classes(folder) or [0])[0]}"
    )
