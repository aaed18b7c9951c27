"""Shadow rounds: ensembles of unlearned and of retrained networks, and measures between them.

One untraining covers all classes, so ``N`` rounds give for every class what other methods need
``N`` runs a class for.
"""

from wfnet.shadows.comparisons import ShadowResult, compare
from wfnet.shadows.measures import MEASURES
from wfnet.shadows.rounds import FORGETFUL, ORIGINAL, RETRAINED, Recipe, ShadowRounds

__all__ = [
    "FORGETFUL",
    "MEASURES",
    "ORIGINAL",
    "RETRAINED",
    "Recipe",
    "ShadowResult",
    "ShadowRounds",
    "compare",
]
