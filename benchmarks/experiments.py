"""The experiments behind the committed tables, by the product's own commands, one after the other.

    python benchmarks/experiments.py quality                     digits: three networks, three seeds
    python benchmarks/experiments.py quality --untrain --recipe paper
    python benchmarks/experiments.py tables --recipe digits/resnet      ten minutes of a core
    python benchmarks/experiments.py trust --run demo --classes 0 3 5 8

    quality   trains a classifier (`wfnet train`), untrains all classes at once, evaluates all rows
              on the test part, for every network and seed; the seed is that of split, base and
              untraining
    tables    `wfnet train`, `untrain`, `baseline` and `evaluate --tables` with one recipe
    trust     `wfnet trust` of a finished run, at several thresholds of pruning, beside networks
              that `wfnet baseline` retrains with several seeds

Options of one command go on after its name: --train --epochs 24, --untrain --steps 300,
--evaluate --published mnist/resnet18, --baseline --methods retrained, --trust --cut-output.
A command that has ended is not repeated when the experiment is called again. Writes the results
of the commands as JSON, with versions, commit and the commands.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from script import RESULTS

from wfnet.benchmarking.provenance import commit, provenance
from wfnet.cli import main as wfnet
from wfnet.cli.train import BASE_NAME
from wfnet.services.files import write_json

COMMANDS = ("train", "untrain", "evaluate", "baseline", "trust")
_MEANS = ("original_acc_r", "acc_r", "acc_r_gap", "acc_f", "acc_f_worst_class", "steps")


class Commands:
    """Runs commands of wfnet and keeps below ``folder`` which of them have ended."""

    def __init__(self, folder: Path, more: dict[str, list[str]]):
        self.folder, self.more = folder, more
        self.record = folder / "finished.json"
        self.finished: dict[str, Any] = {}
        if self.record.is_file():
            self.finished = json.loads(self.record.read_text())

    def run(self, name: str, *words: object, key: str | None = None, again: bool = False) -> None:
        """Runs ``wfnet NAME WORDS`` with the options that were given for it.

        Args:
            key: of a command that runs several times.
            again: whether it is repeated.

        Raises:
            SystemExit: if it fails.
        """
        command = [name, *map(str, words), *self.more.get(name, ())]
        key = key or name
        if not again and self.finished.get(key, {}).get("command") == command:
            return
        started, cpu = time.perf_counter(), time.process_time()
        if wfnet(command):
            raise SystemExit(f"wfnet {shlex.join(command)} failed")
        self.finished[key] = {
            "command": command,
            "commit": commit(),
            "seconds": round(time.perf_counter() - started, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
        }
        write_json(self.record, self.finished)

    def shown(self) -> dict[str, Any]:
        """Returns the commands without the folder of this machine."""
        return json.loads(json.dumps(self.finished).replace(str(self.folder), "FOLDER"))


def quality(args: argparse.Namespace) -> dict[str, Any]:
    """Trains, untrains and evaluates every network with every seed; JSON after every run."""
    record: dict[str, Any] = {"runs": [], "summary": []}
    for network, seed in ((n, s) for n in args.networks for s in args.seeds):
        folder = args.folder / f"{network}-{seed}"
        commands = Commands(folder, args.more)
        base, run = folder / "base", folder / "run"
        given = [*args.data, "--model", f"small/{network}", "--seed", seed]
        commands.run("train", *given, "--output", base, "--force")
        commands.run(
            "untrain", *given, "--checkpoint", base / BASE_NAME, "--output", run, "--force"
        )
        commands.run("evaluate", run, *args.data, "--no-figures")
        record["runs"].append(run_of(run, network, seed) | {"commands": commands.shown()})
        record["summary"] = summarise(record["runs"])
        write_json(args.output, {"provenance": args.provenance, **record})
    return record


def run_of(folder: Path, network: str, seed: int) -> dict[str, Any]:
    """Returns accuracies in % of a finished run, and its steps."""
    found = json.loads((folder / "evaluation.json").read_text())
    result = json.loads((folder / "config.json").read_text())["result"]
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
    }


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns means over seeds, one record for each network."""
    summary = []
    for network in dict.fromkeys(run["network"] for run in runs):
        chosen = [run for run in runs if run["network"] == network]
        means = {name: statistics.mean(run[name] for run in chosen) for name in _MEANS}
        summary.append({"network": network, "seeds": len(chosen), **means})
    return summary


