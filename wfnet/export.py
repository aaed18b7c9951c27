"""Bakes one row's gates into the weights: a plain model without filters."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from numbers import Integral

import torch
from torch import Tensor, nn

from wfnet.durable_layers import DurableLayer
from wfnet.head import cut_from_head, example_images, first_output
from wfnet.labels import check_range
from wfnet.layers import MaskedLayer
from wfnet.services.modes import evaluation_mode

logger = logging.getLogger("wfnet")


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
    for name, layer in masked_layers.items():
        if any(filters[labels].isnan().any() for filters in layer.named_filters().values()):
            raise ValueError(
                f"the filters of layer {name!r} are NaN for what is to be forgotten, so the export "
                "would compute NaN: untrain again with a smaller learning rate"
            )
    plain = _copy_without_filters(model)
    for name, layer in masked_layers.items():
        baked = layer.bake(labels, prune_below)
        if name:
            replace_module(plain, layer, baked)
        else:
            plain = baked
    _close_producers(
        plain, [n for n, m in masked_layers.items() if isinstance(m, DurableLayer)], image_shape
    )
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


def _close_producers(plain: nn.Module, names: list[str], image_shape: Sequence[int] | None) -> None:
    """Zeroes what convolutions compute for closed channels of the BatchNorms ``names``."""
    norms = {n: m for n in names if isinstance(m := plain.get_submodule(n), nn.BatchNorm2d)}
    closed = {n: (m.weight.eq(0) & m.bias.eq(0)) for n, m in norms.items()}
    if not any(channels.any() for channels in closed.values()):
        return
    try:
        images = example_images(plain, image_shape or ())
    except ValueError as error:
        logger.warning("closed channels keep their convolutions' weights: %s", error)
        return
    for name, producer in sole_producers(plain, norms, images).items():
        with torch.no_grad():
            for parameter in (producer.weight, producer.bias):
                if parameter is not None:
                    parameter[closed[name]] = 0.0


def sole_producers(
    model: nn.Module, norms: Mapping[str, nn.Module], images: Tensor
) -> dict[str, nn.Conv2d]:
    """The convolution in front of each of ``norms``, where it computes for that layer alone.

    Found by running the model: a convolution is one if its output is what the norm takes, and if
    the logits stay when noise is added to that output everywhere but in the norm.

    Args:
        model: in evaluation mode inside; its weights stay as they are.
        norms: modules of ``model`` by name.
        images: ``[N, C, H, W]`` that it takes.
    """
    outputs: dict[int, nn.Conv2d] = {}
    kept: dict[int, Tensor] = {}
    found: dict[str, nn.Conv2d] = {}
    noisy: set[nn.Conv2d] = set()

    def computed(module: nn.Conv2d, args: object, output: Tensor) -> Tensor | None:
        if module in noisy:
            changed = output + 1 + output.abs().amax()
            kept[id(changed)] = (changed, output)
            return changed
        outputs[id(output)] = module
        kept[id(output)] = (output, output)
        return None

    def taken(name: str, args: tuple[Tensor]) -> tuple[Tensor] | None:
        x = args[0]
        if not noisy and id(x) in outputs:
            found[name] = outputs[id(x)]
        return (kept[id(x)][1],) if noisy and id(x) in kept else None

    handles = [
        m.register_forward_hook(computed) for m in model.modules() if isinstance(m, nn.Conv2d)
    ]
    handles += [
        m.register_forward_pre_hook(lambda module, args, name=name: taken(name, args))
        for name, m in norms.items()
    ]
    try:
        with evaluation_mode(model), torch.no_grad():
            logits = first_output(model(images))

            def alone(convolutions: set[nn.Conv2d]) -> bool:
                noisy.clear()
                noisy.update(convolutions)
                kept.clear()
                return torch.equal(first_output(model(images)), logits)

            if alone(set(found.values())):
                return found
            return {name: conv for name, conv in found.items() if alone({conv})}
    finally:
        for handle in handles:
            handle.remove()
