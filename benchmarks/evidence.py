"""What the documents say of quality: networks trained, untrained and measured by wfnet's commands.

    python benchmarks/evidence.py --list             studies, their hours on two cores, their state
    python benchmarks/evidence.py digits             one study; without a name all of them
    python benchmarks/evidence.py digits --networks vit --seeds 0 --recipes durable     a part of it

A command that has ended is not repeated, so a study that was interrupted goes on. Each study writes
mean and spread over its seeds to benchmarks/results/study_NAME.json, with data digest, versions,
commit and commands. Real data come from packages (benchmarks/real_data.py says which).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from script import RESULTS

from wfnet.benchmarking.provenance import commit, provenance
from wfnet.cli import main as wfnet
from wfnet.cli.runs import BASE_NAME, read_run
from wfnet.pretrained import FILTERS_NAME
from wfnet.report import run_tables
from wfnet.services.files import write_json

RUNS = Path("runs/evidence")
RECIPES = {name: ["--recipe", name] for name in ("balanced", "durable", "paper")}
RESNET = {"resnet": ["--model", "small/resnet"]}
SMALL = RESNET | {name: ["--model", f"small/{name}"] for name in ("vgg", "vit")}
VIT_WITH_TOKEN = [
    "--model",
    "small/vit_tiny",
    "--model-kwargs",
    "width=64",
    "depth=4",
    "patch_size=8",
]


@dataclass(frozen=True)
class Study:
    """Networks on one data set.

    Attributes:
        title: as the tables call it.
        data: options that name it.
        networks: their options.
        recipes: options of `wfnet untrain`.
        classes: that are attacked, and unlearned by the baselines; none: neither is run.
        evaluate: more options of `wfnet evaluate`.
        shadows: shadow rounds of the first recipe; 0: none.
        hours: about, on two cores.
    """

    title: str
    data: tuple[str, ...]
    networks: dict[str, list[str]]
    recipes: dict[str, list[str]]
    classes: tuple[int, ...] = ()
    evaluate: tuple[str, ...] = ("--tables",)
    hours: float = 1.0
    shadows: int = 0

    def commands(self, folder: Path, network: str, seed: int, recipes: list[str]) -> Iterator[list]:
        """Yields the commands for one network and seed, in their order."""
        given = [*self.data, *self.networks[network], "--seed", seed]
        base = folder / f"{network}-{seed}" / "base"
        yield ["train", *given, "--output", base, "--force"]
        runs = [self.run(folder, network, seed, recipe) for recipe in recipes]
        for recipe, run in zip(recipes, runs, strict=True):
            start = ["untrain", *given, "--checkpoint", base / BASE_NAME, *self.recipes[recipe]]
            yield [*start, "--output", run, "--force"]
            yield ["evaluate", run, *self.evaluate, "--no-figures"]
        if self.classes:
            classes = ["--classes", *self.classes]
            # They do not depend on the recipe. Closeness compares with two retrained networks.
            first, second = runs[0] / "baselines", runs[0] / "retrained"
            retrained = ["--methods", "retrained"]
            yield ["baseline", runs[0], *classes, *retrained]
            # Another start of the weights; all draws stay as they are.
            again = ["--set", f"retrained.seed={seed + 100}", "--output", second]
            yield ["baseline", runs[0], *classes, *retrained, *again]
            for run in runs:
                others = [second] if run == runs[0] else [first, second]
                yield ["trust", run, *classes, "--retrained", *others]
            yield ["baseline", runs[0], *classes]
            if self.shadows:
                yield ["shadows", runs[0], *classes, "--rounds", self.shadows]

    @staticmethod
    def run(folder: Path, network: str, seed: int, recipe: str) -> Path:
        return folder / f"{network}-{seed}" / recipe


FASHION = ("--data", "mnist", "--data-dir", "/usr/share/datasets/fashion-mnist")
STUDIES = {
    "digits": Study(
        "digits, 10 classes",
        ("--data", "digits"),
        SMALL,
        RECIPES,
        classes=(0, 3, 5, 8),
        hours=4,
        shadows=8,
    ),
    "fashion": Study(
        "Fashion-MNIST, 10 classes",
        FASHION,
        SMALL | {"vit_token": VIT_WITH_TOKEN},
        RECIPES,
        classes=(0, 3, 5, 8),
        evaluate=("--tables", "--eval-per-class", "200"),
        hours=8,
    ),
    "mnist5k": Study(
        "5,000 MNIST digits, 10 classes",
        ("--data", "mnist", "--data-dir", "runs/data/mnist5k"),
        SMALL,
        RECIPES,
        classes=(3, 8),
        hours=3,
    ),
    "elpv": Study(
        "solar cells, 8 classes of 40 to 736 training images",
        ("--data-dir", "runs/data/elpv"),
        {"resnet10t": ["--model", "resnet10t", "--img-size", "96", "--cache", "host"]},
        {name: RECIPES[name] for name in ("balanced", "durable")},
        evaluate=(),
        hours=1,
    ),
    "glyphs100": Study(
        "100 rendered characters",
        ("--data", "glyphs100"),
        RESNET,
        {name: RECIPES[name] for name in ("balanced", "durable")},
        classes=(3, 33, 63, 93),
        evaluate=(),
        hours=3,
    ),
}


def finished(folder: Path) -> list[dict[str, str]]:
    """Returns the commands that have ended in a folder, with the commits that they ran at."""
    path = folder / "finished.json"
    return json.loads(path.read_text()) if path.is_file() else []


def digest(study: Study) -> str | None:
    """Returns the SHA-256 sum of the files of the data; None where a package makes them."""
    if "--data-dir" not in study.data:
        return None
    root, found = Path(study.data[study.data.index("--data-dir") + 1]), hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        found.update(f"{path.relative_to(root)} {path.stat().st_size}\n".encode())
        found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def run_study(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Runs what is missing of a study, and returns its results.

    Raises:
        SystemExit: if a command fails.
    """
    study, folder = STUDIES[name], args.folder / name
    recipes = [recipe for recipe in study.recipes if recipe in (args.recipes or study.recipes)]
    networks = [
        network for network in study.networks if network in (args.networks or study.networks)
    ]
    done, runs = finished(folder), []
    for network in networks:
        for seed in args.seeds:
            for words in () if args.as_is else study.commands(folder, network, seed, recipes):
                command = shlex.join(["wfnet", *map(str, words)]).replace(str(folder), "FOLDER")
                if any(one["command"] == command for one in done):
                    continue
                print(f"\n$ {command}", flush=True)
                if wfnet(list(map(str, words))):
                    raise SystemExit(f"{command} failed")
                done = [*finished(folder), {"command": command, "commit": commit()}]
                write_json(folder / "finished.json", done)
            runs += [study.run(folder, network, seed, recipe) for recipe in recipes]
    ended = [run for run in runs if not args.as_is or (run / FILTERS_NAME).is_file()]
    groups, missing = run_tables.collect({str(run): read_run(run) for run in ended})
    missing += [f"{run} was not untrained" for run in runs if run not in ended]
    return {
        "provenance": provenance("cpu", ["benchmarks/evidence.py", name]),
        "title": study.title,
        "data_sha256": digest(study),
        "commands": done,
        "missing": [sentence.replace(str(folder), "FOLDER") for sentence in missing],
        "groups": [
            {
                "title": group.title.replace(str(folder), "FOLDER"),
                "runs": len(group.runs),
                "values": group.summaries(),
            }
            for group in groups
        ],
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("studies", nargs="*", metavar="NAME", help=", ".join(STUDIES))
    parser.add_argument("--list", action="store_true", help="what there is, and what is finished")
    parser.add_argument("--as-is", action="store_true", help="run nothing: results of what ended")
    parser.add_argument("--networks", nargs="+", help="some networks of a study")
    parser.add_argument("--recipes", nargs="+", help="some recipes")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=RUNS, help="of the runs")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON files")
    args = parser.parse_args(argv)
    unknown = [name for name in args.studies if name not in STUDIES]
    if unknown:
        parser.error(f"there is no study {unknown[0]!r}; studies are {', '.join(STUDIES)}")
    for name in args.studies or STUDIES:
        if args.list:
            study, count = STUDIES[name], len(finished(args.folder / name))
            print(f"{name:10} {study.hours:4} h, {count} commands ended: {study.title}")
            continue
        write_json(args.output / f"study_{name}.json", run_study(name, args))
        print(f"written to {args.output / f'study_{name}.json'}")


if __name__ == "__main__":
    main(sys.argv[1:])
