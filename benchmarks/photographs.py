"""What an ImageNet classifier sees in photographs, before and after it forgets their classes.

    python benchmarks/photographs.py RUN

RUN is a run of `wfnet untrain --classes` on the photographs of benchmarks/real_data.py. With
RUN/filtered.onnx (`wfnet bake RUN --per-request --onnx RUN/filtered.onnx`) that file is compared,
too. Writes photographs.json and photographs.png to benchmarks/results.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from script import RESULTS
from timm.data import ImageNetInfo
from torch import Tensor

from wfnet.benchmarking.provenance import provenance
from wfnet.cli import build_parser
from wfnet.cli.inputs import Run
from wfnet.cli.option_files import fill_from_files
from wfnet.cli.runs import read_run
from wfnet.deployment import onnx_logits
from wfnet.report.figures.style import AFTER, BEFORE, picture
from wfnet.services.files import write_json
from wfnet.split import split_network

SHOWN = ("dalmatian", "strawberry", "spoonbill", "cannon")
BEST = 5


def top(logits: Tensor) -> list[list[Any]]:
    """Returns name and probability of the five likeliest classes."""
    chances, classes = logits.softmax(0).topk(BEST)
    names = ImageNetInfo("imagenet-1k")
    pairs = zip(classes.tolist(), chances.tolist(), strict=True)
    return [[names.index_to_description(k).partition(",")[0], round(p, 4)] for k, p in pairs]


@torch.inference_mode()
def examine(run: Path) -> dict[str, Any]:
    """Runs every photograph under every row that was untrained, and compares the exports."""
    work_on = Run(fill_from_files(build_parser(), ["evaluate", str(run), "-j0"]))
    net, base = work_on.network()
    data = work_on.images(base).test
    images, labels = torch.stack([data[i][0] for i in range(len(data))]), data.labels
    rows = list(work_on.untrained)
    base.to(memory_format=torch.channels_last)  # as the network: other layouts round otherwise
    before = base(images)
    others = [k for k in range(net.num_classes) if k not in rows]
    net.fuse = False
    unfused = net(images[:4], labels[:4])
    exact = {
        "original": torch.equal(net(images, None), before),
        "rows_without_images": all(
            bool(f[others].eq(net.alpha_init).all()) for f in net.filter_parameters()
        ),
        "row_without_images": _difference(net(images[:4], others[0]), before[:4]),
    }
    net.fuse = True
    split = split_network(net, images)  # what lies in front of the masks runs once an image
    features = split.front(images)
    under = {row: split.net(features, row) for row in rows}
    own = torch.stack([under[k][i] for i, k in enumerate(labels.tolist())])
    row = rows[0]
    exact |= {
        "fused": _difference(own[:4], unfused),
        "baked": _difference(net.bake(row).eval()(images), under[row]),
    }
    if (run / "filtered.onnx").is_file():
        exact["onnx"] = _difference(onnx_logits(run / "filtered.onnx")(images, labels), own)
    right = {k: logits.argmax(1).eq(labels)[labels != k] for k, logits in under.items()}
    photographs = [
        {"name": data.classes[k], "before": top(before[i]), "after": top(own[i])}
        for i, k in enumerate(labels.tolist())
    ]
    return {
        "provenance": provenance("cpu", ["benchmarks/photographs.py", "RUN"]),
        "model": work_on.options.model,
        "untraining": read_run(run)["untraining"],
        "mask_from": read_run(run)["options"]["mask_from"],
        "seconds": read_run(run)["result"]["seconds"],
        "differences": exact,
        "right_before": before.argmax(1).eq(labels).float().mean().item(),
        "right_under_own_row": own.argmax(1).eq(labels).float().mean().item(),
        "among_five_under_own_row": _among_five(own, labels),
        "others_right": torch.cat([*right.values()]).float().mean().item(),
        "photographs": photographs,
    }


def _difference(found: Tensor, expected: Tensor) -> float:
    """Returns the largest difference as a part of the largest logit."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def _among_five(logits: Tensor, labels: Tensor) -> float:
    return logits.topk(BEST, 1).indices.eq(labels[:, None]).any(1).float().mean().item()


def draw(record: dict[str, Any], folder: Path, path: Path) -> None:
    """Draws some photographs with the five likeliest classes before and after.

    Args:
        folder: with a folder of photographs for each class.
    """
    found = {one["name"]: one for one in record["photographs"]}
    with picture(path, 12.0, 5.6) as figure:
        for axes, name in zip(figure.subplots(3, len(SHOWN)).T, SHOWN, strict=True):
            with Image.open(sorted((folder / name).iterdir())[0]) as image:
                axes[0].imshow(image.convert("RGB"))
            axes[0].set(title=name, xticks=[], yticks=[])
            parts = ("before", BEFORE), ("after", AFTER)
            for axis, (part, color) in zip(axes[1:], parts, strict=True):
                names, chances = zip(*found[name][part][::-1], strict=True)
                axis.barh(range(BEST), [100 * chance for chance in chances], color=color)
                axis.set(xlim=(0, 100), yticks=range(BEST), yticklabels=names)
                axis.set_title(f"{part}, %", fontsize=9)
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(128)
    small.save(path, optimize=True)


def main(run: str) -> None:
    record = examine(Path(run))
    write_json(RESULTS / "photographs.json", record)
    folder = Path(read_run(run)["options"]["data_dir"]) / "test"
    draw(record, folder, RESULTS / "photographs.png")
    shown = ("right_before", "right_under_own_row", "among_five_under_own_row", "others_right")
    print({name: record[name] for name in (*shown, "differences")})


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(sys.argv[1])
