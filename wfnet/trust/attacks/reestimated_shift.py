"""BatchNorm statistics estimated anew, then the class's logit shifted: two attacks in a row.

Re-estimation brings features of the class back, the shift undoes what the head still votes down;
each alone may leave the class unread. Formulas as in the modules of the two.
"""

from __future__ import annotations

from torch import nn

from wfnet.trust.attacks.attack import attack
from wfnet.trust.attacks.batchnorm_statistics import batchnorm_all
from wfnet.trust.attacks.shifted_logit import offset
from wfnet.trust.subject import Subject


@attack(
    "batchnorm_offset",
    "BatchNorm re-estimated, then the class's logit shifted",
    moves_logits=True,
)
def batchnorm_offset(model: nn.Module, subject: Subject) -> nn.Module | None:
    changed = batchnorm_all(model, subject)
    return changed and offset(changed, subject)
