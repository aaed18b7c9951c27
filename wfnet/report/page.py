"""One self-contained page about a run: verdicts, methods side by side, classes, figures.

:func:`write_report` reads the folder of a run, gathers what is shown as plain values (:func:`view`)
and fills the template ``page.html.jinja`` beside this file, which decides on the layout. A section
whose files are missing says which command makes them. The page loads nothing and escapes every name
that comes from data.
"""

import base64
import json
import platform
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from wfnet.evaluation import MultiLabelResult
from wfnet.evaluation.metrics import TOP_K
from wfnet.evaluation.paper_tables import TITLES
from wfnet.evaluation.results import base_name
from wfnet.report.contents import PICTURES, Contents, read_contents
from wfnet.report.run_tables import MEASURES, ORIGINAL, QUALITY, SHADOWS, TRUST, WFNET, run_values
from wfnet.report.verdicts import MARGIN, MARGIN_TAUGHT, judge, what_comes_back
from wfnet.services.files import FilePath, write_text
from wfnet.services.log import logger
from wfnet.trust import CHECKS, TrustRecord, TrustResult, describe_export
from wfnet.version import __version__

REPORT = "report.html"
# Methods that stand first, wherever methods stand side by side, and how one is called here.
_FIRST = (ORIGINAL, WFNET, "also_masked", "retrained", "logit_masked", "bias_shifted")
_TITLES = TITLES | {WFNET: "this network"}
# Models of the trust checks in the same order, and the methods that they are.
_METHODS = {("forgetful" if name == WFNET else name): name for name in _FIRST}
_MODELS = (*_METHODS, "distance")
_UNITS = dict.fromkeys(("acc_r", "acc_f", "worst", "zrf"), ", %") | {"rt": ", epochs"}
_MEANINGS = {
    "acc_r": "accuracy on all other classes; high is good",
    "acc_f": "accuracy on the forgotten class; low is good",
    "worst": "accuracy on the class that is forgotten worst",
    "zrf": "1: as clueless about the class as a new network",
    "rt": "epochs of fine-tuning until the class is back; one that never is counts as the cap",
    "insertion": "near 1 is good",
    "deletion": "near 0 is good",
    "ap_f": "average precision of the forgotten label",
    "map_r": "mean average precision of the others",
}
# Of shadow rounds, what stands for all of them: key and heading.
_SHADOWS = {
    "image: u_lira auc": "U-LiRA, image",
    "class: u_lira auc": "U-LiRA, class",
    "class: klom klom": "KLOM",
}


