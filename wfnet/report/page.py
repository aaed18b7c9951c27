"""One self-contained page about a run: tables, figures, definitions, trust, configuration.

:func:`write_report` reads the folder of a run, gathers what is shown as plain values (:func:`view`)
and fills the template ``page.html.jinja`` beside this file, which decides on the layout. A section
whose files are missing says which command makes them. The page loads nothing and escapes every name
that comes from data.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from wfnet.evaluation.metrics import TOP_K
from wfnet.evaluation.results import base_name
from wfnet.report.contents import PICTURES, Contents, read_contents
from wfnet.report.verdicts import MARGIN, MARGIN_TAUGHT, judge
from wfnet.services.files import write_text
from wfnet.trust import CHECKS, TrustRecord, TrustResult, describe_export
from wfnet.trust.trust_records import COLUMNS
from wfnet.version import __version__

logger = logging.getLogger("wfnet")

REPORT = "report.html"
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

_COLUMNS = {COLUMNS[0]: "model under test"} | {name: name.replace("_", " ") for name in COLUMNS[1:]}


def write_report(folder: str | os.PathLike, path: str | os.PathLike | None = None) -> Path:
    """Writes ``report.html`` of a run, atomically.

    Args:
        folder: of the run.
        path: file to write; ``report.html`` in the folder by default.

    Returns:
        The path that was written.

    Raises:
        FileNotFoundError: if there is no such folder, or nothing in it that a report could show.
        ValueError: for a damaged file.
    """
    contents = read_contents(folder)
    for remark in contents.remarks:
        logger.warning("%s", remark)
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters |= {"marked": _marked, "described": describe_export}
    template = templates.get_template("page.html.jinja")
    text = template.render(view=view(contents), margin=MARGIN, margin_taught=MARGIN_TAUGHT)
    path = Path(folder) / REPORT if path is None else Path(path)
    write_text(path, text.lstrip())
    return path


def view(contents: Contents) -> dict[str, Any]:
    """Returns what the page shows, by the names of the template; None or empty without results."""
    options = contents.run.get("options", {})
    model = options.get("model") or contents.filters.get("model", "a classifier")
    data = options.get("data") or options.get("data_dir") or "its data"
    result, trust = contents.evaluation, contents.trust
    verdicts = judge(result, trust, contents.retrained)
    verdicts["unknown"] += contents.remarks
    if trust is not None:
        verdicts["unknown"] += trust.left_out() + _missing(trust)
    return {
        "title": f"wfnet: {contents.folder.absolute().name}",
        "subtitle": f"{model} on {data}; every class can be forgotten at run time",
        "folder": str(contents.folder),
        "result": result,
        "top5": result is not None and result.settings.get("num_classes", 0) > TOP_K,
        "zrf_base": base_name(result.zrf_base) if result else "",
        "baselines": contents.baselines,
        "retrained": contents.retrained,
        "labels": contents.multi_label,
        "verdicts": verdicts,
        "trust": trust,
        "checks": _checks(trust) if trust else [],
        "by_class": _by_class(trust) if trust else [],
        "exports": contents.exports,
        "paper": contents.tables and _paper_table(contents.tables),
        "pictures": {
            name: (PICTURES[name], base64.b64encode(content).decode())
            for name, content in contents.pictures.items()
        },
        "settings": _settings(contents),
    }


def _missing(trust: TrustResult) -> list[str]:
    """Returns a sentence on what could not be measured for want of retrained models, if any."""
    missing = {record.check: record.missing for record in trust.records if record.missing}
    if not missing:
        return []
    titles = ", ".join(CHECKS[name].title for name in missing)
    return [f"Not measured, or not completely: {titles}. {next(iter(missing.values()))}."]


def _checks(trust: TrustResult) -> list[dict[str, Any]]:
    found = []
    for name, rows in trust.means().items():
        details = [record.details for record in trust.records if record.check == name]
        errors = [d["standard_error"] for d in details if "standard_error" in d]
        definition = re.sub(r"(?::\w+)?:`([^`]+)`", r"\1", CHECKS[name].definition.strip())
        found.append(
            {
                "check": CHECKS[name],
                "definition": re.sub("::$", ":", definition.replace("``", ""), flags=re.M),
                "columns": {
                    who: heading
                    for who, heading in _COLUMNS.items()
                    if any(row[who] is not None for row in rows.values())
                },
                "rows": [(CHECKS[name].meaning(measure), row) for measure, row in rows.items()],
                "chance": sum(errors) / len(errors) if errors else None,
            }
        )
    return found


def _by_class(trust: TrustResult) -> list[tuple[int, str, list[Mapping[str, float | None]]]]:
    """Returns index, name, and each check's headline measure of every class."""
    by_class: dict[int, dict[str, TrustRecord]] = {}
    for record in trust.records:
        by_class.setdefault(record.index, {})[record.check] = record
    headlines = {name: CHECKS[name].headline for name in trust.means()}
    nothing = {"forgetful": None, "distance": None}
    rows = []
    for index, records in sorted(by_class.items()):
        values = [
            records[check].row(measure) if check in records else nothing
            for check, measure in headlines.items()
        ]
        rows.append((index, next(iter(records.values())).name, values))
    return rows


def _paper_table(tables: Mapping[str, Any]) -> dict[str, Any]:
    rows = [(row["method"], row, row.get("published", {})) for row in tables["rows"]]
    shown = [n for n in PAPER_MEASURES if any(ours.get(n) is not None for _, ours, _ in rows)]
    theirs = [n for n in PAPER_MEASURES if any(n in published for _, _, published in rows)]
    source = f" published: {tables['published_source']}" if theirs else ""
    return {
        "caption": f"{tables['title']}.{source}",
        "headings": [PAPER_MEASURES[n] for n in shown]
        + [f"published {PAPER_MEASURES[n]}" for n in theirs],
        "rows": [
            (method, [ours.get(n) for n in shown] + [published.get(n) for n in theirs])
            for method, ours, published in rows
        ],
        "groups": tables.get("groups", ()),
    }


def _settings(contents: Contents) -> list[tuple[str, str]]:
    run, filters = contents.run, dict(contents.filters)
    targets = filters.pop("targets", None)
    of_demo = run.get("stages", {}).get("untrain", {}).get("key", {}).get("untraining")
    evaluated = contents.evaluation.settings if contents.evaluation else None
    settings = {
        "options": run.get("options"),
        "untraining": run.get("untraining") or of_demo,
        "filters": filters,
        "masked layers": targets,
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


def _marked(text: str) -> Markup:
    """Returns plain text as HTML in which what stands in backticks is code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))
