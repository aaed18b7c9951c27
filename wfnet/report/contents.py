"""What the folder of a run holds for a report: results, pictures, settings."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from wfnet.baselines import read_baselines
from wfnet.evaluation import EvaluationResult, MultiLabelResult
from wfnet.evaluation.multilabel_rows import evaluation_from_dict
from wfnet.pretrained import FILTERS_NAME
from wfnet.services.files import FilePath, sha256
from wfnet.services.records import read_json
from wfnet.trust import TrustResult

Evaluation = EvaluationResult | MultiLabelResult

# Pictures by file, in the order of the page, with what is to be seen.
PICTURES = {
    "overview.png": "Accuracy on every class before and after it is forgotten, and on all others; "
    "gates (class x channel) of the first, an intermediate and the last masked layer to run.",
    "confusion.png": "Where images of a forgotten class go, and how accuracy on the other classes "
    "changes.",
    "gates.png": "Gates per forgotten class and output channel; 100% leaves a channel as in the "
    "original.",
    "associations.png": "The filters with the lowest gates of each class in the last masked layer, "
    "as far as several classes share them.",
    "attribution.png": "Insertion and deletion: confidence in the class as its lowest gates are "
    "reset to 1, or set to 0 in the original network.",
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
        trust: ``trust.json``.
        tables: ``tables.json``, the paper's tables beside the published numbers.
        baselines: results of `wfnet baseline` by method, in the folder or one folder below.
        shadows: rows of ``shadows.json``.
        exports: reports beside baked files, by file name.
        remarks: what was left out, as sentences.
    """

    folder: Path
    run: dict[str, Any]
    filters: dict[str, Any]
    tables: dict[str, Any] | None
    baselines: dict[str, dict[str, Any]]
    shadows: list[dict[str, Any]]
    evaluation: Evaluation | None = None
    trust: TrustResult | None = None
    exports: dict[str, dict[str, Any]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    @cached_property
    def evaluations(self) -> dict[str, Evaluation]:
        """By method, the evaluation of a baseline."""
        found = self.baselines.items()
        return {name: evaluation_from_dict(each["evaluation"]) for name, each in found}

    @property
    def pictures(self) -> dict[str, bytes]:
        """The PNG of every file of ``PICTURES`` that is there."""
        paths = {name: self.folder / name for name in PICTURES}
        return {name: path.read_bytes() for name, path in paths.items() if path.is_file()}

    def is_ours(self, path: Path, theirs: str | None, ours: str | None, remedy: str) -> bool:
        """Returns whether a result is of these filters, by their digests; adds a remark if not."""
        if None in (theirs, ours) or theirs == ours:
            return True
        self.remarks.append(f"{path.name} is of other filters and left out; {remedy}.")
        return False


def read_contents(folder: FilePath, empty: bool = False) -> Contents:
    """Reads the results of a run; those of other filters are left out.

    Raises:
        FileNotFoundError: if there is no such folder, or nothing in it that a report could show,
            where that may not be ``empty``.
        ValueError: for a damaged file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: give that of a run, for example demo")
    places = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
    found = Contents(
        folder=folder,
        run=_json(folder / "config.json") or {},
        filters=_json(folder / "wf_config.json") or {},
        tables=_json(folder / "tables.json"),
        baselines={
            each["method"]: each for place in places[::-1] for each in read_baselines(place)
        },
        shadows=(_json(folder / "shadows.json") or {"rows": []})["rows"],
    )
    digest = found.filters.get("filters_digest")
    path = folder / "evaluation.json"
    content = _json(path)
    if content is not None:
        theirs = content.get("settings", {}).get("filters_digest")
        if found.is_ours(path, theirs, digest, f"run `wfnet evaluate {folder}` again"):
            about = "a result of wfnet's evaluation", "run `wfnet evaluate` again"
            found.evaluation = read_json(path, evaluation_from_dict, *about)
    path, filters = folder / "trust.json", folder / FILTERS_NAME
    if path.is_file():
        trust = TrustResult.from_json(path)
        ours = sha256(filters.read_bytes()) if filters.is_file() else None
        theirs = trust.settings.get("filters")
        if found.is_ours(path, theirs, ours, f"run `wfnet trust {folder}` again"):
            found.trust = trust
    for path in sorted(folder.glob("*.trust.json")):
        content = _json(path)
        if found.is_ours(path, content.get("filters_digest"), digest, "bake the file again"):
            found.exports[path.name] = content
    nothing = found.evaluation is None and found.trust is None
    if nothing and not empty:
        makers = f"`wfnet evaluate {folder}` and `wfnet trust {folder}` make results"
        why = " ".join(found.remarks) or makers
        raise FileNotFoundError(f"{folder} holds nothing to report yet: {why}")
    return found


def _json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    return read_json(path, lambda content: {**content}, "a table", "make it again or delete it")
