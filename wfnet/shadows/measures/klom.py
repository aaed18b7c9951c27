"""KLOM: Kullback-Leibler divergence of margins, between unlearned and reference models.

Georgiev et al., "Attribute-to-Delete: Machine Unlearning via Datamodel Matching" (2024): for each
image the distributions, over models, of the margin of its class (here the logit-scaled confidence,
clipped to +-100) are compared, and the divergences averaged over images. With 100 models the source
takes histograms of 20 bins; with a few most bins are empty, so both are fitted by normal
distributions, means for each image and variances as means over the images of the class::

    KL(r || u) = (log(var_u / var_r) + (var_r + (mean_r - mean_u)^2) / var_u - 1) / 2

in nats. Means of few models differ by chance: compare with the level of retrained models.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from wfnet.shadows.measures.measure import Measure, Pair, Values, mean_of_images

_CLIP = 100.0


def measure(pairs: Sequence[Pair]) -> Values:
    """Returns the mean divergence over all images of all pairs."""
    return {"klom": mean_of_images(torch.cat([divergences(pair) for pair in pairs]))}


def divergences(pair: Pair) -> Tensor:
    """Returns the divergence ``[n]`` of each image, in nats."""
    u, r = (side.clamp(-_CLIP, _CLIP) for side in (pair.unlearned, pair.reference))
    var_u, var_r = (side.var(0).mean().clamp_min(1e-12) for side in (u, r))
    squared = (r.mean(0) - u.mean(0)) ** 2
    return ((var_u / var_r).log() + (var_r + squared) / var_u - 1) / 2


MEASURE = Measure(
    name="klom",
    title="KLOM",
    definition=__doc__,
    values={"klom": "KL(reference || unlearned) of margins, nats"},
    function=measure,
)
