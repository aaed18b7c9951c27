"""The paper's tables: our rows of Table 1 and Table 2 beside the published numbers.

The published numbers are data with their source (``published.json``), by cell: data set and
backbone, ``cifar10/resnet18``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from wfnet.evaluation.attribution import AttributionResult
from wfnet.evaluation.groups import GroupResult
from wfnet.evaluation.relearning import RelearnResult
from wfnet.evaluation.results import EvaluationResult, Scores, base_name, padded
from wfnet.services.files import write_json, write_text
from wfnet.services.records import write_csv

FORMAT = 1
# Rows of the tables in their order; other baselines stand before the last one.
TITLES = {
    "original": "original",
    "retrained": "retrained",
    "random_labels": "random labels",
    "negative_gradient": "negative gradient",
    "neggrad_plus": "NegGrad+",
    "wfnet": "WF-Net",
}
_SCORES = ("acc_r", "acc_f", "zrf")
_AREAS = ("insertion", "deletion", "insertion_random", "deletion_random")
_VALUES = (*_SCORES, "rt", "rt_never", "rt_tolerant", "rt_tolerant_never", *_AREAS)

# The last part of a model's name -> the backbone in the published cells, and the millions of
# parameters that it has, whatever its head and first layer: a narrower network is another one.
_BACKBONES = {
    r"resnet18": ("resnet18", (11.1, 11.8)),
    r"resnet50": ("resnet50", (23.4, 25.7)),
    r"resnet101": ("resnet101", (42.4, 44.7)),
    r"vgg16(_bn)?": ("vgg16", (14.6, 14.8), (134.2, 138.5)),
    r"(vit|deit)_t(iny|i)?(_.*)?": ("vit_tiny", (5.3, 5.8)),
    r"(vit|deit)_s(mall)?(_.*)?": ("vit_small", (21.2, 22.2)),
}


@cache
def published() -> dict[str, Any]:
    """``source``, ``units`` and ``cells``: by cell and method the published values."""
    path = resources.files("wfnet.evaluation") / "published.json"
    return json.loads(path.read_text())


def published_cell(data: str | None, name: str, parameters: int) -> str | None:
    """The paper's cell of a data set and a network; None if it has none.

    Args:
        data: ``mnist``, ``cifar10``, ``imagenet``, or None for other data.
        name: of the model: ``resnet18``, ``timm/vit_tiny_patch16_224.augreg``, ``small/vgg16``.
        parameters: how many the network has.
    """
    last = name.rpartition("/")[2].partition(".")[0]
    for pattern, (backbone, *millions) in _BACKBONES.items():
        if re.fullmatch(pattern, last):
            fits = any(low <= parameters / 1e6 <= high for low, high in millions)
            cell = f"{data}/{backbone}"
            return cell if fits and cell in published()["cells"] else None
    return None


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
            not measured. ``published``: the paper's values by the same names, where it has them.
        groups: means of :class:`wfnet.evaluation.GroupResult`, one per size of group.
        settings: how each row was made.
    """

    title: str
    cell: str | None
    zrf_base: float
    tolerance: float | None
    rows: list[dict[str, Any]]
    groups: list[dict[str, Any]]
    settings: dict[str, Any]

    def write(self, folder: str | os.PathLike) -> None:
        """Writes ``tables.json``, ``tables.csv`` (ours, then ``published_*``) and ``tables.md``."""
        content = {
            "format": FORMAT,
            "units": "acc_r, acc_f, zrf in %; rt in epochs; insertion and deletion in [0, 1]",
            "published_source": published()["source"],
            "rt_of_a_class_that_never_came_back": "the cap of the relearn settings",
            **asdict(self),
        }
        write_json(Path(folder) / "tables.json", content)
        lines = []
        for row in self.rows:
            ours = {name: round(row[name], 6) for name in _VALUES if row[name] is not None}
            theirs = {f"published_{name}": value for name, value in row["published"].items()}
            lines.append({"title": self.title, "method": row["method"], **ours, **theirs})
        columns = ["title", "method", *_VALUES, *(f"published_{name}" for name in _VALUES)]
        write_csv(Path(folder) / "tables.csv", lines, columns)
        write_text(Path(folder) / "tables.md", self.markdown())

    def markdown(self) -> str:
        """The tables as Markdown, readable in a terminal too."""
        timed = any(row["rt"] is not None for row in self.rows)
        columns = [("Table 1", _title)]
        columns += [("Acc_r", _number("acc_r", ".2f")), ("Acc_f", _number("acc_f", ".2f"))]
        columns.append(("ZRF", _number("zrf", ".2f")))
        if timed:
            within = f"RT within {100 * (self.tolerance or 0):g} points"
            columns += [("RT", _epochs("rt", ".1f")), (within, _epochs("rt_tolerant", ".1f"))]
        if any(row["published"] for row in self.rows):
            theirs = [*(_number(name, "g") for name in _SCORES), _epochs("rt", "g")]
            columns.append(("published: Acc_r / Acc_f / ZRF / RT", _published(theirs)))
        parts = [f"### {self.title}", _markdown(columns, self.rows)]

        areas = [
            r for r in self.rows if r["insertion"] is not None or "insertion" in r["published"]
        ]
        titles = ("insertion", "deletion", "random order: insertion", "deletion")
        columns = [("Table 2", _title)]
        columns += [(t, _number(name, ".3f")) for t, name in zip(titles, _AREAS, strict=True)]
        if any("insertion" in row["published"] for row in areas):
            theirs = [_number(name, ".2f") for name in _AREAS[:2]]
            columns.append(("published: insertion / deletion", _published(theirs)))
        if areas:
            parts.append(_markdown(columns, areas))

        columns = [
            ("several classes at once", lambda group: group["title"]),
            ("groups", _number("groups", "d")),
            ("Acc_r", _number("acc_r", ".2f")),
            ("original", _number("original_acc_r", ".2f")),
            ("Acc_f", _number("acc_f", ".2f")),
            ("original", _number("original_acc_f", ".2f")),
            ("worst class", _number("acc_f_worst", ".2f")),
        ]
        groups = []
        for group in self.groups:
            title = "pairs" if group["size"] == 2 else f"groups of {group['size']}"
            means = {name: 100 * value for name, value in group["mean"].items()}
            groups.append({"title": title, "groups": group["groups"], **means})
        if groups:
            parts.append(_markdown(columns, groups))
        return "\n\n".join([*parts, "\n".join(self._notes(timed))]) + "\n"

    def _notes(self, timed: bool) -> list[str]:
        notes = [
            "Acc_r, Acc_f and ZRF in %, means over classes; ZRF with log base "
            f"{base_name(self.zrf_base)}."
        ]
        if timed:
            notes.append(
                "RT in epochs, in parentheses the classes that never came back (they count as the "
                "cap)."
            )
        if self.settings.get("published") is not None:
            notes.append(f"The published cell was chosen by hand: {self.settings['published']}")
        if self.cell is not None:
            notes.append(
                f"Published: {self.cell}, {published()['source']}. The paper states neither the "
                "base of ZRF's logarithm nor the optimiser of RT."
            )
        return notes


