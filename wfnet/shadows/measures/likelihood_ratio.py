"""U-LiRA: can a model that unlearned an image be told from one that never saw it?

Hayes et al., "Inexact Unlearning Needs More Careful Evaluations to Avoid a False Sense of Privacy"
(SaTML 2025), algorithm 1; Kurmanji et al., "Towards Unbounded Machine Unlearning" (NeurIPS 2023).
With ``phi`` the logit-scaled confidence of the image ``x`` under the model under test::

    t(x) = log N(phi; mean_u(x), var_u) - log N(phi; mean_r(x), var_r)

where ``u`` are the other models that unlearned ``x``, ``r`` the others that never saw it. Means are
of each image; variances are means over the images of the class, as for few shadows in Carlini et
al., "Membership Inference Attacks From First Principles" (IEEE S&P 2022). Models are tested in
turn: fold ``i`` leaves model ``i`` of both kinds out of means and variances, and has
``t(x)`` of the one that unlearned as positives, of the other as negatives. If both kinds have the
same distribution, the area under the ROC is 0.5; a lower one is chance as well.

The interval of the area is a bootstrap over images, those of true positive rates are Clopper and
Pearson's, as if scores were independent (each image has a score in every fold).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from wfnet.shadows.measures.measure import (
    Estimate,
    Measure,
    Pair,
    Values,
    bootstrap,
    clopper_pearson,
)
from wfnet.trust.membership import roc_auc, true_positives

FALSE_POSITIVES = {"tpr_at_0.1%": 0.001, "tpr_at_1%": 0.01}


def measure(pairs: Sequence[Pair]) -> Values:
    """Returns the area under the ROC and true positive rates over all images of all pairs."""
    found = [scores(pair) for pair in pairs]
    positive, negative = (torch.cat(side, 1) for side in zip(*found, strict=True))

    def area(chosen: Tensor) -> float:
        return roc_auc(positive[:, chosen].flatten(), negative[:, chosen].flatten())

    count = positive.shape[1]
    values = {"auc": Estimate(area(torch.arange(count)), *bootstrap(area, count))}
    for name, rate in FALSE_POSITIVES.items():
        if negative.numel() < 1 / rate:
            needs = f"{math.ceil(1 / rate):,} scores of models that never saw the image"
            values[name] = Estimate(None, needs=f"{needs} ({negative.numel():,} at hand)")
            continue
        share = true_positives(positive.flatten(), negative.flatten(), rate)
        hits = round(share * positive.numel())
        values[name] = Estimate(share, *clopper_pearson(hits, positive.numel()))
    return values


def scores(pair: Pair) -> tuple[Tensor, Tensor]:
    """Returns ``t(x)`` ``[S, n]`` of models that unlearned, and of those that never saw the image.

    Raises:
        ValueError: for fewer than 3 models of a kind, whose folds have no variance.
    """
    count = len(pair.unlearned)
    if count < 3:
        raise ValueError(f"U-LiRA needs 3 models of a kind, 6 shadow rounds; got {count}")
    positive, negative = torch.empty_like(pair.unlearned), torch.empty_like(pair.reference)
    for i in range(count):
        others = torch.arange(count) != i
        fitted = [(s[others].mean(0), s[others].var(0).mean()) for s in vars(pair).values()]
        for tested, into in ((pair.unlearned, positive), (pair.reference, negative)):
            own, reference = (_log_normal(tested[i], *gaussian) for gaussian in fitted)
            into[i] = own - reference
    return positive, negative


def _log_normal(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    variance = variance.clamp_min(1e-12)  # models that all say the same
    return -((x - mean) ** 2 / variance + variance.log()) / 2


MEASURE = Measure(
    name="u_lira",
    title="U-LiRA",
    definition=__doc__,
    values={
        "auc": "area under the ROC of the likelihood ratio",
        "tpr_at_0.1%": "true positive rate at a false positive rate of at most 0.1%",
        "tpr_at_1%": "true positive rate at a false positive rate of at most 1%",
    },
    function=measure,
)
