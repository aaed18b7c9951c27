"""Attacks on a baked model that need no label and no training; each is tried by ``removal``.

A new attack is a function under the decorator ``attack`` in any file here, or the entry point of
another package in the group ``wfnet.attacks``.
"""

import importlib
import pkgutil

from wfnet.services.extras import registry
from wfnet.trust.attacks.attack import Attack

_MODULES = [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]
_FOUND = [found for m in _MODULES for found in vars(m).values() if isinstance(found, Attack)]

# First those that change weights, then those of holders of the base, then those that move logits.
ATTACKS = registry(
    "wfnet.attacks", Attack, _FOUND, lambda a: (a.moves_logits, a.needs_base, a.name)
)

__all__ = ["ATTACKS", "Attack"]
