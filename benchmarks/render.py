"""Turns the committed results into the tables and pictures of the documents.

    python benchmarks/render.py            rewrite them
    python benchmarks/render.py --check    say what is out of date; status 1 if anything is

A table stands between `<!-- results:NAME -->` and `<!-- end -->`, each in one of `DOCUMENTS`. It
comes from `benchmarks/results/*.json` alone, each a run of a script in this folder. A picture
holds the numbers that it shows, as text "values".
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from evidence import RECIPES, STUDIES
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from script import RESULTS, ROOT
from study_tables import cell, commits_of, study_text, values_of
from time_to_quality import ACC_F, ACC_R_LOSS, TO_END

from wfnet.evaluation.paper_tables import TITLES, published
from wfnet.report import figures
from wfnet.report.figures import style
from wfnet.services.tables import markdown_table

DOCUMENTS = tuple(
    ROOT / name for name in ("README.md", "docs/results.md", "docs/evaluation.md", "docs/scale.md")
)
MARKED = re.compile(r"(<!-- results:(\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
# Time to quality: files of time_to_quality, and what was untrained.
TIMES = {
    "time_to_quality_digits": "digits",
    "time_to_quality_fashion": "Fashion-MNIST",
    "time_to_quality_glyphs100": "100 rendered characters",
}
# Ways that the picture shows, from the top.
SHOWN_WAYS = {
    "neggrad_plus": "NegGrad+, a network a class",
    "random_labels": "random labels, a network a class",
    "paper": "recipe paper",
    "durable": "recipe durable",
    "balanced": "recipe balanced",
    TO_END: "recipe quick, to its end",
}
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

META_BAD = {
    "original": "original",
    "logit_masked": "logit masked",
    "bias_shifted": "bias shifted",
    "random_labels": "random labels",
}
# Measures of benchmarks/meta_evaluation.py that are shown, and what they are called.
META_MEASURES = {
    "removal: acc_f": "Acc_f",
    "removal: acc_r": "Acc_r",
    "membership: auc_confidence": "membership, confidence: AUC",
    "membership: auc_calibrated": "membership, calibrated: AUC",
    "membership: lira_auc": "LiRA against two retrained networks: AUC",
    "relearning: acc_f_retain_only": "relearning from other classes",
    "relearning: acc_f_from_1": "relearning from one image",
    "relearning: acc_f_from_10": "relearning from ten",
    "probing: probe_last": "linear probe, input of the head",
    "removal: acc_f_recovered": "removal: best attack without the base",
    "removal: acc_f_batchnorm_all": "removal: BatchNorm re-estimated",
    "removal: acc_f_offset": "removal: logit shifted",
    "removal: auc_logit": "AUC of the class's logit",
    "collateral: acc_nearest_confusion": "collateral: nearest classes",
    "closeness: js_forget": "closeness: JS on the class",
    "closeness: js_retain": "closeness: JS on others",
    "similarity: cka_forget_last": "CKA on the class, input of the head",
    "similarity: cka_retain_last": "CKA on others, input of the head",
    "geometry: compact_forget": "geometry: compactness",
    "geometry: tv_nearest": "geometry: nearest classes, TV",
    "geometry: auc_geometry": "geometry: outputs, AUC",
    "over_unlearning: ou_eps": "over-unlearning: OU@eps",
    "shadows, image: u_lira auc": "U-LiRA, image by image: AUC",
    "shadows, class: u_lira auc": "U-LiRA, class: AUC",
    "shadows, class: klom klom": "KLOM, class",
    "shadows, class: forget_quality score": "forget quality, class: score",
}

_SAME_RUN = ("device", "torch", "commit")
_SAME_SETTINGS = ("dtype", "image_size", "batch_size", "label_expansion", "share_images")
_SAME_SETTINGS += ("classes", "columns")
NOT_RUN = "Not run."
_GOOD = ("reached", "confirmed")


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
    """Makes the table of README.md: all classes in one round, by data, network and recipe."""
    rows, measures = [], ("acc_r", "acc_f", "worst")
    for content in measured().values():
        found, seeds = values_of(content), [group["runs"] for group in content["groups"]]
        for network in dict.fromkeys(network for network, _ in found):
            cells, original = dict.fromkeys(RECIPES, "-"), "-"
            for ((name, recipe), values), runs in zip(found.items(), seeds, strict=True):
                if name == network:
                    scores = (cell(values.get(("quality", "wfnet", m)), 2) for m in measures)
                    cells[recipe] = " / ".join(scores) + f" ({runs})"
                    if original == "-":
                        original = cell(values.get(("quality", "original", "acc_r")), 2)
            commits = commits_of(content)
            rows.append([f"{content['title']}, {network}", original, *cells.values(), commits])
    recipes = (f"`{recipe}`: Acc_r / Acc_f / worst class (seeds)" for recipe in RECIPES)
    return markdown_table(["data, network", "original: Acc_r", *recipes, "commit"], rows)


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
            if not set(cells) <= {"not run", "impossible"}:
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


def picture_values() -> dict[str, dict[str, float]]:
    """Returns what the picture shows, digits and ResNet-8: accuracy in %, by bar and attack."""
    values = values_of(read("study_digits"))
    durable, balanced = (values["ResNet-8", recipe] for recipe in ("durable", "balanced"))
    bars = {
        "balanced": (balanced, "wfnet"),
        "durable": (durable, "wfnet"),
        "durable, cut from the head": (durable, "also_masked"),
        "retrained without the class": (durable, "retrained"),
        "its logit masked": (durable, "logit_masked"),
        "before": (durable, "original"),
    }

    def after(values: Mapping, method: str, check: str, measure: str) -> float | None:
        return values.get(("trust", method, f"{check}: {measure}"), {"mean": None})["mean"]

    return {bar: figures.attack_levels(partial(after, *which)) for bar, which in bars.items()}


def draw_attacks(values: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Draws what an attacker gets back, by attack, beside retrained networks."""
    bars = {name: levels for name, levels in values.items() if name != "before"}
    figures.attacks(values["before"]["nothing"], bars, path)


