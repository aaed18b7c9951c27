"""Attacks on a baked model that need no label and no training: one file each, tried by ``removal``.

A new attack is a file that makes an ``ATTACK``, and its name in ``ATTACKS`` below.
"""

from wfnet.trust.attacks import (
    base_norms,
    batchnorm_statistics,
    equalised_rows,
    shifted_logit,
    standardised_logits,
)
from wfnet.trust.attacks.attack import Attack, Attacked

ATTACKS: dict[str, Attack] = {
    attack.name: attack
    for attack in (
        batchnorm_statistics.OF_ALL,
        batchnorm_statistics.OF_OTHERS,
        equalised_rows.ATTACK,
        base_norms.ATTACK,
        shifted_logit.ATTACK,
        standardised_logits.ATTACK,
    )
}

__all__ = ["ATTACKS", "Attack", "Attacked"]
