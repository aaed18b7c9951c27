"""The paper's tables: our rows of Table 1 and Table 2 beside the published numbers.

The published numbers are data with their source (``published.json``), by cell: data set and
backbone, ``cifar10/resnet18``.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from importlib import resources
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
        data: ``mnist``, ``cifar10`` or ``imagenet``, as their content shows
            (:func:`wfnet.data.standard_files.standard_name`), or None for other data.
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
class TableRow:
    """One method: ours, and what was published for it.

    Attributes:
        method: a key of ``TITLES``, or another baseline's name.
        acc_r, acc_f, zrf: in %.
        rt, rt_never: relearn time in epochs (mean over classes) and classes never relearned;
            None where it was not measured.
        rt_tolerant, rt_tolerant_never: the same within the tolerance of the relearn settings.
        insertion, deletion: areas in [0, 1]; insertion_random, deletion_random: in random order.
        published: the paper's values by the same names, where it has them.
    """

    method: str
    acc_r: float | None = None
    acc_f: float | None = None
    zrf: float | None = None
    rt: float | None = None
    rt_never: int | None = None
    rt_tolerant: float | None = None
    rt_tolerant_never: int | None = None
    insertion: float | None = None
    deletion: float | None = None
    insertion_random: float | None = None
    deletion_random: float | None = None
    published: dict[str, float] = field(default_factory=dict)


_VALUES = [f.name for f in fields(TableRow) if f.name not in ("method", "published")]


@dataclass(frozen=True)
class PaperTables:
    """Rows of Table 1 and Table 2 for one data set and backbone, and groups of classes.

    Attributes:
        title: data set and network, as they are called here.
        cell: the paper's cell that stands beside; None if it has none.
        zrf_base: base of the logarithm in every ZRF of ours.
        tolerance: of ``rt_tolerant``, in points; None without relearning.
        rows: one per method.
        groups: means of :class:`wfnet.evaluation.GroupResult`, one per size of group.
        settings: how each row was made.
    """

    title: str
    cell: str | None
    zrf_base: float
    tolerance: float | None
    rows: list[TableRow]
    groups: list[dict[str, Any]]
    settings: dict[str, Any]

    def to_json(self, path: str | os.PathLike) -> None:
        """Everything, atomically."""
        content = {
            "format": FORMAT,
            "units": "acc_r, acc_f, zrf in %; rt in epochs; insertion and deletion in [0, 1]",
            "published_source": published()["source"],
            "rt_of_a_class_that_never_came_back": "the cap of the relearn settings",
            **asdict(self),
        }
        write_json(path, content)

    def to_csv(self, path: str | os.PathLike) -> None:
        """One line per method: ours, then ``published_*``; atomically."""
        lines = []
        for row in self.rows:
            ours = {name: getattr(row, name) for name in _VALUES}
            line = {name: round(value, 6) for name, value in ours.items() if value is not None}
            theirs = {f"published_{name}": value for name, value in row.published.items()}
            lines.append({"title": self.title, "method": row.method, **line, **theirs})
        columns = ["title", "method", *_VALUES, *(f"published_{name}" for name in _VALUES)]
        write_csv(path, lines, columns)

    def to_markdown(self, path: str | os.PathLike) -> None:
        """The tables as Markdown, atomically."""
        write_text(path, self.markdown())

    def markdown(self) -> str:
        """The tables as Markdown, readable in a terminal too."""
        timed = any(row.rt is not None for row in self.rows)
        tables = [self._table1(timed)]
        if any(row.insertion is not None or "insertion" in row.published for row in self.rows):
            tables.append(self._table2())
        if self.groups:
            tables.append(self._table3())
        sections = [f"### {self.title}", *(_aligned(table) for table in tables)]
        return "\n\n".join([*sections, "\n".join(self._notes(timed))]) + "\n"

    def _table1(self, timed: bool) -> list[list[str]]:
        table = [["Table 1", "Acc_r", "Acc_f", "ZRF"]]
        if timed:
            table[0] += ["RT", f"RT within {100 * (self.tolerance or 0):g} points"]
        beside = any(row.published for row in self.rows)
        if beside:
            table[0].append("published: Acc_r / Acc_f / ZRF / RT")
        for row in self.rows:
            cells = [_title(row.method), *_numbers(vars(row), ("acc_r", "acc_f", "zrf"), ".2f")]
            if timed:
                cells.append(_epochs(row.rt, row.rt_never, ".1f"))
                cells.append(_epochs(row.rt_tolerant, row.rt_tolerant_never, ".1f"))
            theirs = row.published
            if beside:
                published = _numbers(theirs, ("acc_r", "acc_f", "zrf"), "g")
                published.append(_epochs(theirs.get("rt"), theirs.get("rt_never"), "g"))
                cells.append(" / ".join(published) if theirs else "-")
            table.append(cells)
        return table

    def _table2(self) -> list[list[str]]:
        names = ("insertion", "deletion", "insertion_random", "deletion_random")
        table = [["Table 2", "insertion", "deletion", "random order: insertion", "deletion"]]
        beside = any("insertion" in row.published for row in self.rows)
        if beside:
            table[0].append("published: insertion / deletion")
        for row in self.rows:
            if row.insertion is None and "insertion" not in row.published:
                continue
            cells = [_title(row.method), *_numbers(vars(row), names, ".3f")]
            if beside:
                cells.append(" / ".join(_numbers(row.published, names[:2], ".2f")))
            table.append(cells)
        return table

    def _table3(self) -> list[list[str]]:
        table = [
            [
                "several classes at once",
                "groups",
                "Acc_r",
                "original",
                "Acc_f",
                "original",
                "worst class",
            ]
        ]
        names = ("acc_r", "original_acc_r", "acc_f", "original_acc_f", "acc_f_worst")
        for group in self.groups:
            label = "pairs" if group["size"] == 2 else f"groups of {group['size']}"
            percent = {name: 100 * value for name, value in group["mean"].items()}
            table.append([label, str(group["groups"]), *_numbers(percent, names, ".2f")])
        return table

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
        baselines: :meth:`wfnet.baselines.BaselineResult.as_dict` of each method.
        groups: groups of classes, one result per size.
        cell: published numbers to stand beside, a key of ``published()["cells"]``.

    Raises:
        ValueError: for an unknown cell, or baselines whose ZRF or relearn time was computed
            otherwise.
    """
    cells = published()["cells"]
    if cell is not None and cell not in cells:
        raise ValueError(f"nothing was published for {cell!r}; there is {', '.join(cells)}")
    theirs = cells.get(cell, {})
    timed = None if relearning is None else relearning.as_dict()
    settings: dict[str, Any] = {"evaluation": evaluation.settings}
    if timed is not None:
        settings["relearning"] = timed["config"]
    if attribution is not None:
        settings["attribution"] = attribution.settings
    zrf_mode = evaluation.settings.get("zrf_mode", "definition")
    check_baselines(baselines, evaluation.zrf_base, zrf_mode, settings.get("relearning"))
    areas = {} if attribution is None else attribution.mean
    values = {
        "original": _accuracies(evaluation.original),
        "wfnet": {**_accuracies(evaluation.mean), **_times(timed), **areas},
    }
    for baseline in baselines:
        method, found = baseline["method"], EvaluationResult.from_dict(baseline["evaluation"])
        values[method] = {**_accuracies(found.mean), **_times(baseline["relearning"])}
        if baseline["relearning"] is not None:
            settings.setdefault("relearning", baseline["relearning"]["config"])
        settings[method] = {**baseline["settings"], "classes": found.settings["classes"]}
    known = [*values, *theirs]
    methods = [method for method in TITLES if method in known and method != "wfnet"]
    methods += [method for method in dict.fromkeys(known) if method not in TITLES]
    return PaperTables(
        title=title,
        cell=cell,
        zrf_base=evaluation.zrf_base,
        tolerance=settings.get("relearning", {}).get("tolerance"),
        rows=[
            TableRow(method, **values.get(method, {}), published=dict(theirs.get(method, {})))
            for method in (*methods, "wfnet")
        ],
        groups=[result.as_dict() for result in groups],
        settings=settings,
    )