def time_values() -> dict[str, dict[str, list[float]]]:
    """Returns, by way and data, CPU seconds, and 1 where accuracies meet the criterion, else 0."""
    found: dict[str, dict[str, list[float]]] = {label: {} for label in SHOWN_WAYS.values()}
    for name, data in TIMES.items():
        summary = read(name)["summary"]
        for row in summary:
            if row["way"] in SHOWN_WAYS and row["images_a_class"] is None:
                good = row["acc_f"] <= 100 * ACC_F
                good &= row["acc_r"] >= original_of(summary, row) - 100 * ACC_R_LOSS
                found[SHOWN_WAYS[row["way"]]][data] = [row["cpu_seconds"], float(good)]
    return {label: times for label, times in found.items() if times}


def draw_times(values: Mapping[str, Mapping[str, list[float]]], path: Path) -> None:
    """Draws CPU seconds by way, a mark for each data set; hollow where quality is missed."""
    with style.picture(path, 7.6, 4.0) as figure:
        axis = figure.subplots()
        for number, (data, color) in enumerate(zip(TIMES.values(), style.SERIES, strict=False)):
            axis.scatter([], [], 26, color=color, label=data)
            for place, times in enumerate(values.values()):
                if data in times:
                    seconds, good = times[data]
                    height = place + 0.26 * (number - 1)
                    face = color if good else "none"
                    axis.scatter(seconds, height, 26, facecolor=face, edgecolor=color)
                    text = f"  {seconds:.1f}" if seconds < 10 else f"  {seconds:,.0f}"
                    axis.text(seconds, height, text, va="center", fontsize=7, color=color)
        axis.scatter([], [], 26, facecolor="none", edgecolor=style.INK, label="quality missed")
        axis.set_yticks(range(len(values)), values)
        axis.invert_yaxis()
        axis.set(xscale="log", xlabel="CPU seconds of one thread, all classes")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.margins(x=0.08)
        axis.grid(axis="x")
        figure.legend(ncols=4, loc="outside upper center")


PICTURES = {
    RESULTS / "attacks.png": (picture_values, draw_attacks),
    RESULTS / "time_to_quality.png": (time_values, draw_times),
}


def draw_picture(path: Path) -> None:
    """Draws one of ``PICTURES``, and writes its numbers into it."""
    make, draw = PICTURES[path]
    values, shown = make(), PngInfo()
    draw(values, path)
    shown.add_text("values", json.dumps(values))
    with Image.open(path) as image:
        image.load()
    image.save(path, pnginfo=shown, optimize=True)


