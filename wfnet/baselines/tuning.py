"""Settings of a baseline, chosen on validation images by a budget that the method declares.

Every entry of the method's ``grid`` is tried on the same few classes. The best has the highest mean
of ``Acc_r - Acc_f`` over them; of equals the first. The budget is the length of the grid times the
number of classes.
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from wfnet.baselines.method import BaselineConfig, Origin
from wfnet.baselines.unlearning import METHODS, unlearn
from wfnet.data import Dataset
from wfnet.evaluation.pair_engine import RunOptions
from wfnet.evaluation.partial import PartialResults, data_identity
from wfnet.evaluation.plain_models import evaluate_models
from wfnet.services.files import FilePath, fingerprint


def tune(
    method: str,
    origin: Origin,
    validation: Dataset,
    classes: Sequence[int],
    config: BaselineConfig,
    fixed: Collection[str] = (),
    records: FilePath | None = None,
    options: RunOptions | None = None,
) -> tuple[BaselineConfig, list[dict[str, Any]]]:
    """Returns the best settings of a method, and what was tried: settings, class, Acc_r and Acc_f.

    Accuracies are None where training did not stay finite.

    Args:
        method: one of ``METHODS``.
        origin: what models are made of.
        validation: images that are neither trained on nor tested with.
        classes: on which settings are tried; none: ``config`` stays as it is.
        config: what the grid does not name; ``fixed``: what stays although it does.
        records: file in which finished trials are kept; the same call goes on after them.
        options: how images are run.

    Raises:
        FloatingPointError: if no setting gives a finite loss.
        ValueError: as :func:`wfnet.baselines.unlearn`, and for ``records`` of something else.
    """
    known, quiet = METHODS[method], replace(options or RunOptions(), progress=False)
    entries = [{k: v for k, v in entry.items() if k not in fixed} for entry in known.grid]
    entries = [entry for number, entry in enumerate(entries) if entry not in entries[:number]]
    if not any(entries) or not classes:
        return config, []
    kept = PartialResults(
        records,
        lambda: {
            "method": method,
            "original": fingerprint(origin.original),
            **data_identity(origin.train, "training data"),
            **data_identity(validation, "validation data"),
            "settings": known.settings(config, origin.training),
            "code": known.code(),
        },
    )

    def trial(changes: dict[str, Any], label: int) -> dict[str, Any]:
        config_tried, accuracy = replace(config, **changes), {"acc_r": None, "acc_f": None}
        try:
            found = evaluate_models(
                lambda label: unlearn(method, origin, label, config_tried),
                origin.original,
                validation,
                [label],
                options=quiet,
            ).mean
            accuracy = {"acc_r": found.acc_r, "acc_f": found.acc_f}
        except FloatingPointError:
            pass
        return {"settings": changes, "class": label, **accuracy}

    for key in kept.left(json.dumps([entry, label]) for entry in entries for label in classes):
        kept.add(key, trial(*json.loads(key)))

    def score(entry: dict[str, Any]) -> float:
        found = [kept.records[json.dumps([entry, label])] for label in classes]
        if any(one["acc_r"] is None for one in found):
            return -2.0
        return sum(one["acc_r"] - one["acc_f"] for one in found) / len(found)

    best = max(entries, key=score)
    if score(best) == -2.0:
        raise FloatingPointError(
            f"the loss of {method} is finite with none of the {len(entries)} settings that tuning "
            "tried; give other settings with --set, and --tune-classes 0"
        )
    return replace(config, **best), list(kept.records.values())
