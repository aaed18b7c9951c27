"""Similarity of representations: do layers see images as those of retrained models do?

The linear CKA (:mod:`wfnet.evaluation.cka`, with formula and sources) between the features of each
masked layer, and of the input of the head, and those of the same layer of a model that never saw
the class; features as in :mod:`wfnet.trust.probing`. On test images of the forgotten class
(``forget``), where a model that still knows the class may differ, and of the others (``retain``).

Outputs are compared by the check ``closeness``; a changed logit changes outputs alone. Two models
retrained with other seeds differ as well: their level is the one to compare with.
"""

from __future__ import annotations

import math
import statistics

import torch
from torch import nn

from wfnet.evaluation.cka import LEAST, linear_cka
from wfnet.trust.check import Check, Found
from wfnet.trust.probing import HEAD, layer_features
from wfnet.trust.subject import Subject

PARTS = {"forget": "the forgotten class", "retain": "the other classes"}


def measure(model: nn.Module, subject: Subject) -> Found:
    """Returns means over the retrained models that ``model`` is not one of; details by layer."""
    others = subject.others(model)
    values, details = {}, {}
    for part in PARTS if others else ():
        images = getattr(subject, f"test_{part}").images
        if len(images) < LEAST:
            details["left_out"] = f"CKA needs {LEAST} test images of {PARTS[part]}"
            continue
        own, *theirs = (
            {
                name: torch.from_numpy(features)
                for name, features in layer_features(
                    network, subject.layers, images, subject.num_classes
                ).items()
            }
            for network in (model, *others)
        )
        layers = {
            name: statistics.fmean(linear_cka(features, other[name]) for other in theirs)
            for name, features in own.items()
            if all(name in other for other in theirs)
        }
        known = [value for value in layers.values() if not math.isnan(value)]
        if known:
            values[f"cka_{part}_mean"] = statistics.fmean(known)
        if not math.isnan(layers.get(HEAD, math.nan)):
            values[f"cka_{part}_last"] = layers[HEAD]
        details[part] = {k: None if math.isnan(v) else v for k, v in layers.items()}
    return values, details


CHECK = Check(
    name="similarity",
    title="Similarity of representations",
    question="Do layers see images as those of retrained models do?",
    definition=__doc__,
    needs="a model retrained without the class; two, for the similarity of retrained models",
    measures={
        f"cka_{part}_{which}": f"linear CKA with a retrained model, {text}, test images of {where}"
        for part, where in PARTS.items()
        for which, text in (("mean", "mean over layers"), ("last", "input of the head"))
    },
    headline="cka_forget_last",
    measure=measure,
)
