"""One self-contained page about a run: tables, figures, definitions, trust, configuration.

:func:`write_report` collects what the folder of a run holds; a section whose files are missing says
which command makes them. The page loads nothing, works without JavaScript (which only sorts and
searches), and escapes every name that comes from data.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from types import ModuleType
from typing import Any

from wfnet.baselines import read_baselines
from wfnet.evaluation import ClassRecord, EvaluationResult
from wfnet.evaluation.metrics import TOP_K
from wfnet.evaluation.results import base_name
from wfnet.pretrained import FILTERS_NAME
from wfnet.report.page import cell, number, page, percent, sortable_table, table
from wfnet.services.files import write_atomically
from wfnet.trust import CHECKS, TrustResult
from wfnet.trust.relearn import describe as describe_relearning
from wfnet.version import __version__

logger = logging.getLogger("wfnet")

REPORT = "report.html"
# Accuracy on the class below which an attack counts as withstood.
WITHSTOOD = 0.01
# Pictures by file, in the order of the page, with what is to be seen.
PICTURES = {
    "overview.png": "Accuracy on every class before and after it is forgotten, and on all others; "
    "gates (class x channel) of the first, an intermediate and the last masked layer to run.",
    "accuracy_per_class.png": "Accuracy on each class itself and on all others, before and after "
    "the class is forgotten, and, where there are any, of networks retrained without it.",
    "confusion.png": "Where images of a forgotten class go, and how accuracy on the other classes "
    "changes.",
    "gates.png": "Gates per forgotten class and output channel; 100% leaves a channel as in the "
    "original.",
    "associations.png": "The filters with the lowest gates of each class in the last masked layer, "
    "as far as several classes share them.",
    "attribution.png": "Insertion and deletion: confidence in the class as its lowest gates are "
    "reset to 1, or set to 0 in the original network.",
    "trust.png": "Trust checks: the model under test beside the original and retrained ones.",
    "training_curves.png": "Losses and validation accuracies while untraining.",
}
DEFINITIONS = (
    ("Acc_f", "mean over classes c of: correct(images of c, row c) / images of c",
     "accuracy on the forgotten class under its own row; low is good", "Poppi et al., 2024"),
    ("Acc_r", "mean over classes c of: correct(images not of c, row c) / images not of c",
     "accuracy on all other classes under row c; high is good", "Poppi et al., 2024"),
    ("Acc_f@5, Acc_r@5", "the same with the true class among the five largest logits",
     "top-5 variants, shown for more than five classes", "as above"),
    ("ZRF", "1 - mean over images x of c of JS(softmax f_c(x), softmax f_new(x))",
     "1: as clueless as the same network newly initialised; JS(p, q) = KL(p||m)/2 + KL(q||m)/2, "
     "m = (p + q)/2", "Chundawat et al., AAAI 2023"),
    ("RT", "epochs of fine-tuning, 500 random training images each, until the class's original "
     "accuracy is regained; at most 100",
     "relearn time; in parentheses how many classes never came back", "Poppi et al., 2024"),
    ("insertion, deletion", "area under min(1, p_c(share of gates changed) / p_c(original)) over "
     "[0, 1]", "lowest learned gates first, reset to 1 (insertion, near 1 is good) or set to 0 in "
     "the original (deletion, near 0 is good)", "Poppi et al., 2024"),
    ("AP_f, mAP_r", "mean precision at the ranks of the images that have the label",
     "images with several labels: average precision of the forgotten label, and mean of all others",
     "scikit-learn, average_precision_score"),
    ("gate", "gate_scale * sigmoid(alpha[class, channel])",
     "factor on an output channel's weights; 1 leaves it as it is", "Poppi et al., 2024"),
)  # fmt: skip


@dataclass
class Contents:
    """What the folder of a run holds; None or empty where a file is missing.

    Attributes:
        folder: the folder.
        run: ``config.json``.
        filters: ``wf_config.json``.
        evaluation: ``evaluation.json``.
        multi_label: the same file where images have several labels each.
        trust: ``trust.json``.
        tables: ``tables.json``, the paper's tables beside the published numbers.
        baselines: results of `wfnet baseline`, wherever in the folder.
        exports: reports beside baked files, by file name.
        pictures: file name -> bytes of a PNG.
    """

    folder: Path
    run: dict[str, Any] = field(default_factory=dict)
    filters: dict[str, Any] = field(default_factory=dict)
    evaluation: EvaluationResult | None = None
    multi_label: dict[str, Any] | None = None
    trust: TrustResult | None = None
    tables: dict[str, Any] | None = None
    baselines: list[dict[str, Any]] = field(default_factory=list)
    exports: dict[str, dict[str, Any]] = field(default_factory=dict)
    pictures: dict[str, bytes] = field(default_factory=dict)


def read_contents(folder: str | os.PathLike) -> Contents:
    """Reads the results and pictures of a run.

    Raises:
        FileNotFoundError: if there is no such folder, or nothing in it that a report could show.
        ValueError: for a damaged file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: give that of a run, for example demo")
    evaluation = folder / "evaluation.json"
    several = _json(evaluation) or {}
    several = several if several.get("kind") == "multi-label" else None
    found = Contents(
        folder=folder,
        run=_json(folder / "config.json") or {},
        filters=_json(folder / "wf_config.json") or {},
        evaluation=EvaluationResult.from_json(evaluation)
        if evaluation.is_file() and several is None
        else None,
        multi_label=several,
        trust=_trust_result(folder),
        tables=_json(folder / "tables.json"),
        baselines=[
            result
            for place in sorted({path.parent for path in folder.rglob("retrained.json")})
            for result in read_baselines(place)
        ],
        exports={path.name: _json(path) or {} for path in sorted(folder.glob("*.trust.json"))},
        pictures={
            name: (folder / name).read_bytes() for name in PICTURES if (folder / name).is_file()
        },
    )
    if found.evaluation is None and found.trust is None and several is None:
        raise FileNotFoundError(
            f"{folder} holds nothing to report yet: `wfnet evaluate {folder}` and `wfnet trust "
            f"{folder}` make results"
        )
    return found


