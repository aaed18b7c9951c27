"""The errors of all kernels on one device: what a run's smoke tests and tests/gpu measured, summed.

    python benchmarks/numerics.py runs/device --output runs/device/results/numerics.json

device_run.py does this after every stage. A row is one backend (of `cuda`: one set of kernels),
family, dtype and direction, at the smallest shapes (device_smoke.py, errors against fp64 on the
CPU) or at real ones (tests/gpu, errors against fp64 on the device and beside those of eager):

    comparisons, failures       a failure is an error above its limit, NaN included
    largest_error, median_error relative to the norm; those that are no finite numbers left out
    largest_ratio_to_eager      where the limit is eager's error and not a few roundings

`unfinished` names what failed without a comparison: cases that raised, processes that ended early.
Needs Python alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# Families of device_smoke.py by tests of tests/gpu that measure the same.
FAMILIES = {
    "test_conv2d_error": "conv",
    "test_offsets_past_32_bits": "conv",
    "test_eager_agrees_where_nothing_is_masked": "conv",
    "test_linear_error": "linear",
    "test_source_indices": "expansion",
    "test_fused_epilogues_error": "chain",
    "test_chain_error": "chain",
    "test_gate_tables_of_a_network": "gates",
    "test_fused_resnet": "network",
    "test_gradients_of_a_resnet_in_bf16": "network",
}
FORWARD = ("out", "forward", "plain", "logits", "rows", "scale", "scales", "shift", "shifts")
_ABOUT = ("device", "driver", "cuda", "torch", "triton", "wfnet", "commit", "date", "capability")


@dataclass(frozen=True)
class Comparison:
    """One result against the truth; errors that are no finite numbers are None."""

    shapes: str  # smallest, real
    backend: str
    kernels: str | None
    family: str
    dtype: str
    what: str
    error: float | None
    passed: bool
    ratio: float | None = None  # of the error to eager's

    @property
    def direction(self) -> str:
        word = self.what.split()[0]
        if word == "losses":
            return "step"
        return "forward" if word in FORWARD else "backward"

    @property
    def key(self) -> tuple[str, ...]:
        """What its row is; kernels sort as words."""
        return (self.shapes, self.backend, self.kernels or "", self.family, self.dtype,
                self.direction)  # fmt: skip


@dataclass(frozen=True)
class Unfinished:
    """What failed without a comparison that did."""

    name: str
    reason: str


def smoke_results(path: Path) -> Iterator[Comparison | Unfinished]:
    """From a JSON of device_smoke.py."""
    content = json.loads(path.read_text())
    for case in content["cases"]:
        where = content["backend"], content["kernels"], case["family"], case["dtype"]
        for found in case["comparisons"]:
            yield Comparison("smallest", *where, found["what"], found["error"], found["passed"])
        if not case["passed"] and not case["comparisons"]:
            name = f"{path.stem}: {case['case']} {case['dtype']}"
            yield Unfinished(name, case.get("reason", "failed"))


def gpu_results(path: Path) -> Iterator[Comparison | Unfinished]:
    """From a junit XML of tests/gpu."""
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        wrong = False
        for found in case.iter("property"):
            if found.get("name") == "numerics":
                for one in _of_test(case, json.loads(found.get("value"))):
                    wrong = wrong or not one.passed
                    yield one
        for kind in ("failure", "error"):
            for trouble in case.iter(kind):
                if not wrong:
                    first = next(iter((trouble.get("message") or "").splitlines()), kind)
                    yield Unfinished(f"{path.stem}: {case.get('name')}", first)


def _of_test(case: ElementTree.Element, noted: dict) -> Iterator[Comparison]:
    test = case.get("name").partition("[")[0]
    family = FAMILIES.get(test, test.removeprefix("test_"))
    for found in noted["comparisons"]:
        error, eager, ratio = found["error"], found["eager"], None
        if error is not None and eager and 2 * eager >= (found["limit"] or 0.0):
            ratio = error / eager
        yield Comparison("real", noted["backend"], noted["kernels"], family, noted["dtype"],
                         found["what"], error, found["passed"], ratio)  # fmt: skip


def results_in(folder: Path) -> Iterator[Comparison | Unfinished]:
    """From all files of a run's results; one that cannot be read is unfinished itself."""
    readers = (("smoke-*.json", smoke_results), ("tests-*.xml", gpu_results))
    for pattern, read in readers:
        for path in sorted(folder.glob(pattern)):
            try:
                yield from list(read(path))
            except (OSError, ValueError, KeyError, TypeError, ElementTree.ParseError) as error:
                yield Unfinished(path.stem, f"cannot be read: {error}")


