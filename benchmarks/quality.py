"""How well untraining forgets and retains: networks and seeds, evaluated on test images.

    python benchmarks/quality.py                              digits: resnet, vgg, vit; 3 seeds
    python benchmarks/quality.py --recipe paper               the paper's recipe beside it
    python benchmarks/quality.py --data glyphs100 --noise 0.3 --networks resnet --seeds 0
    python benchmarks/quality.py --data /images --networks resnet   an image folder, at 32 pixels

For every network and seed: trains a base classifier, untrains all classes at once, evaluates all
rows on the test part. The seed is that of the split, the base and the untraining. Filters are
chosen on the validation part; nothing is chosen on the test part.

Writes JSON after every run: accuracies in %, settings, seconds, versions, commit and command.
"""

from __future__ import annotations

import argparse
import ast
import json
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import wfnet
from wfnet import UntrainConfig, models, training
from wfnet.benchmarking.timing import about
from wfnet.data import Splits, open_data
from wfnet.data.glyphs import glyphs
from wfnet.services.files import write_json
from wfnet.wrapping import wrap

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    output = arguments.output or default_output(arguments)
    made = about("cpu", ["benchmarks/quality.py", *sys.argv[1:]])
    made["units"] = "acc_* in %, means over classes; seconds of wall time on a shared machine"
    report: dict[str, Any] = {"provenance": made, "runs": [], "summary": []}
    report["runs"] = earlier_runs(output, report["provenance"]["commit"], arguments)
    for network in arguments.networks:
        for seed in arguments.seeds:
            report["runs"].append(one_run(network, seed, arguments))
            report["runs"].sort(key=lambda run: (run["network"], run["seed"]))
            report["summary"] = summarise(report["runs"])
            write_json(output, report)
    print(table(report["summary"]))
    print(f"written to {output}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="digits", help="a name known to open_data, or a folder")
    parser.add_argument("--per-class", type=int, help="glyphs: images rendered for each class")
    parser.add_argument("--noise", type=float, help="glyphs: strength of noise (0.15 to 0.6)")
    parser.add_argument("--networks", nargs="+", default=["resnet", "vgg", "vit"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--width", type=int, help="width of the networks")
    parser.add_argument("--epochs", type=int, help="epochs of the base classifier")
    parser.add_argument("--recipe", default="balanced", choices=("balanced", "paper"))
    parser.add_argument("--alpha-init", type=float, help="start of the filters, for all networks")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help="changes to single settings"
    )
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    arguments.changes = {}
    for item in arguments.set:
        name, separator, value = item.partition("=")
        if not separator:
            parser.error(f"--set takes NAME=VALUE, got {item!r}")
        try:
            arguments.changes[name] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            arguments.changes[name] = value
    return arguments


def default_output(arguments: argparse.Namespace) -> Path:
    suffix = "" if arguments.recipe == "balanced" else f"_{arguments.recipe}"
    return RESULTS / f"quality_{Path(arguments.data).name}{suffix}.json"


def earlier_runs(output: Path, commit: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs of other networks and seeds that the same commit wrote to the same file."""
    if not output.exists():
        return []
    earlier = json.loads(output.read_text())
    if earlier["provenance"]["commit"] != commit:
        return []
    return [
        run
        for run in earlier["runs"]
        if run["network"] not in arguments.networks or run["seed"] not in arguments.seeds
    ]


def read_data(seed: int, arguments: argparse.Namespace) -> Splits:
    if arguments.data.startswith("glyphs"):
        given = {"per_class": arguments.per_class, "noise": arguments.noise}
        given = {name: value for name, value in given.items() if value is not None}
        return glyphs(int(arguments.data.removeprefix("glyphs")), seed=seed, **given)
    if Path(arguments.data).is_dir():
        return open_data(arguments.data, image_size=32, channels=1, mean=(0.5,), std=(0.25,))
    return open_data(arguments.data, seed=seed)


def one_run(network: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Base classifier, untraining and evaluation of one network and seed."""
    data = read_data(seed, arguments)
    size = {} if arguments.width is None else {"width": arguments.width}
    base = models.create(network, data.num_classes, seed=seed, **size)
    settings = dict(training.SMALL_MODEL_SETTINGS[network])
    if arguments.epochs is not None:
        settings["epochs"] = arguments.epochs
    fitted = training.fit_classifier(base, data.train, seed=seed, progress=False, **settings)

    net = wrap(base, data.num_classes, arguments.recipe, arguments.alpha_init)
    config = UntrainConfig.recipe(
        arguments.recipe, data.num_classes, seed=seed, **arguments.changes
    )
    started = time.process_time()
    result = wfnet.untrain(net, data.train, data.validation, config, progress=False)
    cpu_seconds = time.process_time() - started
    rows = None if data.num_classes <= 30 else 10  # Acc_r from some rows of each image
    evaluated = wfnet.evaluate(net, data.test, progress=False, seed=seed, retained_rows=rows)

    forgotten = [100 * record.acc_f for record in evaluated.records]
    run = {
        "data": data.name,
        "network": network,
        "seed": seed,
        "classes": data.num_classes,
        "images": {"train": len(data.train), "validation": len(data.validation),
                   "test": len(data.test)},
        "masked_channels": sum(p.shape[1] for p in net.filter_parameters()),
        "alpha_init": net.alpha_init,
        "normalize_gate": net.normalize_gate,
        "base": {"seconds": fitted.seconds, **settings, **size},
        "original_acc_r": 100 * evaluated.original.acc_r,
        "original_acc_f": 100 * evaluated.original.acc_f,
        "acc_r": 100 * evaluated.mean.acc_r,
        "acc_f": 100 * evaluated.mean.acc_f,
        "acc_f_worst_class": max(forgotten),
        "acc_r_gap": 100 * (evaluated.mean.acc_r - evaluated.original.acc_r),
        "zrf": evaluated.mean.zrf,
        "original_zrf": evaluated.original.zrf,
        "zrf_base": evaluated.zrf_base,
        "evaluated_retained_rows": rows,
        "validation": {"acc_r": 100 * result.best.acc_r, "acc_f": 100 * result.best.acc_f},
        "steps": result.steps,
        "best_step": result.best_step,
        "stopped_early": result.stopped_early,
        "untrain_seconds": result.seconds,
        "untrain_cpu_seconds": cpu_seconds,
        "evaluation_seconds": evaluated.seconds,
        "config": asdict(config),
    }  # fmt: skip
    print(table(summarise([run])).splitlines()[-1], f"(seed {seed})", flush=True)
    return run


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds, one record for each network."""
    summary = []
    for network in dict.fromkeys(run["network"] for run in runs):
        chosen = [run for run in runs if run["network"] == network]
        record = {"data": chosen[0]["data"], "network": network, "seeds": len(chosen)}
        for name in ("original_acc_r", "acc_r", "acc_r_gap", "acc_f", "acc_f_worst_class",
                     "steps", "untrain_seconds", "untrain_cpu_seconds"):  # fmt: skip
            record[name] = statistics.mean(run[name] for run in chosen)
        summary.append(record)
    return summary


def table(summary: list[dict[str, Any]]) -> str:
    lines = ["data        network  seeds  original   Acc_r     gap   Acc_f  worst  steps  seconds"]
    for r in summary:
        lines.append(
            f"{r['data']:<11.11} {r['network']:<7}  {r['seeds']:>5}  {r['original_acc_r']:8.2f}  "
            f"{r['acc_r']:6.2f}  {r['acc_r_gap']:+6.2f}  {r['acc_f']:6.2f}  "
            f"{r['acc_f_worst_class']:5.1f}  {r['steps']:5.0f}  {r['untrain_seconds']:7.1f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