def write_report(folder: str | os.PathLike, path: str | os.PathLike | None = None) -> Path:
    """Writes ``report.html`` of a run, atomically.

    Args:
        folder: of the run.
        path: file to write; ``report.html`` in the folder by default.

    Returns:
        The path that was written.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_contents`.
    """
    contents = read_contents(folder)
    path = Path(folder) / REPORT if path is None else Path(path)
    text = render(contents)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return path


def render(contents: Contents) -> str:
    """The page as a string."""
    sections = [
        ("summary", "Summary", _summary(contents)),
        ("classes", "Classes", _classes(contents)),
        ("trust", "What it protects against, and what not", _trust(contents)),
        ("tables", "Beside other methods", _tables(contents)),
        ("figures", "Figures", _figures(contents)),
        ("definitions", "Definitions", _definitions(contents)),
        ("configuration", "Configuration", _configuration(contents)),
    ]
    name = contents.folder.absolute().name
    options = contents.run.get("options", {})
    model = options.get("model") or contents.filters.get("model", "a classifier")
    data = options.get("data") or options.get("data_dir") or "its data"
    return page(
        f"wfnet: {name}",
        f"{model} on {data}; every class can be forgotten at run time",
        [section for section in sections if section[2]],
    )


def _trust_result(folder: Path) -> TrustResult | None:
    """``trust.json``, unless it was made for other filters than those in the folder."""
    path, filters = folder / "trust.json", folder / FILTERS_NAME
    if not path.is_file():
        return None
    result = TrustResult.from_json(path)
    checked = result.settings.get("filters")
    if checked and filters.is_file():
        found = hashlib.sha256(filters.read_bytes()).hexdigest()
        if found != checked:
            logger.warning("%s is of other filters and left out; run `wfnet trust` again", path)
            return None
    return result


def _json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); make it again or delete it") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged (it holds no table); make it again or delete it")
    return content


