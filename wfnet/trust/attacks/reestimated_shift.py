"""BatchNorm statistics estimated anew, then the class's logit shifted: two attacks in a row.

Re-estimation brings features of the class back, the shift undoes what the head still votes down;
each alone may leave the class unread. Formulas as in the modules of the two.
"""

from __future__ import annotations

from torch import nn

from wfnet.trust.attacks.attack import Attack, Attacked
from wfnet.trust.attacks.batchnorm_statistics import reestimated
from wfnet.trust.attacks.shifted_logit import shift
from wfnet.trust.subject import Subject


def _apply(model: nn.Module, subject: Subject) -> Attacked | None:
    changed = reestimated(model, subject.unlabelled.images, subject.settings.seed)
    return changed and Attacked(changed, shift(changed, subject))


ATTACK = Attack(
    "batchnorm_offset",
    "BatchNorm re-estimated, then the class's logit shifted",
    _apply,
    moves_logits=True,
)
