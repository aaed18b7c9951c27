"""Finds models past whose masks weights are used, or in which labels reach other samples.

``F.linear(x, self.qkv.weight)`` in a parent module, for example. Their source is searched when they
are wrapped, and the first forward pass is watched. Tokens that come before samples show when the
first labels come.
"""

import inspect
import re
import sys
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from wfnet.attention_layers import DirectLinear, WFMultiheadAttention
from wfnet.head import first_output
from wfnet.labels import Selection, forgetting
from wfnet.layers import MaskedLayer


class WeightWatch(TorchFunctionMode):
    """Raises if a masked layer's weight or bias enters a computation outside its own forward."""

    # Take only dtype, device or shape from a tensor argument.
    _NO_VALUES = frozenset(
        ("empty_like", "full_like", "ones_like", "zeros_like", "type_as")
        + ("new_empty", "new_full", "new_ones", "new_zeros", "new_tensor")
    )

    def __init__(self, model: nn.Module, masked_layers: dict[str, MaskedLayer]):
        super().__init__()
        self.model = model
        self.names = {layer: name for name, layer in masked_layers.items()}
        self.owners: dict[int, list[MaskedLayer]] = {}
        for layer in self.names:
            if isinstance(layer, DirectLinear):  # it watches itself
                continue
            read = [layer.weight, layer.bias]
            if isinstance(layer, WFMultiheadAttention):
                read += layer.out_proj.parameters()
            for parameter in read:
                if parameter is not None:
                    self.owners.setdefault(id(parameter), []).append(layer)
        for module in model.modules():  # tied weights have an unmasked use of their own
            if not isinstance(module, MaskedLayer):
                for parameter in module._parameters.values():
                    self.owners.pop(id(parameter), None)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        kind = getattr(func, "__name__", "")
        if kind not in self._NO_VALUES and any(isinstance(r, Tensor) for r in tree_leaves(result)):
            used = args[:1] if kind == "to" else tree_leaves((args, kwargs))
            for value in used:
                layers = self.owners.get(id(value))
                if layers and not _called_by_forward_of(layers):
                    name = self.names[layers[0]]
                    parent = self.model.get_submodule(name.rpartition(".")[0])
                    raise ValueError(bypass_message(name, parent))
        return result


def _called_by_forward_of(layers: Collection[MaskedLayer]) -> bool:
    frame = sys._getframe(2)
    while frame is not None:
        masked = frame.f_code.co_name in ("forward", "computed")
        caller = frame.f_locals.get("self") if masked else None
        if any(caller is layer for layer in layers):
            return True
        frame = frame.f_back
    return False


@dataclass(frozen=True)
class _InSomeLayers(Selection):
    """Labels for ``layers``, and no row for the others."""

    layers: Collection[MaskedLayer] = ()

    def expand(self, batch: int, device: torch.device, num_classes: int) -> Tensor:
        rows = super().expand(batch, device, num_classes)
        return rows if _called_by_forward_of(self.layers) else torch.full_like(rows, -1)


@torch.no_grad()
def check_labels_stay_in_samples(
    model: nn.Module, masked_layers: dict[str, MaskedLayer], images: Tensor
) -> None:
    """Raises if the label of one sample changes another one's logits.

    A linear map that is given tokens before samples, ``[T, B, C]``, would take tokens for samples
    where T is a multiple of B. A label out of range makes a sample NaN: half of the samples get it,
    then the other half, and the rest must stay as they are.

    Args:
        model: without other masked layers.
        masked_layers: by name.
        images: ``[B, C, H, W]``, at least two.

    Raises:
        ValueError: the first such layer is named.
    """
    kinds = nn.Linear, nn.MultiheadAttention  # convolutions have samples first
    linear = {name: m for name, m in masked_layers.items() if isinstance(m, kinds)}
    if not linear:
        return
    layers = list(masked_layers.values())
    first = torch.arange(len(images), device=images.device) < len(images) // 2
    chosen = [layer.backend for layer in layers]

    def logits(half: Tensor, poisoned: Collection[MaskedLayer]) -> Tensor:
        rows = torch.where(half, layers[0].num_classes, -1)[:, None]
        with forgetting(_InSomeLayers(rows, layers=poisoned)):
            return first_output(model(images))

    def crosses(*poisoned: MaskedLayer) -> bool:
        pairs = [(logits(half, poisoned)[~half], plain[~half]) for half in (first, ~first)]
        return not all(torch.allclose(*pair, 1e-3, span, equal_nan=True) for pair in pairs)

    try:
        for layer in layers:
            layer.backend = "eager"  # the reference takes no label out of range
        plain = logits(first, ())
        span = 1e-3 * plain.abs().max().item()
        if crosses(*linear.values()):
            name = next((name for name, layer in linear.items() if crosses(layer)), None)
            raise ValueError(
                f"layer {name!r} cannot be masked: the forget label of a sample changes the logits "
                "of others, as where tokens come before samples ([T, B, C]); make the network with "
                "batch_first=True, or transpose in front of this layer and behind it, or leave it "
                "out of targets="
            )
    finally:
        for layer, backend in zip(layers, chosen, strict=True):
            layer.backend = backend


def uses_weight_directly(parent: nn.Module, child: str) -> bool:
    """Whether the parent's forward, or a method it calls, computes with ``self.<child>.weight``."""
    harmless = r"(?!\.(dtype|device|shape|size|ndim|dim|requires_grad)\b)"
    use = re.compile(
        rf"(?<!_like\()(?<!type_as\()\bself\.{re.escape(child)}\.(in_proj_)?weight\b{harmless}"
    )
    pending, seen = ["forward"], set()
    while pending:
        name = pending.pop()
        seen.add(name)
        try:
            source = inspect.getsource(getattr(type(parent), name))
        except (OSError, TypeError):
            continue
        if use.search(source):
            return True
        pending += {
            called
            for called in re.findall(r"\bself\.(\w+)\(", source)
            if inspect.isfunction(getattr(type(parent), called, None))
        } - seen
    return False


def bypass_message(name: str, parent: nn.Module) -> str:
    return (
        f"layer {name!r} cannot be masked: the model (its parent is a {type(parent).__name__}) "
        "computes with the layer's weight without calling the layer (a fused F.linear, for "
        "example), which would bypass the mask; use an implementation that calls the layer, or "
        "leave it out of targets="
    )
