"""Time to quality: CPU seconds and samples until all classes of a network are forgotten well.

    python benchmarks/time_to_quality.py                    digits, three seeds
    python benchmarks/time_to_quality.py --data glyphs100 --seeds 0
    python benchmarks/time_to_quality.py --data mnist --data-dir FILES --name fashion
    python benchmarks/time_to_quality.py --ways --images 1 2 5 10 20 50
                                        recipe quick, to its end, with so many images a class alone

A run is over at the first validation with Acc_f <= 0.5% and Acc_r at least that of the original
network less one point; what it has then is confirmed on the test part, every image under its own
row and at most nine others. "Quick, to its end" is the recipe as a user gets it, with its one
validation. Seconds are CPU seconds of the process, one thread, from the start of `wfnet.untrain`
(features, steps and validations), with those of opening the data beside them. Ways that make one
network a class (baselines) are timed on some classes, and multiplied by their number. Writes JSON
after every seed; what is in the file and not measured anew stays there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from script import RESULTS

import wfnet
from wfnet import UntrainConfig, models
from wfnet.baselines import METHODS, Origin, unlearn
from wfnet.benchmarking.provenance import provenance
from wfnet.data import Splits, open_data, select
from wfnet.services.files import write_json
from wfnet.training import SMALL_MODEL_SETTINGS, accuracy, fit_classifier
from wfnet.wrapping import wrap

ACC_F, ACC_R_LOSS = 0.005, 0.01
RETAINED_ROWS = 9  # under which a test image runs beside its own: all of ten classes
TO_END = "quick, to its end"
LAST_STAGE = {"mask_from": 1}
WITHOUT = {"features": "off"}  # every step computes the whole network
# Ways: recipe, arguments of the network, changes of settings; "part": of the recipe's steps.
WAYS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "paper": ("paper", {}, WITHOUT),
    "balanced": ("balanced", {}, WITHOUT),
    "a quarter of the steps": ("balanced", {}, {**WITHOUT, "part": 0.25}),
    "last stage": ("balanced", LAST_STAGE, WITHOUT),
    "last stage, features kept": ("balanced", LAST_STAGE, {"features": "host"}),
    "last stage, features kept, a quarter": (
        "balanced",
        LAST_STAGE,
        {"features": "host", "part": 0.25},
    ),
    "quick": ("quick", {}, {}),
    TO_END: ("quick", {}, {}),
    "quick, rows start open": ("quick", {}, {"saliency": 0.0, "part": 2.0}),
    "durable": ("durable", {}, WITHOUT),
}


class Reached(Exception):
    """The validation images are forgotten and retained well enough."""


def untrain_until(
    way: str, base: torch.nn.Module, data: Splits, original: float, about: Mapping[str, Any]
) -> dict[str, Any]:
    """Untrains until the quality is reached, or to the end; returns what that took, and accuracies
    on the test part."""
    recipe, arguments, changes = WAYS[way]
    classes = len(data.classes)
    if way != TO_END:
        # Fewer images would let a run end by chance; patience would end it before its time.
        images = {"validation_images": max(1000, 10 * classes)}
        changes = {"min_validations": 20, "patience": 1000, **images, **changes}
    changes = {"seed": about["seed"], **changes}
    if about["images_a_class"] is not None:
        changes["images_per_class"] = about["images_a_class"]
    part = changes.pop("part", 1.0)
    net = wrap(base, classes, recipe, **arguments)
    config = UntrainConfig.recipe(recipe, classes, **changes)
    steps = max(1, round(config.total_steps(len(data.train)) * part))
    config = UntrainConfig.recipe(recipe, classes, **changes, epochs=None, steps=steps)
    seen: list[Mapping[str, float]] = []

    def reached() -> bool:
        return seen[-1]["acc_f"] <= ACC_F and seen[-1]["acc_r"] >= original - ACC_R_LOSS

    def log(record: Mapping[str, float]) -> None:
        seen.append(record)
        if way != TO_END and reached():
            raise Reached

    began = time.process_time()
    with contextlib.suppress(Reached):
        wfnet.untrain(net, data.train, data.validation, config, progress=False, log=log)
    seconds = time.process_time() - began
    # The few validation images of a whole run say little: it is judged on the test part.
    return ({} if way == TO_END else {"reached": reached()}) | {
        "cpu_seconds": seconds,
        "steps": seen[-1]["step"],
        "of_steps": steps,
        "samples": seen[-1]["step"] * config.samples,
        **test_accuracies(net, data),
    }


def test_accuracies(net: wfnet.WFNet, data: Splits) -> dict[str, float]:
    net.fuse = True  # what lies in front of the first mask is computed once per image
    rows = min(RETAINED_ROWS, len(data.classes) - 1)
    result = wfnet.evaluate(net, data.test, retained_rows=rows, progress=False)
    before, after = result.original, result.mean
    return {
        "acc_r": 100 * after.acc_r,
        "acc_f": 100 * after.acc_f,
        "original_acc_r": 100 * before.acc_r,
        "confirmed": after.acc_f <= ACC_F and after.acc_r >= before.acc_r - ACC_R_LOSS,
    }


def time_baseline(name: str, base: torch.nn.Module, data: Splits, labels: list[int]) -> dict:
    """Unlearns some classes, a network each; returns the CPU seconds that all would take."""
    origin, scores, began = Origin(base, data.train), [], time.process_time()
    made = [unlearn(name, origin, label, METHODS[name].defaults) for label in labels]
    seconds = (time.process_time() - began) / len(labels) * len(data.classes)
    for label, model in zip(labels, made, strict=True):
        own = data.test.labels == label
        parts = (select(data.test, part.nonzero().flatten()) for part in (~own, own))
        scores.append([100 * accuracy(model, part) for part in parts])
    acc_r, acc_f = map(statistics.fmean, zip(*scores, strict=True))
    return {"cpu_seconds": seconds, "classes_run": len(labels), "acc_r": acc_r, "acc_f": acc_f}


def run(args: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """All ways with the base network of a seed; a record each."""
    began = time.process_time()
    data = open_data(args.data, args.data_dir, seed=seed, test_per_class=args.test_per_class)
    reading = time.process_time() - began
    base = models.create(args.network, len(data.classes), seed=seed)
    settings = SMALL_MODEL_SETTINGS[args.network] | ({"epochs": args.epochs} if args.epochs else {})
    fit_classifier(base, data.train, seed=seed, progress=False, **settings)
    original = accuracy(base, data.validation)
    found = []
    about = {"seed": seed, "images_a_class": None, "reading_seconds": reading}
    about |= {"commit": args.commit, "base_epochs": settings["epochs"]}
    about["test_per_class"] = args.test_per_class
    few = [(TO_END, {**about, "images_a_class": count}) for count in args.images]
    for way, images in [(way, about) for way in args.ways] + few:
        found.append(images | {"way": way} | untrain_until(way, base, data, original, images))
        print(line(found[-1]), flush=True)
    for name in args.baselines:
        found.append(about | {"way": name} | time_baseline(name, base, data, args.labels))
        print(line(found[-1]), flush=True)
    return found


def _key(one: Mapping[str, Any]) -> tuple[Any, ...]:
    return one["seed"], one["way"], one["images_a_class"]


def line(record: Mapping[str, Any]) -> str:
    steps = f"{record['steps']} steps" if "steps" in record else "a network a class"
    end = "" if record.get("reached", True) else ", NOT REACHED"
    few = f", {record['images_a_class']} images a class" if record["images_a_class"] else ""
    return (
        f"seed {record['seed']} {record['way']}{few}: {record['cpu_seconds']:.2f} CPU s, {steps}, "
        f"test Acc_r {record['acc_r']:.2f}, Acc_f {record['acc_f']:.2f}{end}"
    )


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns medians of CPU seconds and means of accuracies over seeds, for each way."""
    found = []
    for way, count in dict.fromkeys((one["way"], one["images_a_class"]) for one in runs):
        same = [one for one in runs if (one["way"], one["images_a_class"]) == (way, count)]
        means = {
            name: statistics.fmean(one[name] for one in same)
            for name in ("acc_r", "acc_f", "original_acc_r", "steps", "samples")
            if name in same[0]
        }
        kept = {
            name: sum(o[name] for o in same) for name in ("reached", "confirmed") if name in same[0]
        }
        seconds = statistics.median(one["cpu_seconds"] for one in same)
        about = {"way": way, "images_a_class": count, "seeds": len(same), "cpu_seconds": seconds}
        found.append(about | means | kept)
    return found


