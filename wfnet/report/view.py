"""What the page of a run shows, as plain data; how it is laid out is the template's business."""

from __future__ import annotations

import base64
import json
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from wfnet.evaluation import ClassRecord, EvaluationResult
from wfnet.evaluation.metrics import TOP_K
from wfnet.evaluation.results import base_name
from wfnet.report.contents import PICTURES, Contents
from wfnet.report.verdicts import Verdicts, judge
from wfnet.trust import CHECKS, TrustRecord, TrustResult
from wfnet.trust.attacks import ATTACKS
from wfnet.trust.check import Check
from wfnet.version import __version__

PAPER_MEASURES = {
    "acc_r": "Acc_r, %",
    "acc_f": "Acc_f, %",
    "zrf": "ZRF, %",
    "rt": "RT, epochs",
    "rt_never": "never relearned",
    "rt_tolerant": "RT, tolerant",
    "rt_tolerant_never": "never, tolerant",
    "insertion": "insertion",
    "deletion": "deletion",
    "insertion_random": "insertion, random order",
    "deletion_random": "deletion, random order",
}
_COLUMNS = {
    "forgetful": "model under test",
    "original": "original",
    "retrained": "retrained",
    "distance": "distance",
}


@dataclass(frozen=True)
class Picture:
    """A figure: its anchor, caption, text for those who cannot see it, and PNG in base64."""

    anchor: str
    caption: str
    alternative: str
    data: str


@dataclass(frozen=True)
class CheckView:
    """A trust check over all classes.

    Attributes:
        check: the check.
        definition: its source and formula, plain text.
        columns: headings of what any measure has a value of, by name.
        rows: (what is measured, values by column).
        chance: standard error of one class's area under the ROC; None where it is not known.
    """

    check: Check
    definition: str
    columns: dict[str, str]
    rows: list[tuple[str, Mapping[str, float | None]]]
    chance: float | None


@dataclass(frozen=True)
class PaperTable:
    """The paper's tables as one: (method, values) under headings."""

    caption: str
    headings: list[str]
    rows: list[tuple[str, list[float | None]]]
    groups: list[dict[str, Any]]


@dataclass(frozen=True)
class View:
    """The page; None or empty where there is nothing to show.

    Attributes:
        title, subtitle: of the page.
        folder: of the run, for the commands that make what is missing.
        result: the evaluation, with ``worst``, the record of the worst forgotten class, ``top5``,
            whether top-5 accuracies are shown, and ``zrf_base``, the base of its logarithm.
        retrained: class -> evaluation of the network retrained without it.
        labels: the evaluation of images that have several labels each; there are no checks then.
        verdicts: what forgetting protects against, and what not.
        trust: results of the checks, with ``checks`` as they are shown, and ``by_class``: index,
            name, and (value, distance to retraining) of each check's headline.
        exports: (file, how it was made, what was found) of exported files that were attacked.
        methods: (method, scores, number of classes): the run beside other methods.
        paper: the paper's tables, instead of ``methods`` where there are any.
        pictures: figures by file name.
        settings: (title, JSON) of everything that made the numbers.
    """

    title: str
    subtitle: str
    folder: str
    result: EvaluationResult | None
    worst: ClassRecord | None
    top5: bool
    zrf_base: str
    retrained: Mapping[int, ClassRecord]
    labels: Mapping[str, Any] | None
    verdicts: Verdicts
    trust: TrustResult | None
    checks: list[CheckView]
    by_class: list[tuple[int, str, list[tuple[float | None, float | None]]]]
    exports: list[tuple[str, str, str]]
    methods: list[tuple[str, Any, int]]
    paper: PaperTable | None
    pictures: Mapping[str, Picture]
    settings: list[tuple[str, str]] = field(default_factory=list)

    @property
    def headlines(self) -> list[tuple[str, str]]:
        """(heading, meaning) of each check's headline measure."""
        return [
            (
                shown.check.name,
                f"{shown.check.meaning(shown.check.headline)}; in brackets the distance to "
                "retraining",
            )
            for shown in self.checks
        ]

    @property
    def sections(self) -> list[tuple[str, str]]:
        """(anchor, heading) of the sections, in the order of the page."""
        classes = self.result is not None or self.labels is not None
        return [
            ("summary", "Summary"),
            *([("classes", "Classes")] if classes else []),
            ("trust", "What it protects against, and what not"),
            *([("tables", "Beside other methods")] if self.labels is None else []),
            *([("figures", "Figures")] if set(self.pictures) - {"trust.png"} else []),
            ("definitions", "Definitions"),
            ("configuration", "Configuration"),
        ]


def make_view(contents: Contents) -> View:
    """Returns what the page of a run shows."""
    options = contents.run.get("options", {})
    model = options.get("model") or contents.filters.get("model", "a classifier")
    data = options.get("data") or options.get("data_dir") or "its data"
    result, trust = contents.evaluation, contents.trust
    verdicts = judge(result, trust, contents.retrained)
    verdicts.unknown += contents.remarks + (trust.left_out() if trust else [])
    if trust is not None and (missing := _missing(trust)):
        verdicts.unknown.append(missing)
    return View(
        title=f"wfnet: {contents.folder.absolute().name}",
        subtitle=f"{model} on {data}; every class can be forgotten at run time",
        folder=str(contents.folder),
        result=result,
        worst=result and max(result.records, key=lambda record: record.acc_f),
        top5=result is not None and result.settings.get("num_classes", 0) > TOP_K,
        zrf_base=base_name(result.zrf_base) if result else "",
        retrained=contents.retrained,
        labels=contents.multi_label,
        verdicts=verdicts,
        trust=trust,
        checks=_checks(trust) if trust else [],
        by_class=_by_class(trust) if trust else [],
        exports=_exports(contents.exports),
        methods=_methods(contents),
        paper=_paper_table(contents.tables) if contents.tables else None,
        pictures={name: _picture(name, content) for name, content in contents.pictures.items()},
        settings=_settings(contents),
    )


