"""``retrained``: trained from scratch without the images of the class; the gold standard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import nn

from wfnet.baselines.method import BaselineConfig, Method, Task
from wfnet.data import select
from wfnet.evaluation.initialisation import reinitialise
from wfnet.training import fit_classifier


class Retrained(Method):
    """Trains a new network on the other classes; of the settings it uses the seed alone."""

    name = "retrained"
    unused = tuple(field.name for field in fields(BaselineConfig) if field.name != "seed")

    def unlearn(self, task: Task) -> nn.Module:
        seed = task.config.seed
        model = reinitialise(task.original, seed) if task.fresh is None else task.fresh()
        model = model.to(task.device).requires_grad_(True)
        given = {"seed": seed, "progress": False, "workers": task.workers, **task.training}
        fit_classifier(model, select(task.train, task.others), **given)
        return model.eval()

    def settings(self, config: BaselineConfig, training: Mapping[str, Any]) -> dict[str, Any]:
        return {"training": dict(training), "seed": config.seed}
