"""export the plain model that has forgotten a class

Multiply the gates of one row (or several) into the weights: a plain model of the original class
that carries neither filters nor the original weights.

example:
  wfnet bake runs/r50 --forget 281 --verify
  wfnet bake runs/r50 --forget 281 --prune-below 0.1 --cut-output --verify
  wfnet bake runs/r50 --forget tabby 285 --output cats.safetensors --onnx cats.onnx

The file loads into the original model: model.load_state_dict(safetensors.torch.load_file(FILE)).
An --output without .safetensors is a folder that the model's own library loads, with its
preprocessing: timm.create_model("local-dir:FOLDER", pretrained=True), or transformers'
AutoModelForImageClassification.from_pretrained("FOLDER").
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from wfnet import hugging_face
from wfnet.cli.classifier import data_settings
from wfnet.cli.inputs import Run, class_indices
from wfnet.cli.options import Parser, add_command
from wfnet.cli.runs import check_writable, versions
from wfnet.cli.weights import load_weights
from wfnet.compact import compact
from wfnet.data import batches, multi_hot_of
from wfnet.head import CUT_LOGIT, first_output
from wfnet.network import WFNet
from wfnet.pretrained import filters_digest
from wfnet.services import settings
from wfnet.services.extras import require
from wfnet.services.files import write_atomically, write_json, write_tensors
from wfnet.trust import CHECKS, TrustSettings, check_export, describe_export
from wfnet.trust.subject import ImageReader


def add_parser(commands: argparse._SubParsersAction) -> Parser:
    parser = add_command(
        commands, run, "no file was left half written", "RUN --forget CLASS [CLASS ...] [options]"
    )
    group = parser.group("export")
    text = "the class to forget, by number or name; several are forgotten together"
    group.add("--forget CLASS", text, nargs="+", required=True)
    group.add_all(
        f"""
        --output FILE  safetensors file (default: RUN/forget_CLASS.safetensors), or the folder for
            a model of timm or transformers
        --onnx FILE  also export as ONNX, for any batch size
        --prune-below T  make gates below T exactly 0, so that what they scaled cannot be scaled
            back [default: 0]
        --cut-output  also cut the class from the head (its logit becomes a constant): re-estimated
            BatchNorm, rescaled rows and fine-tuning on other classes find nothing to bring back
            there; the outputs differ from a retrained model's in that entry, and whoever has images
            of the class can still teach it again
        --compact  also write the network without its closed channels, as an exported program beside
            the file (.pt2, for torch.export.load): smaller, faster, and nothing of these channels
            is in it
        --verify  load the file again, compare its outputs with the filtered network's, and, where
            the run knows its data, attack it: accuracies and what brings the class back go into a
            JSON file beside it
        --images N  for --verify: images to compare outputs on, test images if the run knows its
            data [default: 256]
        --samples N  for --verify: the most images of each kind in the attacks
            [default: {TrustSettings().samples}]
        """,
        prune_below=settings.non_negative_float,
        samples=settings.int_from(2),
    )
    group.add_seed("of splits and draws")
    parser.add_inputs(workers=0)
    return parser


def run(options: argparse.Namespace) -> None:
    work_on = Run(options)
    forget = class_indices(options.forget, work_on.names, work_on.num_classes)
    untrained = work_on.untrained
    unchanged = [label for label in forget if untrained is not None and label not in untrained]
    if unchanged:
        raise ValueError(
            f"class {unchanged[0]} was not untrained in {work_on.folder}, so its export would be "
            f"the original model; the run has classes {', '.join(map(str, untrained))}"
        )
    name = f"forget_{'_'.join(map(str, forget))}.safetensors"
    path = Path(options.output or work_on.folder / name)
    if path.suffix and path.suffix != ".safetensors" and not path.is_dir():
        raise ValueError(
            f"{path} must end in .safetensors, or be a folder without an ending (for ONNX there is "
            "--onnx)"
        )
    check_writable(path.absolute().parent)
    if options.onnx:
        for package in ("onnx", "onnxscript"):
            require(package, "onnx")
        check_writable(Path(options.onnx).absolute().parent)
    if options.compact:
        require("torch_pruning", "compact")
    net, classifier = work_on.network()
    images = None
    if net.gate == "durable" and len(forget) > 1 and (options.data or options.data_dir):
        images = _other_images(work_on, classifier, forget)
    about = {"names": work_on.names, "preprocessing": _changed_preprocessing(options)}
    export = Export(path, tuple(forget), options.prune_below, options.cut_output, images, about)
    export.save(net)
    names = work_on.names or list(map(str, range(net.num_classes)))
    shown = [str(i) if names[i] == str(i) else f"{i} ({names[i]})" for i in forget]
    listed = f"class{'es' if len(shown) > 1 else ''} {', '.join(shown)}"
    print(f"{path}: {type(classifier).__name__} that has forgotten {listed}")
    if images is not None:
        print(f"statistics of both rows at once were measured on {len(images)} training images")
    if options.verify:
        tested, what = _images(work_on, classifier, options.images)
        found = export.verify(net, classifier, tested)
        pruned = f", gates below {options.prune_below:g} at 0," if options.prune_below else ""
        reference = "the filtered network" if images is None else "the network in memory"
        cut = f"; the logit that was cut is {CUT_LOGIT:g} throughout" if options.cut_output else ""
        print(
            f"verified on {what}: equal to {reference}{pruned} within rounding: outputs "
            f"up to {found['span']:.1f} differ by at most {found['difference']:.1e} "
            f"({found['predictions']} of {found['images']} predictions equal){cut}"
        )
        _attack(work_on, export, net, classifier, found)
    if options.compact:
        _write_compact(net, export, _images(work_on, classifier, 2)[0])
    if options.onnx:
        example, _ = _images(work_on, classifier, 2)
        cuts = options.prune_below, options.cut_output, options.compact
        plain = net.bake(forget, *cuts, images=images)
        _write_onnx(plain.cpu(), example, Path(options.onnx))
        size = ", ".join(map(str, example.shape[1:]))
        print(f"{options.onnx}: the same as ONNX, input [batch, {size}]")


@dataclass(frozen=True)
class Export:
    """The file or folder of a plain model that has forgotten classes.

    The fields are those of ``bake``, and ``about`` those of ``save_classifier``, for a folder.
    """

    path: Path
    forget: tuple[int, ...]
    prune_below: float = 0.0
    cut_output: bool = False
    images: Tensor | None = None
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def is_folder(self) -> bool:
        return self.path.suffix != ".safetensors"

    @property
    def weights(self) -> Path:
        """The file with the weights."""
        return self.path / "model.safetensors" if self.is_folder else self.path

    def baked(self, net: WFNet) -> nn.Module:
        return net.bake(list(self.forget), self.prune_below, self.cut_output, images=self.images)

    def described(self) -> dict[str, Any]:
        """What was done, for files."""
        return {name: getattr(self, name) for name in ("forget", "prune_below", "cut_output")}

    def save(self, net: WFNet) -> None:
        """Writes the weights as safetensors; their metadata say what was done, as ``wfnet``.

        In a folder, the model's library writes them and its configuration.
        """
        if self.is_folder:
            hugging_face.save_classifier(self.baked(net).cpu(), self.path, **self.about)
            return
        about = {"model": type(net.model).__name__, "num_classes": net.num_classes}
        metadata = {"format": "pt", "wfnet": json.dumps(about | self.described())}
        write_tensors(self.path, self.baked(net).state_dict(), metadata)

    def loaded(self, classifier: nn.Module) -> nn.Module:
        """A copy of the classifier with the weights of the file, on the CPU; of a folder, what the
        model's library loads."""
        if self.is_folder:
            return hugging_face.load_saved(self.path, classifier)
        plain = copy.deepcopy(classifier).cpu()
        load_weights(plain, self.path)
        return plain.eval()

    @torch.inference_mode()
    def verify(self, net: WFNet, classifier: nn.Module, images: Tensor) -> dict[str, Any]:
        """Compares the file with the filtered network on ``images [N, C, H, W]``.

        A pruned export is compared with the network whose gates below the threshold are 0; one that
        was cut, in the logits of all other classes; one whose statistics were measured, with itself
        before it was written.

        Returns:
            Largest absolute difference and output (``span``), the bound on their quotient, the
            number of equal predictions of so many images; what was pruned and cut.

        Raises:
            RuntimeError: if they differ by more than rounding, or a cut logit is not the constant.
        """
        forget = list(self.forget)
        weight = next(iter(net.masked_layers.values())).weight
        plain = self.loaded(classifier).to(weight.device)
        if self.prune_below:
            net = copy.deepcopy(net)
            for layer in net.masked_layers.values():
                layer.close_below(self.prune_below, forget)
        parts = images.to(weight.device, weight.dtype).split(64)
        labels = torch.tensor(forget, device=weight.device)
        if self.images is not None:
            again = self.baked(net)
            expected = torch.cat([first_output(again(x)) for x in parts]).double()
        else:
            rows = [labels.expand(len(x), -1) for x in parts]
            expected = torch.cat([net(x, forget=r) for x, r in zip(parts, rows, strict=True)])
            expected = expected.double()
        found = torch.cat([first_output(plain(part)) for part in parts]).double()
        if self.cut_output:
            if not found[:, forget].eq(CUT_LOGIT).all():
                raise RuntimeError(
                    f"{self.path}: a logit of a forgotten class is not {CUT_LOGIT:g}; do not use "
                    "it: bake again without --cut-output"
                )
            others = [k for k in range(found.shape[1]) if k not in forget]
            expected, found = expected[:, others], found[:, others]
        difference, span = (found - expected).abs().max().item(), expected.abs().max().item()
        # Rounding errors of the layers add up like a random walk.
        limit = 64 * torch.finfo(weight.dtype).eps * len(net.masked_layers) ** 0.5
        if not difference <= limit * span:  # or NaN
            raise RuntimeError(
                f"{self.path} does not compute what the filtered network does: outputs differ by "
                f"{difference:.2e} at outputs up to {span:.2e}, more than rounding "
                f"({limit * span:.1e}); do not use it, and please report this"
            )
        return {
            "difference": difference,
            "span": span,
            "limit": limit,
            "predictions": int((found.argmax(1) == expected.argmax(1)).sum()),
            "images": len(images),
            "prune_below": self.prune_below,
            "cut_logit": CUT_LOGIT if self.cut_output else None,
        }


