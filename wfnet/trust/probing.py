"""Linear probes: how much of the forgotten class each layer's features still hold.

A probe is a logistic regression on the frozen features of one layer (Alain and Bengio,
"Understanding intermediate layers using linear classifier probes", 2016), here for the question
"this class or another one?". Its score is the balanced accuracy on test images,

    (share of the class's images found + share of the other images passed over) / 2

1: a line through the layer's features separates the class, 0.5: nothing to be read. A network that
never saw the class also has features that tell it apart, because classes look different: compare
with the retrained models' level, not with 0.5.

The probe's own training images are all that were drawn of the class and of the others; it weighs
both sides equally, so that their mix does not matter.

Features are the outputs of each masked layer and the input of the head, averaged over a grid of
image regions (or over tokens) to at most 1,024 numbers, and standardised. Standardising undoes any
gate that is not exactly zero, as an attacker would.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wfnet.head import find_head
from wfnet.services.extras import require
from wfnet.trust.check import Check
from wfnet.trust.subject import Subject, predict

FEATURES = 1024
HEAD = "input of the head"


def measure(model: nn.Module, subject: Subject, others: Sequence[nn.Module]) -> dict[str, Any]:
    """Balanced accuracy of the probe of every layer; ``details["layers"]`` has them by name."""
    train = subject.train_forget.with_others(subject.train_retain)
    test = subject.test_forget.with_others(subject.test_retain)
    names = [name for name in subject.layers if _module(model, name) is not None]
    trained_on = layer_features(model, names, train.images, subject.num_classes)
    tested_on = layer_features(model, names, test.images, subject.num_classes)
    wanted, truth = (part.labels.numpy() == subject.label for part in (train, test))
    layers = {
        name: probe(trained_on[name], wanted, tested_on[name], truth, subject.settings.seed)
        for name in trained_on
    }
    return {
        "values": {"probe_last": layers[HEAD], "probe_best": max(layers.values())},
        "details": {"layers": layers, "images": {"train": len(train), "test": len(test)}},
    }


def probe(
    features: np.ndarray, wanted: np.ndarray, test: np.ndarray, truth: np.ndarray, seed: int
) -> float:
    """Balanced accuracy on ``test [m, d]`` of a logistic regression on ``features [n, d]``.

    Args:
        features, test: float arrays.
        wanted, truth: bool arrays ``[n]`` and ``[m]``: whether an image is of the class.
        seed: of the solver.
    """
    linear = require("sklearn.linear_model", "eval")
    mean, scale = features.mean(0), features.std(0)
    scale[scale < 1e-12] = 1.0  # pruned channels and constant ones
    model = linear.LogisticRegression(
        C=1.0, class_weight="balanced", max_iter=200, tol=1e-3, random_state=seed
    )
    with warnings.catch_warnings():  # an unfinished fit is a weaker probe, no error
        warnings.simplefilter("ignore")
        model.fit((features - mean) / scale, wanted)
    found = model.predict((test - mean) / scale)
    return float((found[truth].mean() + 1 - found[~truth].mean()) / 2)


def layer_features(
    model: nn.Module, names: Sequence[str], images: Tensor, num_classes: int | None = None
) -> dict[str, np.ndarray]:
    """Pooled features ``[n, d]`` of the layers ``names`` and of the input of the head.

    Of a layer that runs several times, those of its last run; layers that do not run, or whose
    outputs do not belong to single images, are left out.
    """
    last: dict[str, Tensor] = {}
    kept: dict[str, list[Tensor]] = {name: [] for name in (*names, HEAD)}

    def flush(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        count = len(inputs[0])
        for name, features in last.items():
            if features.shape[0] % count == 0:
                kept[name].append(pooled(_by_image(features, count)))
        last.clear()

    with ExitStack() as hooks:
        for name in names:
            hooks.enter_context(
                model.get_submodule(name).register_forward_hook(
                    lambda module, inputs, output, name=name: last.update({name: output})
                )
            )
        head = find_head(model, num_classes)
        if head is not None:
            hooks.enter_context(
                head[1].register_forward_hook(
                    lambda module, inputs, output: last.update({HEAD: inputs[0]})
                )
            )
        hooks.enter_context(model.register_forward_hook(flush))
        predict(model, images)
    return {
        name: found.double().numpy()
        for name, found in ((n, torch.cat(p)) for n, p in kept.items() if p)
        if len(found) == len(images)
    }


def _by_image(features: Tensor, count: int) -> Tensor:
    """``[count, windows * N, C]`` of features in windows, ``[count * windows, N, C]``."""
    if features.shape[0] == count:
        return features
    return features.unflatten(0, (count, -1)).flatten(1, -2)


def pooled(features: Tensor) -> Tensor:
    """``[n, d]`` with ``d <= FEATURES`` where channels allow: means over regions, or over tokens.

    Args:
        features: ``[n, C, H, W]``, ``[n, tokens, C]`` or ``[n, C]``.
    """
    if features.dim() == 4:
        side = max(1, math.isqrt(FEATURES // features.shape[1]))
        size = [min(side, s) for s in features.shape[2:]]
        return F.adaptive_avg_pool2d(features.float(), size).flatten(1).cpu()
    if features.dim() == 3:
        groups = min(max(1, FEATURES // features.shape[2]), features.shape[1])
        return F.adaptive_avg_pool1d(features.float().mT, groups).flatten(1).cpu()
    return features.float().flatten(1).cpu()


def _module(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


CHECK = Check(
    name="probing",
    title="Linear probes",
    question="How much of the forgotten class do the features of each layer still hold?",
    definition=__doc__,
    needs="a model retrained without the class, for the level to compare with",
    measures={
        "probe_last": "balanced accuracy of a linear probe on the input of the head",
        "probe_best": "the highest balanced accuracy over all layers",
    },
    headline="probe_last",
    measure=measure,
)
