"""Tables over several runs: mean and spread over seeds, methods side by side.

Runs that differ in their seeds alone (of base, split and untraining) are one group. Numbers come
from the files that the other commands left in the folders of the runs.
"""

import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from wfnet.evaluation.multilabel_rows import MultiLabelResult
from wfnet.evaluation.paper_tables import TITLES
from wfnet.evaluation.results import means
from wfnet.report.contents import Contents, read_contents
from wfnet.services.files import FilePath, write_text
from wfnet.services.records import write_csv
from wfnet.services.tables import latex_table, markdown_table
from wfnet.untraining.untrain_config import FREE_TO_CHANGE, UntrainConfig

SEEDS = 3  # the fewest that say something of the spread
WFNET, ORIGINAL = "wfnet", "original"
QUALITY, TRUST, SHADOWS = "quality", "trust", "shadows"
# What may be missing -> the command that makes it.
COMMANDS = {
    "evaluation.json": "wfnet evaluate {}",
    "tables.json": "wfnet evaluate {} --tables",
    "baselines": "wfnet baseline {}",
    "trust.json": "wfnet trust {}",
    "shadows.json": "wfnet shadows {}",
}
MEASURES = {
    "acc_r": ("Acc_r", 2),
    "acc_f": ("Acc_f", 2),
    "worst": ("worst class", 2),
    "zrf": ("ZRF", 1),
    "rt": ("RT", 1),
    "insertion": ("insertion", 3),
    "deletion": ("deletion", 3),
    "pairs_acc_r": ("pairs: Acc_r", 2),
    "pairs_acc_f": ("pairs: Acc_f", 2),
    "ap_f": ("AP_f", 1),  # of images with several labels
    "map_r": ("mAP_r", 1),
    "pairs_ap_f": ("pairs: AP_f", 1),
    "pairs_map_r": ("pairs: mAP_r", 1),
}
# Settings that may not differ within a group. A run of a version without one had its default.
_SETTINGS = {
    one.name: one.default
    for one in fields(UntrainConfig)
    if one.name not in FREE_TO_CHANGE | {"seed", "fuse", "capture"}
}
_DESCRIPTION = ("data", "data_dir", "model", "model_kwargs", "recipe", "targets", "alpha_init")
_DESCRIPTION += ("train_per_class", "filter_dtype", "pretrained", "img_size", "augment")

Key = tuple[str, str, str]  # table, method, measure


@dataclass
class Group:
    """Runs of equal settings.

    Attributes:
        title: what they have in common.
        settings: the same, in full.
        runs: their folders.
        values: of every table, method and measure, one for each run that has it.
    """

    title: str
    settings: dict[str, Any]
    runs: list[str] = field(default_factory=list)
    values: dict[Key, list[float]] = field(default_factory=dict)

    def summaries(self) -> list[dict[str, Any]]:
        """Returns a record for each value: table, method, measure, mean, spread and runs."""
        return [
            {
                "table": table,
                "method": method,
                "measure": measure,
                "mean": statistics.fmean(values),
                "spread": statistics.stdev(values) if len(values) > 1 else None,
                "runs": len(values),
            }
            for (table, method, measure), values in self.values.items()
        ]


def collect(runs: Mapping[str, Mapping[str, Any]]) -> tuple[list[Group], list[str]]:
    """Reads and groups runs.

    Args:
        runs: ``config.json`` of each run, by its folder.

    Returns:
        The groups, and sentences about what is missing, with the command that makes it.

    Raises:
        ValueError: for a damaged file, or one run given twice.
    """
    groups: dict[str, Group] = {}
    missing: dict[str, list[str]] = {}
    for folder, record in runs.items():
        options, untraining = record["options"], record.get("untraining") or {}
        settings = {name: options.get(name) for name in _DESCRIPTION if options.get(name)}
        if untraining:
            settings |= {name: untraining.get(name, one) for name, one in _SETTINGS.items()}
        group = groups.setdefault(str(sorted(settings.items(), key=str)), Group("", settings))
        group.runs.append(folder)
        contents = read_contents(folder, empty=True)
        for key, value in run_values(contents).items():
            group.values.setdefault(key, []).append(value)
        for name, there in zip(COMMANDS, _parts(contents), strict=True):
            if not there:
                missing.setdefault(name, []).append(folder)
    found = list(groups.values())
    for group in found:
        group.title = _title(group, found)
    sentences = [
        f"{name} in {', '.join(folders)}: {COMMANDS[name].format(folders[0])}"
        + " and so on" * (len(folders) > 1)
        for name, folders in missing.items()
    ]
    sentences += [
        f"{group.title}: {len(group.runs)} of at least {SEEDS} seeds"
        for group in found
        if len(group.runs) < SEEDS
    ]
    return found, sentences


def _title(group: Group, groups: Sequence[Group]) -> str:
    """Names data, network and recipe, and the settings in which groups of that name differ."""

    def name(each: Group) -> str:
        known = each.settings
        parts = (known.get("data") or known.get("data_dir"), known.get("model"))
        return ", ".join(str(part) for part in (*parts, known.get("recipe", "balanced")) if part)

    alike = [other.settings for other in groups if name(other) == name(group)]
    every = dict.fromkeys(setting for settings in alike for setting in settings)
    differ = [s for s in every if len({str(settings.get(s)) for settings in alike}) > 1]
    return ", ".join([name(group), *(f"{s}={group.settings.get(s)}" for s in differ)])