def _attack(
    work_on: Run, export: Export, net: WFNet, classifier: nn.Module, agreement: dict[str, Any]
) -> None:
    """Attacks the file itself, prints what was found and writes it beside the file as JSON."""
    options, checks = work_on.options, []
    if not options.data and not options.data_dir:
        print("accuracies and attacks need images: give --data NAME or --data-dir DIR")
    elif multi_hot_of((data := work_on.images(classifier)).test) is not None:
        print("the data have several labels per image: the file was compared, but not attacked")
    else:
        device = next(net.parameters()).device
        checks = check_export(
            export.loaded(classifier).to(device),
            copy.deepcopy(classifier).to(device).eval(),
            data,
            list(net.masked_layers),
            list(export.forget),
            TrustSettings(samples=options.samples, seed=options.seed),
            options.workers,
        )
        for check in checks:
            print(describe_export(check))
    report = export.path.with_suffix(".trust.json")
    content = {
        "units": "acc_* and auc_* are fractions in [0, 1]",
        **export.described(),
        "file": export.path.name,
        "filters_digest": filters_digest(net),
        "sha256": hashlib.sha256(export.weights.read_bytes()).hexdigest(),
        "seed": options.seed,
        "samples": options.samples,
        "agreement": agreement,
        "measures": CHECKS["removal"].measures,
        "classes": checks,
        "versions": versions(),
    }
    write_json(report, content)
    print(f"all of it is in {report}")


