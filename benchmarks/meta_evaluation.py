"""Do the measures tell good from bad? Networks whose quality is known, judged by every measure.

    wfnet shadows RUN --classes 0 3 5 8 --methods logit_masked bias_shifted random_labels
    python benchmarks/meta_evaluation.py RUN --classes 0 3 5 8

Good are networks retrained without the class with another seed. Bad are the original, with its
logit of the class as it was, masked, or shifted, and one fine-tuned with random labels. All are
models of the shadow rounds of RUN. Trust checks judge those of ``--rounds``, beside networks
retrained in other rounds; measures of ensembles are read from ``shadows.json``. For each measure,
over classes and rounds:

- ``auc``: how probably a bad network is told from a good one by the value alone, in the better
  direction: 0.5 not at all, 1 always;
- ``gap``: difference of means, in units of the mean standard deviation of both.

What is measured is kept beside the output, and the same command goes on there.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from script import RESULTS

from wfnet.benchmarking.provenance import provenance
from wfnet.cli import shadows as command
from wfnet.cli.option_files import fill_from_files
from wfnet.cli.options import make_parser
from wfnet.evaluation.partial import PartialResults
from wfnet.fusion.trace import execution_order
from wfnet.services.files import write_json
from wfnet.services.progress import Progress
from wfnet.shadows import FORGETFUL, ORIGINAL, RETRAINED, ShadowRounds
from wfnet.trust import CHECKS, TrustSettings
from wfnet.trust.membership import roc_auc
from wfnet.trust.subject import Subject, image_readers

GOOD = RETRAINED
BAD = (ORIGINAL, "logit_masked", "bias_shifted", "random_labels")
MOST = 99.0  # the widest gap, and that where neither has any spread
REFERENCES = 2  # retrained networks beside which a model is judged
Values = dict[tuple[str, str], list[float]]  # (measure, method) -> one for each class and round


def measured(
    rounds: ShadowRounds, numbers: Sequence[int], classes: Sequence[int], kept: PartialResults
) -> Values:
    """Returns the trust measures of every method, class and round."""
    values: Values = {}
    methods = (FORGETFUL, GOOD, *BAD)
    settings = TrustSettings()
    with Progress(len(numbers) * len(classes) * len(methods), "judging", True) as bar:
        for number in numbers:
            net = rounds.net(number)
            layers = execution_order(net.model, list(net.masked_layers))
            half = replace(rounds.data, train=rounds.half(number))
            readers = image_readers(half, settings, rounds.workers)
            others = [k for k in range(number % 2, 100, 2) if k != number][:REFERENCES]
            for label in classes:
                subject = None
                for method in methods:
                    key = f"{number} {label} {method}"
                    if kept.left([key]):
                        model = rounds.model(number, method, label)
                        subject = subject or Subject(
                            label,
                            half.num_classes,
                            *readers,
                            layers,
                            settings,
                            model,
                            rounds.model(number, ORIGINAL, label),
                            [rounds.model(k, RETRAINED, label) for k in others],
                        )
                        found = {}
                        for name, check in CHECKS.items():
                            torch.manual_seed(settings.seed)
                            each = check.measure(model, subject)[0]
                            found |= {f"{name}: {what}": value for what, value in each.items()}
                        kept.add(key, found)
                    for measure, value in kept.records[key].items():
                        values.setdefault((measure, method), []).append(value)
                    bar.update()
    return values


def of_ensembles(path: Path, classes: Sequence[int]) -> Values:
    """Returns the measures of ``wfnet shadows`` of every method and class."""
    values: Values = {}
    for row in json.loads(path.read_text())["rows"]:
        if row["index"] in map(str, classes) and row["value"] is not None:
            measure = f"shadows, {row['against']}: {row['measure']} {row['what']}"
            values.setdefault((measure, row["method"]), []).append(row["value"])
    return values


def separation(good: Sequence[float], bad: Sequence[float]) -> dict[str, float]:
    """Returns ``auc`` and ``gap`` between values of good and of bad networks."""
    good, bad = (torch.tensor(values, dtype=torch.float64) for values in (good, bad))
    auc = roc_auc(bad, good)
    spread = math.sqrt((good.var() + bad.var()) / 2)
    difference = (bad.mean() - good.mean()).item()
    direction = (difference > 0) - (difference < 0)
    gap = difference / spread if spread else MOST * direction
    return {"auc": max(auc, 1 - auc), "gap": max(-MOST, min(MOST, gap))}


def table(values: Values) -> list[dict[str, Any]]:
    """Returns a row for each measure: means of good networks and of filters, separations."""
    rows = []
    for measure in dict.fromkeys(measure for measure, _ in values):
        good = values.get((measure, GOOD))
        if good is None or len(good) < 2:  # an attack that does not apply to retrained networks
            continue
        row = {"measure": measure, "values": len(good), "good": sum(good) / len(good)}
        for method in (*BAD, FORGETFUL):
            found = values.get((measure, method))
            if found is not None and len(found) > 1:
                row[method] = {"mean": sum(found) / len(found), **separation(good, found)}
        rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> dict[str, Any]:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a run, with its shadow rounds")
    parser.add_argument("--classes", nargs="+", type=int, required=True)
    parser.add_argument("--rounds", nargs="+", type=int, default=[0, 1], help="that are judged")
    parser.add_argument("--output", type=Path, default=RESULTS / "meta_evaluation.json")
    args = parser.parse_args(argv)
    options = fill_from_files(make_parser((command,)), ["shadows", str(args.run)])
    rounds = command.rounds_of(options)
    about = {**rounds.identity, "seed": rounds.first_seed}
    kept = PartialResults(args.output.with_suffix(".partial.json"), lambda: about)
    values = measured(rounds, args.rounds, args.classes, kept)
    values |= of_ensembles(args.run / "shadows.json", args.classes)
    words = ["benchmarks/meta_evaluation.py", *argv]
    record = {"provenance": provenance("cpu", words), "about": about, "rows": table(values)}
    write_json(args.output, record)
    print(f"written to {args.output}")
    return record


if __name__ == "__main__":
    main()
