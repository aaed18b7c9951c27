"""The paper's tables: our rows of Table 1 and Table 2 beside the published numbers.

The published numbers are data with their source (``published.json``), by cell: data set and
backbone, ``cifar10/resnet18``.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from wfnet.evaluation.attribution import CURVES, AttributionResult
from wfnet.evaluation.groups import GroupResult
from wfnet.evaluation.multilabel_rows import MultiLabelResult, evaluation_from_dict
from wfnet.evaluation.relearning import RelearnResult
from wfnet.evaluation.results import EvaluationResult, Scores, base_name
from wfnet.services.files import FilePath, write_json, write_text
from wfnet.services.records import write_csv
from wfnet.services.tables import wide_markdown_table

FORMAT = 1
# Rows of the tables in their order; other baselines stand before the last one.
TITLES = {
    "original": "original",
    "also_masked": "filters, logit masked",
    "logit_masked": "logit masked",
    "bias_shifted": "bias shifted",
    "retrained": "retrained",
    "random_labels": "random labels",
    "negative_gradient": "negative gradient",
    "neggrad_plus": "NegGrad+",
    "ssd": "SSD",
    "salun": "SalUn",
    "scrub": "SCRUB",
    "bad_teacher": "bad teacher",
    "unsir": "UNSIR",
    "undo": "UNDO",
    "wfnet": "WF-Net",
}
_SCORES = ("acc_r", "acc_f", "zrf")
_PRECISIONS = ("ap_f", "map_r")  # in place of scores, where images have several labels
_VALUES = (*_SCORES, "rt", "rt_never", "rt_tolerant", "rt_tolerant_never", *CURVES)


@cache
def published() -> dict[str, Any]:
    """``source``, ``units`` and ``cells``: by cell and method the published values."""
    path = resources.files("wfnet.evaluation") / "published.json"
    return json.loads(path.read_text())


@dataclass(frozen=True)
class PaperTables:
    """Rows of Table 1 and Table 2 for one data set and backbone, and groups of classes.

    Attributes:
        title: data set and network, as they are called here.
        cell: the paper's cell that stands beside; None if it has none.
        zrf_base: base of the logarithm in every ZRF of ours.
        tolerance: of ``rt_tolerant``, in points; None without relearning.
        rows: one per ``method``: ``acc_r``, ``acc_f``, ``zrf`` in %; ``rt``, ``rt_never``: relearn
            time in epochs, and classes never relearned, also within the tolerance;
            ``insertion``, ``deletion``: areas in [0, 1], also in random order. None where it was
            not measured. Of images with several labels ``ap_f`` and ``map_r`` in %. ``published``:
            the paper's values by the same names, where it has them.
        groups: means of :class:`wfnet.evaluation.GroupResult`, one per size of group.
        settings: how each row was made.
    """

    title: str
    cell: str | None
    zrf_base: float | None
    tolerance: float | None
    rows: list[dict[str, Any]]
    groups: list[dict[str, Any]]
    settings: dict[str, Any]

    @property
    def of_labels(self) -> bool:
        """Whether images have several labels each."""
        return any("ap_f" in row for row in self.rows)

    def write(self, folder: FilePath) -> None:
        """Writes ``tables.json``, ``tables.csv`` (ours, then ``published_*``) and ``tables.md``."""
        content = {
            "format": FORMAT,
            "units": "acc_r, acc_f, zrf in %; rt in epochs; insertion and deletion in [0, 1]",
            "published_source": published()["source"],
            "rt_of_a_class_that_never_came_back": "the cap of the relearn settings",
            **asdict(self),
        }
        write_json(Path(folder) / "tables.json", content)
        lines, precisions = [], _PRECISIONS if self.of_labels else ()
        for row in self.rows:
            measured = {name: row.get(name) for name in (*_VALUES, *precisions)}
            ours = {name: round(v, 6) for name, v in measured.items() if v is not None}
            theirs = {f"published_{name}": value for name, value in row["published"].items()}
            lines.append({"title": self.title, "method": row["method"], **ours, **theirs})
        columns = [
            "title",
            "method",
            *_VALUES,
            *precisions,
            *(f"published_{name}" for name in _VALUES),
        ]
        write_csv(Path(folder) / "tables.csv", lines, columns)
        write_text(Path(folder) / "tables.md", self.markdown())

    def markdown(self) -> str:
        """The tables as Markdown, readable in a terminal too."""
        columns = [("Acc_r", "acc_r", ".2f"), ("Acc_f", "acc_f", ".2f"), ("ZRF", "zrf", ".2f")]
        theirs = [("Acc_r", "acc_r", "g"), ("Acc_f", "acc_f", "g"), ("ZRF", "zrf", "g")]
        theirs.append(("RT", "rt", "g"))
        if self.of_labels:
            columns = [("AP_f", "ap_f", ".2f"), ("mAP_r", "map_r", ".2f")]
        timed = any(row["rt"] is not None for row in self.rows)
        if timed:
            within = f"RT within {100 * (self.tolerance or 0):g} points"
            columns += [("RT", "rt", ".1f"), (within, "rt_tolerant", ".1f")]
        parts = [
            f"### {self.title}",
            _markdown("labels" if self.of_labels else "Table 1", columns, theirs, self.rows),
        ]

        titles = ("insertion", "deletion", "random order: insertion", "deletion")
        columns = [(text, name, ".3f") for text, name in zip(titles, CURVES, strict=True)]
        theirs = [(name, name, ".2f") for name in CURVES[:2]]
        areas = [
            r for r in self.rows if r["insertion"] is not None or "insertion" in r["published"]
        ]
        if areas:
            parts.append(_markdown("Table 2", columns, theirs, areas))

        kinds = [("mAP_r", "map_r"), ("AP_f", "ap_f")]
        if not self.of_labels:
            kinds = [("Acc_r", "acc_r"), ("Acc_f", "acc_f")]
        columns = [
            ("groups", "groups", "d"),
            *(
                column
                for text, name in kinds
                for column in ((text, name, ".2f"), ("original", f"original_{name}", ".2f"))
            ),
            ("worst class", f"{kinds[1][1]}_worst", ".2f"),
        ]
        groups = []
        for group in self.groups:
            title = "pairs" if group["size"] == 2 else f"groups of {group['size']}"
            means = {name: 100 * value for name, value in group["mean"].items()}
            groups.append({"method": title, "groups": group["groups"], **means})
        if groups:
            parts.append(_markdown("several classes at once", columns, [], groups))

        if self.of_labels:
            notes = [
                "AP_f and mAP_r in %, means over labels. A masked logit has the label's share of "
                "the images, which is chance, and leaves all other outputs as they are. Relearn "
                "time, insertion, deletion and ZRF are of images with one label each."
            ]
            return "\n\n".join([*parts, *notes]) + "\n"
        base = base_name(self.zrf_base)
        notes = [f"Acc_r, Acc_f and ZRF in %, means over classes; ZRF with log base {base}."]
        if any(row["method"] == "logit_masked" for row in self.rows):
            notes.append(
                "Acc_r may rise above the original's, because a competitor is missing: compare it "
                "with that of the original with the logit masked."
            )
        if timed:
            notes.append(
                "RT in epochs, in parentheses the classes that never came back (they count as the "
                "cap)."
            )
        if self.cell is not None:
            notes.append(
                f"Published: {self.cell}, {published()['source']}. The cell was chosen by hand: "
                "these data, this network or these classes may be others than the paper's. It "
                "states neither the base of ZRF's logarithm nor the optimiser of RT."
            )
        return "\n\n".join([*parts, "\n".join(notes)]) + "\n"


def make_tables(
    title: str,
    evaluation: EvaluationResult | MultiLabelResult,
    relearning: RelearnResult | None = None,
    attribution: AttributionResult | None = None,
    baselines: Sequence[Mapping[str, Any]] = (),
    groups: Sequence[GroupResult] = (),
    cell: str | None = None,
) -> PaperTables:
    """Puts results side by side.

    Args:
        title: data set and network.
        evaluation: of the filtered network; the row ``original`` comes from it too.
        relearning, attribution: of the filtered network, where they were measured.
        baselines: :meth:`wfnet.baselines.BaselineResult.as_dict` of each method, measured alike
            (:func:`check_baselines`).
        groups: groups of classes, one result per size.
        cell: published numbers to stand beside, a key of ``published()["cells"]``.
    """
    theirs = {} if cell is None else published()["cells"][cell]
    timed = None if relearning is None else relearning.as_dict()
    settings: dict[str, Any] = {"evaluation": evaluation.settings}
    if timed is not None:
        settings["relearning"] = timed["config"]
    if attribution is not None:
        settings["attribution"] = attribution.settings
    areas = {} if attribution is None else attribution.mean
    if isinstance(evaluation, MultiLabelResult):
        zrf_base, mean = None, {name: 100 * value for name, value in evaluation.mean.items()}
        original = {name: mean[f"original_{name}"] for name in _PRECISIONS}
        values = {
            "original": original,
            "logit_masked": {**original, "ap_f": mean["share"]},
            "wfnet": {name: mean[name] for name in _PRECISIONS},
        }
    else:
        zrf_base = evaluation.zrf_base
        values = {
            "original": _measured(evaluation.original, None),
            "wfnet": {**_measured(evaluation.mean, timed), **areas},
        }
    for baseline in baselines:
        method, found = baseline["method"], evaluation_from_dict(baseline["evaluation"])
        if isinstance(found, MultiLabelResult):
            values[method] = {name: 100 * found.mean[name] for name in _PRECISIONS}
        else:
            values[method] = _measured(found.mean, baseline["relearning"])
        if baseline["relearning"] is not None:
            settings.setdefault("relearning", baseline["relearning"]["config"])
        settings[method] = {**baseline["settings"], "classes": found.settings["classes"]}
    known = [*values, *theirs]
    methods = [method for method in TITLES if method in known and method != "wfnet"]
    methods += [method for method in dict.fromkeys(known) if method not in TITLES]
    rows = [
        {
            "method": method,
            **dict.fromkeys(_VALUES),
            **values.get(method, {}),
            "published": dict(theirs.get(method, {})),
        }
        for method in (*methods, "wfnet")
    ]
    tolerance = settings.get("relearning", {}).get("tolerance")
    groups = [result.as_dict() for result in groups]
    return PaperTables(title, cell, zrf_base, tolerance, rows, groups, settings)


def check_baselines(
    baselines: Sequence[Mapping[str, Any]],
    zrf_base: float,
    relearning: Mapping[str, Any] | None = None,
) -> None:
    """Raises ValueError for baselines that were not measured as the filtered network is.

    ``relearning`` are the settings of its relearn time, as in a result; None without.
    """
    wanted = {"zrf_base": zrf_base, **(relearning or {})}
    for baseline in baselines:
        timed = baseline["relearning"]
        found = {n: v for n, v in baseline["evaluation"].items() if n == "zrf_base"}
        for name, value in (found if timed is None else found | timed["config"]).items():
            if wanted.setdefault(name, value) != value:
                raise ValueError(
                    f"baseline {baseline['method']} was measured with {name}={value}, others with "
                    f"{wanted[name]}: measure all alike, or leave the relearn time out "
                    "(--no-relearn)"
                )


def _measured(scores: Scores, timed: Mapping[str, Any] | None) -> dict[str, float]:
    """Values of a row: scores in %, and relearn times from a result's dictionary."""
    values = {name: 100 * getattr(scores, name) for name in _SCORES}
    if timed is not None:
        for name, mean in (("rt", "mean"), ("rt_tolerant", "mean_tolerant")):
            values |= {name: timed[mean]["epochs"], f"{name}_never": timed[mean]["never"]}
    return values


def _markdown(
    title: str,
    columns: Sequence[tuple[str, str, str]],
    theirs: Sequence[tuple[str, str, str]],
    rows: Sequence[Mapping[str, Any]],
) -> str:
    """A Markdown table of rows beside published values.

    ``columns``: title, name of the value, format. ``theirs``: published values, in one column.
    """
    table = [[title, *(text for text, _, _ in columns)]]
    for row in rows:
        label = TITLES.get(row["method"], row["method"].replace("_", " "))
        table.append([label, *(_cell(row, name, form) for _, name, form in columns)])
    if any(name in row["published"] for _, name, _ in theirs for row in rows):
        table[0].append("published: " + " / ".join(text for text, _, _ in theirs))
        for cells, row in zip(table[1:], rows, strict=True):
            found = [_cell(row["published"], name, form) for _, name, form in theirs]
            cells.append(" / ".join(found) if row["published"] else "-")
    return wide_markdown_table(table[0], table[1:])


def _cell(row: Mapping[str, Any], name: str, form: str) -> str:
    """A value as text; behind a relearn time, how many classes never came back."""
    if row.get(name) is None:
        return "-"
    never = f"{name}_never"
    return format(row[name], form) + (f" ({row[never]:g})" if never in row else "")
