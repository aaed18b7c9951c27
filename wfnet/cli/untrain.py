"""learn filters for all classes of a timm or torchvision classifier

Learn filters for all classes of a classifier in one round. Its weights stay as they are; the output
folder gets filters, history, checkpoints and every option.

example:
  wfnet untrain --data-dir /data/imagenet --model resnet50 --pretrained -b 256 --output runs/r50
  wfnet untrain --resume runs/r50           (goes on where an interrupted run stopped)
  torchrun --nproc-per-node 8 -m wfnet untrain ...     (the same run, shared by eight GPUs)
  wfnet evaluate runs/r50
  wfnet bake runs/r50 --forget 281
"""

import argparse
import contextlib
import math
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from textwrap import indent
from typing import NamedTuple

import torch

from wfnet.cli.chosen_classes import choose_classes, network_names, with_network_labels
from wfnet.cli.chosen_images import add_list_options, untraining_images
from wfnet.cli.inputs import (
    check_split,
    choose_device,
    count_classes,
    data_name,
    is_pretrained,
    joined_ranks,
    make_classifier,
    names_of_weights,
    open_images,
    with_known_names,
)
from wfnet.cli.options import Parser, add_command, config_changes, fuse_of
from wfnet.cli.report import draw_training
from wfnet.cli.runs import RUN_FILE, RUN_FILES, check_writable, read_run, write_run
from wfnet.data import CorruptImages, Dataset, Splits, batches, limit_per_class, select
from wfnet.evaluation.forward import Forward
from wfnet.head import find_head
from wfnet.hugging_face import local_folder
from wfnet.network import WFNet
from wfnet.services import settings
from wfnet.services.locks import folder_lock
from wfnet.services.log import logger
from wfnet.services.ranks import Ranks, local_device
from wfnet.targets import MANY_CLASSES
from wfnet.training import accuracy
from wfnet.untraining import UntrainConfig, UntrainResult, untrain
from wfnet.untraining.mask_depth import choose_mask_from, depth_report
from wfnet.untraining.memory import bytes_per_image
from wfnet.untraining.run_state import CHECKPOINT_NAME
from wfnet.untraining.untrain_config import RECIPES
from wfnet.wrapping import DURABLE_ALPHA_INIT, MANY_ALPHA_INIT, masks_linear_maps, wrap

# Settings that are options, in the order of the help.
_METHOD_OPTIONS = (
    *("steps", "epochs", "batch_size", "grad_accum_steps", "label_expansion", "lr"),
    *("optimizer", "schedule", "lambda0", "lambda1", "lambda2", "match", "tolerance"),
    *("margin", "forget_images", "retain_images", "distil", "share_images", "saliency"),
    *("sampler", "compound", "shrink", "clip"),
    *("patience", "validations_per_epoch", "min_validations", "validation_images", "stop_on"),
    *("features", "feature_dtype", "views", "max_corrupt"),
)
_OUTPUT_OPTIONS = ("checkpoint_every",)
# Images that the original network classifies before untraining starts, at most.
_LOOK_AT = 1000


def add_parser(commands: argparse._SubParsersAction) -> Parser:
    parser = add_command(commands, run, saved, "--data-dir DIR --model NAME [options]")
    _add_method_options(parser)
    group = parser.group("output")
    group.add(
        "--resume RUN",
        "go on with the run in folder RUN and its options; without a name, with the one in the "
        "output folder, if there is one",
        nargs="?",
        const="auto",
    )
    group.add_config()
    group.add_fields(UntrainConfig, *_OUTPUT_OPTIONS)
    group.add_all(
        """
        --output DIR  folder of the run (default: runs/MODEL-DATA)
        --experiment NAME  a folder of that name in --output
        --force  replace a run that is in the output folder
        --log-interval SECONDS  least time between lines of progress, where no terminal shows a
            bar [default: 60]
        --dry-run  check everything, run a small batch, show the plan and about what memory it takes
        """,
        log_interval=settings.positive_float,
    )
    parser.add_inputs()
    return parser


