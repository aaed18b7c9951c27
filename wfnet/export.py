"""Bakes one row's gates into the weights: a plain model without filters."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from numbers import Integral

from torch import Tensor, nn

from wfnet.head import cut_from_head
from wfnet.labels import check_range
from wfnet.layers import MaskedLayer


def bake(
    model: nn.Module,
    masked_layers: Mapping[str, MaskedLayer],
    num_classes: int,
    forget: int | Sequence[int] | Tensor | None,
    prune_below: float = 0.0,
    cut_output: bool = False,
    head: str | None = None,
    image_shape: Sequence[int] | None = None,
) -> nn.Module:
    """A plain copy of ``model`` with the gates of ``forget`` in its weights.

    The work of :meth:`wfnet.WFNet.bake`, which see.
    """
    if not 0 <= prune_below < math.inf:
        raise ValueError(
            f"prune_below={prune_below} must be a finite number of at least 0: gates below it "
            "become 0 (0.05, for example; 0 prunes nothing)"
        )
    if prune_below > 1:
        raise ValueError(
            f"prune_below={prune_below} is more than 1, the gate of an untouched filter, so it "
            "would close nearly all of the network; give a threshold between 0 and 1"
        )
    labels = forget_list(forget, num_classes)
    plain = _copy_without_filters(model)
    for name, layer in masked_layers.items():
        baked = layer.bake(labels, prune_below)
        if name:
            replace_module(plain, layer, baked)
        else:
            plain = baked
    if cut_output:
        cut_from_head(plain, labels, num_classes, head, image_shape)
    return plain.requires_grad_(True).eval()


def forget_list(forget: int | Sequence[int] | Tensor | None, num_classes: int) -> list[int]:
    """The labels to forget, each once; ``[]`` for None, the original network.

    Raises:
        TypeError: if one is no integer.
        ValueError: if one is out of range, or if there is none at all: an empty list or -1 from a
            mistake would otherwise export a network that has forgotten nothing.
    """
    if forget is None:
        return []
    if isinstance(forget, Tensor):
        forget = forget.reshape(-1).tolist()
    labels = list(forget) if isinstance(forget, Sequence) else [forget]
    if isinstance(forget, str):
        labels = [forget]
    for label in labels:
        if isinstance(label, bool) or not isinstance(label, Integral):
            raise TypeError(f"forget must be one integer label or several; got {label!r}")
    if labels:
        check_range(min(labels), max(labels), num_classes)
    chosen = list(dict.fromkeys(int(label) for label in labels if label != -1))
    if not chosen:
        raise ValueError(
            f"forget={forget!r} names no class to forget, so the export would be the original "
            "model; name a class, or give forget=None where the original is wanted"
        )
    return chosen


def _copy_without_filters(model: nn.Module) -> nn.Module:
    """A deep copy in which masked layers are left shared: they are about to be replaced."""
    memo = {id(m): m for m in model.modules() if isinstance(m, MaskedLayer)}
    return copy.deepcopy(model, memo)


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts ``new`` under every name that ``old`` has in ``model``: a layer may be used twice."""
    for parent in list(model.modules()):
        for child, module in parent._modules.items():
            if module is old:
                parent._modules[child] = new
