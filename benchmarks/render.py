"""Turns the committed results into the tables of README.md.

    python benchmarks/render.py            rewrite it
    python benchmarks/render.py --check    say whether it is out of date; status 1 if it is

A table stands between `<!-- results:NAME -->` and `<!-- end -->` and comes from
`benchmarks/results/*.json` alone, each a run of a script in this folder.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable
from typing import Any

from script import RESULTS, ROOT, markdown_table

README = ROOT / "README.md"
MARKED = re.compile(r"(<!-- results:(\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
# In this order; a file that is not there is a row "not run".
QUALITY = {
    "quality_digits": "digits, 10 classes",
    "quality_letters10": "folder of rendered letters, 10 classes",
    "quality_glyphs100": "rendered characters, 100 classes",
    "quality_glyphs100_hard": "the same with much noise",
    "quality_digits_durable": "recipe `durable`: digits",
    "quality_digits_paper": "for comparison, recipe `paper`: digits",
}
NETWORKS = {"resnet": "ResNet-8", "vgg": "small VGG", "vit": "small ViT"}
STEP_COLUMNS = {
    "loop": "`loop`",
    "grouped": "`grouped`",
    "vmap": "`vmap`",
    "eager": "`eager`",
    "compile": "`compile`",
    "unmasked": "`unmasked`",
    "unmasked_compiled": "`unmasked` compiled",
    "wfnet/eager/unfused": "wfnet, unfused",
    "wfnet/eager/fused": "**wfnet, fused**",
    "wfnet/eager/compiled": "**wfnet, fused and compiled**",
    "wfnet/triton/captured": "**wfnet, Triton, captured**",
    "wfnet/cuda/captured": "**wfnet, CUDA, captured**",
}


_SAME_RUN = ("device", "torch", "commit")
_SAME_SETTINGS = ("dtype", "image_size", "batch_size", "label_expansion", "share_images")
_SAME_SETTINGS += ("classes", "columns")
NOT_RUN = "Not run."


def read(name: str) -> dict[str, Any] | None:
    """Returns a file of results; None if there is none."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def step_files() -> list[dict[str, Any]]:
    """Returns whole-step results of every device; networks measured alike apart are one."""
    found: dict[tuple, dict[str, Any]] = {}
    for path in sorted(RESULTS.glob("step_*.json")):
        content = json.loads(path.read_text())
        key = tuple(content[name] for name in _SAME_RUN)
        key += tuple(str(content["settings"][name]) for name in _SAME_SETTINGS)
        if key not in found:
            found[key] = content
            continue
        networks = found[key]["networks"]
        twice = networks.keys() & content["networks"].keys()
        if twice:
            raise ValueError(f"{path} has {', '.join(sorted(twice))} a second time; keep one")
        networks.update(content["networks"])
    return list(found.values())


def quality() -> str:
    rows = []
    for name, label in QUALITY.items():
        content = read(name)
        if content is None:
            rows.append([label, *["not run"] * 3])
            continue
        for row in content["summary"]:
            seeds = f"{row['seeds']} seed{'s' if row['seeds'] > 1 else ''}"
            network = NETWORKS.get(row["network"].rpartition("/")[2], row["network"])
            rows.append(
                [
                    f"{label}, {network} ({seeds}, {row['steps']:,.0f} steps)",
                    *(f"{row[key]:.2f}" for key in ("original_acc_r", "acc_r", "acc_f")),
                ]
            )
    head = ["data, network", "original: Acc_r", "all classes, one round: Acc_r", "Acc_f"]
    return markdown_table(head, rows)


def _step_cell(column: dict[str, Any] | None) -> str:
    if column is None:
        return "not run"
    if "impossible" in column:
        return "impossible"
    return f"{column['median_ms']:,.1f} ({column['peak_mebibytes']:,.1f})"


def step() -> str:
    """Makes one table per device: rows are columns of the benchmark, columns are networks."""
    parts = []
    for content in step_files():
        settings, networks = content["settings"], content["networks"]
        head = [f"{n}, {one['expanded_samples']} samples" for n, one in networks.items()]
        rows = []
        for column, label in STEP_COLUMNS.items():
            cells = [_step_cell(network["columns"].get(column)) for network in networks.values()]
            if any(cell not in ("not run", "impossible") for cell in cells):
                rows.append([label, *cells])
        floors = [
            (network["expanded_samples"], network["floor_samples_per_second"].get("fused_with_v"))
            for network in networks.values()
        ]
        if any(rate for _, rate in floors):
            cells = [f"{samples / rate * 1e3:,.1f}" if rate else "-" for samples, rate in floors]
            rows.append(["roofline", *cells])
        parts.append(
            f"{content['device']}, {settings['dtype']}, {settings['image_size']} px, "
            f"n = {settings['batch_size']}, M = {settings['label_expansion']}, torch "
            f"{content['torch']}, commit {content['commit']}: milliseconds (peak MiB)\n\n"
            + markdown_table(["", *head], rows)
        )
    return "\n\n".join(parts) or NOT_RUN


def evaluation() -> str:
    content = read("eval_cpu")
    if content is None:
        return NOT_RUN
    settings = content["settings"]
    rows = []
    for name, values in content["milliseconds"].items():
        median, peak = statistics.median(values), content["peak_mebibytes"][name]
        rate = content["pairs"] / median * 1e3
        rows.append([f"`{name}`", f"{median:,.0f}", f"{rate:,.0f}", f"{peak:,.1f}"])
    return (
        f"{settings['model']}, {settings['image_size']} px, {settings['images']} images x "
        f"{settings['classes']} classes, {content['device']}, commit {content['commit']}\n\n"
    ) + markdown_table(["", "ms", "(image, row) pairs per second", "peak MiB"], rows)


SECTIONS: dict[str, Callable[[], str]] = {
    "quality": quality,
    "step": step,
    "evaluation": evaluation,
}


def rendered(text: str) -> str:
    """Returns a document with its tables as the results have them.

    Raises:
        ValueError: for a marker without a table, or a table without a marker.
    """
    marked = [match.group(2) for match in MARKED.finditer(text)]
    if sorted(marked) != sorted(SECTIONS):
        raise ValueError(
            f"{README.name} marks the tables {sorted(marked)}, this script makes {sorted(SECTIONS)}"
        )
    return MARKED.sub(lambda m: f"{m.group(1)}\n{SECTIONS[m.group(2)]()}\n\n{m.group(3)}", text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(argv)
    before = README.read_text()
    after = rendered(before)
    if after == before:
        print("everything is up to date")
        return 0
    if args.check:
        print(f"{README.name} is out of date; run python benchmarks/render.py")
        return 1
    README.write_text(after)
    print(f"written: {README.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