def _missing(trust: TrustResult) -> str:
    """Returns one sentence on what could not be measured for want of retrained models."""
    records = [record for record in trust.records if record.missing]
    if not records:
        return ""
    titles: dict[str, list[str]] = {}
    for name in dict.fromkeys(record.check for record in records):
        titles.setdefault(CHECKS[name].needs, []).append(CHECKS[name].title)
    texts = [f"{', '.join(names)} (needed: {needs})" for needs, names in titles.items()]
    advice = records[0].missing.partition(" at hand); ")[2]
    return f"Not measured, or not completely: {'; '.join(texts)}. For example, {advice}."


def _checks(trust: TrustResult) -> list[CheckView]:
    found = []
    for name, rows in trust.means().items():
        errors = [
            record.details["standard_error"]
            for record in trust.records
            if record.check == name and "standard_error" in record.details
        ]
        found.append(
            CheckView(
                check=CHECKS[name],
                definition=_without_markup(CHECKS[name].definition),
                columns={
                    column: heading
                    for column, heading in _COLUMNS.items()
                    if any(row[column] is not None for row in rows.values())
                },
                rows=[(CHECKS[name].meaning(n) or n, row) for n, row in rows.items()],
                chance=sum(errors) / len(errors) if errors else None,
            )
        )
    return found


def _by_class(
    trust: TrustResult,
) -> list[tuple[int, str, list[tuple[float | None, float | None]]]]:
    by_class: dict[int, dict[str, TrustRecord]] = {}
    for record in trust.records:
        by_class.setdefault(record.index, {})[record.check] = record
    checks = [check for check in CHECKS.values() if check.name in trust.means()]
    rows = []
    for index, records in sorted(by_class.items()):
        values = []
        for check in checks:
            record = records.get(check.name)
            value = record and record.forgetful.get(check.headline)
            values.append((value, record and record.row(check.headline)["distance"]))
        rows.append((index, next(iter(records.values())).name, values))
    return rows


def _exports(reports: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    texts = {"acc_f": "as it is"}
    texts |= {f"acc_f_{attack.name}": f"with {attack.text}" for attack in ATTACKS.values()}
    rows = []
    for name, report in reports.items():
        below = report.get("prune_below") or 0
        how = f", gates below {below:g} at 0" if below else ""
        how += ", class cut from the head" if report.get("cut_output") else ""
        for found in report.get("classes", ()):
            values = found["values"]
            ways = "; ".join(f"{text} {values[k]:.1%}" for k, text in texts.items() if k in values)
            text = f"accuracy on class {found['name']} {ways}. On the others {values['acc_r']:.1%}."
            rows.append((str(report.get("file", name)), how, text))
    return rows


def _methods(contents: Contents) -> list[tuple[str, Any, int]]:
    rows = []
    for baseline in contents.baselines:
        found = EvaluationResult.from_dict(baseline["evaluation"])
        rows.append((baseline["method"], found.mean, len(found.records)))
    own = contents.evaluation
    if rows and own is not None:
        rows += [
            (name, scores, len(own.records))
            for name, scores in (("original", own.original), ("wfnet", own.mean))
        ]
    return rows


def _paper_table(tables: Mapping[str, Any]) -> PaperTable:
    rows = tables["rows"]
    shown = [n for n in PAPER_MEASURES if any(row.get(n) is not None for row in rows)]
    theirs = [n for n in PAPER_MEASURES if any(n in row.get("published", {}) for row in rows)]
    source = f" published: {tables['published_source']}" if theirs else ""
    return PaperTable(
        caption=f"{tables['title']}.{source}",
        headings=[
            *(PAPER_MEASURES[name] for name in shown),
            *(f"published {PAPER_MEASURES[name]}" for name in theirs),
        ],
        rows=[
            (
                row["method"],
                [row.get(n) for n in shown] + [row.get("published", {}).get(n) for n in theirs],
            )
            for row in rows
        ],
        groups=list(tables.get("groups", ())),
    )


def _picture(name: str, content: bytes) -> Picture:
    caption = PICTURES[name]
    return Picture(
        anchor=f"figure-{name.partition('.')[0]}",
        caption=caption,
        alternative=caption.partition(";")[0].partition(":")[0].rstrip("."),
        data=base64.b64encode(content).decode("ascii"),
    )


def _without_markup(text: str) -> str:
    """Returns documentation as plain text: no quotes of code, no roles."""
    text = re.sub(r"(?::\w+)?:`([^`]+)`", r"\1", text.strip()).replace("``", "")
    return re.sub(r"::$", ":", text, flags=re.M)


def _settings(contents: Contents) -> list[tuple[str, str]]:
    run = contents.run
    evaluated = contents.evaluation.settings if contents.evaluation else None
    settings = {
        "options": run.get("options"),
        "untraining": run.get("untraining")
        or run.get("stages", {}).get("untrain", {}).get("key", {}).get("untraining"),
        "filters": {k: v for k, v in contents.filters.items() if k != "targets"},
        "masked layers": contents.filters.get("targets"),
        "evaluation": (contents.multi_label or {}).get("settings") or evaluated,
        "trust checks": contents.trust.settings if contents.trust else None,
        "versions": run.get("versions"),
        "seconds": run.get("seconds"),
        "this report": {
            "wfnet": __version__,
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
        },
    }
    return [
        (title, json.dumps(value, indent=2, ensure_ascii=False))
        for title, value in settings.items()
        if value
    ]
