"""Quality of unlearning: `wfnet train`, `untrain` and `evaluate` for every network and seed.

    python benchmarks/quality.py                       digits: three networks, three seeds
    python benchmarks/quality.py --untrain --recipe paper

All classes are untrained at once and evaluated on the test part; the seed is that of split, base
and untraining. Options of one command go on after its name: --train --epochs 24, --untrain --steps
300. A run that has ended is not repeated when the script is called again. Writes accuracies as
JSON, with versions, commit and the commands.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

from script import RESULTS

from wfnet.benchmarking.provenance import provenance
from wfnet.cli import main as wfnet
from wfnet.cli.train import BASE_NAME
from wfnet.services.files import write_json

COMMANDS = ("train", "untrain", "evaluate")
_MEANS = ("original_acc_r", "acc_r", "acc_r_gap", "acc_f", "acc_f_worst_class", "steps")


def run(args: argparse.Namespace, network: str, seed: int) -> dict[str, Any]:
    """Runs the commands for one network and seed, unless they have ended; returns accuracies in %.

    Raises:
        SystemExit: if a command fails.
    """
    folder = args.folder / f"{network}-{seed}"
    base, untrained = folder / "base", folder / "run"
    given = [*args.data, "--model", f"small/{network}", "--seed", seed]
    words = {
        "train": [*given, "--output", base, "--force"],
        "untrain": [*given, "--checkpoint", base / BASE_NAME, "--output", untrained, "--force"],
        "evaluate": [untrained, *args.data, "--no-figures"],
    }
    commands = [[name, *map(str, words[name]), *args.more.get(name, ())] for name in COMMANDS]
    finished = folder / "finished.json"
    if not finished.is_file() or json.loads(finished.read_text()) != commands:
        for command in commands:
            if wfnet(command):
                raise SystemExit(f"wfnet {shlex.join(command)} failed")
        write_json(finished, commands)
    found = json.loads((untrained / "evaluation.json").read_text())
    result = json.loads((untrained / "config.json").read_text())["result"]
    before, after = found["original"], found["mean"]
    return {
        "network": network,
        "seed": seed,
        "original_acc_r": 100 * before["acc_r"],
        "original_acc_f": 100 * before["acc_f"],
        "acc_r": 100 * after["acc_r"],
        "acc_f": 100 * after["acc_f"],
        "acc_f_worst_class": 100 * max(one["acc_f"] for one in found["classes"]),
        "acc_r_gap": 100 * (after["acc_r"] - before["acc_r"]),
        "zrf": after["zrf"],
        **{name: result[name] for name in ("steps", "best_step", "stopped_early", "seconds")},
        "commands": [shlex.join(c).replace(str(args.folder), "FOLDER") for c in commands],
    }


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns means over seeds, one record for each network."""
    summary = []
    for network in dict.fromkeys(run["network"] for run in runs):
        chosen = [run for run in runs if run["network"] == network]
        means = {name: statistics.mean(run[name] for run in chosen) for name in _MEANS}
        summary.append({"network": network, "seeds": len(chosen), **means})
    return summary


def parse(argv: list[str]) -> argparse.Namespace:
    """Reads the command line; options after --COMMAND belong to that command of wfnet."""
    starts = [i for i, word in enumerate(argv) if word[:2] == "--" and word[2:] in COMMANDS]
    ends = [*starts, len(argv)]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="digits", help="a name, or a folder of images")
    parser.add_argument("--networks", nargs="+", default=["resnet", "vgg", "vit"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, help="of the runs (default: runs/quality_DATA)")
    parser.add_argument("--output", type=Path, help="JSON file (default: in benchmarks/results)")
    args = parser.parse_args(argv[: ends[0]])
    args.more = {
        argv[start].removeprefix("--"): argv[start + 1 : end]
        for start, end in zip(starts, ends[1:], strict=True)
    }
    name = f"quality_{Path(args.data).name}"
    args.folder = args.folder or Path("runs", name)
    args.output = args.output or RESULTS / f"{name}.json"
    args.data = ["--data-dir" if Path(args.data).is_dir() else "--data", args.data]
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    words = [word.replace(str(args.folder), "FOLDER") for word in argv]
    record = {"provenance": provenance("cpu", ["benchmarks/quality.py", *words]), "runs": []}
    for network, seed in ((n, s) for n in args.networks for s in args.seeds):
        record["runs"].append(run(args, network, seed))
        record["summary"] = summarise(record["runs"])
        write_json(args.output, record)
    print(f"written to {args.output}")
    return record


if __name__ == "__main__":
    main()
