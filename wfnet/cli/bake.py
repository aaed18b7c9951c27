"""export the plain model that has forgotten a class

Multiply the gates of one row (or several) into the weights: a plain model of the original class
that carries neither filters nor the original weights.

example:
  wfnet bake runs/r50 --forget 281 --verify
  wfnet bake runs/r50 --forget 281 --prune-below 0.1 --cut-output --verify
  wfnet bake runs/r50 --forget tabby 285 --output cats.safetensors --onnx cats.onnx
  wfnet bake runs/r50 --per-request --onnx filtered.onnx

The file loads into the original model: model.load_state_dict(safetensors.torch.load_file(FILE)).
An --output without .safetensors is a folder that the model's own library loads, with its
preprocessing: timm.create_model("local-dir:FOLDER", pretrained=True), or transformers'
AutoModelForImageClassification.from_pretrained("FOLDER").
"""

import argparse
import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from wfnet import hugging_face
from wfnet.benchmarking.provenance import versions
from wfnet.cli.classifier import data_settings
from wfnet.cli.inputs import Run, class_indices
from wfnet.cli.options import Parser, add_command
from wfnet.cli.runs import check_writable
from wfnet.cli.weights import load_weights
from wfnet.compact import compact
from wfnet.data import batches
from wfnet.data.transforms import chosen_preprocessing
from wfnet.deployment import Deployment, onnx_logits
from wfnet.head import CUT_LOGIT, check_same_logits, first_output
from wfnet.network import WFNet
from wfnet.pretrained import filters_digest
from wfnet.services import settings
from wfnet.services.extras import require
from wfnet.services.files import sha256, write_json, write_tensors
from wfnet.trust import CHECKS, TrustSettings, check_export, describe_export
from wfnet.trust.subject import ImageReader

FORMATS = ("onnx", "program", "package", "int8")
IMAGES = 256  # on which outputs are compared


def add_parser(commands: argparse._SubParsersAction) -> Parser:
    parser = add_command(
        commands, run, "no file was left half written", "RUN --forget CLASS [CLASS ...] [options]"
    )
    group = parser.group("export")
    text = "the class to forget, by number or name; several are forgotten together"
    group.add("--forget CLASS", text, nargs="+")
    group.add_all(
        f"""
        --output FILE  safetensors file (default: RUN/forget_CLASS.safetensors), or the folder for
            a model of timm or transformers
        --onnx FILE  also export as ONNX, for any batch size
        --program FILE  also export as a program for torch.export.load (.pt2)
        --package FILE  also compile, with AOTInductor, for torch._inductor.aoti_load_package
            (.pt2); this file, and a --program beside it, are for the device of --device
        --int8 FILE  also export as ONNX in 8 bits, by ONNX Runtime's quantiser on training images
            of the other classes; accuracies before and after are printed
        --per-request  export the filtered network instead, to --onnx, --program or --package: a
            second input `forget`, int64 [batch], chooses the class of each image (-1: original)
        --prune-below T  make gates below T exactly 0, so that what they scaled cannot be scaled
            back [default: 0]
        --cut-output  also cut the class from the head (its logit becomes a constant): re-estimated
            BatchNorm, rescaled rows and fine-tuning on other classes find nothing to bring back
            there; the outputs differ from a retrained model's in that entry, and whoever has images
            of the class can still teach it again
        --compact  also write the network without its closed channels, as a --program (default:
            beside the file): smaller, faster, and nothing of these channels is in it; so for
            --onnx, --package and --int8
        --verify  load the file again, compare its outputs with the filtered network's, and, where
            the run knows its data, attack it: accuracies and what brings the class back go into a
            JSON file beside it
        --images N  for --verify: images to compare outputs on, test images if the run knows its
            data [default: {IMAGES}]
        --samples N  for --verify: the most images of each kind in the attacks
            [default: {TrustSettings().samples}]
        """,
        prune_below=settings.non_negative_float,
        samples=settings.int_from(2),
    )
    group.add_seed("of draws; images are split as in the run")
    parser.add_inputs(workers=0)
    return parser


def run(options: argparse.Namespace) -> None:
    work_on = Run(options)
    if options.per_request:
        _check_per_request(options)
        _check_files(options)
        net, classifier = work_on.network()
        _deploy(work_on, net, _images(work_on, classifier, 4)[0])
        return
    if not options.forget:
        raise ValueError("name the class to forget, --forget CLASS, or give --per-request")
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
    if options.compact:
        require("torch_pruning", "compact")
        options.program = options.program or str(path.with_suffix(".pt2"))
    _check_files(options)
    net, classifier = work_on.network()
    images = None
    if work_on.measures_statistics(net, forget) and (options.data or options.data_dir):
        images = _other_images(work_on, classifier, forget)
    preprocessing = chosen_preprocessing({**vars(options), "in_chans": None})
    about = {"names": work_on.names, "preprocessing": preprocessing}
    export = Export(path, tuple(forget), options.prune_below, options.cut_output, images, about)
    export.save(net)
    names = work_on.names or list(map(str, range(net.num_classes)))
    shown = [str(i) if names[i] == str(i) else f"{i} ({names[i]})" for i in forget]
    listed = f"class{'es' if len(shown) > 1 else ''} {', '.join(shown)}"
    print(f"{path}: {type(classifier).__name__} that has forgotten {listed}")
    if images is not None:
        print(f"statistics of both rows at once were measured on {len(images)} training images")
    if net.gate == "durable" and not options.cut_output:
        print("the class's row of the head still tells a part of it; --cut-output takes it out")
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
    if any(getattr(options, name) for name in FORMATS):
        example = _images(work_on, classifier, 4)[0]
        plain = _smaller(net, export, example) if options.compact else export.baked(net)
        deployment = _deploy(work_on, plain, example)
        if options.int8:
            others = _other_images(work_on, classifier, forget)
            deployment.save_int8(Path(options.int8), others)
            _compare_accuracies(work_on, plain, classifier, forget)


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
        # Rounding errors of the layers add up like a random walk.
        limit = 64 * torch.finfo(weight.dtype).eps * len(net.masked_layers) ** 0.5
        difference, span = check_same_logits(found, expected, limit, str(self.path), least=0.0)
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
    else:
        data = work_on.images(classifier)
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
        "units": "acc_*, ap_* and auc_* are fractions in [0, 1]",
        **export.described(),
        "file": export.path.name,
        "filters_digest": filters_digest(net),
        "sha256": sha256(export.weights.read_bytes()),
        "seed": options.seed,
        "samples": options.samples,
        "agreement": agreement,
        "measures": dict(CHECKS["removal"].measures),
        "classes": checks,
        "versions": versions(),
    }
    write_json(report, content)
    print(f"all of it is in {report}")


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


