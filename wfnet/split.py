"""A filtered network in two parts: what is frozen in front of the first mask, and the rest.

What lies before the first mask is a constant of the image, whatever it is to forget. With masks in
late layers alone most of the network lies there: it can be computed once per image and kept.
"""

import copy
from typing import NamedTuple

import torch
from torch import Tensor, fx

from wfnet.fusion import Fusion, NotFusable
from wfnet.fusion.cut import split_at_features
from wfnet.labels import DeferredLabelCheck, select
from wfnet.network import WFNet
from wfnet.services.log import logger


class SplitNetwork(NamedTuple):
    """The two parts of a network; they share its modules.

    Attributes:
        front: ``[N, C, H, W]`` images to features ``[N, ...]``.
        net: features, in the place of images, to logits. Its filters are those of the network.
        at: name of the operation that makes the features.
    """

    front: fx.GraphModule
    net: WFNet
    at: str


@torch.no_grad()
def split_network(net: WFNet, images: Tensor) -> SplitNetwork | None:
    """Splits ``net`` at the last tensor in front of its masks that everything behind is made from.

    Args:
        net: is not changed.
        images: ``[N, C, H, W]``, as the network takes them, with which the parts are checked.

    Returns:
        None where there is no such tensor because the first layers are masked; and, with a line in
        the log, for a network that torch.fx cannot trace.
    """
    name = type(net.model).__name__
    try:
        parts = split_at_features(net.model, images[:2])
    except NotFusable as reason:
        logger.info("%s has no features to keep: %s", name, reason)
        return None
    if parts is None:
        return None
    front, rest, at = parts
    split = SplitNetwork(front.eval(), _around(net, rest.eval()), at)
    few, rows = images[:2], torch.tensor([0, -1], device=images.device)[: len(images)]
    expected = net._unfused(few, select(rows))
    found = split.net._unfused(split.front(few), select(rows))
    # The same operations: at most rounding may differ, a wrong cut is off by about 1.
    span = expected.abs().max().clamp_min(1e-6)
    if not bool((found - expected).abs().max() <= 1e-3 * span):
        logger.info("%s has no features to keep: in two parts it computes something else", name)
        return None
    return split


def _around(net: WFNet, model: fx.GraphModule) -> WFNet:
    """``net`` with ``model`` in the place of its own, and the same masked layers."""
    part = copy.copy(net)
    part._modules = {**net._modules, "model": model}
    part._fusion, part._label_check = Fusion(), DeferredLabelCheck()
    part._all_called, part.image_shape = False, None
    return part
