"""Closeness to retraining: how far the outputs are from those of models that never saw the class.

Between the softmax outputs ``q`` of the model and ``p`` of a retrained one, mean over images, on
test images of the forgotten class (``forget``) and of the others (``retain``)::

    kl = sum_k p_k (log p_k - log q_k)      js = (KL(p || m) + KL(q || m)) / 2, m = (p + q) / 2
    tv = sum_k |p_k - q_k| / 2              agreement = share of images with the same prediction

in nats; where images have several labels, means over the outputs, each of one label. Unlearning is
defined by closeness to retraining (Guo et al., "Certified Data Removal from
Machine Learning Models", ICML 2020); outputs are where it can be measured. They say nothing of what
the weights still hold (Jeon et al., "An Information Theoretic Evaluation Metric For Strong
Unlearning", 2024): the other checks ask for that. Two models retrained with other seeds differ as
well: with two of them, their distance from each other is the level below which no method can be
told from retraining. An export whose class was cut from its head (``cut_output``) is compared as it
is: the constant in place of that logit is part of the distance.
"""

import torch
from torch import Tensor, nn

from wfnet.evaluation import metrics
from wfnet.trust.check import Check, Found
from wfnet.trust.subject import Subject


def measure(model: nn.Module, subject: Subject) -> Found:
    """Returns means over the retrained models that ``model`` is not one of."""
    others = subject.others(model)
    values: dict[str, float] = {}
    for part in ("forget", "retain") if others else ():
        own, *theirs = (
            subject.distributions(subject.logits(network, f"test_{part}"))
            for network in (model, *others)
        )
        found = [distances(reference, own) for reference in theirs]
        for name in found[0]:
            values[f"{name}_{part}"] = sum(each[name] for each in found) / len(found)
    images = {"forget": len(subject.test_forget), "retain": len(subject.test_retain)}
    return values, {"images": images}


def distances(reference: Tensor, logits: Tensor) -> dict[str, float]:
    """Returns the means of kl, js, tv and agreement between two ``logits [..., K]``."""
    log_p, log_q = (torch.log_softmax(z.double(), -1) for z in (reference, logits))
    p, q = log_p.exp(), log_q.exp()
    return {
        "kl": torch.where(p > 0, p * (log_p - log_q), 0).sum(-1).mean().clamp_min(0).item(),
        "js": metrics.jensen_shannon(reference, logits).mean().item(),
        "tv": ((p - q).abs().sum(-1) / 2).mean().item(),
        "agreement": (p.argmax(-1) == q.argmax(-1)).double().mean().item(),
    }


CHECK = Check(
    name="closeness",
    title="Closeness to retraining",
    question="How far are the outputs from those of models that never saw the class?",
    definition=__doc__,
    needs="a model retrained without the class; two, for the distance between retrained models",
    measures={
        f"{name}_{part}": f"{text}, on test images of {where}"
        for part, where in (("forget", "the forgotten class"), ("retain", "the other classes"))
        for name, text in (
            ("kl", "KL(retrained || model), nats"),
            ("js", "Jensen-Shannon divergence, nats (0 to 0.693)"),
            ("tv", "total variation distance (0 to 1)"),
            ("agreement", "share of equal predictions"),
        )
    },
    headline="js_forget",
    measure=measure,
)
