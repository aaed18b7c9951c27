"""Removability of a baked export: can its holder bring the class back without a labelled image?

The attacks of :mod:`wfnet.trust.attacks` need no training and no labels; each is tried on a copy.
Each reports the accuracy on the class (low is good) and on the others (an attack that destroys the
rest is no attack). Beside them stands the area under the ROC of the class's logit, images of the
class against others: what the outputs tell whatever offset is chosen.

Attackers' images are a sample of the training part in which the class has its natural share (the
details count them): statistics and shifts depend on the mix. The details also say how many of the
export's rows are multiples of the base's.

In an export whose class was cut from its head (``cut_output``), only attacks on the logits and the
base's row of the head reach its logit. The same attacks on a retrained model, which has nothing to
bring back, give the level to compare with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from wfnet.trust.attacks import ATTACKS, Attacked
from wfnet.trust.attacks.base_norms import rows_against_base
from wfnet.trust.check import Check
from wfnet.trust.membership import roc_auc
from wfnet.trust.subject import Subject, share_correct

# An attack that destroys the rest is no attack: what it may cost the other classes.
TOLERATED = 0.1


def measure(model: nn.Module, subject: Subject, others: Sequence[nn.Module]) -> dict[str, Any]:
    """Accuracies before and after every attack that applies to ``model``."""
    attacked = {"": Attacked(model)}
    attacked |= {f"_{name}": attack.apply(model, subject) for name, attack in ATTACKS.items()}
    own, rest = {}, {}
    for name, found in attacked.items():
        if found is not None:
            logits = found.logits(subject, "test_forget")
            own[f"acc_f{name}"] = share_correct(logits, subject.test_forget.labels)
            logits = found.logits(subject, "test_retain")
            rest[f"acc_r{name}"] = share_correct(logits, subject.test_retain.labels)
    without_base = ["", *(f"_{name}" for name, attack in ATTACKS.items() if not attack.needs_base)]
    forget, retain = (
        subject.logits(model, f"test_{part}")[:, subject.label] for part in ("forget", "retain")
    )
    values = own | rest
    values["acc_f_recovered"] = max(
        own[f"acc_f{name}"]
        for name in without_base
        if rest.get(f"acc_r{name}", -1) >= rest["acc_r"] - TOLERATED
    )
    values["auc_logit"] = roc_auc(forget, retain)
    of_class = int((subject.unlabelled.labels == subject.label).sum())
    images = {"unlabelled": len(subject.unlabelled), "of_the_class": of_class}
    details: dict[str, Any] = {"attackers_images": images}
    if model is subject.forgetful:
        details["rows"] = rows_against_base(model, subject.original, subject.layers)
    return {"values": values, "details": details}


_TEXTS = {"": "as it is", **{f"_{name}": attack.text for name, attack in ATTACKS.items()}}
CHECK = Check(
    name="removal",
    title="Removability of the export",
    question="Can the holder of the baked file bring the class back without labelled images?",
    definition=__doc__,
    needs="a model retrained without the class, for the level to compare with",
    measures={
        **{f"acc_f{k}": f"accuracy on the forgotten class, {text}" for k, text in _TEXTS.items()},
        **{f"acc_r{k}": f"accuracy on the other classes, {text}" for k, text in _TEXTS.items()},
        "acc_f_recovered": "highest accuracy on the class by an attack without the base that costs "
        "the others at most 10 points",
        "auc_logit": "area under the ROC of the class's logit, its images against others",
    },
    headline="acc_f_batchnorm_all",
    measure=measure,
)
