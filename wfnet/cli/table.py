"""mean and spread over seeds of several runs: Markdown, CSV, LaTeX

Put the results of several runs side by side. Runs whose settings differ in seeds alone are one
group, with mean and standard deviation over them; baselines, trust checks and shadow rounds of the
runs stand in the same tables. What a run lacks is said, with the command that makes it.

example:
  wfnet table runs/wf-0 runs/wf-1 runs/wf-2
  wfnet table runs/* --output tables
"""

import argparse
from pathlib import Path

from wfnet.cli.options import Parser, add_command
from wfnet.cli.runs import check_writable, read_run
from wfnet.report import run_tables


def add_parser(commands: argparse._SubParsersAction) -> Parser:
    parser = add_command(commands, run, "nothing was written", "[--output DIR] RUN...")
    parser.set_defaults(threads=None)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs")
    parser.group("output").add("--output DIR", "folder for seeds.md, seeds.csv and seeds.tex")
    return parser


def run(options: argparse.Namespace) -> None:
    folders = list(dict.fromkeys(str(Path(name)) for name in options.runs))
    records = {name: read_run(name) for name in folders}
    others = [name for name, record in records.items() if record["command"] != "untrain"]
    if others:
        raise ValueError(f"{others[0]} holds no run of `wfnet untrain`: leave it out")
    if options.output:
        check_writable(Path(options.output))
    groups, missing = run_tables.collect(records)
    print(run_tables.markdown(groups))
    print("mean ± standard deviation over seeds; accuracies and ZRF in %, RT in epochs")
    for sentence in missing:
        print(f"missing: {sentence}")
    if options.output:
        run_tables.write(groups, options.output)
        print(f"\nin {options.output}: seeds.md, seeds.csv, seeds.tex")