def write_report(folder: FilePath, path: FilePath | None = None) -> Path:
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
    of_labels = isinstance(result, MultiLabelResult)
    verdicts = judge(result, trust, contents.evaluations)
    side_by_side = _side_by_side(contents)
    came_back = _what_comes_back(trust)
    methods = {name for name, _ in side_by_side["rows"]}
    methods.update(column[2] for figure in came_back for column in figure["columns"][1:])
    verdicts["unknown"] += contents.remarks
    if trust is not None:
        verdicts["unknown"] += trust.left_out() + _missing(trust)
    return {
        "title": f"wfnet: {contents.folder.absolute().name}",
        "subtitle": f"{model} on {data}; every class can be forgotten at run time",
        "folder": str(contents.folder),
        "result": None if of_labels else result,
        "top5": not of_labels
        and result is not None
        and result.settings.get("num_classes", 0) > TOP_K,
        "zrf_base": base_name(result.zrf_base) if result and not of_labels else "",
        "by_method": {
            name: {record.index: record for record in contents.evaluations[name].records}
            for name in _ordered(contents.evaluations)
        },
        "side_by_side": side_by_side,
        "came_back": came_back,
        "methods": {name: _title(name) for name in _ordered(methods)},
        "labels": result if of_labels else None,
        "verdicts": verdicts,
        "trust": trust,
        "checks": _checks(trust) if trust else [],
        "by_class": _by_class(trust) if trust else [],
        "exports": contents.exports,
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
        columns = {
            who: _title(_METHODS.get(who, who))
            for who in _MODELS
            if any(row[who] is not None for row in rows.values())
        }
        found.append(
            {
                "check": CHECKS[name],
                "definition": re.sub("::$", ":", definition.replace("``", ""), flags=re.M),
                "columns": columns,
                "headings": [
                    ("measure", "what was measured"),
                    *(
                        (text, "mean over classes", _METHODS.get(w, w))
                        for w, text in columns.items()
                    ),
                ],
                "rows": [(CHECKS[name].meaning(measure), row) for measure, row in rows.items()],
                "chance": sum(errors) / len(errors) if errors else None,
            }
        )
    return found


def _by_class(trust: TrustResult) -> list[tuple[int, str, list[Mapping[str, float | None]]]]:
    """Returns index, name, and each check's headline measure of every class."""
    by_class: dict[tuple, dict[str, TrustRecord]] = {}
    for record in trust.records:
        by_class.setdefault(record.place[:3], {})[record.check] = record
    headlines = {name: CHECKS[name].headline_of(found) for name, found in trust.means().items()}
    nothing = {"forgetful": None, "distance": None}
    rows = []
    for (*_, index), records in sorted(by_class.items()):
        values = [
            records[check].row(measure) if check in records else nothing
            for check, measure in headlines.items()
        ]
        rows.append((index, next(iter(records.values())).name, values))
    return rows


def _side_by_side(contents: Contents) -> dict[str, Any]:
    """Returns the table of methods: columns of (heading, meaning, digits), a row for each method.

    Acc_r, Acc_f and ZRF are means over the classes that all methods were evaluated on.
    """
    results = [*contents.evaluations.values()]
    results += [contents.evaluation] if contents.evaluation else []
    each = [{record.index for record in result.records} for result in results]
    shared = set.intersection(*each) if each else set()
    values = run_values(contents, shared or None)
    columns = {
        (QUALITY, name): (f"{heading}{_UNITS.get(name, '')}", _MEANINGS.get(name, ""), digits)
        for name, (heading, digits) in MEASURES.items()
        if not name.startswith("pairs")
    }
    for check in CHECKS.values():
        for headline in (check.headline, check.headline_of(())):
            meaning = check.meaning(headline)
            columns[TRUST, f"{check.name}: {headline}"] = (check.title, meaning, 3)
    for name, heading in _SHADOWS.items():
        columns[SHADOWS, name] = (heading, "shadow rounds; areas under the ROC, KLOM in nats", 3)
    columns = {key: c for key, c in columns.items() if any((k[0], k[2]) == key for k in values)}
    published = {r["method"]: r["published"] for r in (contents.tables or {"rows": []})["rows"]}
    theirs = [n for n in MEASURES if any(n in found for found in published.values())]
    methods = _ordered({key[1] for key in values} | {m for m in published if published[m]})
    return {
        "columns": [
            *columns.values(),
            *(
                (f"published {MEASURES[n][0]}", contents.tables["published_source"], 2)
                for n in theirs
            ),
        ],
        "rows": [
            (
                method,
                [values.get((table, method, name)) for table, name in columns]
                + [published.get(method, {}).get(name) for name in theirs],
            )
            for method in methods
        ],
        "shared": len(shared),
        "partly": len(set(map(frozenset, each))) > 1,
        "groups": (contents.tables or {}).get("groups", ()),
    }


def _ordered(methods: Collection[str]) -> list[str]:
    order = [*_FIRST, *_TITLES]
    return sorted(methods, key=lambda m: (order.index(m) if m in order else len(order), m))


def _what_comes_back(trust: TrustResult | None) -> list[dict[str, Any]]:
    """Returns the figures of attacks, one for each number of classes that were forgotten together:
    columns, and a row of (method, value) for each attack."""
    figures = []
    for size in trust.sizes if trust else ():
        found = what_comes_back(trust.means(size))
        models = [who for who in _METHODS if any(row[who] is not None for row in found.values())]
        heading = "attack", "what is done with the baked file"
        figure = {
            "size": size,
            "classes": len({r.place[:3] for r in trust.records if r.together == size}),
            "columns": [heading, *((_title(_METHODS[w]), "%", _METHODS[w]) for w in models)],
            "rows": [
                (text, [(_METHODS[who], row[who]) for who in models]) for text, row in found.items()
            ],
        }
        figures += [figure] * bool(found)
    return figures


def _title(method: str) -> str:
    return _TITLES.get(method, method.replace("_", " "))


def _settings(contents: Contents) -> list[tuple[str, str]]:
    run, filters = contents.run, dict(contents.filters)
    targets = filters.pop("targets", None)
    of_demo = run.get("stages", {}).get("untrain", {}).get("key", {}).get("untraining")
    settings = {
        "options": run.get("options"),
        "untraining": run.get("untraining") or of_demo,
        "filters": filters,
        "masked layers": targets,
        "evaluation": contents.evaluation.settings if contents.evaluation else None,
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