def _add_method_options(parser: Parser) -> None:
    text = "Options without a default here have that of the recipe."
    group = parser.group("untraining", text)
    group.add_all(
        f"""
        --recipe  balanced forgets evenly and retains by distillation; paper has the authors'
            settings; durable puts gates behind BatchNorm, so that a baked network withstands
            re-estimated statistics and fine-tuning on the other classes; quick is balanced with
            masks in the last half of the stages, 20 images a class and few, large steps
            [default: balanced]
        --untrain-split  val: untrain without the training set, on the validation images (those of
            val/) that are not drawn for evaluation [default: train]
        --classes [CLASS...]  untrain some classes of a network that knows more, with images of
            these: numbers or names that the network has for them, or FOLDER=NUMBER for each class
            of the data; without any, all classes of the data. The rows of all others stay at the
            original
        --targets NAME...  layers to mask: names or patterns (default: the linear maps of a
            transformer's blocks, else convolutions; the paper masks qkv)
        --mask-from STAGE  mask late layers alone, so that all in front of them runs once per image:
            from a stage on (layer3, blocks.9), the last so many stages (1), a part of them (0.25),
            or all; auto chooses on validation images by at most four short runs from the back
            (default: all; recipe quick: 0.5 where convolutions are masked). Late masks leave more
            of the class: with recipe durable one image brings back more (docs/scale.md), and a
            transformer's residual stream goes around them
        --filter-dtype  of filters and optimiser state; bfloat16 takes half the memory and is
            rounded stochastically [default: float32]
        --alpha-init X  first value of filter entries (default: 3; of the hard gates of recipe
            durable {DURABLE_ALPHA_INIT:g}, and {MANY_ALPHA_INIT:g} with images of more than
            {MANY_CLASSES} classes)
        --augment  crop and mirror training images at random
        """,
        recipe=tuple(RECIPES),
        untrain_split=("train", "val"),
        filter_dtype=("float32", "bfloat16"),
        alpha_init=settings.filter_entry,
    )
    add_list_options(group)
    group.add_fields(UntrainConfig, *_METHOD_OPTIONS)
    group.add_seed()


def make_config(
    options: argparse.Namespace,
    num_classes: int,
    rows: tuple[int, ...] | None = None,
    transformer: bool = False,
) -> UntrainConfig:
    """Returns the recipe with what the command line changes.

    Args:
        options: of the command line.
        num_classes: of the network; where some rows are untrained, of the images.
        rows: that are untrained; None for all. The recipe's length is that for as many classes.
        transformer: whether linear maps alone are masked.
    """
    given = config_changes(options, UntrainConfig, *_METHOD_OPTIONS, *_OUTPUT_OPTIONS, "seed")
    if options.train_per_class is not None:  # more than a recipe takes by itself
        given["images_per_class"] = options.train_per_class
    changes = given | {
        "classes": rows,
        "channels_last": options.channels_last,
        "workers": options.workers or 0,  # not chosen yet before the images are open
        "cache_dir": options.cache_dir,
        "amp": "bfloat16" if options.amp else None,
        "fuse": fuse_of(options),
    }
    durable = options.recipe == "durable"  # knows both numbers apart
    count = num_classes if rows is None or durable else max(2, len(rows))
    return UntrainConfig.recipe(options.recipe, count, transformer, **changes)


def run_folder(options: argparse.Namespace) -> Path:
    """The folder of the run."""
    if options.resume not in (None, "auto"):
        return Path(options.resume)
    network = local_folder(options.model)
    model = options.model or "network" if network is None else network.resolve().name
    model = model.replace("/", "-").replace(":", "-")
    data = Path(options.data or options.data_dir or "data").resolve().name
    folder = Path(options.output or f"runs/{model}-{data}")
    return folder / options.experiment if options.experiment else folder


def saved(options: argparse.Namespace) -> str:
    """What is on disk when the run was interrupted."""
    folder = run_folder(options)
    if not (folder / CHECKPOINT_NAME).is_file():
        return "no checkpoint was written yet"
    return (
        f"the last checkpoint is in {folder}: `wfnet untrain --resume {folder}` goes on from "
        "there and ends as if nothing had happened"
    )


def run(options: argparse.Namespace) -> None:
    with joined_ranks(options) as ranks, contextlib.ExitStack() as inside:
        folder = run_folder(options)
        make_config(options, count_classes(options))  # out of range is refused before work starts
        if not options.dry_run:
            ranks.first_does(lambda: _take_folder(folder, options, inside))
        if options.resume is not None and options.threads is None:
            # Sums over other numbers of threads round otherwise.
            with contextlib.suppress(FileNotFoundError, ValueError, KeyError):
                torch.set_num_threads(read_run(folder)["threads"])
        prepared = _prepare(options, folder, ranks)
        _show_plan(options, prepared)
        if options.dry_run:
            _show_memory(prepared)
        else:
            _untrain(options, prepared)


class _Prepared(NamedTuple):
    """What is untrained: the network with fresh filters on its device, its images, the settings
    and the folder of the run, and what was tried to choose the first masked stage."""

    net: WFNet
    data: Splits
    config: UntrainConfig
    tried: list[dict]
    folder: Path
    ranks: Ranks


