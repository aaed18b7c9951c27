"""`wfnet bake`: one class's plain model, without filters."""

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib
import importlib.util
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from wfnet.cli.classifier import data_settings
from wfnet.cli.inputs import (
    check_run_folder,
    class_indices,
    load_network,
    open_images,
    untrained_classes,
)
from wfnet.cli.options import (
    HelpFormatter,
    add_compute_options,
    add_data_options,
    add_model_options,
)
from wfnet.cli.runs import RUN_FILE, check_writable, read_run, versions
from wfnet.cli.weights import load_weights
from wfnet.compact import compact, size_of
from wfnet.data import batches, multi_hot_of
from wfnet.head import CUT_LOGIT
from wfnet.network import WFNet
from wfnet.pretrained import filters_digest
from wfnet.services import settings
from wfnet.services.extras import require
from wfnet.services.files import write_atomically, write_json, write_tensors
from wfnet.trust import CHECKS, TrustSettings, check_export, describe_export

logger = logging.getLogger("wfnet")

EXAMPLE = """example:
  wfnet bake runs/r50 --forget 281 --verify
  wfnet bake runs/r50 --forget 281 --prune-below 0.1 --cut-output --verify
  wfnet bake runs/r50 --forget tabby 285 --output cats.safetensors --onnx cats.onnx

The file loads into the original model: model.load_state_dict(safetensors.torch.load_file(FILE))"""
_ONNX = ("onnx", "onnxscript")


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "bake",
        help="export the plain model that has forgotten a class",
        description="Multiply the gates of one row (or several) into the weights: a plain model of "
        "the original class that carries neither filters nor the original weights.",
        usage="wfnet bake RUN --forget CLASS [CLASS ...] [options]",
        epilog=EXAMPLE,
        formatter_class=HelpFormatter,
    )
    parser.set_defaults(run=run, saved=lambda options: "no file was left half written")
    parser.add_argument("folder", metavar="RUN", help="folder of a run")
    group = parser.add_argument_group("export")
    group.add_argument(
        "--forget",
        nargs="+",
        required=True,
        metavar="CLASS",
        help="the class to forget, by number or name; several are forgotten together",
    )
    group.add_argument(
        "--output", metavar="FILE", help="safetensors file (default: RUN/forget_CLASS.safetensors)"
    )
    group.add_argument("--onnx", metavar="FILE", help="also export as ONNX, for any batch size")
    group.add_argument(
        "--prune-below",
        type=settings.non_negative_float,
        default=0.0,
        metavar="T",
        help="make gates below T exactly 0, so that what they scaled cannot be scaled back",
    )
    group.add_argument(
        "--cut-output",
        action="store_true",
        help="also cut the class from the head (its logit becomes a constant): re-estimated "
        "BatchNorm, rescaled rows and fine-tuning on other classes find nothing to bring back "
        "there; the outputs differ from a retrained model's in that entry, and whoever has images "
        "of the class can still teach it again",
    )
    group.add_argument(
        "--compact",
        action="store_true",
        help="also write the network without its closed channels, as an exported program beside "
        "the file (.pt2, for torch.export.load): smaller, faster, and nothing of these channels is "
        "in it",
    )
    group.add_argument(
        "--verify",
        action="store_true",
        help="load the file again, compare its outputs with the filtered network's, and, where the "
        "run knows its data, attack it: accuracies and what brings the class back go into a JSON "
        "file beside it",
    )
    group.add_argument(
        "--images",
        type=settings.positive_int,
        default=256,
        metavar="N",
        help="for --verify: images to compare outputs on, test images if the run knows its data",
    )
    group.add_argument(
        "--samples",
        type=settings.int_from(2),
        default=TrustSettings().samples,
        metavar="N",
        help="for --verify: the most images of each kind in the attacks",
    )
    group.add_argument(
        "--seed", type=settings.seed, default=0, metavar="N", help="of splits and draws"
    )
    add_model_options(parser)
    add_data_options(parser)
    add_compute_options(parser, workers=0)
    return parser


def run(options: argparse.Namespace) -> int:
    folder = Path(options.folder)
    if options.threads:
        torch.set_num_threads(options.threads)
    config = check_run_folder(folder)
    names = read_run(folder).get("classes") if (folder / RUN_FILE).is_file() else None
    forget = class_indices(options.forget, names, config["num_classes"])
    untrained = untrained_classes(folder)
    unchanged = [label for label in forget if untrained is not None and label not in untrained]
    if unchanged:
        raise ValueError(
            f"class {unchanged[0]} was not untrained in {folder}, so its export would be the "
            f"original model; the run has classes {', '.join(map(str, untrained))}"
        )
    path = Path(options.output or folder / baked_name(forget))
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} must end in .safetensors (for ONNX there is --onnx)")
    check_writable(path.absolute().parent)
    if options.onnx:
        _check_onnx(Path(options.onnx))
    if options.compact:
        require("torch_pruning", "compact")
    net, classifier = load_network(options, folder)
    save_baked(net, forget, path, options.prune_below, options.cut_output)
    print(f"{path}: {type(classifier).__name__} that has forgotten {_listed(forget, names)}")
    if options.verify:
        images, what = _images(options, classifier)
        agreement = verify(
            net, classifier, forget, path, images, options.prune_below, options.cut_output
        )
        print(f"verified on {what}: {agreement}")
        attack_export(options, net, classifier, forget, path, agreement)
    if options.compact:
        _write_compact(net, forget, path, options, _images(options, classifier, few=2)[0])
    if options.onnx:
        images, _ = _images(options, classifier, few=2)
        plain = net.bake(forget, options.prune_below, options.cut_output, options.compact)
        _export_onnx(plain.cpu(), images, Path(options.onnx))
        size = ", ".join(map(str, images.shape[1:]))
        print(f"{options.onnx}: the same as ONNX, input [batch, {size}]")
    return 0


