"""All-class evaluation: every image under every row, beside running one class after the other.

    python benchmarks/bench_eval.py --model resnet18 --image-size 64 --images 32 --classes 20

Columns, all of which see `images x classes` samples and return the predicted class of each:

    baked      one plain model per class (`bake`), class after class
    unfused    a mixed batch of (image, row) pairs, layer by layer
    fused      the same through the fused plan: what comes before the first mask once per image
    plain      the original network on as many samples, without any row: the least without sharing

Interleaved, medians, pairs per second, peak memory that a pass adds. Columns must agree in their
predictions. Writes JSON with raw timings, versions, commit and command.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from script import CUDA, begin, make_parser
from torch import Tensor, nn

import wfnet
from wfnet.benchmarking.timing import interleaved, peak_mebibytes, timed
from wfnet.cli.classifier import create_classifier
from wfnet.services.files import write_json

COLUMNS = ("baked", "unfused", "fused", "plain")


def predictions(args: argparse.Namespace, device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """Returns one function per column: predicted classes ``[images, classes]``."""
    torch.manual_seed(args.seed)
    net = wfnet.WFNet(
        create_classifier(
            args.model, args.classes, in_channels=3, image_size=args.image_size, seed=args.seed
        ),
        args.classes,
    )
    for parameter in net.filter_parameters():
        nn.init.normal_(parameter, 2.0, 1.0)
    net = net.to(device).to(memory_format=torch.channels_last).eval()
    images = torch.randn(args.images, 3, args.image_size, args.image_size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    source = torch.arange(args.images, device=device).repeat_interleave(args.classes)
    rows = torch.arange(args.classes, device=device).repeat(args.images)
    parts = torch.arange(len(rows), device=device).split(args.batch_size)
    plain = net.bake(None)

    def in_batches(predict: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.cat([predict(part).argmax(1) for part in parts]).unflatten(
            0, (args.images, args.classes)
        )

    def filtered(part: Tensor) -> Tensor:
        first, last = int(source[part[0]]), int(source[part[-1]])
        return net(images[first : last + 1], rows[part], source[part] - first)

    def run(fuse: bool) -> Tensor:
        net.fuse = fuse
        if fuse and net.fused_network(images[:2]) is None:
            raise SystemExit("the network runs unfused; the line above says why")
        return in_batches(filtered)

    def baked() -> Tensor:
        found = []
        for label in range(args.classes):
            model = net.bake(label)
            found.append(torch.cat([model(x).argmax(1) for x in images.split(args.batch_size)]))
        return torch.stack(found, 1)

    return {
        "baked": baked,
        "unfused": lambda: run(False),
        "fused": lambda: run(True),
        "plain": lambda: in_batches(lambda part: plain(images[source[part]])),
    }


def agreement(found: dict[str, Callable[[], Tensor]], dtype: torch.dtype) -> dict[str, float]:
    """Returns the share of the samples for which a column predicts the class that `unfused` does.

    Random weights leave logits close to each other: in 16 bits the largest one may change.

    Raises:
        SystemExit: if a column differs in more than 1% of the samples, in 16 bits 25%.
    """
    least = 0.99 if dtype is torch.float32 else 0.75
    expected = found["unfused"]()
    same = {
        name: (found[name]() == expected).double().mean().item()
        for name in ("baked", "fused")
        if name in found
    }
    for name, share in same.items():
        if share < least:
            raise SystemExit(f"{name} agrees with unfused on {share:.1%} of the samples only")
    return same


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, repeats=5, dtype="bfloat16" if CUDA else "float32")
    add = parser.add_argument
    add("--model", default="resnet18", help="timm name, torchvision/, small/NAME")
    add("--image-size", type=int, default=224 if CUDA else 64)
    add("--images", type=int, default=256 if CUDA else 16)
    add("--classes", type=int, default=1000 if CUDA else 20)
    add("-b", "--batch-size", type=int, default=1024 if CUDA else 80)
    add("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    record = begin("bench_eval", args, argv)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    autocast = torch.autocast(device.type, dtype, enabled=dtype is not torch.float32)
    record["pairs"] = pairs = args.images * args.classes
    with torch.inference_mode(), autocast:
        calls = predictions(args, device)
        record["agreement"] = agreement(calls, dtype)
        calls["plain"]()
        times, failed = interleaved(calls, args.repeats, lambda call: timed(call, device))
        if failed:
            raise SystemExit(f"columns failed: {failed}")
        record["milliseconds"] = times
        memory = {name: peak_mebibytes(call, device) for name, call in calls.items()}
    record["peak_mebibytes"] = memory
    if args.output:
        write_json(args.output, record)
    print(
        f"{args.model}, {args.image_size} px, {args.images} images x {args.classes} classes, "
        f"{record['device']}"
    )
    print("column          ms      least   largest    pairs/s   x baked      MiB")
    base = statistics.median(times["baked"])
    for name, values in times.items():
        median = statistics.median(values)
        print(
            f"{name:10}{median:9.1f}{min(values):10.1f}{max(values):10.1f}"
            f"{pairs / median * 1e3:11,.0f}{base / median:10.2f}{memory[name]:9.1f}"
        )
    return record


if __name__ == "__main__":
    main()