def _changed_preprocessing(options: argparse.Namespace) -> dict[str, Any]:
    """What of the images' preprocessing the options changed, as ``save_classifier`` takes it."""
    names = "mean", "std", "interpolation", "crop_pct"
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def _other_images(work_on: Run, classifier: nn.Module, forget: list[int]) -> Tensor:
    """Training images of the classes that stay."""
    options = work_on.options
    train = work_on.images(classifier).train
    reader = ImageReader(train, options.samples, options.seed, options.workers)
    return reader.without(*forget).images


def _images(work_on: Run, classifier: nn.Module, count: int) -> tuple[Tensor, str]:
    """Test images of the run's data, or random ones of the size that the network takes."""
    options = work_on.options
    if options.data or options.data_dir:
        images = work_on.images(classifier).test
        order = torch.arange(min(count, len(images))).split(64)
        read = [batch.images for batch in batches(images, order, options.workers)]
        if read:
            images = torch.cat(read)
            return images, f"{len(images)} test images"
    expected = data_settings(classifier, options.model)
    size = options.img_size or expected.get("image_size", 224)
    channels = options.in_chans or expected.get("channels", 3)
    generator = torch.Generator().manual_seed(options.seed)
    return torch.randn(count, channels, size, size, generator=generator), f"{count} random images"


def _write_compact(net: WFNet, export: Export, images: Tensor) -> None:
    net.eval()
    net(images.to(next(net.parameters()).device), forget=None)  # the size of its images
    plain = export.baked(net).cpu()
    small = compact(plain, images.shape[1:])
    target = export.path.with_suffix(".pt2")
    batch = torch.export.Dim("batch")
    program = torch.export.export(small, (images,), dynamic_shapes=({0: batch},))

    def save(path: Path) -> None:
        with open(path, "wb") as file:  # of a path it asks for the suffix .pt2
            torch.export.save(program, file)

    write_atomically(target, save)
    (before, flops), (after, left) = (_size(model, images[:1]) for model in (plain, small))
    print(
        f"{target}: without closed channels: {after:,} of {before:,} parameters, "
        f"{left / 1e6:,.1f} of {flops / 1e6:,.1f} MFLOPs an image"
    )


def _size(model: nn.Module, image: Tensor) -> tuple[int, int]:
    """Parameters, and floating-point operations for ``image [1, C, H, W]``."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(image)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops()


def _write_onnx(model: nn.Module, images: Tensor, path: Path) -> None:
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
