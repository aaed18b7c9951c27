"""What an ImageNet classifier sees in photographs, before and after it forgets their classes.

    python benchmarks/photographs.py RUN

RUN is a run of `wfnet untrain --classes` on the photographs of benchmarks/real_data.py. With
RUN/filtered.onnx (`wfnet bake RUN --per-request --onnx RUN/filtered.onnx`) that file is compared,
too. Writes photographs.json and photographs.png to benchmarks/results, of recipe durable
photographs_durable.json.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from script import RESULTS
from timm.data import ImageNetInfo
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from wfnet.benchmarking.provenance import provenance
from wfnet.cli import build_parser
from wfnet.cli.inputs import Run
from wfnet.cli.option_files import fill_from_files
from wfnet.cli.runs import read_run
from wfnet.deployment import Deployment, onnx_logits
from wfnet.head import CUT_LOGIT
from wfnet.network import WFNet
from wfnet.report.figures.style import AFTER, BEFORE, picture
from wfnet.services.files import write_json
from wfnet.split import split_network
from wfnet.trust.attacks.batchnorm_statistics import batchnorm_all

SHOWN = ("dalmatian", "strawberry", "spoonbill", "cannon")
BEST = 5


def top(logits: Tensor) -> list[list[Any]]:
    """Returns name and probability of the five likeliest classes."""
    chances, classes = logits.softmax(0).topk(BEST)
    names = ImageNetInfo("imagenet-1k")
    pairs = zip(classes.tolist(), chances.tolist(), strict=True)
    return [[names.index_to_description(k).partition(",")[0], round(p, 4)] for k, p in pairs]


@torch.no_grad()
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
        "rows_without_images": _untouched(net, others),
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
    cut = net.bake(row, cut_output=True)(images)
    kept = torch.arange(net.num_classes) != row
    exact["cut"] = _difference(cut[:, kept], under[row][:, kept])
    exact["cut_logit_is_constant"] = bool(cut[:, row].eq(CUT_LOGIT).all())
    with torch.enable_grad():  # which channels belong together is read from the graph of autograd
        small = net.bake(row, compact=True)
    exact["compact"] = _difference(small(images), under[row])
    Deployment(small, images[:4]).save_onnx(run / "compact.onnx")
    exact["compact_onnx"] = _difference(onnx_logits(run / "compact.onnx")(images), under[row])
    # All that somebody with these photographs can do without labels.
    theirs = SimpleNamespace(
        unlabelled=SimpleNamespace(images=images), settings=SimpleNamespace(seed=0)
    )
    again = {k: batchnorm_all(net.bake(k), theirs)(images) for k in rows}
    if (run / "filtered.onnx").is_file():
        exact["onnx"] = _difference(onnx_logits(run / "filtered.onnx")(images, labels), own)
    photographs = [
        {"name": data.classes[k], "before": top(before[i]), "after": top(own[i])}
        for i, k in enumerate(labels.tolist())
    ]
    return {
        "provenance": provenance("cpu", ["benchmarks/photographs.py", "RUN"]),
        "model": work_on.options.model,
        "recipe": read_run(run)["options"]["recipe"],
        "untraining": read_run(run)["untraining"],
        "mask_from": read_run(run)["options"]["mask_from"],
        "seconds": read_run(run)["result"]["seconds"],
        "differences": exact,
        "size": [_size(net.bake(row), images), _size(small, images)],
        "right_before": _share(before, labels),
        "among_five_under_own_row": _among_five(own, labels),
        **_right(under, labels),
        "reestimated": {
            "right_before": _share(batchnorm_all(net.bake(None), theirs)(images), labels),
            **_right(again, labels),
        },
        "photographs": photographs,
    }


def _difference(found: Tensor, expected: Tensor) -> float:
    """Returns the largest difference as a part of the largest logit."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def _untouched(net: WFNet, rows: list[int]) -> bool:
    """Whether filters and statistics of these rows are those of a fresh network."""
    found = []
    for name, table in (net.named_filters() | net.named_statistics()).items():
        layer, kind = net.masked_layers[name.rpartition(".")[0]], name.rpartition(".")[2]
        if "pair" not in kind:  # of rows that were untrained
            start = layer.filter_starts().get(kind)
            start = getattr(layer, kind.replace("row", "running")) if start is None else start
            found.append(bool(table[rows].eq(start).all()))
    return all(found)


def _share(logits: Tensor, labels: Tensor) -> float:
    return logits.argmax(1).eq(labels).float().mean().item()


def _right(under: dict[int, Tensor], labels: Tensor) -> dict[str, float]:
    """Returns what part of the photographs is right, of a row's class and of all others."""
    own, others = [], []
    for row, logits in under.items():
        right = logits.argmax(1).eq(labels).float()
        own.append(right[labels == row])
        others.append(right[labels != row])
    found = (torch.cat(part).mean().item() for part in (own, others))
    return dict(zip(("right_under_own_row", "others_right"), found, strict=True))


def _size(model: nn.Module, images: Tensor) -> dict[str, int]:
    with FlopCounterMode(display=False) as counter:
        model(images[:1])
    count = sum(p.numel() for p in model.parameters())
    return {"parameters": count, "flops": counter.get_total_flops()}


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
    durable = record["recipe"] == "durable"
    write_json(RESULTS / f"photographs{'_durable' if durable else ''}.json", record)
    if not durable:
        folder = Path(read_run(run)["options"]["data_dir"]) / "test"
        draw(record, folder, RESULTS / "photographs.png")
    shown = ("right_before", "right_under_own_row", "others_right", "reestimated", "size")
    print({name: record[name] for name in (*shown, "differences")})


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(sys.argv[1])
