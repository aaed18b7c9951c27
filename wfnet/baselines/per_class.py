"""One baseline for all classes: models kept in a folder, their measures, their results in files."""

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from wfnet.baselines.method import BaselineConfig, Forget, Origin, written
from wfnet.baselines.unlearning import METHODS, unlearn
from wfnet.data import Dataset, classes_of, labels_of, multi_hot_of
from wfnet.evaluation.multilabel_rows import MultiLabelResult, evaluation_from_dict
from wfnet.evaluation.pair_engine import RunOptions
from wfnet.evaluation.pairs import check_classes
from wfnet.evaluation.partial import check_identity, data_identity
from wfnet.evaluation.plain_models import evaluate_models
from wfnet.evaluation.relearning import RelearnConfig, RelearnResult, relearn_times
from wfnet.evaluation.results import EvaluationResult
from wfnet.services.files import FilePath, fingerprint, read_metadata, read_tensors, write_tensors
from wfnet.services.records import read_json

RELEARNED = "relearning_records.json"


@dataclass(frozen=True)
class BaselineResult:
    """One method, all classes: its measures, and how the models were made."""

    method: str
    evaluation: EvaluationResult | MultiLabelResult
    relearning: RelearnResult | None
    settings: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "method": self.method,
            "settings": self.settings,
            "evaluation": self.evaluation.as_dict(),
            "relearning": None if self.relearning is None else self.relearning.as_dict(),
        }


class BaselineModels:
    """The models of one method, kept in a folder: made when first asked for, read after that.

    An interrupted run therefore goes on with the first class that is missing. Call an object with
    a class to get its model.

    Args:
        method: one of ``METHODS``.
        folder: files ``class_<number>.safetensors`` are written here.
        origin: the original network and its training images.
        config: settings; the method's defaults if None.

    Raises:
        ValueError: when called, for a file that is damaged or was made otherwise.
    """

    def __init__(
        self, method: str, folder: FilePath, origin: Origin, config: BaselineConfig | None = None
    ):
        known = METHODS[method]
        self.method, self.folder, self.origin = method, Path(folder), origin
        self.config = config or known.defaults
        settings = known.settings(self.config, origin.training)
        self.settings = json.loads(json.dumps(settings))  # as they are read again
        self.identity = {
            "method": method,
            "original": fingerprint(origin.original),
            **data_identity(origin.train, "training data"),
            "settings": self.settings,
            "code": known.code(),
        }

    def path(self, label: Forget) -> Path:
        """Where the model of a class is kept."""
        return self.folder / f"class_{written(label)}.safetensors"

    def __call__(self, label: Forget) -> nn.Module:
        path = self.path(label)
        if path.is_file():
            tensors = read_tensors(path)
            found = json.loads(read_metadata(path).get("identity", "{}"))
            check_identity(path, found, self.identity)
            model = copy.deepcopy(self.origin.original)
            model.load_state_dict(tensors)
            return model.requires_grad_(True).eval()
        model = unlearn(self.method, self.origin, label, self.config)
        metadata = {"format": "pt", "identity": json.dumps(self.identity), "class": written(label)}
        write_tensors(path, model.state_dict(), metadata)
        return model

    def remove(self) -> None:
        """Deletes the files of all classes, and what was measured on them alone."""
        (self.folder / RELEARNED).unlink(missing_ok=True)
        for path in self.folder.glob("class_*.safetensors"):
            path.unlink()


def run_baseline(
    models: BaselineModels,
    test: Dataset,
    classes: Sequence[int] | None = None,
    relearn: RelearnConfig | None = None,
    zrf_base: float = math.e,
    seed: int = 0,
    options: RunOptions | None = None,
) -> BaselineResult:
    """Makes and evaluates one baseline for every class; goes on where it was interrupted.

    Args:
        models: of one method; its folder also keeps the records of finished classes.
        test: images for the measures.
        classes: all by default.
        relearn: relearn times with these settings; None for none.
        zrf_base, seed: as in :func:`wfnet.evaluate`.
        options: how images are run.

    Raises:
        As :func:`unlearn`, :func:`wfnet.evaluation.evaluate_models` and
        :func:`wfnet.evaluation.relearning.relearn_times`.
    """
    origin, identity = models.origin, models.identity
    rows = classes
    if multi_hot_of(origin.train) is None:
        names = classes_of(origin.train)
        rows = check_classes(classes, labels_of(origin.train), len(names)).tolist()
    options = replace(options or RunOptions(), records=models.folder / RELEARNED)
    evaluation = evaluate_models(models, origin.original, test, rows, zrf_base, seed, options)
    relearning = None
    if relearn is not None:
        relearning = relearn_times(
            models, origin.train, test, origin.original, rows, relearn, options, identity
        )
    return BaselineResult(models.method, evaluation, relearning, models.settings)


def read_baselines(folder: FilePath) -> list[dict[str, Any]]:
    """The finished baselines that `wfnet baseline` left in ``folder``; none if it is missing.

    Raises:
        ValueError: for a damaged file.
    """
    found = []
    for method in METHODS:
        path = Path(folder) / f"{method}.json"
        if path.is_file():
            what, remedy = "a result of `wfnet baseline`", "delete it and run the baseline again"
            found.append(read_json(path, _baseline, what, remedy))
    return found


def _baseline(content: Mapping[str, Any]) -> dict[str, Any]:
    evaluation_from_dict(content["evaluation"])
    return {name: content[name] for name in ("method", "evaluation", "relearning", "settings")}