def main(argv: list[str] | None = None) -> dict[str, Any]:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", default="digits", help="name of a data set")
    add("--data-dir", help="folder with its files")
    add("--network", default="resnet", choices=models.SMALL_MODELS)
    add("--epochs", type=int, help="of training the base network")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--ways", nargs="*", choices=WAYS, default=list(WAYS))
    add("--images", nargs="*", type=int, default=[], help="a class, of quick to its end")
    add(
        "--baselines",
        nargs="*",
        choices=METHODS,
        default=[],
        help="beside them, such as random_labels",
    )
    add("--labels", nargs="+", type=int, default=[3, 8], help="classes that baselines unlearn")
    add("--test-per-class", type=int, help="test images of a class, at most")
    add("--name", help="of the data, in the name of the JSON file (default: --data)")
    add("--output", type=Path, help="JSON file (default: in benchmarks/results)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    output = args.output or RESULTS / f"time_to_quality_{args.name or args.data}.json"
    record: dict[str, Any] = {
        "provenance": provenance("cpu", ["benchmarks/time_to_quality.py", *argv]),
        "criterion": {"acc_f": 100 * ACC_F, "acc_r_loss": 100 * ACC_R_LOSS},
        "runs": [],
    }
    args.commit = record["provenance"]["commit"]
    if output.exists():
        record["runs"] = json.loads(output.read_text())["runs"]
    for seed in args.seeds:
        runs = {_key(one): one for one in record["runs"]}
        runs |= {_key(one): one for one in run(args, seed)}
        record["runs"] = list(runs.values())
        record["summary"] = summary(record["runs"])
        write_json(output, record)
    print(f"written to {output}")
    return record


if __name__ == "__main__":
    main()
