"""What docs/scale.md says of filters in 16 bits, of several ranks, and of evaluating many classes.

    python benchmarks/scale_evidence.py                    all three, five minutes on one core
    python benchmarks/scale_evidence.py --parts ranks

    rounding    digits, ResNet-8: filters in fp32, in bfloat16 with stochastic rounding, and in
                bfloat16 rounded to nearest: validation loss, Acc_r and Acc_f of the test part
    ranks       digits, ResNet-8: filters after a few steps of two ranks and of one process, in
                fp32 and fp64: the largest difference
    evaluation  all rows of many classes: seconds of one core, and the memory that it adds

Writes benchmarks/results/scale_cpu.json after every part; `python benchmarks/render.py` puts the
numbers into the document. Parts that are not asked for stay as they are in the file.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from script import RESULTS
from torch import Tensor

import wfnet
from wfnet import UntrainConfig, models, training
from wfnet.benchmarking.provenance import provenance
from wfnet.data import Batch, Splits, TensorImages, open_data
from wfnet.services.files import write_json
from wfnet.untraining import optimizers
from wfnet.wrapping import wrap

PARTS = ("rounding", "ranks", "evaluation")


@contextmanager
def rounding_to_nearest() -> Iterator[None]:
    """The optimiser without its random bits."""
    stochastic = optimizers.stochastic_round
    optimizers.stochastic_round = lambda values, dtype, *key: values.to(dtype)
    try:
        yield
    finally:
        optimizers.stochastic_round = stochastic


def classifier(seed: int) -> tuple[torch.nn.Module, Splits]:
    """A ResNet-8 trained on the digits, and the digits."""
    data = open_data("digits", seed=seed)
    base = models.create("resnet", data.num_classes, seed=seed)
    settings = training.SMALL_MODEL_SETTINGS["resnet"]
    training.fit_classifier(base, data.train, seed=seed, progress=False, **settings)
    return base, data


def rounding(seeds: list[int], steps: int) -> dict:
    runs = []
    for seed in seeds:
        base, data = classifier(seed)
        config = UntrainConfig.recipe("balanced", data.num_classes, seed=seed, steps=steps)
        for name in ("float32", "bfloat16", "nearest"):
            dtype = torch.float32 if name == "float32" else torch.bfloat16
            net = wrap(base, data.num_classes, filter_dtype=dtype)
            with rounding_to_nearest() if name == "nearest" else nullcontext():
                result = wfnet.untrain(net, data.train, data.validation, config, progress=False)
            found = wfnet.evaluate(net, data.test, progress=False, seed=seed)
            runs.append(
                {
                    "seed": seed,
                    "filters": name,
                    "steps": result.steps,
                    "validation_loss": result.best.loss,
                    "acc_r": 100 * found.mean.acc_r,
                    "acc_f": 100 * found.mean.acc_f,
                    "original_acc_r": 100 * found.original.acc_r,
                }
            )
            print(runs[-1], flush=True)
    return {"data": "digits", "network": "ResNet-8", "steps": steps, "runs": runs}


class _InDouble:
    """A data set whose images are fp64."""

    def __init__(self, dataset: TensorImages):
        self.dataset, self.labels, self.classes = dataset, dataset.labels, dataset.classes

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, indices: Tensor) -> Batch:
        batch = self.dataset.batch(indices)
        return Batch(batch.images.double(), batch.labels, batch.indices)


def _few_steps(base: torch.nn.Module, train: TensorImages, dtype: str, steps: int) -> Tensor:
    """All filters after a few steps, on every rank of the group if there is one."""
    net = wrap(copy.deepcopy(base).to(getattr(torch, dtype)), 10)
    config = UntrainConfig.recipe("balanced", 10, steps=steps)
    data = _InDouble(train) if dtype == "float64" else train
    wfnet.untrain(net, data, None, config, progress=False)
    return torch.cat([p.detach().flatten() for p in net.filter_parameters()])


def _rank(rank: int, folder: str, base: torch.nn.Module, train: TensorImages, steps: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    found = {dtype: _few_steps(base, train, dtype, steps) for dtype in ("float32", "float64")}
    if rank == 0:
        torch.save(found, f"{folder}/filters.pt")
    dist.destroy_process_group()


def ranks(steps: int) -> dict:
    base, data = classifier(0)
    found: dict[str, object] = {"data": "digits", "network": "ResNet-8", "steps": steps, "ranks": 2}
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (folder, base, data.train, steps), nprocs=2)
        shared = torch.load(f"{folder}/filters.pt")
    for dtype, filters in shared.items():
        alone = _few_steps(base, data.train, dtype, steps)
        found[f"largest_difference_{dtype}"] = (filters - alone).abs().max().item()
        found[f"largest_movement_{dtype}"] = (alone - wrap(base, 10).alpha_init).abs().max().item()
    print(f"two ranks and one process after {steps} steps: {found}", flush=True)
    return found


def _mebibytes(what: str) -> float:
    """Resident size of this process: VmRSS now, VmHWM its peak (not that of its parent)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"/proc/self/status has no {what}: the evaluation is measured on Linux")


def _evaluate_many(pipe: multiprocessing.connection.Connection, images: int, classes: int) -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(classes).repeat(-(-images // classes))[:images]
    pixels = torch.rand(images, 1, 8, 8, generator=generator)
    data = TensorImages(pixels, labels, [str(label) for label in range(classes)], 0.5, 0.5)
    net = wfnet.WFNet(models.create("resnet", classes, 1, seed=1, width=4), classes, fuse=True)
    before, start, cpu = _mebibytes("VmRSS"), time.perf_counter(), time.process_time()
    wfnet.evaluate(net, data, progress=False)
    pipe.send(
        {
            "images": images,
            "classes": classes,
            "pixels": 8,
            "network": "ResNet-8 of width 4",
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - cpu,
            "mebibytes_before": before,
            "mebibytes_added": _mebibytes("VmHWM") - before,
        }
    )


def evaluation(images: int, classes: int) -> dict:
    """In a process of its own, whose memory is nothing else's."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_evaluate_many, args=(theirs, images, classes))
    child.start()
    theirs.close()
    try:
        found = ours.recv()
    except EOFError:
        raise SystemExit("the evaluation ended early; its message is above") from None
    child.join()
    print(f"evaluation: {found}", flush=True)
    return found


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=300, help="of the runs that are rounded")
    parser.add_argument("--few-steps", type=int, default=6, help="of the runs on two ranks")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--output", type=Path, default=RESULTS / "scale_cpu.json")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    torch.set_num_threads(1)
    record = json.loads(args.output.read_text()) if args.output.exists() else {}
    record["benchmark"] = "scale"
    run = {
        "rounding": lambda: rounding(args.seeds, args.steps),
        "ranks": lambda: ranks(args.few_steps),
        "evaluation": lambda: evaluation(args.images, args.classes),
    }
    for part in args.parts:
        measured_with = provenance(
            "cpu", ["benchmarks/scale_evidence.py", *(sys.argv[1:] if argv is None else argv)]
        )
        record[part] = {**measured_with, **run[part]()}
        write_json(args.output, record)
    return record


if __name__ == "__main__":
    main()