def shown_values(path: Path) -> dict[str, dict[str, Any]] | None:
    """Returns the numbers that a picture shows; None if there is none."""
    if not path.is_file():
        return None
    with Image.open(path) as image:
        return json.loads(image.text.get("values", "null"))


def meta_evaluation() -> str:
    """Makes a table of how well measures tell bad networks from good ones."""
    content = read("meta_evaluation")
    if content is None:
        return NOT_RUN
    found = {row["measure"]: row for row in content["rows"]}
    rows = []
    for measure, label in META_MEASURES.items():
        row = found.get(measure, {})
        cells = [row.get(bad) for bad in (*META_BAD, "forgetful")]
        shown = ["-" if c is None else f"{c['mean']:.2f}: {c['auc']:.2f}" for c in cells]
        rows.append([label, f"{row['good']:.2f}" if row else "-", *shown])
    return markdown_table(["measure", "retrained", *META_BAD.values(), "filters"], rows)


def original_of(summary: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> float:
    """Returns the original network's Acc_r beside a row; a network a class: beside the others."""
    return next(one["original_acc_r"] for one in (row, *summary) if "original_acc_r" in one)


def time_to_quality() -> str:
    """Makes two tables: CPU seconds until all classes are forgotten well, and images a class."""
    rows, curves, counts = [], [], (1, 2, 5, 10, 20, 50)
    for name, label in TIMES.items():
        few, summary = {}, read(name)["summary"]
        for row in summary:
            original = f"({original_of(summary, row):.2f})"
            seconds, scores = f"{row['cpu_seconds']:.1f}", (row["acc_r"], row["acc_f"])
            scores = [f"{score:.2f}" for score in scores]
            if row["images_a_class"] is not None:
                few[row["images_a_class"]] = f"{' / '.join(scores)}, {seconds} ({row['seeds']})"
                continue
            steps = f"{row['steps']:.0f}" if "steps" in row else "-"
            good = (f"{row[key]} of {row['seeds']}" if key in row else "-" for key in _GOOD)
            rows.append([f"{label} {original}: {row['way']}", seconds, steps, *scores, *good])
        curves.append([label, *(few.get(count, "-") for count in counts)])
    head = ["all classes, ResNet-8 (original: Acc_r)", "CPU s", "steps", "Acc_r", "Acc_f", *_GOOD]
    images = ["quick, to its end, images a class: Acc_r / Acc_f, CPU s (seeds)", *map(str, counts)]
    return f"{markdown_table(head, rows)}\n\n{markdown_table(images, curves)}"


def measured() -> dict[str, dict[str, Any]]:
    """Returns the studies that have run, as far as they have, by name."""
    found = {name: read(f"study_{name}") for name in STUDIES}
    return {name: content for name, content in found.items() if content is not None}


def studies() -> str:
    """Returns the tables of every study that was measured."""
    texts = [study_text(STUDIES[name], content) for name, content in measured().items()]
    return "\n\n".join(texts) or NOT_RUN


def paper() -> str:
    """Makes a table of the paper's numbers for MNIST: methods, and its networks side by side."""
    cells = {name: own for name, own in published()["cells"].items() if name.startswith("mnist/")}
    measures = "acc_r", "acc_f", "zrf", "rt"
    rows = []
    for method in [m for m in TITLES if any(m in own for own in cells.values())]:
        found = [own.get(method, {}) for own in cells.values()]
        texts = (" / ".join(f"{own[m]:g}" for m in measures if m in own) for own in found)
        rows.append([TITLES[method], *texts])
    rows.append(
        ["WF-Net: insertion / deletion"]
        + ["{insertion:g} / {deletion:g}".format(**own["wfnet"]) for own in cells.values()]
    )
    names = (name.partition("/")[2] for name in cells)
    return markdown_table(["Acc_r / Acc_f / ZRF / RT", *names], rows)


def photographs() -> str:
    """Says what an ImageNet classifier sees in photographs, before and after their classes go."""
    runs = [found for found in map(read, ("photographs", "photographs_durable")) if found]
    if not runs:
        return NOT_RUN
    first = runs[0]
    text = (
        f"Right on {100 * first['right_before']:.0f}% of {len(first['photographs'])} photographs "
        f"before; {100 * first['reestimated']['right_before']:.0f}% after BatchNorm statistics "
        f"were re-estimated on these photographs, as in the last two columns."
    )
    columns = [
        "recipe",
        "its row: right",
        "rows of others: right",
        "re-estimated: its row",
        "others",
    ]
    rows, notes, percent = [], [], "{:.1f}".format
    for run in runs:
        parts = (
            p[n] for p in (run, run["reestimated"]) for n in ("right_under_own_row", "others_right")
        )
        rows.append([f"`{run['recipe']}`", *(percent(100 * part) for part in parts)])
        notes.append(_about_photographs(run))

    def three(best: list) -> str:
        return ", ".join(f"{name} {100 * chance:.0f}" for name, chance in best[:3])

    seen = [
        [p["name"], three(p["before"]), *(three(run["photographs"][i]["after"]) for run in runs)]
        for i, p in enumerate(first["photographs"])
    ]
    names = [f"under its own row, `{run['recipe']}`, %" for run in runs]
    tables = (
        markdown_table(columns, rows),
        markdown_table(["photograph", "before, %", *names], seen),
    )
    return "\n\n".join([text, tables[0], *notes, tables[1]])


def _about_photographs(run: dict) -> str:
    """Returns how a run was made, and how far its exports differ."""
    found, made = run["differences"], run["provenance"]
    before, after = run["size"]
    wrapped = "bit by bit" if found["original"] else "not exactly"
    untouched = "are" if found["rows_without_images"] else "are not"
    filtered = f", filtered {found['onnx']:.0e}" if "onnx" in found else ""
    return (
        f"`{run['recipe']}`: {run['untraining']['steps']} steps, {run['seconds']:.0f} s on one "
        f"busy core, masks from `{run['mask_from']}` on. Wrapped it computes the original's "
        f"logits, {wrapped}; the rows of classes without images {untouched} as they began. Largest "
        f"differences as parts of the largest logit: fused {found['fused']:.0e}, baked "
        f"{found['baked']:.0e}, cut {found['cut']:.0e}, compact {found['compact']:.0e}; in ONNX "
        f"Runtime compact {found['compact_onnx']:.0e}{filtered}; a row without "
        f"images from the original {found['row_without_images']:.0e}. Compact: "
        f"{after['parameters']:,} of {before['parameters']:,} parameters, "
        f"{after['flops'] / 1e6:,.0f} of {before['flops'] / 1e6:,.0f} MFLOPs an image. Commit "
        f"{made['commit']}, torch {made['torch']}, timm {made['timm']}."
    )


SECTIONS: dict[str, Callable[[], str]] = {
    "studies": studies,
    "paper": paper,
    "photographs": photographs,
    "quality": quality,
    "step": step,
    "meta": meta_evaluation,
    "time": time_to_quality,
}


def rendered(texts: Mapping[Path, str]) -> dict[Path, str]:
    """Returns documents with their tables as the results have them.

    Raises:
        ValueError: unless every table is marked once, and every marker has a table.
    """
    marked = [match.group(2) for text in texts.values() for match in MARKED.finditer(text)]
    if sorted(marked) != sorted(SECTIONS):
        raise ValueError(
            f"{', '.join(path.name for path in texts)} mark the tables {sorted(marked)}, "
            f"this script makes {sorted(SECTIONS)}"
        )
    return {
        path: MARKED.sub(lambda m: f"{m.group(1)}\n{SECTIONS[m.group(2)]()}\n\n{m.group(3)}", text)
        for path, text in texts.items()
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(argv)
    before = {path: path.read_text() for path in DOCUMENTS}
    after = rendered(before)
    changed = [path for path in DOCUMENTS if after[path] != before[path]]
    changed += [path for path, (make, _) in PICTURES.items() if shown_values(path) != make()]
    for path in changed:
        if args.check:
            print(f"{path.name} is out of date; run python benchmarks/render.py")
        elif path in PICTURES:
            draw_picture(path)
        else:
            path.write_text(after[path])
    if not changed:
        print("everything is up to date")
    elif not args.check:
        print("written:", *(path.name for path in changed))
    return 1 if changed and args.check else 0


if __name__ == "__main__":
    sys.exit(main())
