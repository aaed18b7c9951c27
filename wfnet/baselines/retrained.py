"""``retrained``: trained from scratch without the images of the class; the gold standard.

An image with several labels is one of the class if that is among them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from wfnet.baselines.method import BaselineConfig, Forget, Method, Origin
from wfnet.data import select
from wfnet.evaluation.initialisation import reinitialise
from wfnet.training import fit_classifier


class Retrained(Method):
    """Trains a new network on the other classes, as the original was trained."""

    name = "retrained"
    several = True

    def unlearn(self, origin: Origin, label: Forget, config: BaselineConfig) -> nn.Module:
        fresh = origin.fresh or partial(reinitialise, origin.original)
        model = fresh(config.seed)
        model = model.to(origin.device).requires_grad_(True)
        given = {"seed": config.seed, "progress": False, "workers": origin.workers}
        images = select(origin.train, origin.images(label)[1])
        fit_classifier(model, images, **{**given, **origin.training})
        return model.eval()

    def settings(self, config: BaselineConfig, training: Mapping[str, Any]) -> dict[str, Any]:
        return {"training": dict(training), **super().settings(config, training)}
