"""Attacks on a baked model that need no label and no training: one file each, tried by ``removal``.

A new attack is a file that makes an ``ATTACK``, and its name in ``ATTACKS`` below.
"""

from wfnet.trust.attacks import (
    affine_reset,
    base_head,
    base_norms,
    batchnorm_statistics,
    equalised_rows,
    reestimated_shift,
    shifted_logit,
    standardised_logits,
)
from wfnet.trust.attacks.attack import Attack, Attacked

ATTACKS: dict[str, Attack] = {
    attack.name: attack
    for attack in (
        batchnorm_statistics.OF_ALL,
        batchnorm_statistics.OF_OTHERS,
        affine_reset.ATTACK,
        equalised_rows.ATTACK,
        base_norms.ATTACK,
        base_head.ATTACK,
        shifted_logit.ATTACK,
        reestimated_shift.ATTACK,
        standardised_logits.ATTACK,
    )
}

__all__ = ["ATTACKS", "Attack", "Attacked"]
