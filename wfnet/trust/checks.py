"""The trust checks, in the order in which they are run and shown."""

from wfnet.trust import (
    class_geometry,
    closeness,
    collateral,
    membership,
    over_unlearning,
    probing,
    prototypes,
    relearn,
    removal,
    similarity,
)
from wfnet.trust.check import Check

_MODULES = (membership, relearn, prototypes, probing, removal, collateral, over_unlearning)

CHECKS: dict[str, Check] = {
    module.CHECK.name: module.CHECK for module in (*_MODULES, closeness, similarity, class_geometry)
}