def baked_name(forget: Sequence[int]) -> str:
    return f"forget_{'_'.join(map(str, forget))}.safetensors"


def save_baked(
    net: WFNet,
    forget: Sequence[int],
    path: Path,
    prune_below: float = 0.0,
    cut_output: bool = False,
) -> None:
    """Writes the weights of ``net.bake(forget, prune_below, cut_output)`` as safetensors.

    Its metadata say what was done, under ``wfnet``.
    """
    state = net.bake(list(forget), prune_below, cut_output).state_dict()
    record = {
        "model": type(net.model).__name__,
        "num_classes": net.num_classes,
        "forget": list(forget),
        "prune_below": prune_below,
        "cut_output": cut_output,
    }
    # Clones: a tensor under two names is written under both.
    write_tensors(
        path,
        {k: v.clone() for k, v in state.items()},
        {"format": "pt", "wfnet": json.dumps(record)},
    )


@dataclass(frozen=True)
class Agreement:
    """How far two networks' outputs ``[N, K]`` are apart, and how far rounding may take them.

    Logits that were cut are not among these outputs.

    Attributes:
        difference: largest absolute difference.
        span: largest absolute output.
        limit: bound on ``difference / span``.
        predictions: images with equal predictions, of ``images``.
        prune_below: gates below this were taken as 0 in both.
        cut_logit: the constant that all logits of the forgotten classes were; None if not cut.
    """

    difference: float
    span: float
    limit: float
    predictions: int
    images: int
    prune_below: float = 0.0
    cut_logit: float | None = None

    @property
    def within_rounding(self) -> bool:
        return self.difference <= self.limit * self.span  # False for NaN

    def __str__(self) -> str:
        pruned = f", gates below {self.prune_below:g} at 0," if self.prune_below else ""
        cut = self.cut_logit is not None
        constant = f"; the logit that was cut is {self.cut_logit:g} throughout" if cut else ""
        return (
            f"equal to the filtered network{pruned} within rounding: {'other ' if cut else ''}"
            f"outputs up to {self.span:.1f} differ by at most {self.difference:.1e} "
            f"({self.predictions} of {self.images} predictions equal){constant}"
        )


@torch.inference_mode()
def verify(
    net: WFNet,
    classifier: nn.Module,
    forget: Sequence[int],
    path: Path,
    images: Tensor,
    prune_below: float = 0.0,
    cut_output: bool = False,
) -> Agreement:
    """Loads ``path`` into a copy of ``classifier`` and compares it with the filtered network.

    A pruned export is compared with the network whose gates below the threshold are 0; one that
    was cut, in the logits of all classes but those in ``forget``.

    Raises:
        RuntimeError: if they differ by more than rounding, or a cut logit is not the constant.
    """
    weight = next(iter(net.masked_layers.values())).weight
    plain = _loaded(classifier, path).to(weight.device)
    if prune_below:
        net = _pruned(net, forget, prune_below)
    images = images.to(weight.device, weight.dtype)
    labels = torch.tensor(forget, device=weight.device)
    expected, found = [], []
    for part in images.split(64):
        expected.append(net(part, forget=labels.expand(len(part), -1)))
        found.append(plain(part))
    expected, found = torch.cat(expected).double(), torch.cat(found).double()
    if cut_output:
        cut = found[:, list(forget)]
        if not cut.eq(CUT_LOGIT).all():
            raise RuntimeError(
                f"{path}: logits of the forgotten class run from {cut.min():.4g} to "
                f"{cut.max():.4g} where {CUT_LOGIT:g} was expected; do not use it: bake again "
                f"(without --cut-output if {type(classifier).__name__} computes with the outputs "
                "of its head)"
            )
        others = [k for k in range(found.shape[1]) if k not in forget]
        expected, found = expected[:, others], found[:, others]
    agreement = Agreement(
        difference=(found - expected).abs().max().item(),
        span=expected.abs().max().item(),
        # Rounding errors of the layers add up like a random walk.
        limit=64 * torch.finfo(weight.dtype).eps * len(net.masked_layers) ** 0.5,
        predictions=int((found.argmax(1) == expected.argmax(1)).sum()),
        images=len(images),
        prune_below=prune_below,
        cut_logit=CUT_LOGIT if cut_output else None,
    )
    if not agreement.within_rounding:
        raise RuntimeError(
            f"{path} does not compute what the filtered network does: outputs differ by "
            f"{agreement.difference:.2e} at outputs up to {agreement.span:.2e}, more than rounding "
            f"({agreement.limit * agreement.span:.1e}); do not use it, and please report this"
        )
    return agreement


