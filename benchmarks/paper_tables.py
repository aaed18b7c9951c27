"""The paper's tables for a recipe, from the training of the classifier on: four commands in a row.

    python benchmarks/paper_tables.py digits/resnet                     ten minutes of a core
    python benchmarks/paper_tables.py digits/vit --methods              no baselines: two minutes
    python benchmarks/paper_tables.py mnist/resnet18 --options --data-dir /data/mnist

runs ``wfnet train``, ``untrain``, ``baseline`` and ``evaluate --tables`` with ``--config RECIPE``
in one folder, and writes the tables with the commands, commit and versions that made them. Given
again it goes on where it stopped: finished commands are not repeated.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path

from wfnet.baselines import METHODS
from wfnet.benchmarking.timing import about, commit
from wfnet.cli import main as wfnet
from wfnet.cli.train import BASE_NAME
from wfnet.services.files import write_json

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="digits/resnet, mnist/vit_tiny, ...")
    parser.add_argument("--folder", type=Path, help="of the runs (default: runs/RECIPE)")
    parser.add_argument("--output", type=Path, help="JSON file (default: in benchmarks/results)")
    parser.add_argument("--published", help="published numbers to stand beside, mnist/resnet18")
    parser.add_argument(
        "--methods", nargs="*", choices=METHODS, help="baselines (default: the recipe's)"
    )
    parser.add_argument(
        "--relearn-batch-norm", choices=("train", "frozen"), default="train",
        help="whether relearning updates running statistics",
    )  # fmt: skip
    parser.add_argument(
        "--options", nargs=argparse.REMAINDER, default=[], help="for all four commands"
    )
    arguments = parser.parse_args()
    folder = arguments.folder or Path("runs", arguments.recipe.replace("/", "-"))
    output = arguments.output or RESULTS / f"tables_{arguments.recipe.replace('/', '_')}.json"
    base, run = folder / "base", folder / "untrained"
    config = ["--config", arguments.recipe, *arguments.options]
    published = ["--published", arguments.published] if arguments.published else []
    measured = ["--relearn-batch-norm", arguments.relearn_batch_norm]
    methods = [] if arguments.methods is None else ["--methods", *arguments.methods]
    commands = {
        "train": ["train", "--output", base, *config],
        "untrain": [
            "untrain", "--checkpoint", base / BASE_NAME, "--output", run, "--resume", *config,
        ],
        "baseline": ["baseline", run, *methods, *measured, *config],
        "evaluate": ["evaluate", run, "--tables", *published, *measured, *config],
    }  # fmt: skip
    if arguments.methods == []:
        del commands["baseline"]
    record = folder / "finished.json"
    finished = json.loads(record.read_text()) if record.is_file() else {}
    for name, command in commands.items():
        command = [str(part) for part in command]
        if finished.get(name, {}).get("command") == command and name != "evaluate":
            continue
        started, cpu = time.perf_counter(), time.process_time()
        if wfnet(command):
            raise SystemExit(f"wfnet {shlex.join(command)} failed")
        finished[name] = {
            "command": command,
            "commit": commit(),
            "seconds": round(time.perf_counter() - started, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
        }
        write_json(record, finished)
    tables = json.loads((run / "tables.json").read_text())
    shown = json.dumps(finished).replace(folder.as_posix(), "FOLDER")
    words = [word.replace(str(folder), "FOLDER") for word in sys.argv[1:]]
    made = {**about("cpu", ["benchmarks/paper_tables.py", *words]), "commands": json.loads(shown)}
    write_json(output, {"provenance": made, **tables})
    print(f"written to {output}")


if __name__ == "__main__":
    main()
