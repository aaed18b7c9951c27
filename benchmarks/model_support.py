"""Which networks of timm, torchvision and transformers can be wrapped, fused, untrained and baked.

    python benchmarks/model_support.py            (some 80 networks, random weights, CPU, minutes)

For each network: WFNet with its default targets computes what the base computes; the fused plan
is made, or the reason why not; one step of `wfnet.untrain` moves every filter matrix and no weight;
a baked class equals the filtered network. Writes `benchmarks/results/model_support.json` and the
table `docs/models.md`. `--models NAME ...` tries others, without writing anything.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from logging.handlers import BufferingHandler
from typing import Any

import timm
import torch
import torchvision
import transformers
from script import RESULTS, ROOT
from torch import nn
from transformers.models.auto import modeling_auto

import wfnet
from wfnet.benchmarking.provenance import provenance
from wfnet.data import TensorImages
from wfnet.head import first_output
from wfnet.services.clock import reason_of
from wfnet.services.files import fingerprint, write_json
from wfnet.services.tables import markdown_table

CLASSES = 10
# timm names, torchvision's and transformers' types after a slash; arguments where 64 pixels do
# not do: px is the size of the images, others are of the constructor or the configuration.
MODELS = """
    resnet18 resnet34 resnet50 resnet101 resnet50d wide_resnet50_2 resnext50_32x4d seresnet50
    ecaresnet50t skresnet18 resnet50_gn resnetv2_50 res2net50_26w_4s vgg11 vgg16 vgg16_bn
    densenet121 dla34 dpn68 darknet53 cspresnet50 hrnet_w18_small selecsls42b ese_vovnet19b_dw
    repvgg_a0 regnetx_002 regnety_002 inception_v3:px=96 xception41 nfnet_l0 mobilenetv2_100
    mobilenetv3_large_100 mnasnet_100 ghostnet_100 lcnet_050 mixnet_s rexnet_100 efficientnet_b0
    tf_efficientnet_b0 efficientnetv2_rw_t convnext_atto convnextv2_atto poolformer_s12
    mobilevit_xxs:px=128 vit_tiny_patch16_224:img_size=64 vit_small_patch16_224:img_size=64
    deit_tiny_patch16_224:img_size=64 deit3_small_patch16_224:img_size=64
    beit_base_patch16_224:img_size=64 eva02_tiny_patch14_224:img_size=56
    cait_xxs24_224:img_size=64 xcit_nano_12_p16_224:px=64
    swin_tiny_patch4_window7_224:img_size=112 pvt_v2_b0 mixer_s16_224:px=224
    torchvision/resnet18 torchvision/resnet50 torchvision/vgg11_bn torchvision/vgg16
    torchvision/alexnet torchvision/squeezenet1_1 torchvision/googlenet:px=96
    torchvision/shufflenet_v2_x1_0 torchvision/mobilenet_v2 torchvision/efficientnet_b0
    torchvision/convnext_tiny torchvision/densenet121 torchvision/swin_t:px=64
    torchvision/vit_b_16:image_size=64 torchvision/swin_v2_t:px=64
    transformers/vit:image_size=64 transformers/deit:image_size=64 transformers/swin:px=224
    transformers/convnext transformers/resnet transformers/beit:image_size=64
    transformers/dinov2:image_size=70 transformers/regnet transformers/mobilenet_v2
"""


def create(name: str, arguments: dict[str, Any]) -> tuple[nn.Module, int]:
    """Returns the network with seeded random weights in evaluation mode, and its image size."""
    arguments = dict(arguments)
    size = arguments.pop("px", None) or arguments.get("img_size") or arguments.get("image_size", 64)
    torch.manual_seed(0)
    if name.startswith("torchvision/"):
        if name.endswith("googlenet"):
            arguments |= {"aux_logits": False, "init_weights": True}
        model = torchvision.models.get_model(
            name.partition("/")[2], num_classes=CLASSES, **arguments
        )
    elif name.startswith("transformers/"):
        kind = name.partition("/")[2]
        config = transformers.AutoConfig.for_model(kind, num_labels=CLASSES, **arguments)
        # Of DeiT there are two classifiers, with and without a teacher.
        architecture = modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES[kind]
        architecture = architecture if isinstance(architecture, str) else architecture[0]
        model = getattr(transformers, architecture)(config)
    else:
        model = timm.create_model(name, num_classes=CLASSES, **arguments)
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():  # zeros would hide what lies behind them
            if not parameter.any():
                parameter.normal_(std=0.02)
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in norms:  # statistics of real activations, or gradients vanish in deep networks
            norm.train()
            norm.momentum = 1.0
        if norms:
            model(torch.rand(8, 3, size, size))
        for norm in norms:
            norm.momentum = 0.1
    return model.eval(), size


def examine(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Finds what works for one network, and why not what does not."""
    model, size = create(name, arguments)
    found: dict[str, Any] = {
        "model": name,
        "px": size,
        "wrap": False,
        "fuse": "",
        "untrain": False,
        "bake": False,
        "masked": 0,
        "gates": 0,
        "note": "",
    }
    images = torch.rand(4, 3, size, size)
    try:
        net = wfnet.WFNet(model, CLASSES)
        opened = net(images, torch.arange(4))  # the first call is watched: no fast paths
        with torch.no_grad():
            original = net(images, None)
    except (ValueError, RuntimeError, TypeError) as error:
        found["note"] = reason_of(error)
        return found
    with torch.no_grad():
        expected = first_output(model(images))
    if not torch.equal(original, expected) or _error(opened, expected) > 1e-4:
        found["note"] = "a fresh wrapper does not compute what the base computes"
        return found
    found["wrap"] = True
    found["masked"] = len(net.masked_layers)
    found["gates"] = sum(p.shape[1] for p in net.filter_parameters())
    found["fuse"], reason = _fusion(net, images)
    found["note"] = reason
    try:
        with torch.no_grad():
            for parameter in net.filter_parameters():
                parameter.normal_(1.0, 2.0)
            baked = first_output(net.bake(3)(images))
            found["bake"] = _error(net(images, 3), baked) < 1e-3
            found["bake"] &= torch.equal(first_output(net.bake(None)(images)), expected)
        found["untrain"] = _untrain_once(net, images)
    except (ValueError, RuntimeError, TypeError, ArithmeticError) as error:
        found["note"] = reason_of(error)
    return found