def _parts(contents: Contents) -> tuple[object, ...]:
    """Returns what of ``COMMANDS`` is there, in that order."""
    return (
        contents.evaluation,
        contents.tables,
        contents.baselines,
        contents.trust,
        contents.shadows,
    )


def run_values(contents: Contents, classes: Collection[int] | None = None) -> dict[Key, float]:
    """Returns the numbers of one run.

    Args:
        contents: of its folder.
        classes: means of Acc_r, Acc_f and ZRF (or of average precisions) are over these; relearn
            times of a method that was measured on others, too, are left out. By default each method
            has its own classes.
    """
    found: dict[Key, float] = {}
    times = {
        method: baseline["relearning"]["mean"]["epochs"]
        for method, baseline in contents.baselines.items()
        if baseline["relearning"] is not None
    }
    results = dict(contents.evaluations)
    if contents.tables is not None:
        _add_tables(found, contents.tables, times)
    if contents.evaluation is not None:
        results[WFNET] = contents.evaluation
    for method, whole in results.items():
        records = [r for r in whole.records if classes is None or r.index in classes]
        more = () if isinstance(whole, MultiLabelResult) else ("zrf",)
        for name in (whole.retain, whole.forget, *more):
            found[QUALITY, method, name] = 100 * means(records, [name])[name]
            if method == WFNET:
                before = f"original_{name}"
                found[QUALITY, ORIGINAL, name] = 100 * means(records, [before])[before]
        found[QUALITY, method, "worst"] = 100 * max(getattr(r, whole.forget) for r in records)
        if method in times and len(records) == len(whole.records):
            found[QUALITY, method, "rt"] = times[method]
    for check, rows in contents.trust.means().items() if contents.trust else ():
        for measure, row in rows.items():
            for who, value in row.items():
                if value is not None and who not in ("distance", "classes"):
                    found[TRUST, _method(who), f"{check}: {measure}"] = value
    for row in contents.shadows:
        if row["index"] == "all" and row["value"] is not None:
            name = f"{row['against']}: {row['measure']} {row['what']}"
            found[SHADOWS, _method(row["method"]), name] = row["value"]
    return found


def _method(who: str) -> str:
    return WFNET if who == "forgetful" else who


def _add_tables(
    found: dict[Key, float], content: Mapping[str, Any], times: dict[str, float]
) -> None:
    (row,) = (row for row in content["rows"] if row["method"] == WFNET)
    if row["rt"] is not None:
        times[WFNET] = row["rt"]
    for name in ("insertion", "deletion"):
        if row[name] is not None:
            found[QUALITY, WFNET, name] = row[name]
    for group in content["groups"]:
        if group["size"] == 2:
            for name in ("acc_r", "acc_f", "ap_f", "map_r"):
                if name in group["mean"]:
                    found[QUALITY, WFNET, f"pairs_{name}"] = 100 * group["mean"][name]
    for row in content["rows"]:
        for name in ("ap_f", "map_r"):
            if name in row:
                found[QUALITY, row["method"], name] = row[name]


# -- as text --------------------------------------------------------------------------------------

Table = tuple[str, list[str], list[list[str]]]  # title, head, rows


def tables_of(group: Group) -> list[Table]:
    """Returns the tables of a group: quality with a row for each method, the others with a row for
    each measure and methods side by side."""
    made = []
    for table in (QUALITY, TRUST, SHADOWS):
        keys = [key for key in group.values if key[0] == table]
        if not keys:
            continue
        order = [*TITLES, *dict.fromkeys(method for _, method, _ in keys)]
        methods = sorted({method for _, method, _ in keys}, key=order.index)
        titles = [TITLES.get(method, method.replace("_", " ")) for method in methods]
        if table == QUALITY:
            measures = [m for m in MEASURES if any(key[2] == m for key in keys)]
            head = ["", *(MEASURES[m][0] for m in measures)]
            rows = [
                [title, *(_cell(group, (table, method, m), MEASURES[m][1]) for m in measures)]
                for title, method in zip(titles, methods, strict=True)
            ]
        else:
            head = [table, *titles]
            rows = [
                [measure, *(_cell(group, (table, method, measure), 3) for method in methods)]
                for measure in dict.fromkeys(key[2] for key in keys)
            ]
        made.append((f"{group.title} ({_count(len(group.runs), 'seed')})", head, rows))
    return made


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _cell(group: Group, key: Key, digits: int) -> str:
    """Returns mean and standard deviation over runs; how many, where not all have a value."""
    values = group.values.get(key, [])
    if not values:
        return "-"
    text = f"{statistics.fmean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.{digits}f}"
    return text if len(values) == len(group.runs) else f"{text} ({len(values)})"


def markdown(groups: Sequence[Group]) -> str:
    """Returns all tables as Markdown."""
    tables = [table for group in groups for table in tables_of(group)]
    return "\n\n".join(f"{title}:\n\n{markdown_table(*rest)}" for title, *rest in tables) + "\n"


def write(groups: Sequence[Group], folder: FilePath) -> None:
    """Writes ``seeds.md``, ``seeds.tex`` and ``seeds.csv``: a line for each value, in full."""
    write_text(Path(folder) / "seeds.md", markdown(groups))
    tables = [table for group in groups for table in tables_of(group)]
    write_text(Path(folder) / "seeds.tex", "".join(latex_table(*table) for table in tables))
    lines = [{"group": group.title, **one} for group in groups for one in group.summaries()]
    columns = ["group", "table", "method", "measure", "mean", "spread", "runs"]
    write_csv(Path(folder) / "seeds.csv", lines, columns)