# -- summary and classes --------------------------------------------------------------------------


def _summary(contents: Contents) -> str:
    cards = []
    result = contents.evaluation
    if result is not None:
        before, after = result.original, result.mean
        worst = max(result.records, key=lambda r: r.acc_f)
        cards += [
            (_change(before.acc_f, after.acc_f), "accuracy on the forgotten class (Acc_f)"),
            (_change(before.acc_r, after.acc_r), "accuracy on all others (Acc_r)"),
            (f"{before.zrf:.3f} → {after.zrf:.3f}",
             f"ZRF, log base {base_name(result.zrf_base)}"),
            (f"{100 * worst.acc_f:.1f}%", f"worst forgotten class: {worst.name}"),
            (f"{len(result.records):,}", f"classes, {result.settings.get('images', 0):,} images"),
        ]  # fmt: skip
    boxes = "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(text)}</span></div>'
        for value, text in cards
    )
    several = contents.multi_label
    if several is not None:
        mean = several["mean"]
        cards += [
            (
                _change(mean["original_ap_f"], mean["ap_f"]),
                "average precision of the label (mAP_f)",
            ),
            (
                _change(mean["original_map_r"], mean["map_r"]),
                "mean average precision of all others",
            ),
            (f"{len(several['classes']):,}", "labels; images have several each"),
        ]
    missing = ""
    if result is None and several is None:
        missing = _hint(f"wfnet evaluate {contents.folder}", "accuracies of every class")
    return f'<div class="cards">{boxes}</div>{missing}' if boxes else missing


def _classes(contents: Contents) -> str:
    result = contents.evaluation
    if contents.multi_label is not None:
        return _labels(contents.multi_label)
    if result is None:
        return ""
    top5 = result.settings.get("num_classes", 0) > TOP_K
    levels = retrained_records(contents)
    header = [
        ("#", "number of the class"), ("class", "its name"), ("images", "test images of the class"),
        ("Acc_f before", "accuracy on the class, original, %"),
        ("Acc_f", "accuracy on the class when it is forgotten, %"),
        ("Acc_r before", "accuracy on the others, original, %"),
        ("Acc_r", "accuracy on the others when the class is forgotten, %"),
        ("change", "of Acc_r, points"),
        *([("Acc_f@5", "top-5, %"), ("Acc_r@5", "top-5, %")] if top5 else []),
        ("ZRF", f"log base {base_name(result.zrf_base)}"),
        *([("retrained Acc_f", "retrained without the class, %"),
           ("retrained Acc_r", "retrained without the class, %")] if levels else []),
    ]  # fmt: skip
    rows = []
    for record in result.records:
        change = record.acc_r - record.original_acc_r
        cells = [
            cell(record.index), cell(record.name, text=True), cell(record.n_forget),
            percent(record.original_acc_f), percent(record.acc_f),
            percent(record.original_acc_r), percent(record.acc_r),
            cell(change, f"{100 * change:+.2f}"),
            *([percent(record.acc_f_top5), percent(record.acc_r_top5)] if top5 else []),
            number(record.zrf),
        ]  # fmt: skip
        if levels:
            level = levels.get(record.index)
            cells += [percent(level and level.acc_f), percent(level and level.acc_r)]
        rows.append((f"class-{record.index}", f"{record.index} {record.name}", cells))
    text = (
        "<p>Each line is the network that forgets that class: accuracies in %, click a heading to "
        "sort.</p>"
    )
    return text + sortable_table("class-table", header, rows, "Search by class name")


