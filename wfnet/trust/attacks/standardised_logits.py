"""Every logit brought to mean 0 and variance 1 over unlabelled images.

With ``m_k`` and ``s_k`` of logit ``k`` over the images, ``z_k <- (z_k - m_k) / s_k``: no class can
be voted down for all images alike, nor have logits that are too small.
"""

from __future__ import annotations

from torch import nn

from wfnet.trust.attacks.attack import ChangedLogits, attack
from wfnet.trust.subject import Subject


@attack("standardised", "logits standardised over unlabelled images", moves_logits=True)
def standardised(model: nn.Module, subject: Subject) -> nn.Module:
    seen = subject.logits(model, "unlabelled")
    mean, deviation = seen.mean(0), seen.std(0).clamp_min(1e-12)
    return ChangedLogits(model, lambda logits: (logits - mean) / deviation)
