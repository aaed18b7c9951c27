"""Membership inference on the forgotten class: can one tell that its images were trained on?

The score of an image ``x`` of class ``y`` is the logit of its confidence (Carlini et al.,
"Membership Inference Attacks From First Principles", IEEE S&P 2022)::

    phi(x) = log(p_y / (1 - p_y)) = z_y - logsumexp(z without z_y)

a monotone function of the cross entropy that is close to normal over models; where images have
several labels, the logit of the label. Three attacks, each scored per image:

- by confidence and by entropy: area under the ROC of members (images of the class that the
  original was trained on) against non-members (test images of the class), by ``phi`` and by the
  negative entropy, which needs no label (Yeom et al., CSF 2018; Salem et al., NDSS 2019).
  Beside it the true positive rate at a false positive rate of at most 10%.
- calibrated: the same by ``phi(x) - mean over retrained models of phi(x)``, which takes out
  how hard an image is (Watson et al., "On the Importance of Difficulty Calibration in Membership
  Inference Attacks", ICLR 2022).
- against retrained models: the attack on unlearning of Hayes et al., "Inexact Unlearning Needs More
  Careful Evaluations to Avoid a False Sense of Privacy" (SaTML 2025), with an offline LiRA of one
  variance: ``t(x) = phi(x) - mean over the other retrained models of phi(x)`` for the members, of
  this model against those of retrained models. It asks whether the model can be told from one that
  never saw the class.

A retrained model has no members, so the first three are near 0.5 for it, give or take the standard
error (Hanley and McNeil, Radiology 1982) in the details; the last is 0.5 for it. What counts is
the distance to the retrained models' level, in either direction: a model that is far *less*
confident than one that never saw the class gives itself away, too.
"""

import math

import torch
from torch import Tensor, nn

from wfnet.trust.check import Check, Found
from wfnet.trust.subject import Subject


def measure(model: nn.Module, subject: Subject) -> Found:
    """Returns areas under the ROC; the calibrated ones need other retrained models."""
    parts = ("train_forget", "test_forget")

    def scores(network: nn.Module, part: str) -> Tensor:
        logits = subject.logits(network, part)
        if subject.several_labels:  # log(p / (1 - p)) of the label itself
            return logits[:, subject.label]
        return confidence(logits, subject.label)

    members, strangers = (scores(model, part) for part in parts)
    auc = roc_auc(members, strangers)
    values = {
        "auc_confidence": auc,
        "auc_entropy": roc_auc(
            *(-_entropy(subject.distributions(subject.logits(model, part))) for part in parts)
        ),
        "tpr_confidence": true_positives(members, strangers),
    }
    others = subject.others(model)
    if others:
        shadow, hardness = (torch.stack([scores(o, part) for o in others]) for part in parts)
        members_less = members - shadow.mean(0)
        values["auc_calibrated"] = roc_auc(members_less, strangers - hardness.mean(0))
        if len(others) >= 2:
            left_out = shadow - (shadow.sum(0) - shadow) / (len(others) - 1)
            values["lira_auc"] = roc_auc(members_less, left_out.flatten())
    return values, {
        "members": len(members),
        "non_members": len(strangers),
        "standard_error": auc_error(auc, len(members), len(strangers)),
    }


def confidence(logits: Tensor, label: int) -> Tensor:
    """Returns the finite ``log(p / (1 - p))`` ``[n]`` fp64 of a class for ``logits [n, K]``."""
    logits = logits.double()
    rest = torch.cat((logits[:, :label], logits[:, label + 1 :]), 1)
    return logits[:, label] - rest.logsumexp(1)


def _entropy(logits: Tensor) -> Tensor:
    log_p = torch.log_softmax(logits, -1)
    return -(log_p.exp() * log_p).flatten(1).sum(1)


def roc_auc(positive: Tensor, negative: Tensor) -> float:
    """Returns how probably a positive scores above a negative, ties counted half (Mann-Whitney).

    Args:
        positive, negative: scores ``[n]`` and ``[m]``.
    """
    order, positive = negative.sort().values, positive.contiguous()
    below = torch.searchsorted(order, positive, right=False)
    not_above = torch.searchsorted(order, positive, right=True)
    return ((below + not_above).double().mean() / (2 * len(negative))).item()


def auc_error(auc: float, positives: int, negatives: int) -> float:
    """Returns the standard error of an area under the ROC (Hanley and McNeil, 1982, eq. 2)."""
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (positives - 1) * (q1 - auc**2) + (negatives - 1) * (q2 - auc**2)
    return math.sqrt(max(variance, 0.0) / (positives * negatives))


def true_positives(positive: Tensor, negative: Tensor, false_positives: float = 0.1) -> float:
    """Returns the share of positives above what a share of the negatives exceeds at most."""
    allowed = int(false_positives * len(negative))
    threshold = negative.sort(descending=True).values[allowed]
    return (positive > threshold).double().mean().item()


CHECK = Check(
    name="membership",
    title="Membership inference",
    question="Can one tell that images of the forgotten class were trained on?",
    definition=__doc__,
    needs="two models retrained without the class; one, for scores less its own",
    measures={
        "auc_confidence": "area under the ROC, members against test images, by log(p/(1-p))",
        "auc_entropy": "as the first, by the negative entropy of the outputs",
        "tpr_confidence": "true positives at no more than 10% false ones, by log(p/(1-p))",
        "auc_calibrated": "as the first, less the mean of the retrained models on the same image",
        "lira_auc": "members under this model against the same under retrained models; 0.5: no "
        "difference",
    },
    headline="auc_confidence",
    measure=measure,
    retrained=2,
)