def check_baselines(
    baselines: Sequence[Mapping[str, Any]],
    zrf_base: float,
    zrf_mode: str = "definition",
    relearning: Mapping[str, Any] | None = None,
) -> None:
    """Raises ValueError for baselines that were not measured as the filtered network is.

    Args:
        baselines: as :func:`wfnet.baselines.read_baselines` gives them.
        zrf_base, zrf_mode: of the filtered network's evaluation.
        relearning: settings of its relearn time, as in a result; None without.
    """
    if baselines and zrf_mode != "definition":
        raise ValueError(
            f"the filtered network's ZRF is of mode {zrf_mode!r}, that of the baselines as it is "
            "defined; evaluate with --zrf-mode definition"
        )
    for baseline in baselines:
        method, base = baseline["method"], baseline["evaluation"]["zrf_base"]
        if not math.isclose(base, zrf_base):
            raise ValueError(
                f"baseline {method} was evaluated with ZRF base {base_name(base)}, the filtered "
                f"network with {base_name(zrf_base)}; evaluate both alike"
            )
        timed = baseline["relearning"]
        if timed is None:
            continue
        relearning = timed["config"] if relearning is None else relearning
        differ = [name for name in relearning if timed["config"].get(name) != relearning[name]]
        if differ:
            raise ValueError(
                f"baseline {method} was relearned with {differ[0]}={timed['config'][differ[0]]}, "
                f"others with {relearning[differ[0]]}: relearn all alike, or leave it out "
                "(--no-relearn)"
            )


def _title(method: str) -> str:
    return TITLES.get(method, method.replace("_", " "))


def _accuracies(scores: Scores) -> dict[str, float]:
    return {name: 100 * getattr(scores, name) for name in ("acc_r", "acc_f", "zrf")}


def _times(timed: Mapping[str, Any] | None) -> dict[str, float]:
    """Relearn times of a row, from a result's dictionary."""
    if timed is None:
        return {}
    return {
        "rt": timed["mean"]["epochs"],
        "rt_never": timed["mean"]["never"],
        "rt_tolerant": timed["mean_tolerant"]["epochs"],
        "rt_tolerant_never": timed["mean_tolerant"]["never"],
    }


def _numbers(values: Mapping[str, float | None], names: Sequence[str], form: str) -> list[str]:
    found = (values.get(name) for name in names)
    return ["-" if value is None else format(value, form) for value in found]


def _epochs(mean: float | None, never: int | None, form: str) -> str:
    return "-" if mean is None else f"{mean:{form}} ({never:g})"


def _aligned(table: list[list[str]]) -> str:
    """A Markdown table whose columns are as wide as their widest cell; numbers to the right."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [padded(cells, widths) for cells in table]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (lines[0], rule, *lines[1:]))