def _fusion(net: wfnet.WFNet, images: torch.Tensor) -> tuple[str, str]:
    """Returns what the fused plan covers, or "no" and the reason, as the package logs it."""
    lines = BufferingHandler(1000)
    logger = logging.getLogger("wfnet")
    logger.addHandler(lines)
    logger.setLevel(logging.INFO)
    net.fuse = True
    try:
        net(images, torch.arange(4))
    finally:
        logger.removeHandler(lines)
        net.fuse = False
    text = " ".join(record.getMessage() for record in lines.buffer)
    _, unfused, reason = text.partition("runs unfused: ")
    if unfused:
        return "no", reason
    covered = text.partition(": ")[2].removeprefix("fused ")
    return covered.replace(" other operations run as they are", " others"), ""


def _untrain_once(net: wfnet.WFNet, images: torch.Tensor) -> bool:
    """Whether one step moves every filter matrix and nothing else."""
    before = {name: p.detach().clone() for name, p in net.named_filters().items()}
    weights = fingerprint(net.model)
    count = CLASSES
    data = TensorImages(
        torch.rand(count, 3, *images.shape[2:]), torch.arange(count), list(map(str, range(count)))
    )
    config = wfnet.UntrainConfig.recipe(
        "balanced", CLASSES, steps=1, batch_size=4, label_expansion=2
    )
    wfnet.untrain(net, data, None, config, progress=False)
    moved = [not torch.equal(p, before[name]) for name, p in net.named_filters().items()]
    return all(moved) and fingerprint(net.model) == weights


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-6)).item()


def table(records: list[dict[str, Any]], about: str) -> str:
    """Returns the records as Markdown."""
    mark = {True: "yes", False: "no"}
    head = ["network", "px", "masked layers", "gates a class", "fuse", "untrain", "bake", "remark"]
    rows = []
    for r in records:
        cells = [r["masked"], f"{r['gates']:,}", r["fuse"] or "-", mark[r["untrain"]]]
        cells = [*cells, mark[r["bake"]]] if r["wrap"] else ["-"] * 5
        rows.append([r["model"], r["px"], *cells, r["note"].replace("|", "\\|")])
    return f"""# Networks that were tried

Made by `python benchmarks/model_support.py`: random weights, default targets, CPU. \
*fuse* tells what the fused plan covers, or that the network runs unfused; *untrain*: one \
step moves every filter matrix and no weight; *bake*: an exported class equals the \
filtered network. ConvNeXt has no attention: its convolutions are masked (all MLPs of \
timm's atto are), linear maps of its MLPs not.

{sum(r["wrap"] for r in records)} of {len(records)} wrap, \
{sum(r["untrain"] and r["bake"] for r in records)} untrain and bake. {about}

{markdown_table(head, rows)}
"""


def listed() -> dict[str, dict[str, int]]:
    """Returns the networks of :data:`MODELS` with their arguments."""
    found = {}
    for word in MODELS.split():
        name, *arguments = word.split(":")
        pairs = (argument.split("=") for argument in arguments)
        found[name] = {key: int(value) for key, value in pairs}
    return found


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", help="names instead of the list; writes no files")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    known = listed()
    chosen = {name: known.get(name, {}) for name in args.models} if args.models else known
    records = []
    for name, arguments in chosen.items():
        start = time.perf_counter()
        records.append(examine(name, arguments))
        r = records[-1]
        print(
            f"{name:34} wrap {r['wrap']!s:5} untrain {r['untrain']!s:5} bake {r['bake']!s:5} "
            f"fuse {r['fuse']} {r['note']} ({time.perf_counter() - start:.1f} s)",
            flush=True,
        )
    if args.models is None:
        made = provenance("cpu", ["benchmarks/model_support.py"])
        write_json(RESULTS / "model_support.json", {**made, "models": records})
        packages = "torch", "timm", "torchvision", "transformers", "commit"
        versions = (f"{key} {made[key]}" for key in packages)
        (ROOT / "docs" / "models.md").write_text(table(records, f"({', '.join(versions)})"))
    return records


if __name__ == "__main__":
    main()