def tables(args: argparse.Namespace) -> dict[str, Any]:
    """Makes the paper's tables for a recipe, from the training of the classifier on."""
    commands = Commands(args.folder, args.more)
    base, run = args.folder / "base", args.folder / "untrained"
    config = ["--config", args.recipe]
    commands.run("train", "--output", base, *config)
    commands.run("untrain", "--checkpoint", base / BASE_NAME, "--output", run, "--resume", *config)
    if args.more.get("baseline") != ["--methods"]:
        commands.run("baseline", run, *config)
    commands.run("evaluate", run, "--tables", *config, again=True)
    found = json.loads((run / "tables.json").read_text())
    return {"commands": commands.shown(), **found}


def trust(args: argparse.Namespace) -> dict[str, Any]:
    """Runs all checks of a run, and the removability of exports that are pruned."""
    commands = Commands(args.folder, args.more)
    classes = ["--classes", *args.classes] if args.classes else []
    levels = []
    for seed in args.seeds:
        levels.append(args.folder / f"retrained-{seed}")
        # The seed of the networks alone: --seed would draw other training images.
        set_seed = ["--set", f"retrained.seed={seed}"]
        method = ["--methods", "retrained", *classes, *set_seed, "--output", levels[-1]]
        commands.run("baseline", args.run, *method, "--no-relearn", key=f"baseline {seed}")
    found = {}
    for below in (0.0, *args.prune_below):
        output = args.folder / f"trust-{below:g}"
        checks = ["--prune-below", below, *classes, "--output", output]
        checks += ["--retrained", *levels] if below == 0 else ["--checks", "removal"]
        commands.run("trust", args.run, *checks, key=f"trust {below:g}")
        found[f"{below:g}"] = json.loads((output / "trust.json").read_text())
    return {"commands": commands.shown(), "by_prune_below": found}


EXPERIMENTS = {"quality": quality, "tables": tables, "trust": trust}


def parse(argv: list[str]) -> argparse.Namespace:
    """Reads the command line; options after --COMMAND belong to that command of wfnet."""
    starts = [i for i, word in enumerate(argv) if word[:2] == "--" and word[2:] in COMMANDS]
    ends = [*starts, len(argv)]
    more = {
        argv[start].removeprefix("--"): argv[start + 1 : end]
        for start, end in zip(starts, ends[1:], strict=True)
    }
    own = argv[: ends[0]]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--data", default="digits", help="quality: a name, or a folder of images")
    parser.add_argument("--networks", nargs="+", default=["resnet", "vgg", "vit"])
    parser.add_argument("--seeds", nargs="+", type=int, help="default: quality 0 1 2, trust 1 2 3")
    parser.add_argument("--recipe", default="digits/resnet", help="of tables")
    parser.add_argument("--run", type=Path, default=Path("demo"), help="trust: folder of a run")
    parser.add_argument("--classes", nargs="+", help="trust: default all")
    parser.add_argument("--prune-below", type=float, nargs="*", default=[0.1, 0.3, 0.6])
    parser.add_argument("--folder", type=Path, help="of the runs (default: runs/EXPERIMENT)")
    parser.add_argument("--force", action="store_true", help="begin anew")
    parser.add_argument("--output", type=Path, help="JSON file (default: in benchmarks/results)")
    args = parser.parse_args(own)
    args.more = more
    name = {"quality": Path(args.data).name, "tables": args.recipe, "trust": args.run.name}
    name = f"{args.experiment}_{name[args.experiment].replace('/', '_')}"
    args.folder = args.folder or Path("runs", name)
    args.output = args.output or RESULTS / f"{name}.json"
    args.data = ["--data-dir" if Path(args.data).is_dir() else "--data", args.data]
    args.seeds = args.seeds or ([1, 2, 3] if args.experiment == "trust" else [0, 1, 2])
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    if args.force:
        shutil.rmtree(args.folder, ignore_errors=True)
    words = [word.replace(str(args.folder), "FOLDER") for word in argv]
    args.provenance = provenance("cpu", ["benchmarks/experiments.py", *words])
    record = {"provenance": args.provenance, **EXPERIMENTS[args.experiment](args)}
    write_json(args.output, record)
    print(f"written to {args.output}")
    return record


if __name__ == "__main__":
    main()
