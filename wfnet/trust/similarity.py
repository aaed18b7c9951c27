"""Similarity of representations: do layers see images as those of retrained models do?

Centred kernel alignment between the features of each masked layer, and of the input of the head,
and those of the same layer of a model that never saw the class; features as in
:mod:`wfnet.trust.probing`. On test images of the forgotten class (``forget``), where a model that
still knows the class may differ, and of the others (``retain``). Kornblith et al., "Similarity of
Neural Network Representations Revisited" (ICML 2019),
with linear kernels ``K = X X'``, ``L = Y Y'`` and, so that minibatches and more features than
images do not bias it, the estimate of Nguyen et al., "Do Wide and Deep Networks Learn the Same
Things?" (ICLR 2021, eqs. 2 to 4): over minibatches of ``n`` images each, and with diagonals of 0 in
``K`` and ``L``::

    hsic(K, L) = (tr(K L) + sum(K) sum(L) / ((n - 1)(n - 2)) - 2 sum(K L) / (n - 2)) / (n (n - 3))
    cka = mean hsic(K, L) / sqrt(mean hsic(K, K) mean hsic(L, L))

1: the same up to a rotation, a scale and a shift; about 0: unrelated (it can fall below).

Outputs are compared by the check ``closeness``; a changed logit changes outputs alone. Two models
retrained with other seeds differ as well: their level is the one to compare with.
"""

import math
import statistics

import torch
from torch import Tensor, nn

from wfnet.trust.check import Check, Found
from wfnet.trust.probing import HEAD, layer_features
from wfnet.trust.subject import Subject

LEAST = 4  # images
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


def linear_cka(first: Tensor, second: Tensor, batch_size: int = 256) -> float:
    """Returns the linear CKA of features ``[N, d]`` and ``[N, e]`` of the same images.

    A last minibatch of fewer than 4 images is left out. NaN where one of them does not vary.

    Raises:
        ValueError: for fewer than 4 images, or other numbers of them.
    """
    if len(first) != len(second) or len(first) < LEAST:
        raise ValueError(
            f"CKA needs features of the same images, {LEAST} at least; got {len(first)} and "
            f"{len(second)}"
        )
    sums = torch.zeros(3, dtype=torch.float64)
    for x, y in zip(first.split(batch_size), second.split(batch_size), strict=True):
        if len(x) >= LEAST:
            a, b = _kernel(x), _kernel(y)
            sums += torch.tensor([_hsic(a, b), _hsic(a, a), _hsic(b, b)], dtype=torch.float64)
    both, own, other = sums.tolist()
    return both / math.sqrt(own * other) if own > 0 and other > 0 else math.nan


def _kernel(features: Tensor) -> Tensor:
    """Returns ``X X'`` ``[n, n]`` fp64 with a diagonal of 0; centring first loses no digits."""
    x = features.double()
    x = x - x.mean(0)
    return (x @ x.T).fill_diagonal_(0)


def _hsic(a: Tensor, b: Tensor) -> float:
    n = len(a)
    rows = (a.sum(0) * b.sum(0)).sum()
    found = (a * b).sum() + a.sum() * b.sum() / ((n - 1) * (n - 2)) - 2 * rows / (n - 2)
    return (found / (n * (n - 3))).item()


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