def _loaded(classifier: nn.Module, path: Path) -> nn.Module:
    plain = copy.deepcopy(classifier).cpu()
    load_weights(plain, path)
    return plain.eval()


def _pruned(net: WFNet, forget: Sequence[int], prune_below: float) -> WFNet:
    """A copy whose products of gates below the threshold are 0: alpha is minus infinity there."""
    pruned = copy.deepcopy(net)
    with torch.no_grad():
        for layer in pruned.masked_layers.values():
            layer.close_below(prune_below, forget)
    return pruned


def attack_export(
    options: argparse.Namespace,
    net: WFNet,
    classifier: nn.Module,
    forget: Sequence[int],
    path: Path,
    agreement: Agreement,
) -> None:
    """Attacks the file itself, prints what was found and writes it beside the file as JSON."""
    checks = []
    folder = Path(options.folder)
    asked = options.data or options.data_dir
    data = open_images(options, classifier, folder=folder) if asked else None
    if data is not None and multi_hot_of(data.test) is None:
        device = next(net.parameters()).device
        checks = check_export(
            _loaded(classifier, path).to(device),
            copy.deepcopy(classifier).to(device).eval(),
            data,
            list(net.masked_layers),
            forget,
            TrustSettings(samples=options.samples, seed=options.seed),
            options.workers,
        )
        for check in checks:
            print(describe_export(check))
    elif data is not None:
        print("the data have several labels per image: the file was compared, but not attacked")
    else:
        print(
            "accuracies and attacks need images: give --data NAME or --data-dir DIR, the run has "
            "recorded neither"
        )
    report = path.with_suffix(".trust.json")
    write_json(
        report,
        {
            "units": "acc_* and auc_* are fractions in [0, 1]",
            "file": path.name,
            "filters_digest": filters_digest(net),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "forget": list(forget),
            "prune_below": options.prune_below,
            "cut_output": options.cut_output,
            "seed": options.seed,
            "samples": options.samples,
            "agreement": asdict(agreement),
            "measures": CHECKS["removal"].measures,
            "classes": checks,
            "versions": versions(),
        },
    )
    print(f"all of it is in {report}")


def _images(
    options: argparse.Namespace, classifier: nn.Module, few: int | None = None
) -> tuple[Tensor, str]:
    """Test images of the run's data, or random ones of the size that the network takes."""
    count = few or options.images
    if options.data or options.data_dir:
        images = open_images(options, classifier, folder=Path(options.folder)).test
        order = torch.arange(min(count, len(images))).split(64)
        read = [batch.images for batch in batches(images, order, options.workers)]
        if read:
            images = torch.cat(read)
            return images, f"{len(images)} test images"
    settings = data_settings(classifier, options.model)
    size = options.img_size or settings.get("image_size", 224)
    channels = options.in_chans or next(p for p in classifier.parameters() if p.dim() == 4).shape[1]
    generator = torch.Generator().manual_seed(options.seed)
    return torch.randn(count, channels, size, size, generator=generator), f"{count} random images"


def _listed(forget: Sequence[int], names: Sequence[str] | None) -> str:
    shown = [str(i) if not names or names[i] == str(i) else f"{i} ({names[i]})" for i in forget]
    return f"class {shown[0]}" if len(shown) == 1 else f"classes {', '.join(shown)}"


def _write_compact(
    net: WFNet, forget: Sequence[int], path: Path, options: argparse.Namespace, images: Tensor
) -> None:
    net.eval()
    net(images.to(next(net.parameters()).device), forget=None)  # the size of its images
    plain = net.bake(forget, options.prune_below, options.cut_output).cpu()
    small = compact(plain, images.shape[1:])
    target = path.with_suffix(".pt2")
    batch = torch.export.Dim("batch")
    program = torch.export.export(small, (images,), dynamic_shapes=({0: batch},))
    write_atomically(target, lambda temporary: _save_program(program, temporary))
    before, after = size_of(plain, images), size_of(small, images)
    print(
        f"{target}: without closed channels: {after.parameters:,} of {before.parameters:,} "
        f"parameters, {after.flops / 1e6:,.1f} of {before.flops / 1e6:,.1f} MFLOPs an image"
    )


def _save_program(program: torch.export.ExportedProgram, path: Path) -> None:
    with open(path, "wb") as file:
        torch.export.save(program, file)


def _check_onnx(path: Path) -> None:
    missing = [name for name in _ONNX if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"--onnx needs {' and '.join(missing)}: install with `pip install {' '.join(_ONNX)}`"
        )
    check_writable(path.absolute().parent)


def _export_onnx(model: nn.Module, images: Tensor, path: Path) -> None:
    batch = torch.export.Dim("batch")
    program = torch.onnx.export(
        model.eval(),
        (images,),
        dynamo=True,
        dynamic_shapes=({0: batch},),
        verbose=False,
        input_names=["images"],
        output_names=["logits"],
    )
    write_atomically(path, lambda temporary: program.save(str(temporary)))