def _labels(content: Mapping[str, Any]) -> str:
    """The table of a multi-label evaluation."""
    header = [
        ("#", "number of the label"), ("label", "its name"), ("images", "test images that have it"),
        ("share", "of all images, %: the average precision of an output that says nothing"),
        ("AP_f before", "average precision of the label, original, %"),
        ("AP_f", "average precision of the label when it is forgotten, %"),
        ("mAP_r before", "mean average precision of the others, original, %"),
        ("mAP_r", "mean average precision of the others when the label is forgotten, %"),
    ]  # fmt: skip
    names = ("share", "original_ap_f", "ap_f", "original_map_r", "map_r")
    rows = [
        (
            f"class-{record['index']}", f"{record['index']} {record['name']}",
            [cell(record["index"]), cell(record["name"], text=True), cell(record["images"]),
             *(percent(record[name]) for name in names)],
        )
        for record in content["classes"]
    ]  # fmt: skip
    return sortable_table("class-table", header, rows, "Search by class name")


def retrained_records(contents: Contents) -> dict[int, ClassRecord]:
    """By class, the evaluation of the network retrained without it; empty without baselines."""
    for baseline in contents.baselines:
        if baseline["method"] == "retrained":
            found = EvaluationResult.from_dict(baseline["evaluation"])
            return {record.index: record for record in found.records}
    return {}


def _figures(contents: Contents) -> str:
    parts = []
    for name, text in PICTURES.items():
        if name in contents.pictures and name != "trust.png":
            parts.append(_picture(contents, name, text))
    return "".join(parts)


def _picture(contents: Contents, name: str, text: str) -> str:
    data = base64.b64encode(contents.pictures[name]).decode("ascii")
    short = escape(text.partition(";")[0].partition(":")[0].rstrip("."), quote=True)
    return (
        f'<figure id="figure-{name.partition(".")[0]}"><img alt="{short}" '
        f'src="data:image/png;base64,{data}"><figcaption>{escape(text)}</figcaption></figure>\n'
    )


# -- tables beside others -------------------------------------------------------------------------


def _tables(contents: Contents) -> str:
    if contents.multi_label is not None:
        return ""
    if contents.tables is not None:
        return _paper_tables(contents.tables)
    if contents.baselines:
        header = ["method", "Acc_r, %", "Acc_f, %", "ZRF", "classes"]
        rows = []
        for baseline in contents.baselines:
            found = EvaluationResult.from_dict(baseline["evaluation"])
            rows.append(
                [cell(baseline["method"], text=True), percent(found.mean.acc_r),
                 percent(found.mean.acc_f), number(found.mean.zrf), cell(len(found.records))]
            )  # fmt: skip
        if contents.evaluation is not None:
            for name, scores in (("original", contents.evaluation.original),
                                 ("wfnet", contents.evaluation.mean)):  # fmt: skip
                rows.append(
                    [cell(name, text=True), percent(scores.acc_r), percent(scores.acc_f),
                     number(scores.zrf), cell(len(contents.evaluation.records))]
                )  # fmt: skip
        return table(header, rows)
    return _hint(
        f"wfnet baseline {contents.folder}", "retrained networks and other methods to compare with"
    )


def _paper_tables(tables: Mapping[str, Any]) -> str:
    names = {
        "acc_r": "Acc_r, %", "acc_f": "Acc_f, %", "zrf": "ZRF, %", "rt": "RT, epochs",
        "rt_never": "never relearned", "rt_tolerant": "RT, tolerant",
        "rt_tolerant_never": "never, tolerant", "insertion": "insertion", "deletion": "deletion",
        "insertion_random": "insertion, random order", "deletion_random": "deletion, random order",
    }  # fmt: skip
    rows = tables["rows"]
    shown = [n for n in names if any(row.get(n) is not None for row in rows)]
    theirs = [n for n in names if any(n in row.get("published", {}) for row in rows)]
    header = ["method", *(names[n] for n in shown), *(f"published {names[n]}" for n in theirs)]
    lines = [
        [
            cell(row["method"], text=True),
            *(_rounded(row.get(n)) for n in shown),
            *(_rounded(row.get("published", {}).get(n)) for n in theirs),
        ]
        for row in rows
    ]
    source = f"published: {tables['published_source']}" if theirs else ""
    html = table(header, lines, caption=f"{tables['title']}. {source}".strip())
    for group in tables.get("groups", ()):
        mean = group["mean"]
        html += (
            f"<p>{group['groups']:,} groups of {group['size']} classes forgotten at once: Acc_r "
            f"{100 * mean['acc_r']:.2f}% (original {100 * mean['original_acc_r']:.2f}%), Acc_f "
            f"{100 * mean['acc_f']:.2f}% (original {100 * mean['original_acc_f']:.2f}%).</p>"
        )
    return html


