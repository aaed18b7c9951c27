"""The trust checks, in the order in which they are run and shown."""

from wfnet.trust import closeness, collateral, membership, probing, relearn, removal, similarity
from wfnet.trust.check import Check

CHECKS: dict[str, Check] = {
    module.CHECK.name: module.CHECK
    for module in (membership, relearn, probing, removal, collateral, closeness, similarity)
}
