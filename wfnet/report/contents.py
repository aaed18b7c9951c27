"""What the folder of a run holds for a report: results, pictures, settings."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wfnet.baselines import read_baselines
from wfnet.evaluation import ClassRecord, EvaluationResult
from wfnet.pretrained import FILTERS_NAME
from wfnet.trust import TrustResult

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
        remarks: what was left out, or cannot be told, as sentences.
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
    remarks: list[str] = field(default_factory=list)

    @property
    def retrained(self) -> dict[int, ClassRecord]:
        """By class, the evaluation of the network retrained without it; empty without any."""
        for baseline in self.baselines:
            if baseline["method"] == "retrained":
                found = EvaluationResult.from_dict(baseline["evaluation"])
                return {record.index: record for record in found.records}
        return {}


def read_contents(folder: str | os.PathLike) -> Contents:
    """Reads the results and pictures of a run.

    Raises:
        FileNotFoundError: if there is no such folder, or nothing in it that a report could show.
        ValueError: for a damaged file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: give that of a run, for example demo")
    found = Contents(
        folder=folder,
        run=_json(folder / "config.json") or {},
        filters=_json(folder / "wf_config.json") or {},
        tables=_json(folder / "tables.json"),
        baselines=[
            result
            for place in sorted({path.parent for path in folder.rglob("retrained.json")})
            for result in read_baselines(place)
        ],
        pictures={
            name: (folder / name).read_bytes() for name in PICTURES if (folder / name).is_file()
        },
    )
    _add_evaluation(found)
    _add_trust(found)
    _add_exports(found)
    if found.evaluation is None and found.trust is None and found.multi_label is None:
        if found.remarks:
            raise FileNotFoundError(
                f"{folder} holds nothing that could be reported: {' '.join(found.remarks)}"
            )
        raise FileNotFoundError(
            f"{folder} holds nothing to report yet: `wfnet evaluate {folder}` and `wfnet trust "
            f"{folder}` make results"
        )
    return found


def _add_evaluation(found: Contents) -> None:
    """Adds ``evaluation.json``, unless it was made of other filters than those in the folder."""
    path = found.folder / "evaluation.json"
    content = _json(path)
    if content is None:
        return
    again = f"run `wfnet evaluate {found.folder}` again"
    several = content.get("kind") == "multi-label"
    result = None if several else EvaluationResult.from_json(path)
    other = _other_network(found, content)
    if other:
        found.remarks.append(f"{path.name} is of another network ({other}) and left out; {again}.")
        return
    if found.filters and "filters_digest" not in content.get("settings", {}):
        found.remarks.append(
            f"{path.name} does not say of which filters it is; to be sure, {again}."
        )
    found.evaluation, found.multi_label = result, content if several else None


def _other_network(found: Contents, content: dict[str, Any]) -> str:
    """Returns how the network of an evaluation differs from that of the run; empty if it fits."""
    settings = content.get("settings", {})
    for name in ("filters_digest", "num_classes", "model"):
        theirs, ours = settings.get(name), found.filters.get(name)
        if theirs is not None and ours is not None and theirs != ours:
            return "its filters" if name == "filters_digest" else f"{name} {theirs}, here {ours}"
    names = found.run.get("classes")
    for record in content["classes"] if names else ():
        index, name = record["index"], record["name"]
        if index >= len(names) or names[index] != name:
            return f"class {index} is {name!r}"
    return ""


def _add_trust(found: Contents) -> None:
    """Adds ``trust.json``, unless it was made of other filters than those in the folder."""
    path, filters = found.folder / "trust.json", found.folder / FILTERS_NAME
    if not path.is_file():
        return
    again = f"run `wfnet trust {found.folder}` again"
    result = TrustResult.from_json(path)
    wanted = hashlib.sha256(filters.read_bytes()).hexdigest() if filters.is_file() else None
    if wanted is not None and result.settings.get("filters", wanted) != wanted:
        found.remarks.append(f"{path.name} is of other filters and left out; {again}.")
        return
    if "attackers_images" not in result.settings:
        text = "comes from a version whose attackers had too many images of the forgotten class"
        found.remarks.append(f"{path.name} {text}; {again}.")
    found.trust = result


def _add_exports(found: Contents) -> None:
    """Adds the reports beside baked files, but for those that were baked with other filters."""
    ours = found.filters.get("filters_digest")
    for path in sorted(found.folder.glob("*.trust.json")):
        content = _json(path) or {}
        theirs = content.get("filters_digest")
        if None not in (ours, theirs) and ours != theirs:
            found.remarks.append(
                f"{path.name} is of a file that was baked with other filters, and left out; bake "
                "it again."
            )
        else:
            found.exports[path.name] = content


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
