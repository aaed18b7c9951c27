"""Turns the committed results into the tables of README.md and docs/scale.md, and the first chart.

    python benchmarks/render.py            rewrite both and docs/throughput.png
    python benchmarks/render.py --check    say what is out of date; status 1 if anything is

A table stands between `<!-- results:NAME -->` and `<!-- end -->` and comes from
`benchmarks/results/*.json` alone, each a run of a script in this folder. The chart carries a digest
of the results that it was drawn from.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from script import RESULTS, ROOT, markdown_table

README = ROOT / "README.md"
SCALE = ROOT / "docs" / "scale.md"
CHART = ROOT / "docs" / "throughput.png"
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
# What the tests show of a backend without a device.
WITHOUT_DEVICE = {
    "reference": ("tested; the truth for the others", "not run"),
    "eager": ("tested in fp64 to 1e-10, forward and all gradients", "not run"),
    "triton": ("numerics in Triton's interpreter (fp32, fp16)", "compiles, not yet run"),
    "cuda": ("numerics in an emulation of the device (bf16, fp16)", "compiles, not yet run"),
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


def data() -> str:
    content = read("data_cpu")
    if content is None:
        return NOT_RUN
    by_workers = content["images_per_second"]
    rows = [
        [name, *(f"{statistics.median(rates[name]):,.0f}" for rates in by_workers.values())]
        for name in next(iter(by_workers.values()))
    ]
    return (
        f"{content['files']} JPEG files of {content['mean_bytes'] / 1024:.0f} KiB at "
        f"{content['settings']['image_size']} px, {content['device']}, commit "
        f"{content['commit']}: images per second\n\n"
    ) + markdown_table(["", *(f"{count} workers" for count in by_workers)], rows)


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


def backends() -> str:
    """Lists which backend ran where: from the devices of the committed step results."""
    ran: dict[str, set[str]] = {}
    for content in step_files():
        for network in content["networks"].values():
            for column, found in network["columns"].items():
                if column.startswith("wfnet/") and "impossible" not in found:
                    ran.setdefault(column.split("/")[1], set()).add(content["device"])
    rows = []
    for name, (cpu, cuda) in WITHOUT_DEVICE.items():
        devices = sorted(device for device in ran.get(name, ()) if "NVIDIA" in device)
        rows.append([f"`{name}`", cpu, f"steps run: {', '.join(devices)}" if devices else cuda])
    return markdown_table(["backend", "CPU", "CUDA device"], rows)


def with_what(content: dict[str, Any]) -> str:
    """Returns what belongs beside numbers of one machine."""
    return f"{content['device']}, torch {content['torch']}, commit {content['commit']}"


def rounding() -> str:
    content = (read("scale_cpu") or {}).get("rounding")
    if content is None:
        return NOT_RUN
    runs = {(run["seed"], run["filters"]): run for run in content["runs"]}
    seeds = sorted({seed for seed, _ in runs})
    names = {
        "float32": "fp32",
        "bfloat16": "bfloat16, rounded stochastically",
        "nearest": "bfloat16, rounded to nearest",
    }
    rows = []
    for name, label in names.items():
        of_seeds = (runs[seed, name] for seed in seeds)
        cells = (
            f"{run['validation_loss']:.4f}, {run['acc_r']:.2f}, {run['acc_f']:.2f}"
            for run in of_seeds
        )
        rows.append([label, *cells])
    return (
        f"{content['data']}, {content['network']}, {content['steps']} steps "
        f"(`python benchmarks/scale_evidence.py`; {with_what(content)})\n\n"
    ) + markdown_table(
        ["filters", *(f"seed {n}: validation loss, Acc_r, Acc_f" for n in seeds)], rows
    )


def ranks() -> str:
    content = (read("scale_cpu") or {}).get("ranks")
    if content is None:
        return NOT_RUN
    return (
        f"After {content['steps']} steps on {content['data']} ({content['network']}, fp32, filters "
        f"that moved by up to {content['largest_movement_float32']:.2f}) those of two ranks and of "
        f"one process differed by {content['largest_difference_float32']:.0e} at most, in fp64 by "
        f"{content['largest_difference_float64']:.0e}\n"
        f"(`python benchmarks/scale_evidence.py`; {with_what(content)})."
    )


def many_classes() -> str:
    content = (read("scale_cpu") or {}).get("evaluation")
    if content is None:
        return NOT_RUN
    return (
        f"{content['images']:,} images x {content['classes']:,} rows ({content['pixels']} x "
        f"{content['pixels']} pixels, a {content['network']}, fused) took "
        f"{content['cpu_seconds']:.0f} s of one CPU core and {content['mebibytes_added']:.0f} MiB "
        f"beside the process's {content['mebibytes_before']:.0f}\n"
        f"(`python benchmarks/scale_evidence.py`; {with_what(content)})."
    )


def allreduce() -> str:
    content = read("allreduce_gloo")
    if content is None:
        return NOT_RUN
    settings, rows = content["settings"], []
    of_two = [record for record in content["records"] if record["ranks"] == 2]
    for record in of_two:
        dense, few = (f"{record[way]['sent'] / 2**20:.1f} MiB" for way in ("dense", "rows"))
        if 2 * record["union"] > settings["classes"]:
            few = "all are sent"
        rows.append([f"{record['batch_size'] // 2:,}", f"{record['union']:,}", dense, few])
    slower = [
        record["gather"]["milliseconds"]
        / min(record[way]["milliseconds"] for way in ("dense", "rows"))
        for record in of_two
    ]
    off = max(
        abs(record[way]["on_the_wire"] / record[way]["sent"] - 1)
        for record in content["records"]
        for way in ("dense", "rows", "gather")
    )
    head = ["images of a minibatch", "rows that occur", "a rank sends: all rows", "these rows"]
    return (
        f"Gradients of {settings['gates']:,} gates (ResNet-50's) x {settings['classes']:,} "
        f"classes, M = {settings['expansion']}, two ranks, {content['backend']} "
        f"(`python benchmarks/bench_allreduce.py`; {with_what(content)})\n\n"
        f"{markdown_table(head, rows)}\n\n"
        f"What went over the wire agrees with the formula to {off:.1%}. Gathering each rank's "
        f"own rows would send down to half of that,\nand took {min(slower):.1f} to "
        f"{max(slower):.1f} times as long as the faster of both."
    )


SECTIONS: dict[str, Callable[[], str]] = {
    "quality": quality,
    "step": step,
    "data": data,
    "evaluation": evaluation,
    "backends": backends,
}
SCALE_SECTIONS: dict[str, Callable[[], str]] = {
    "ranks": ranks,
    "allreduce": allreduce,
    "rounding": rounding,
    "many_classes": many_classes,
}


def documents() -> list[tuple[Path, dict[str, Callable[[], str]]]]:
    """Returns files with tables, and what makes them."""
    return [(README, SECTIONS), (SCALE, SCALE_SECTIONS)]


def rendered(
    text: str, sections: dict[str, Callable[[], str]] = SECTIONS, name: str = "README.md"
) -> str:
    """Returns a document with its tables as the results have them.

    Raises:
        ValueError: for a marker without a table, or a table without a marker.
    """
    marked = [match.group(2) for match in MARKED.finditer(text)]
    if sorted(marked) != sorted(sections):
        raise ValueError(
            f"{name} marks the tables {sorted(marked)}, this script makes {sorted(sections)}"
        )
    return MARKED.sub(lambda m: f"{m.group(1)}\n{sections[m.group(2)]()}\n\n{m.group(3)}", text)


def digest() -> str:
    """Returns a hash of the results that the chart shows."""
    return hashlib.sha256(json.dumps(step_files(), sort_keys=True).encode()).hexdigest()[:32]


def draw(path: Path) -> None:
    """Draws the time of a step relative to eager masking, and its memory, one group per network."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = {
        "compile": ("compiled eager masks", "#888888"),
        "unmasked": ("without masks", "#bbbbbb"),
        "wfnet/eager/fused": ("wfnet, fused", "#d55e00"),
        "wfnet/eager/compiled": ("wfnet, fused and compiled", "#e69f00"),
        "wfnet/triton/captured": ("wfnet, Triton", "#0072b2"),
        "wfnet/cuda/captured": ("wfnet, CUDA", "#009e73"),
    }
    groups = [
        (
            f"{name}, {content['settings']['image_size']} px\n"
            f"{content['device'].replace(', ', chr(10))}",
            network["columns"],
        )
        for content in step_files()
        for name, network in content["networks"].items()
        if "median_ms" in network["columns"].get("eager", {})
    ]
    present = [
        column
        for column in names
        if any("median_ms" in columns.get(column, {}) for _, columns in groups)
    ]
    figure, axes = pyplot.subplots(1, 2, figsize=(2 + 2.2 * len(groups), 3.8), layout="constrained")
    for axis, key, what in (
        (axes[0], "median_ms", "speed of a step / eager masks"),
        (axes[1], "peak_mebibytes", "peak memory / eager masks"),
    ):
        for position, column in enumerate(present):
            heights = []
            for _, columns in groups:
                own, base = columns.get(column, {}).get(key), columns["eager"][key]
                ratio = float("nan") if own is None else own / base
                heights.append(1 / ratio if key == "median_ms" else ratio)
            width = 0.8 / len(present)
            places = [i + (position - (len(present) - 1) / 2) * width for i in range(len(groups))]
            bars = axis.bar(places, heights, width, label=names[column][0], color=names[column][1])
            axis.bar_label(bars, [f"{h:.2f}" for h in heights], fontsize=7, padding=2)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks(range(len(groups)), [label for label, _ in groups], fontsize=8)
        axis.set_ylabel(what)
        axis.margins(y=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    if present:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, fontsize=8, loc="outside upper center", ncols=len(present))
    figure.savefig(path, dpi=130, metadata={"Results": digest()})
    pyplot.close(figure)


def drawn_from(path: Path) -> str | None:
    """Returns the digest in a chart."""
    if not path.is_file():
        return None
    from PIL import Image

    with Image.open(path) as image:
        return image.info.get("Results")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(argv)
    stale, texts = [], {}
    for path, sections in documents():
        before = path.read_text()
        texts[path] = rendered(before, sections, path.name)
        if texts[path] != before:
            stale.append(path.name)
    if drawn_from(CHART) != digest():
        stale.append(str(CHART.relative_to(ROOT)))
    if args.check:
        if stale:
            print(f"out of date: {', '.join(stale)}; run python benchmarks/render.py")
        return bool(stale)
    for path, text in texts.items():
        if path.name in stale:
            path.write_text(text)
    if str(CHART.relative_to(ROOT)) in stale:
        draw(CHART)
    print(f"written: {', '.join(stale)}" if stale else "everything is up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