def _prepare(options: argparse.Namespace, folder: Path, ranks: Ranks) -> _Prepared:
    device = local_device(choose_device(options.device))
    count = count_classes(options)
    names = None if options.classes is None else names_of_weights(options)
    if options.classes is not None:  # the network has more than the data
        count = options.num_classes if names is None else len(names)
        if count is None and not is_pretrained(options):
            raise ValueError("--classes needs --num-classes, the number of classes of the network")
    classifier = make_classifier(options, count, data_name(options))
    rows, pictured = None, count
    with ranks.first_ahead():
        data = open_images(options, classifier, options.augment)
        check_split(options)
        if options.classes is None:
            data = with_known_names(data, options, None if options.resume is None else folder)
        else:
            count = find_head(classifier)[1].weight.shape[0]
            names = network_names(names, count)
            numbers, rows = choose_classes(options.classes, data.classes, count, names)
            data, pictured = with_network_labels(data, numbers, count, names), len(numbers)
        data = untraining_images(options, data, folder)

    def wrapped(recipe: str, alpha_init: float | None, mask_from: str | None) -> WFNet:
        net = wrap(
            classifier,
            count,
            recipe,
            alpha_init,
            targets=options.targets,
            mask_from=mask_from,
            backend=options.backend,
            fuse=fuse_of(options),
            tune=options.tune,
            filter_dtype=getattr(torch, options.filter_dtype),
        ).to(device)
        layout = torch.channels_last if options.channels_last else torch.preserve_format
        return net.to(memory_format=layout)

    tried = _choose_mask_from(options, partial(wrapped, "balanced", None), data, rows, ranks)
    alpha_init = options.alpha_init
    if alpha_init is None and options.recipe == "durable" and pictured <= MANY_CLASSES:
        alpha_init = DURABLE_ALPHA_INIT  # few are retained, however many the network has
    net = wrapped(options.recipe, alpha_init, options.mask_from)
    config = make_config(options, pictured, rows, masks_linear_maps(net))
    return _Prepared(net, data, config, tried, folder, ranks)


def _choose_mask_from(
    options: argparse.Namespace,
    wrapped: Callable[[str | None], WFNet],
    data: Splits,
    rows: tuple[int, ...] | None,
    ranks: Ranks,
) -> list[dict]:
    """Replaces ``--mask-from auto`` by a stage; returns what was tried."""
    if options.mask_from != "auto":
        return []
    if not ranks.alone or getattr(data.train, "multi_hot", None) is not None:
        raise ValueError(
            "--mask-from auto is for one process and images with one label each: name a stage"
        )
    config = make_config(options, wrapped(None).num_classes, rows)
    chosen, tried = choose_mask_from(wrapped, data.train, data.validation, config)
    print(f"masks       {indent(depth_report(chosen, tried), ' ' * 12).strip()}", flush=True)
    options.mask_from = chosen
    return [asdict(trial) for trial in tried]


def _untrain(options: argparse.Namespace, prepared: _Prepared) -> None:
    net, data, config, tried, folder, ranks = prepared
    about = {"untraining": asdict(config), "classes": data.classes}  # with the recipe's settings
    about |= {"mask_depths": tried, "threads": torch.get_num_threads()}
    started = ranks.first_does((folder / CHECKPOINT_NAME).is_file)
    if ranks.first and not started:
        _check_before(net, data.validation, config)
        write_run(folder, options, **about)
    result = untrain(
        net,
        data.train,
        data.validation,
        config,
        folder,
        resume=options.resume is not None,
        progress=not options.quiet,
        log_interval=options.log_interval,
    )
    if ranks.first:
        about["result"] = {
            **{name: getattr(result, name) for name in ("steps", "best_step", "stopped_early")},
            "seconds": round(result.seconds, 2),
            "samples": result.samples,
            "spent": {name: round(seconds, 2) for name, seconds in result.spent.items()},
            "corrupt_images": len(result.corrupt_images),
        }
        if result.best is not None:
            about["result"]["validation_acc_r"] = result.best.acc_r
            about["result"]["validation_acc_f"] = result.best.acc_f
        write_run(folder, options, **about)
        draw_training(result.history, folder)
        _show_result(result, folder, (config.classes or [0])[0])


