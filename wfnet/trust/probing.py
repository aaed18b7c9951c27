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

import math
import warnings
from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wfnet.head import find_head
from wfnet.services.extras import require
from wfnet.trust.check import Check, Found
from wfnet.trust.subject import BATCH, Subject, predict

FEATURES = 1024
HEAD = "input of the head"


def measure(model: nn.Module, subject: Subject) -> Found:
    """Returns balanced accuracies of probes; details have every layer's by name."""
    train = subject.train_forget.with_others(subject.train_retain)
    test = subject.test_forget.with_others(subject.test_retain)
    trained_on, tested_on = (
        layer_features(model, subject.layers, part.images, subject.num_classes)
        for part in (train, test)
    )
    wanted, truth = (subject.is_own(part).numpy() for part in (train, test))
    layers = {
        name: probe(trained_on[name], wanted, tested_on[name], truth, subject.settings.seed)
        for name in trained_on
    }
    values = {"probe_last": layers[HEAD], "probe_best": max(layers.values())}
    return values, {"layers": layers, "images": {"train": len(train), "test": len(test)}}


def probe(
    features: np.ndarray, wanted: np.ndarray, test: np.ndarray, truth: np.ndarray, seed: int
) -> float:
    """Returns the balanced accuracy on ``test [m, d]`` of a probe of ``features [n, d]``.

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
    model: nn.Module, names: Sequence[str], images: Tensor, num_classes: int
) -> dict[str, np.ndarray]:
    """Returns pooled features ``[n, d]`` of the layers ``names`` and of the input of the head.

    Of a layer that runs several times, those of its last run; layers that do not run, or whose
    outputs do not belong to single images, are left out.
    """
    modules = dict(model.named_modules())
    watched = {name: modules[name] for name in names if name in modules}
    head = find_head(model, num_classes)
    if head is not None:
        watched[HEAD] = head[1]
    last: dict[str, Tensor] = {}
    kept: dict[str, list[Tensor]] = {name: [] for name in watched}
    with ExitStack() as hooks:
        for name, module in watched.items():

            def keep(module: nn.Module, inputs: tuple, output: Tensor, name: str = name) -> None:
                last[name] = inputs[0] if name == HEAD else output

            hooks.enter_context(module.register_forward_hook(keep))
        for part in images.split(BATCH):
            last.clear()
            predict(model, part)
            for name, features in last.items():
                windows, rest = divmod(len(features), len(part))
                if windows > 1 and rest == 0:  # [n * windows, tokens, C], of window transformers
                    features = features.unflatten(0, (-1, windows)).flatten(1, -2)
                if rest == 0:
                    kept[name].append(pooled(features))
    found = {name: torch.cat(parts).double().numpy() for name, parts in kept.items() if parts}
    return {name: features for name, features in found.items() if len(features) == len(images)}


def pooled(features: Tensor) -> Tensor:
    """Returns means over regions or tokens: ``[n, d]``, ``d <= FEATURES`` where channels allow.

    Args:
        features: ``[n, C, H, W]``, ``[n, tokens, C]`` or ``[n, C]``.
    """
    features = features.float()
    if features.dim() == 4:
        side = max(1, math.isqrt(FEATURES // features.shape[1]))
        features = F.adaptive_avg_pool2d(features, [min(side, s) for s in features.shape[2:]])
    elif features.dim() == 3:
        groups = min(max(1, FEATURES // features.shape[2]), features.shape[1])
        features = F.adaptive_avg_pool1d(features.mT, groups)
    return features.flatten(1).cpu()


CHECK = Check(
    name="probing",
    title="Linear probes",
    question="How much of the forgotten class do the features of each layer still hold?",
    definition=__doc__,
    measures={
        "probe_last": "balanced accuracy of a linear probe on the input of the head",
        "probe_best": "the highest balanced accuracy over all layers",
    },
    headline="probe_last",
    measure=measure,
)