def parts_that_ended(stages: Iterable[dict], results: Path) -> Iterator[Unfinished]:
    """Parts of device_run.py's summary that were to compare, and have no file or ended early."""
    for stage in stages:
        if stage.get("kept"):  # of an earlier run, whose files are elsewhere
            continue
        for part in stage["parts"]:
            name, status, code = part["name"], part["status"], part.get("exit_code")
            file = results / f"{name}.json"
            if stage["name"] == "tests":
                file = results / f"tests-{name}.xml"
            elif stage["name"] != "smoke":
                continue
            # Status 1 is that of a comparison that failed.
            whole = file.exists() and (status in ("passed", "skipped") or code in (0, 1))
            if not whole or status == "out of time":
                ended = f"ended with status {code}" if status == "failed" else status
                yield Unfinished(name, ended)


def summed(found: Iterable[Comparison | Unfinished], about: dict[str, object]) -> dict[str, object]:
    """JSON of all rows, in the order of their keys."""
    rows: dict[tuple, list[Comparison]] = {}
    unfinished = []
    for one in found:
        if isinstance(one, Unfinished):
            unfinished.append({"name": one.name, "reason": one.reason})
        else:
            rows.setdefault(one.key, []).append(one)
    return {
        "benchmark": "numerics",
        **{name: about.get(name) for name in _ABOUT},
        "rows": [_row(rows[key]) for key in sorted(rows)],
        "unfinished": unfinished,
    }


def _row(comparisons: Sequence[Comparison]) -> dict[str, object]:
    one = comparisons[0]
    errors = [c.error for c in comparisons if c.error is not None]
    ratios = [c.ratio for c in comparisons if c.ratio is not None]
    return {
        "shapes": one.shapes,
        "backend": one.backend,
        "kernels": one.kernels,
        "family": one.family,
        "dtype": one.dtype,
        "direction": one.direction,
        "comparisons": len(comparisons),
        "failures": sum(not c.passed for c in comparisons),
        "largest_error": max(errors, default=None),
        "median_error": statistics.median(errors) if errors else None,
        "compared_with_eager": len(ratios),
        "largest_ratio_to_eager": max(ratios, default=None),
    }


def write(run: Path, stages: Iterable[dict], output: Path) -> dict[str, object] | None:
    """Sums a run's results up; None if there is nothing to sum."""
    results = run / "results"
    found = [*results_in(results), *parts_that_ended(stages, results)]
    if not found:
        return None
    try:
        about = json.loads((results / "environment.json").read_text())
    except (OSError, ValueError):
        about = {}
    content = summed(found, about)
    part = output.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(output)
    return content


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="the folder of device_run.py's --output")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args(argv)
    try:
        stages = json.loads((arguments.run / "summary.json").read_text())["stages"]
    except (OSError, ValueError, KeyError):
        stages = []
    content = write(arguments.run, stages, arguments.output)
    if content is None:
        print(f"{arguments.run} has no results of device_smoke.py or tests/gpu")
        return 1
    for row in content["rows"]:
        names = (row["shapes"], row["backend"], row["kernels"] or "", row["family"], row["dtype"],
                 row["direction"])  # fmt: skip
        error, ratio = row["largest_error"], row["largest_ratio_to_eager"]
        print(f"{' '.join(filter(None, names)):55}{row['comparisons']:5} comparisons, "
              f"{row['failures']} failures"
              + ("" if error is None else f", largest error {error:.1e}")
              + ("" if ratio is None else f", {ratio:.2f} times eager's"))  # fmt: skip
    for one in content["unfinished"]:
        print(f"unfinished: {one['name']}: {one['reason']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