def _signed(value: float | None) -> str:
    return cell(value, None if value is None else f"{value:+.3f}")


def _rounded(value: float | None) -> str:
    return cell(value, None if value is None else f"{value:.4g}")


# -- trust ----------------------------------------------------------------------------------------


def _trust(contents: Contents) -> str:
    good, bad = statements(contents.evaluation, contents.trust)
    parts = [
        _statements("It does", good, "verdict good"),
        _statements("It does not", bad, "verdict"),
    ]
    trust = contents.trust
    if contents.multi_label is not None:
        return "".join(parts)
    if trust is None:
        parts.append(_hint(f"wfnet trust {contents.folder}", "attacks on what was forgotten"))
        return "".join(parts) + _exports(contents)
    means = trust.means()
    classes = len({record.index for record in trust.records})
    models = sorted({record.retrained_models for record in trust.records})
    parts.append(
        f"<p>Means over {classes:,} {'class' if classes == 1 else 'classes'}. The model under test "
        "is the plain model of each class, as it would be exported; beside it the same measured on "
        f"the original and on {' or '.join(map(str, models))} retrained "
        f"{'model' if models == [1] else 'models'} per class. Distance: model under test less "
        "retrained.</p>"
    )
    parts += [f"<p>Not measured. {escape(sentence)}</p>" for sentence in trust.missing()[:6]]
    if "trust.png" in contents.pictures:
        parts.append(_picture(contents, "trust.png", PICTURES["trust.png"]))
    for check, rows in means.items():
        module = CHECKS[check]
        lines = [
            [
                cell(name, text=True), number(row["forgetful"]), number(row["original"]),
                number(row["retrained"]),
                _signed(row["distance"]),
                cell(_meaning(check, name), text=True),
            ]
            for name, row in rows.items()
        ]  # fmt: skip
        header = ["measure", "model under test", "original", "retrained", "distance", "what it is"]
        parts.append(f"<h3>{escape(module.TITLE)}: {escape(module.QUESTION)}</h3>")
        parts.append(table(header, lines, text_columns=(0, 5)))
        parts.append(_noise(trust, check))
    parts.append(_trust_by_class(trust))
    return "".join(parts) + _exports(contents)


def _noise(trust: TrustResult, check: str) -> str:
    """How far chance alone takes one class's area under the curve."""
    errors = [
        record.details["standard_error"]
        for record in trust.records
        if record.check == check and "standard_error" in record.details
    ]
    if not errors:
        return ""
    return (
        "<p>Standard error of one class's <code>auc_confidence</code>, from its number of images: "
        f"{sum(errors) / len(errors):.3f} on average. A class's distance of up to about three "
        "times that may be chance.</p>"
    )


def _trust_by_class(trust: TrustResult) -> str:
    """One line per class with every check's headline, and its distance to retraining."""
    by_class: dict[int, dict[str, Any]] = {}
    for record in trust.records:
        by_class.setdefault(record.index, {})[record.check] = record
    checks = [c for c in CHECKS if any(c in found for found in by_class.values())]
    header = [("#", "number of the class"), ("class", "its name")]
    for check in checks:
        headline = CHECKS[check].HEADLINE
        header.append((headline, _meaning(check, headline)))
        header.append(("distance", f"{headline}: model under test less retrained"))
    rows = []
    for index, found in sorted(by_class.items()):
        name = next(iter(found.values())).name
        cells = [cell(index), cell(name, text=True)]
        for check in checks:
            record, headline = found.get(check), CHECKS[check].HEADLINE
            distance = None if record is None else record.distance(headline)
            cells.append(number(None if record is None else record.forgetful.get(headline)))
            cells.append(_signed(distance))
        rows.append((f"trust-class-{index}", f"{index} {name}", cells))
    table_ = sortable_table("trust-table", header, rows, "Search by class name")
    return f"<h3>By class</h3>{table_}"


