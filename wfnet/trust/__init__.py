"""Trust checks: how well a class is forgotten, measured against models that never knew it.

Each check is one file with a ``CHECK``, whose ``measure(model, subject)`` is a function of one
plain model; the runner applies it to the model under test, to the original, and to every retrained
model, so that each number stands beside the two levels that give it meaning. What the checks say is
a lower bound of what an attacker can do: a stronger attack may exist.
"""

from wfnet.trust.checks import CHECKS
from wfnet.trust.removal import check_export, describe_export
from wfnet.trust.runner import run_checks
from wfnet.trust.subject import TrustSettings
from wfnet.trust.trust_records import TrustRecord, TrustResult

__all__ = [
    "CHECKS",
    "TrustRecord",
    "TrustResult",
    "TrustSettings",
    "check_export",
    "describe_export",
    "run_checks",
]
