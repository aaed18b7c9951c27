"""Tables of the studies that benchmarks/evidence.py has written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evidence import Study

from wfnet.evaluation.paper_tables import TITLES
from wfnet.report.run_tables import MEASURES, ORIGINAL, QUALITY, SEEDS, TRUST, WFNET
from wfnet.services.tables import markdown_table

NETWORKS = {
    "small/resnet": "ResNet-8",
    "small/vgg": "small VGG",
    "small/vit": "small ViT",
    "small/vit_tiny": "ViT with class token",
    "resnet10t": "ResNet-10-T",
}
# What is done with a baked file: label, check, measure.
ATTACKS = (
    ("nothing", "removal", "acc_f"),
    ("BatchNorm re-estimated on unlabelled images", "removal", "acc_f_batchnorm_all"),
    ("BatchNorm's affine part reset", "removal", "acc_f_affine_reset"),
    ("rows equalised", "removal", "acc_f_equalised"),
    ("rows scaled to the base's norms", "removal", "acc_f_base_norms"),
    ("the base's head row put back", "removal", "acc_f_base_head"),
    ("fine-tuned on other classes only, 50 steps", "relearning", "acc_f_retain_only"),
    ("fine-tuned with one image of the class", "relearning", "acc_f_from_1"),
    ("with ten", "relearning", "acc_f_from_10"),
    ("its head row made of one image, untrained", "prototypes", "acc_f_head_1"),
    ("of ten", "prototypes", "acc_f_head_10"),
    ("the class's logit shifted", "removal", "acc_f_offset"),
    ("re-estimated, then shifted", "removal", "acc_f_batchnorm_offset"),
    ("replaced by a constant, then shifted", "removal", "acc_f_absence"),
    ("logits standardised", "removal", "acc_f_standardised"),
    ("AUC of the class's logit", "removal", "auc_logit"),
    ("Acc_r as it is", "removal", "acc_r"),
    ("Acc_r after rows were equalised", "removal", "acc_r_equalised"),
)
_BESIDE = ("retrained", "logit_masked", "bias_shifted", ORIGINAL)

# A value's record by table, method and measure, for a network and a recipe.
Values = dict[tuple[str, str], dict[tuple[str, str, str], Mapping[str, Any]]]


def values_of(content: Mapping[str, Any]) -> Values:
    """Returns the values of a study's groups."""
    found: Values = {}
    for group in content["groups"]:
        network, recipe, *more = group["title"].split(", ")[1:]
        key = NETWORKS.get(network, network), ", ".join([recipe, *more])
        found[key] = {(v["table"], v["method"], v["measure"]): v for v in group["values"]}
    return found


def commits_of(content: Mapping[str, Any]) -> str:
    """Returns the commits at which a study's commands ran."""
    return ", ".join(sorted({command["commit"] for command in content["commands"]}))


def study_text(study: Study, content: Mapping[str, Any]) -> str:
    """Returns a study's heading, where it comes from, what there is of it, and its tables."""
    found, made = values_of(content), content["provenance"]
    seeds = {group["title"]: group["runs"] for group in content["groups"]}
    about = f"Commit {commits_of(content)}, torch {made['torch']}, {made['date']}. "
    about += _seeds(study, seeds)
    if study.classes:
        about += f" Other methods and attacks: classes {', '.join(map(str, study.classes))}."
    parts = [f"### {content['title']}", about, _quality(found), _methods(found)]
    parts += [_attacks(found, network) for network in dict.fromkeys(n for n, _ in found)]
    return "\n\n".join(part for part in parts if part)


def _seeds(study: Study, runs: Mapping[str, int]) -> str:
    """Says how many seeds there are of every network that the study has."""
    shown = []
    for words in study.networks.values():
        counts = {count for title, count in runs.items() if f", {words[1]}, " in title}
        known = " or ".join(map(str, sorted(counts))) or "none"
        shown.append(f"{NETWORKS.get(words[1], words[1])} {known}")
    return f"Seeds, of {SEEDS}: {', '.join(shown)}; ± standard deviation."


def cell(record: Mapping[str, Any] | None, digits: int, scale: int = 1) -> str:
    """Returns mean and standard deviation as text."""
    if record is None:
        return "-"
    text = f"{scale * record['mean']:.{digits}f}"
    return text if record["spread"] is None else f"{text} ± {scale * record['spread']:.{digits}f}"


def _quality(found: Values) -> str:
    """Returns the table of networks and recipes, all classes; originals stand above theirs."""
    known = {measure for values in found.values() for _, _, measure in values}
    measures = {name: MEASURES[name] for name in MEASURES if name in known}
    rows, before = [], None
    for (network, recipe), values in found.items():
        shown = [(f"`{recipe}`", WFNET)]
        if network != before:
            shown.insert(0, (f"**{network}**, original", ORIGINAL))
        for label, method in shown:
            cells = (cell(values.get((QUALITY, method, m)), n) for m, (_, n) in measures.items())
            rows.append([label, *cells])
        before = network
    return markdown_table(["", *(title for title, _ in measures.values())], rows)


def _methods(found: Values) -> str:
    """Returns the table of other methods: a row for each, networks side by side."""
    made: dict[str, dict[str, str]] = {}
    measures = "acc_r", "acc_f", "zrf", "rt"
    for (network, _), values in found.items():
        for method in {m for table, m, _ in values if table == QUALITY} - {WFNET, ORIGINAL}:
            records = (values.get((QUALITY, method, measure)) for measure in measures)
            cells = (cell(record, 1) for record in records)
            made.setdefault(method, {})[network] = " / ".join(cells)
    if not made:
        return ""
    networks = dict.fromkeys(network for network, _ in found)
    order = [m for m in TITLES if m in made] + [m for m in made if m not in TITLES]
    rows = [[TITLES.get(m, m), *(made[m].get(network, "-") for network in networks)] for m in order]
    head = ["other methods, a model for each class: Acc_r / Acc_f / ZRF / RT", *networks]
    return markdown_table(head, rows)


def _attacks(found: Values, network: str) -> str:
    """Returns the table of attacks on baked models of a network, beside others."""
    runs = {f"`{recipe}`": values for (name, recipe), values in found.items() if name == network}
    own = ((WFNET, ""), ("also_masked", " and masked"))
    columns = [(t + more, who, [values]) for t, values in runs.items() for who, more in own]
    columns += [(who.replace("_", " "), who, [*runs.values()]) for who in _BESIDE]
    columns = [c for c in columns if any(key[:2] == (TRUST, c[1]) for v in c[2] for key in v)]
    rows = []
    for label, check, measure in ATTACKS:
        cells = []
        for _, method, places in columns:
            key = TRUST, method, f"{check}: {measure}"
            known = (values[key] for values in places if key in values)
            record = max(known, key=lambda one: one["runs"], default=None)
            cells.append(cell(record, 1, scale=100))
        if set(cells) - {"-"}:
            rows.append([label, *cells])
    if not rows:
        return ""
    head = [f"{network}: attack on the baked model, Acc_f after it", *(c[0] for c in columns)]
    return markdown_table(head, rows)