def _exports(contents: Contents) -> str:
    parts = []
    for name, report in contents.exports.items():
        for found in report.get("classes", ()):
            values = found["values"]
            ways = ", ".join(
                f"{text} {100 * values[key]:.1f}%"
                for key, text in (
                    ("acc_f", "as it is"),
                    ("acc_f_batchnorm_all", "BatchNorm re-estimated"),
                    ("acc_f_equalised", "rows equalised"),
                    ("acc_f_offset", "logit shifted"),
                )
                if key in values
            )
            below = report.get("prune_below") or 0
            pruned = f", gates below {below:g} at 0" if below else ""
            pruned += ", class cut from the head" if report.get("cut_output") else ""
            parts.append(
                f"<li><code>{escape(str(report.get('file', name)))}</code>{pruned}: accuracy on "
                f"class {escape(str(found['name']))} {ways}; on the others "
                f"{100 * values['acc_r']:.1f}%</li>"
            )
    return f"<h3>Exported files</h3><ul>{''.join(parts)}</ul>" if parts else ""


def statements(
    evaluation: EvaluationResult | None, trust: TrustResult | None
) -> tuple[list[str], list[str]]:
    """What forgetting at run time protects against, and what not, with the measured numbers.

    Returns:
        Sentences for both, plain text. What was not measured is said to be so.
    """
    means = trust.means() if trust else {}

    def levels(check: str, name: str) -> str | None:
        row = means.get(check, {}).get(name)
        if row is None or row["forgetful"] is None:
            return None
        level = row["retrained"]
        beside = "" if level is None else f" (a retrained model: {100 * level:.1f}%)"
        return f"{100 * row['forgetful']:.1f}%{beside}"

    good, bad = [], []
    if evaluation is not None:
        good.append(
            "Who can only send images, while you set the forget label, gets "
            f"{100 * evaluation.mean.acc_f:.1f}% accuracy on the class instead of "
            f"{100 * evaluation.original.acc_f:.1f}%, and {100 * evaluation.mean.acc_r:.1f}% "
            f"instead of {100 * evaluation.original.acc_r:.1f}% on all others."
        )
        bad.append(
            "Whoever chooses the label, or holds the base weights, has the original network with "
            f"{100 * evaluation.original.acc_f:.1f}% on the class: filters only suppress "
            "behaviour, the base still holds everything it learned."
        )
    near = levels("collateral", "acc_nearest_confusion")
    if near:
        before = means["collateral"]["acc_nearest_confusion"]["original"]
        good.append(
            f"Classes that resemble the forgotten one are read at {near}; the original reads them "
            f"at {100 * before:.1f}%."
        )
    cut = trust is not None and bool(trust.settings.get("cut_output"))
    # Of exports with the class cut from the head: what no longer brings it back protects.
    withstood = {
        "acc_f_batchnorm_all": "BatchNorm statistics estimated anew on unlabelled images bring an "
        "export whose class is cut from its head (cut_output) to no more than",
        "acc_f_retain_only": "Fine-tuning on images of the other classes alone brings an export "
        "whose class is cut from its head (cut_output) to no more than",
    }
    attacks = (
        ("removal", "acc_f_batchnorm_all", "Who holds a baked file and unlabelled images brings "
         "the class back by estimating BatchNorm statistics anew, to"),
        ("removal", "acc_f_offset", "Who sees the logits and adds a constant to the class's "
         "reaches"),
        ("relearning", "acc_f_retain_only", "Who fine-tunes a baked model on images of the other "
         "classes alone reaches"),
    )  # fmt: skip
    for check, name, text in attacks:
        if found := levels(check, name):
            if cut and name in withstood and means[check][name]["forgetful"] < WITHSTOOD:
                good.append(f"{withstood[name]} {found} accuracy on the class.")
            else:
                bad.append(f"{text} {found} accuracy on the class.")
    few = [n for n in means.get("relearning", {}) if n.startswith("acc_f_from_")]
    for name in few:
        count = int(name.rpartition("_")[2])
        bad.append(
            f"Who fine-tunes with {count} {'image' if count == 1 else 'images'} of the class "
            f"reaches {levels('relearning', name)}."
        )
    if cut:
        bad.append(
            "The exports under test give a constant for the logit of the class, which was cut from "
            "the head: that it was removed shows, outputs differ from a retrained model's in that "
            "entry, and whoever has images of the class can put a new row there."
        )
    if row := means.get("probing", {}).get("probe_last"):
        level = "" if row["retrained"] is None else f" (a retrained model: {row['retrained']:.2f})"
        bad.append(
            "Features before the head still tell the class from the others: a linear probe has "
            f"balanced accuracy {row['forgetful']:.2f}{level}; 0.5 would be chance."
        )
    if row := means.get("membership", {}).get("lira_auc"):
        bad.append(
            "Whether the model ever saw the class can be told from retrained models by its "
            f"confidence on training images, with an area under the ROC of {row['forgetful']:.2f}; "
            "0.5 would be chance."
        )
    if trust is None:
        bad.append(
            "How far a baked model withstands attacks was not measured; it carries neither filters "
            "nor the original weights, but can be taught the class again."
        )
    return good, bad