def _smaller(net: WFNet, export: Export, images: Tensor) -> nn.Module:
    """The baked network without its closed channels; prints what that saves."""
    net.eval()
    net(images.to(next(net.parameters()).device), forget=None)  # the size of its images
    plain = export.baked(net).cpu()
    small = compact(plain, images.shape[1:])
    (before, flops), (after, left) = (_size(model, images[:1]) for model in (plain, small))
    if after == before:
        print(
            "no channel is closed wherever it runs, so --compact takes nothing out: recipe durable "
            "closes channels"
        )
        return small
    print(
        f"without closed channels: {after:,} of {before:,} parameters, "
        f"{left / 1e6:,.1f} of {flops / 1e6:,.1f} MFLOPs an image"
    )
    return small


def _size(model: nn.Module, image: Tensor) -> tuple[int, int]:
    """Parameters, and floating-point operations for ``image [1, C, H, W]``."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(image)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops()


def _check_per_request(options: argparse.Namespace) -> None:
    """Refuses options of the export of one class."""
    of_one = ("forget", "output", "prune_below", "cut_output", "compact", "verify", "int8")
    given = {name: getattr(options, name) for name in of_one} | {"images": options.images != IMAGES}
    wrong = next((name for name in given if given[name]), None)
    if wrong:
        raise ValueError(
            f"--per-request exports the network of all classes, and --{wrong.replace('_', '-')} "
            "belongs to the export of one; leave one of them out"
        )
    if not (options.onnx or options.program or options.package):
        raise ValueError("--per-request needs a file: give --onnx, --program or --package")


def _check_files(options: argparse.Namespace) -> None:
    """Refuses files that cannot be written, before work starts."""
    files = {name: Path(path) for name in FORMATS if (path := getattr(options, name))}
    for name, path in files.items():
        suffix = ".onnx" if name in ("onnx", "int8") else ".pt2"
        if path.suffix != suffix:
            raise ValueError(f"--{name} {path} must end in {suffix}")
        if suffix == ".onnx":
            for package in ("onnx", "onnxscript", *(["onnxruntime"] if name == "int8" else [])):
                require(package, "onnx")
        check_writable(path.absolute().parent)
    if len(set(files.values())) < len(files):
        raise ValueError("two of --onnx, --program, --package and --int8 name the same file")
    if options.int8 and not (options.data or options.data_dir):
        raise ValueError("--int8 measures activations on images: give --data NAME or --data-dir")


def _deploy(work_on: Run, network: nn.Module, images: Tensor) -> Deployment:
    """Writes the files that the options name, and prints how far each is from the network."""
    options = work_on.options
    if not options.package:  # a program is bound to the kind of device that it was made on
        network = network.to("cpu", memory_format=torch.contiguous_format)
    deployment = Deployment(network, images)
    inputs = f"images [batch, {', '.join(map(str, images.shape[1:]))}]"
    if options.per_request:
        inputs += " and forget, int64 [batch], -1 for the original"
    for name in ("onnx", "program", "package"):
        path = getattr(options, name)
        if path:
            found = getattr(deployment, f"save_{name}")(Path(path))
            checked = "not compared: onnxruntime is not installed"
            if found is not None:
                checked = f"logits differ by at most {found:.1e}"
            print(f"{path}: of {inputs}; {checked}")
    return deployment


@torch.inference_mode()
def _compare_accuracies(
    work_on: Run, plain: nn.Module, classifier: nn.Module, forget: list[int]
) -> None:
    """Prints what the network of 8 bits knows of the class and of the others, and ``plain``."""
    options, test = work_on.options, work_on.images(classifier).test
    reader = ImageReader(test, options.samples, options.seed, options.workers)
    if reader.truth.dim() == 2:
        print("accuracies in 8 bits were not measured: images have several labels each")
        return
    int8, weight = onnx_logits(Path(options.int8)), next(plain.parameters())
    networks = lambda x: first_output(plain(x.to(weight))), int8
    shown = []
    for part, what in ((reader.of(*forget), "forgotten"), (reader.without(*forget), "other")):
        right = [
            torch.cat([run(x).argmax(1).cpu() for x in part.images.split(64)]).eq(part.labels)
            for run in networks
        ]
        before, after = (float(found.float().mean()) for found in right)
        shown.append(f"{len(part)} {what} test images {before:.1%} -> {after:.1%}")
    print(f"{options.int8}: in 8 bits; accuracy on {', on '.join(shown)}")
