"""How many images a second reach the network, from where, beside the loaders people know.

    python benchmarks/bench_data.py --images 512 --workers 0 2

Makes a folder of JPEG files of ImageNet's average size (500 x 375, about 110 KB; --data-dir takes a
real one), packs the same files into shards, and reads batches at --image-size in random order:

    torchvision   ImageFolder and DataLoader, the transforms that people write
    timm          timm's data set and loader (without its CUDA prefetcher)
    folder        wfnet, image files
    shards        wfnet, WebDataset shards
    first epoch   wfnet with --cache host, while the cache fills
    host, disk, device   wfnet, later epochs from that cache

Prints a table and writes JSON with the raw timings after every repeat. A column whose
package is missing says so.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from image_folders import write_images
from script import begin, make_parser

from wfnet.data import CachedImages, ImageFiles, ImageShards, batches, evaluation_transform
from wfnet.data.shards import find_shards
from wfnet.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from wfnet.services.files import write_json

CLASSES = 8
Epoch = Callable[[int], Iterator[int]]  # number of the epoch -> sizes of batches


def pack(root: Path, packed: Path, per_shard: int = 128) -> None:
    """Writes the files of `root/<class>/` as shards."""
    files = sorted(root.glob("*/*"))
    classes = sorted({path.parent.name for path in files})
    packed.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(files), per_shard):
        with tarfile.open(packed / f"{start // per_shard:05d}.tar", "w") as tar:
            for path in files[start : start + per_shard]:
                key = f"{path.parent.name}-{path.stem}"
                label = str(classes.index(path.parent.name)).encode()
                for name, content in ((f"{key}.jpg", path.read_bytes()), (f"{key}.cls", label)):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def ours(dataset: object, args: argparse.Namespace, workers: int) -> Epoch:
    def epoch(number: int) -> Iterator[int]:
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(number))
        for batch in batches(dataset, order.split(args.batch_size), workers):
            yield len(batch.images.to(args.device))

    return epoch


def torchvision_epoch(root: Path, args: argparse.Namespace, workers: int) -> Epoch:
    from torchvision import datasets, transforms

    transform = transforms.Compose(
        [
            transforms.Resize(int(args.image_size / 0.875), transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(args.image_size),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    loader = torch.utils.data.DataLoader(
        datasets.ImageFolder(root, transform), args.batch_size, shuffle=True, num_workers=workers
    )
    return lambda number: (len(images.to(args.device)) for images, _ in loader)


def timm_epoch(root: Path, args: argparse.Namespace, workers: int) -> Epoch:
    import timm.data

    loader = timm.data.create_loader(
        timm.data.create_dataset("", root=str(root)),
        (3, args.image_size, args.image_size),
        args.batch_size,
        use_prefetcher=False,
        interpolation="bicubic",
        crop_pct=0.875,
        num_workers=workers,
        persistent_workers=False,
        device=torch.device(args.device),
    )
    return lambda number: (len(images.to(args.device)) for images, _ in loader)


def columns(root: Path, folder: Path, args: argparse.Namespace, workers: int) -> dict[str, Epoch]:
    """Returns one epoch per column; those of a missing package are left out."""
    transform = evaluation_transform(args.image_size)
    files = ImageFiles(root, transform)
    shards = ImageShards(find_shards(folder, "shards"), transform)

    def cached(place: str) -> CachedImages:
        return CachedImages(
            files,
            place,
            args.image_size,
            IMAGENET_MEAN,
            IMAGENET_STD,
            device=args.device,
            folder=folder / "cache",
        )

    made: dict[str, Epoch] = {}
    for name, make in (("torchvision", torchvision_epoch), ("timm", timm_epoch)):
        try:
            made[name] = make(root, args, workers)
        except ImportError as error:
            print(f"{name}: not run ({error})", file=sys.stderr)
    made["folder"] = ours(files, args, workers)
    made["shards"] = ours(shards, args, workers)
    made["first epoch"] = lambda number: ours(cached("host"), args, workers)(number)
    for place in ("host", "disk", "device"):
        made[place] = ours(cached(place), args, workers)
        for _ in made[place](0):  # fills the cache
            pass
    return made


def rate(epoch: Epoch, number: int) -> float:
    """Returns images per second of one epoch, the start of workers included."""
    start = time.perf_counter()
    images = sum(epoch(number))
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return images / (time.perf_counter() - start)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, repeats=3)
    add = parser.add_argument
    add("--data-dir", type=Path, help="folder <class>/*.jpg instead of made files")
    add("--images", type=int, default=512, help="made files")
    add("--image-size", type=int, default=224)
    add("-b", "--batch-size", type=int, default=64)
    add("--workers", type=int, nargs="+", default=[0, 2])
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    record = begin("bench_data", args, argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        root = args.data_dir or folder / "images"
        if args.data_dir is None:
            names = [f"class{n % CLASSES}/{n:06d}.jpg" for n in range(args.images)]
            write_images(root, names, 375, 500)
        pack(root, folder / "shards")
        sizes = [path.stat().st_size for path in root.glob("*/*")]
        record |= {"files": len(sizes), "mean_bytes": statistics.mean(sizes)}
        results = record["images_per_second"] = {}
        for workers in args.workers:
            epochs = columns(root, folder, args, workers)
            rates = results[str(workers)] = {column: [] for column in epochs}
            for number in range(args.repeats):
                for column, epoch in epochs.items():
                    rates[column].append(rate(epoch, number))
                if args.output:
                    write_json(args.output, record)
    print(
        f"{len(sizes)} JPEG files of {record['mean_bytes'] / 1024:.0f} KiB at {args.image_size} "
        f"px; {record['device']}"
    )
    for workers, rates in results.items():
        base = statistics.median(rates["folder"])
        print(f"\n{workers} workers    images/s       min       max   x folder")
        for column, values in rates.items():
            median = statistics.median(values)
            print(
                f"{column:12} {median:10,.0f} {min(values):9,.0f} {max(values):9,.0f} "
                f"{median / base:10.2f}"
            )
    return record


if __name__ == "__main__":
    main()