def _statements(title: str, sentences: Sequence[str], kind: str) -> str:
    if not sentences:
        return ""
    heading = "protect" if title == "It does" else "protect, at all or well enough"
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f'<div class="{kind}"><h3>{title} {heading}</h3><ul>{items}</ul></div>'


def _meaning(check: str, name: str) -> str:
    if check == "relearning":
        return describe_relearning(name)
    return CHECKS[check].MEASURES.get(name, "")


# -- definitions and configuration ----------------------------------------------------------------


def _definitions(contents: Contents) -> str:
    rows = [[cell(text, text=True) for text in line] for line in DEFINITIONS]
    html = table(["measure", "formula", "meaning", "source"], rows, text_columns=(0, 1, 2, 3))
    if contents.trust is None:
        return html
    for check in dict.fromkeys(record.check for record in contents.trust.records):
        module = CHECKS[check]
        html += f"<h3>{escape(module.TITLE)}</h3><pre>{escape(_without_markup(module))}</pre>"
    return html


def _without_markup(module: ModuleType) -> str:
    """The module's documentation as plain text: no quotes of code, no roles."""
    text = (module.__doc__ or "").strip()
    text = re.sub(r"(?::\w+)?:`([^`]+)`", r"\1", text).replace("``", "")
    return re.sub(r"::$", ":", text, flags=re.M)


def _configuration(contents: Contents) -> str:
    run = contents.run
    parts = []
    settings = {
        "options": run.get("options"),
        "untraining": run.get("untraining")
        or run.get("stages", {}).get("untrain", {}).get("key", {}).get("untraining"),
        "filters": {k: v for k, v in contents.filters.items() if k != "targets"},
        "masked layers": contents.filters.get("targets"),
        "evaluation": (contents.multi_label or {}).get("settings")
        or (contents.evaluation.settings if contents.evaluation else None),
        "trust checks": contents.trust.settings if contents.trust else None,
        "versions": run.get("versions"),
        "seconds": run.get("seconds"),
        "this report": {
            "wfnet": __version__, "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
        },
    }  # fmt: skip
    for title, value in settings.items():
        if value:
            text = json.dumps(value, indent=2, ensure_ascii=False)
            parts.append(f"<h3>{escape(title)}</h3><pre>{escape(text)}</pre>")
    return "".join(parts)


def _change(before: float, after: float) -> str:
    return f"{100 * before:.1f}% → {100 * after:.1f}%"


def _hint(command: str, what: str) -> str:
    return f"<p class=soft>Not there yet: {escape(what)}. <code>{escape(command)}</code></p>"