def _take_folder(folder: Path, options: argparse.Namespace, inside: contextlib.ExitStack) -> None:
    """Locks the folder of the run, and removes a run that is to be replaced."""
    check_writable(folder)
    inside.enter_context(folder_lock(folder))
    if options.resume is not None:
        return
    found = [folder / name for name in RUN_FILES if (folder / name).exists()]
    holds = any(path.name != RUN_FILE for path in found)
    # A run that ended before its first checkpoint has left nothing but its options.
    if not options.force and (holds or (found and "result" in read_run(folder))):
        raise FileExistsError(
            f"{folder} holds a run already: --resume goes on with it, --force replaces it, and "
            "another --output or --experiment leaves it alone"
        )
    for path in found:
        path.unlink()


def _show_plan(options: argparse.Namespace, prepared: _Prepared) -> None:
    net, data, config, _, folder, ranks = prepared
    weights = sum(p.numel() for p in net.model.parameters())
    filters = sum(p.numel() for p in net.filter_parameters())
    accumulated = config.grad_accum_steps
    size, moments = _filter_bytes(net, config)
    several = f" x {accumulated} minibatches" if accumulated > 1 else ""
    shared = "" if ranks.alone else f", shared by {ranks.size} processes"
    print(
        f"data        {data}\n"
        f"network     {options.model}, {weights - filters:,} frozen weights\n"
        f"filters     {len(net.masked_layers)} layers, {filters // net.num_classes:,} gates for "
        f"each of {net.num_classes} classes: {_size(size)} in {options.filter_dtype}, with the "
        f"optimiser's state {_size(size + moments)}\n"
        f"untraining  recipe {options.recipe}: up to {config.total_steps(len(data.train)):,} "
        f"steps of {config.images} images{several}, {config.samples} samples each under its row"
        f"{shared}; lr {config.lr:g}, seed {config.seed}\n"
        f"output      {folder}",
        flush=True,
    )


def _filter_bytes(net: WFNet, config: UntrainConfig) -> tuple[int, int]:
    """Bytes of all filters, and of the moments of RowAdam."""
    size = sum(p.numel() * p.element_size() for p in net.filter_parameters())
    return size, 2 * size if config.optimizer == "row_adam" else 0


def _show_memory(prepared: _Prepared) -> None:
    """About what the run takes on one device."""
    net, images, config = prepared.net, prepared.data.train, prepared.config
    few = next(batches(images, torch.arange(len(images)).split(4), config.workers), None)
    if few is None:
        raise ValueError("none of the training images can be read; see the log")
    of_one = math.ceil(config.images / prepared.ranks.size)
    step = of_one * bytes_per_image(net, few.images.shape[1:], config, max(2, min(8, of_one)))
    size, moments = _filter_bytes(net, config)
    tensors = (*net.model.parameters(), *net.model.buffers())
    weights = sum(t.numel() * t.element_size() for t in tensors) - size
    filters = 4 * size + moments  # with the gradient, the best and the last good ones
    print(
        f"memory      about {_size(weights + filters + step)} on each device: {_size(weights)} of "
        f"frozen weights, {_size(filters)} of filters (with moments, gradient, the best and the "
        f"last good ones), {_size(step)} of a step over {of_one} images (estimated from a smaller "
        "one)",
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
def _check_before(net: WFNet, images: Dataset, config: UntrainConfig) -> None:
    """Runs the network, so that a long run does not start with what cannot work.

    A network that cannot classify its images has wrong weights, classes or normalisation.
    """
    per_class = max(1, math.ceil(_LOOK_AT / len(images.classes)))
    few = select(images, limit_per_class(images.labels, per_class, config.seed))
    corrupt = CorruptImages(len(few))  # untraining counts them against the limit
    batch = next(batches(few, torch.arange(len(few)).split(2), 0, corrupt), None)
    if batch is None:
        return
    forward = Forward.of(net, config.amp_dtype, config.channels_last)
    net.fuse = False  # each layer asks its backend
    with forward.autocast():
        net(forward.images(batch.images), forget=0)
    net.fuse = config.fuse
    share, chance = accuracy(net, few, 64, config.workers, config.amp), 1 / len(images.classes)
    print(
        f"before      the original network classifies {share:.2%} of {len(few):,} validation "
        "images correctly",
        flush=True,
    )
    if share < max(2 * chance, chance + 0.05):
        logger.warning(
            "this is hardly better than guessing (%.2f%%): check the weights, the order of the "
            "classes, and the normalisation (--mean, --std)",
            100 * chance,
        )


def _show_result(result: UntrainResult, folder: Path, label: int) -> None:
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
        f"filters     {folder}\n\nnext:\n  wfnet evaluate {folder}\n"
        f"  wfnet bake {folder} --forget {label}"
    )
