"""Which layers a network masks: named by the user, or linear maps of blocks or convolutions."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence

from torch import nn

from wfnet.bypass import bypass_message, uses_weight_directly
from wfnet.durable_layers import DurableBatchNorm2d, durable_type
from wfnet.head import head_modules
from wfnet.layers import LayerNames, MaskedLayer, masked_type, refuse_layer

Targets = str | type | Sequence[str | type] | None

# Last part of the name of a query, key or value projection in the transformers of timm,
# torchvision and transformers.
_QKV_NAME = re.compile(r"(to_)?(qkv|kv|q|k|v)(_proj)?|query|key|value")
# And of the other linear maps of a transformer's block.
_BLOCK_LINEAR = re.compile(_QKV_NAME.pattern + r"|proj|out_proj|fc1|fc2|dense")
# A block's name ends with its number: blocks.0 of blocks.0.attn.qkv.
_BLOCK = re.compile(r"(.*\.)?\d+(?=\.)")
# Never masked by default: patch embeddings, what prepares features for the head (timm's VGG), and
# small networks that compute position biases, whose batch is no batch of images.
_NOT_BY_DEFAULT = {"patch_embed", "conv_proj", "pre_logits", "cpb_mlp", "meta_mlp", "rel_pos"}


def check_samples_are_independent(model: nn.Module) -> None:
    """Raises ValueError for a model in which a sample's logits depend on the rest of its batch.

    BatchNorm without running statistics normalises by its batch in evaluation mode too: the logits
    of a sample would depend on the forget labels of the others.
    """
    for name, module in model.named_modules():
        batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if batch_norm and (module.running_mean is None or module.running_var is None):
            raise ValueError(
                f"layer {name!r} ({type(module).__name__}) keeps no running statistics, so a "
                "sample's logits would depend on the forget labels of the others in its batch: "
                "train the classifier with track_running_stats=True, or replace the layer by "
                "GroupNorm or InstanceNorm"
            )


def choose_targets(
    model: nn.Module,
    targets: Targets = None,
    num_classes: int | None = None,
    durable: bool = False,
) -> list[str]:
    """Names of the layers to mask, in the order of the network.

    Args:
        model: the classifier.
        targets: names, shell-style patterns or layer types, or a list of them; None: of a
            transformer the linear maps of its blocks (``attn.qkv``, ``attn.proj``, ``mlp.fc1``,
            ``mlp.fc2``), else all convolutions, but never the head. "qkv" is the paper's setting.
        num_classes: outputs of the head, by which it is told from other layers.
        durable: layers with gates behind them: every BatchNorm, else ``attn.qkv`` and ``mlp.fc1``
            of a transformer, else all convolutions. Patterns choose among these.

    Raises:
        TypeError, ValueError: for targets that are none of these, that match nothing, or that name
            a layer which cannot be masked correctly.
    """
    if durable:
        return _durable_targets(model, targets, num_classes)
    if targets is None:
        return _default_targets(model, num_classes)
    if not isinstance(targets, str | type | Sequence):
        raise TypeError(
            f"targets is a name, a pattern, a layer type or a list of them; got {targets!r}"
        )
    wanted = [targets] if isinstance(targets, str | type) else list(targets)
    if not wanted:
        raise ValueError(
            f"targets is empty, so nothing would be masked; maskable layers of "
            f"{type(model).__name__} are: {_some(_maskable_names(model))}"
        )
    exact = isinstance(targets, LayerNames)
    if exact:  # a checkpoint also names the WF layers that its model came with
        wanted = [n for n in wanted if not isinstance(_find(model, n), MaskedLayer)]
    names: set[str] = set()
    for target in wanted:
        if not isinstance(target, str | type):
            raise TypeError(f"a target is a name, a pattern or a layer type; got {target!r}")
        found = [
            name
            for name, m in model.named_modules()
            if name
            and (
                isinstance(m, target)
                if isinstance(target, type)
                else name == target or (not exact and _matches(name, target))
            )
        ]
        if isinstance(target, str) and any(c in target for c in "*?["):
            # what is no layer to mask is passed over, a convolution that cannot be masked is not
            found = [n for n in found if _is_layer(model.get_submodule(n))]
        if not found:
            raise ValueError(
                f"target {target!r} matches no layer of {type(model).__name__}; its maskable "
                f"layers are: {_some(_maskable_names(model))}"
            )
        names.update(found)
    ordered = [name for name, _ in model.named_modules() if name in names]
    for name in ordered:
        _check_target(model, name)
    return ordered


def _durable_targets(model: nn.Module, targets: Targets, num_classes: int | None) -> list[str]:
    heads = head_modules(model, num_classes)
    layers = {n: m for n, m in model.named_modules() if n and m not in heads and durable_type(m)}
    inner = {n: m for n, m in layers.items() if not _NOT_BY_DEFAULT & set(n.split("."))}
    norms = [n for n, m in inner.items() if issubclass(durable_type(m), DurableBatchNorm2d)]
    maps = _linear_maps(inner, _BLOCK_LINEAR)
    possible = norms or maps or [n for n, m in inner.items() if isinstance(m, nn.Conv2d)]
    usual = possible
    if not norms and _linear_maps(inner, _QKV_NAME):
        # Gates behind attn.proj and mlp.fc2 too cost more of the other classes.
        usual = [n for n in maps if _QKV_NAME.fullmatch(_last(n)) or _last(n) == "fc1"]
    if targets is None:
        chosen = set(usual)
    else:
        chosen = set()
        for target in [targets] if isinstance(targets, str | type) else targets:
            exact = isinstance(targets, LayerNames)
            if isinstance(target, type):
                found = [n for n, m in layers.items() if isinstance(m, target)]
            elif target in layers:
                found = [target]
            else:
                found = [] if exact else [n for n in possible if _matches(n, target)]
            if not found:
                raise ValueError(
                    f"target {target!r} matches no layer of {type(model).__name__} that can have "
                    f"durable gates; those are: {_some(list(layers))}"
                )
            chosen.update(found)
    if not chosen:
        raise ValueError(
            f"{type(model).__name__} has no BatchNorm, linear map or convolution that could have "
            "durable gates"
        )
    return [name for name in layers if name in chosen]


def _find(model: nn.Module, name: str) -> nn.Module | None:
    return dict(model.named_modules()).get(name)


def _is_layer(m: nn.Module) -> bool:
    if isinstance(m, MaskedLayer):
        return False
    return isinstance(m, nn.Conv2d | nn.Linear) or masked_type(m) is not None


def _matches(name: str, target: str) -> bool:
    """A full name, a suffix of whole parts (as PEFT's target_modules), or a shell-style pattern."""
    return name == target or name.endswith(f".{target}") or fnmatch.fnmatchcase(name, target)


def _default_targets(model: nn.Module, num_classes: int | None = None) -> list[str]:
    if any(isinstance(m, MaskedLayer) for m in model.modules()):
        return []
    heads = head_modules(model, num_classes)
    candidates = {
        name: m
        for name, m in model.named_modules()
        if name and m not in heads and not _NOT_BY_DEFAULT & set(name.split("."))
    }
    for name, m in model.named_modules():  # a patch embedding by another name (MLP-Mixer's stem)
        if "PatchEmbed" in type(m).__name__:
            candidates = {n: c for n, c in candidates.items() if not n.startswith(f"{name}.")}
    qkv = _linear_maps(candidates, _QKV_NAME)
    attention = [n for n, m in candidates.items() if isinstance(m, nn.MultiheadAttention)]
    if not qkv and attention:
        raise ValueError(
            f"the qkv projection of {attention[0]!r} (nn.MultiheadAttention) is not a module of "
            "its own, so it cannot be masked; use an implementation with a qkv linear layer "
            "(timm's, for example), or name other layers in targets="
        )
    # The residual stream goes past qkv alone: all linear maps of the blocks take part.
    blocks = {_block(name) for name in qkv}
    chosen = [n for n in _linear_maps(candidates, _BLOCK_LINEAR) if _block(n) in blocks]
    chosen = chosen or [name for name, m in candidates.items() if isinstance(m, nn.Conv2d)]
    if not chosen:
        raise ValueError(
            f"{type(model).__name__} has no convolution and no qkv projection that could be "
            f"masked; name layers in targets=, for example one of: {_some(_maskable_names(model))}"
        )
    for name in chosen:
        _check_target(model, name)
    return chosen


def _last(name: str) -> str:
    """The last part of a layer's name."""
    return name.rpartition(".")[2]


def _linear_maps(layers: dict[str, nn.Module], pattern: re.Pattern) -> list[str]:
    """Names of the linear layers whose last part is as the pattern says."""
    linear = (name for name, layer in layers.items() if isinstance(layer, nn.Linear))
    return [name for name in linear if pattern.fullmatch(_last(name))]


def _block(name: str) -> str:
    """The name of the block that a layer lies in; of a layer in none, that of its parent."""
    found = _BLOCK.match(name)
    return found.group() if found else name.rpartition(".")[0]


def _check_target(model: nn.Module, name: str) -> None:
    layer = model.get_submodule(name)
    if isinstance(layer, MaskedLayer):
        raise ValueError(f"layer {name!r} is masked already; leave it out of targets")
    if masked_type(layer) is None:
        raise ValueError(refuse_layer(layer, name))
    parent = model.get_submodule(name.rpartition(".")[0])
    if uses_weight_directly(parent, _last(name)):
        raise ValueError(bypass_message(name, parent))


def _maskable_names(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if name and masked_type(m) is not None]


def _some(names: list[str], limit: int = 8) -> str:
    if not names:
        return "none"
    more = f", ... ({len(names)} in all)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