def make_tables(
    title: str,
    evaluation: EvaluationResult,
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
    values = {
        "original": _scores(evaluation.original),
        "wfnet": {**_scores(evaluation.mean), **_times(timed), **areas},
    }
    for baseline in baselines:
        method, found = baseline["method"], EvaluationResult.from_dict(baseline["evaluation"])
        values[method] = {**_scores(found.mean), **_times(baseline["relearning"])}
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
    return PaperTables(title, cell, evaluation.zrf_base, tolerance, rows, groups, settings)


def check_baselines(
    baselines: Sequence[Mapping[str, Any]],
    zrf_base: float,
    zrf_mode: str = "definition",
    relearning: Mapping[str, Any] | None = None,
) -> None:
    """Raises ValueError for baselines that were not measured as the filtered network is.

    ``relearning`` are the settings of its relearn time, as in a result; None without.
    """
    if baselines and zrf_mode != "definition":
        raise ValueError(
            f"the filtered network's ZRF is of mode {zrf_mode!r}, that of the baselines as it is "
            "defined; evaluate with --zrf-mode definition"
        )
    for baseline in baselines:
        evaluated, timed = baseline["evaluation"], baseline["relearning"]
        config = {} if timed is None else timed["config"]
        relearning = config if relearning is None else relearning
        wanted = {"zrf_base": zrf_base, **(relearning if config else {})}
        found = {"zrf_base": evaluated["zrf_base"], **config}
        differ = [name for name in wanted if found.get(name) != wanted[name]]
        if differ:
            name = differ[0]
            raise ValueError(
                f"baseline {baseline['method']} was measured with {name}={found.get(name)}, "
                f"others with {wanted[name]}: measure all alike, or leave the relearn time out "
                "(--no-relearn)"
            )


def _scores(scores: Scores) -> dict[str, float]:
    return {name: 100 * getattr(scores, name) for name in _SCORES}


def _times(timed: Mapping[str, Any] | None) -> dict[str, float]:
    """Relearn times of a row, from a result's dictionary."""
    if timed is None:
        return {}
    return {
        f"{name}{suffix}": timed[mean][value]
        for name, mean in (("rt", "mean"), ("rt_tolerant", "mean_tolerant"))
        for suffix, value in (("", "epochs"), ("_never", "never"))
    }


# A cell of a table is a function of its row.
Cell = Callable[[Mapping[str, Any]], str]


def _title(row: Mapping[str, Any]) -> str:
    return TITLES.get(row["method"], row["method"].replace("_", " "))


def _number(name: str, form: str) -> Cell:
    return lambda row: "-" if row.get(name) is None else format(row[name], form)


def _epochs(name: str, form: str) -> Cell:
    mean, never = _number(name, form), _number(f"{name}_never", "g")
    return lambda row: "-" if row.get(name) is None else f"{mean(row)} ({never(row)})"


def _published(cells: Sequence[Cell]) -> Cell:
    """The paper's values of a row, one beside the other."""

    def cell(row: Mapping[str, Any]) -> str:
        theirs = row["published"]
        return " / ".join(part(theirs) for part in cells) if theirs else "-"

    return cell


def _markdown(columns: Sequence[tuple[str, Cell]], rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table whose columns are as wide as their widest cell; numbers to the right."""
    header = [title for title, _ in columns]
    table = [header, *([cell(row) for _, cell in columns] for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [padded(cells, widths) for cells in table]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (lines[0], rule, *lines[1:]))
