"""Which layers a network masks: named by the user, or linear maps of blocks or convolutions."""

import fnmatch
import math
import re
from collections.abc import Collection, Sequence

from torch import nn

from wfnet.attention_layers import DirectLinear
from wfnet.bypass import bypass_message, uses_weight_directly
from wfnet.durable_layers import DurableBatchNorm2d, durable_type
from wfnet.fusion.trace import execution_order
from wfnet.head import head_modules
from wfnet.layers import LayerNames, MaskedLayer, WFLinear, masked_type, refuse_layer

# More than these crowd the channels that durable gates close.
MANY_CLASSES = 30

Targets = str | type | Sequence[str | type] | None
MaskFrom = str | int | float | None

# Last part of the name of a query, key or value projection in the transformers of timm,
# torchvision and transformers.
_QKV_NAME = re.compile(r"(to_)?(qkv|kv|q|k|v)(_proj)?|query|key|value")
# And of the other linear maps of a transformer's block.
_BLOCK_LINEAR = re.compile(_QKV_NAME.pattern + r"|proj|o_proj|out_proj|fc1|fc2|dense")
_NUMBERED = re.compile(r"(.*\.)?mlp\.\d+")  # torchvision's fc1 and fc2
# A block's name ends with its number: blocks.0 of blocks.0.attn.qkv.
_BLOCK = re.compile(r"(.*\.)?\d+(?=\.)")
# A stage's name ends with the first part that is numbered: layer3 of layer3.0.conv1, blocks.0.
_STAGE = re.compile(r"([^.\d]+\.)*[^.]*\d[^.]*")
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
    mask_from: MaskFrom = None,
) -> list[str]:
    """Names of the layers to mask, in the order of the network.

    Args:
        model: the classifier.
        targets: names, shell-style patterns or layer types, or a list of them; None: of a
            transformer the linear maps of its blocks (``attn.qkv``, ``attn.proj``, ``mlp.fc1``,
            ``mlp.fc2``), else all convolutions, but never the head. "qkv" is the paper's setting.
        num_classes: outputs of the head, by which it is told from other layers.
        durable: layers with gates behind them: every BatchNorm (with more than 30 classes the last
            third of them: a stage of most networks), else as without. Patterns choose among these.
        mask_from: of all these only those in the last stages (:func:`last_stages`).

    Raises:
        TypeError, ValueError: for targets that are none of these, that match nothing, or that name
            a layer which cannot be masked correctly; for another ``mask_from``.
    """
    heads = head_modules(model, num_classes)
    modules = {name: m for name, m in model.named_modules() if name}
    # A patch embedding by another name: MLP-Mixer's stem.
    stems = tuple(f"{name}." for name, m in modules.items() if "PatchEmbed" in type(m).__name__)
    inner = {
        name: m
        for name, m in modules.items()
        if m not in heads
        and not _NOT_BY_DEFAULT & set(name.split("."))
        and not (stems and name.startswith(stems))
    }
    if durable:
        layers = {n: m for n, m in modules.items() if m not in heads and durable_type(m)}
        patterns = _durable_layers({n: m for n, m in inner.items() if n in layers})
        listed = f"its layers that can have durable gates are: {_some(list(layers))}"
    else:
        layers = patterns = modules
        names = [name for name, m in modules.items() if masked_type(m) is not None]
        listed = f"its maskable layers are: {_some(names)}"
    kind = type(model).__name__
    if targets is None:
        if not durable and any(isinstance(m, MaskedLayer) for m in modules.values()):
            return []
        if durable:
            names = _usual({name: inner[name] for name in patterns}) or _usual_norms(
                patterns, num_classes
            )
        else:
            names = _usual(inner)
        if not names:
            raise ValueError(f"{kind} has no convolution and no linear map of a block; {listed}")
    else:
        names = _named(kind, targets, layers, patterns, durable, listed)
    names = last_stages(model, names, mask_from)
    ordered = [name for name in modules if name in names]
    if not durable:
        for name in ordered:
            _check_target(model, name)
    return ordered


def stages_of(model: nn.Module, names: Collection[str]) -> dict[str, list[str]]:
    """Layers by stage, in the order in which they run.

    A stage is named by the first part of a layer's name that has a number: ``layer3``,
    ``blocks.11``, ``features.denseblock4``; a layer without one is a stage of its own
    (``conv_head``).
    """
    found: dict[str, list[str]] = {}
    for name in execution_order(model, [n for n, _ in model.named_modules() if n in names]):
        stage = _STAGE.match(name)
        found.setdefault(stage[0] if stage else name, []).append(name)
    return found


def last_stages(model: nn.Module, names: Collection[str], mask_from: MaskFrom) -> set[str]:
    """Those of the layers ``names`` that lie late in the network.

    Args:
        mask_from: a module (``"layer3"``): what lies in it and what runs behind; a whole number:
            the last so many stages (:func:`stages_of`); a number below 1: that part of the stages,
            rounded, at least one; None or "all": all. Numbers may be text.

    Raises:
        ValueError: for a module that holds none of the layers, or more stages than there are.
    """
    if mask_from is None or mask_from == "all":
        return set(names)
    stages = stages_of(model, names)
    ordered = [name for stage in stages.values() for name in stage]
    known = f"its stages are {_some([*stages], 16)}"
    try:
        count = float(mask_from)
    except ValueError:
        for place, name in enumerate(ordered):
            if name == mask_from or name.startswith(f"{mask_from}."):
                return set(ordered[place:])
        raise ValueError(f"mask_from: no masked layer lies in {mask_from!r}; {known}") from None
    if 0 < count < 1:
        count = max(1, round(count * len(stages)))
    if count not in range(1, len(stages) + 1):
        raise ValueError(f"mask_from={mask_from} is no number of the {len(stages)} stages; {known}")
    return {name for stage in [*stages][-int(count) :] for name in stages[stage]}


def _named(
    kind: str,
    targets: str | type | Sequence[str | type],
    layers: dict[str, nn.Module],
    patterns: Collection[str],
    durable: bool,
    listed: str,
) -> set[str]:
    """Names of the layers that the user's targets match, each at least one."""
    if not isinstance(targets, str | type | Sequence):
        raise TypeError(
            f"targets is a name, a pattern, a layer type or a list of them; got {targets!r}"
        )
    if isinstance(targets, str | type):
        targets = [targets]
    if not targets:
        raise ValueError(f"targets is empty, so nothing of {kind} is masked; {listed}")
    exact = isinstance(targets, LayerNames)
    names: set[str] = set()
    for target in targets:
        if isinstance(target, type):
            found = [name for name, m in layers.items() if isinstance(m, target)]
        elif not isinstance(target, str):
            raise TypeError(f"a target is a name, a pattern or a layer type; got {target!r}")
        elif exact or (durable and target in layers):
            found = [target] if target in layers else []
        else:
            found = [name for name in patterns if _matches(name, target)]
            if any(c in target for c in "*?["):
                # what is no layer to mask is passed over, a convolution that cannot be is not
                found = [name for name in found if durable or _is_layer(layers[name])]
        if not found:
            raise ValueError(f"target {target!r} matches no layer of {kind}; {listed}")
        if exact:  # a checkpoint also names the WF layers that its model came with
            found = [name for name in found if not isinstance(layers[name], MaskedLayer)]
        names.update(found)
    return names


def _usual(inner: dict[str, nn.Module]) -> set[str]:
    """All linear maps of a transformer's blocks, else all convolutions."""
    qkv = _linear_maps(inner, _QKV_NAME)
    # The residual stream goes past qkv alone: all linear maps of the blocks take part.
    blocks = {_block(name) for name in qkv}
    linear = [name for name, m in inner.items() if isinstance(m, nn.Linear)]
    usual = {*_linear_maps(inner, _BLOCK_LINEAR), *filter(_NUMBERED.fullmatch, linear)}
    chosen = {name for name in usual if _block(name) in blocks}
    packed = {name for name, m in inner.items() if isinstance(m, nn.MultiheadAttention)}
    around = tuple(name.rpartition(".")[0] + "." for name in packed)  # their blocks
    chosen |= packed | {name for name in linear if name.startswith(around)}
    return chosen or {name for name, m in inner.items() if isinstance(m, nn.Conv2d)}


def _durable_layers(inner: dict[str, nn.Module]) -> list[str]:
    """BatchNorms, else a transformer's linear maps, else convolutions."""
    norms = [n for n, m in inner.items() if issubclass(durable_type(m), DurableBatchNorm2d)]
    convolutions = [name for name, m in inner.items() if isinstance(m, nn.Conv2d)]
    return norms or _linear_maps(inner, _BLOCK_LINEAR) or convolutions


def _usual_norms(norms: list[str], num_classes: int | None) -> set[str]:
    """All BatchNorms; many classes crowd the early ones, which hold what all of them need."""
    many = num_classes is not None and num_classes > MANY_CLASSES
    return set(norms[-math.ceil(len(norms) / 3) :] if many else norms)


def _is_layer(m: nn.Module) -> bool:
    if isinstance(m, MaskedLayer):
        return False
    return isinstance(m, nn.Conv2d | nn.Linear) or masked_type(m) is not None


def _matches(name: str, target: str) -> bool:
    """A full name, a suffix of whole parts (as PEFT's target_modules), or a shell-style pattern."""
    return name == target or name.endswith(f".{target}") or fnmatch.fnmatchcase(name, target)


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
    if layer_type(model, name) is None:
        raise ValueError(bypass_message(name, model.get_submodule(name.rpartition(".")[0])))


def layer_type(model: nn.Module, name: str, durable: bool = False) -> type[MaskedLayer] | None:
    """The class that masks a layer of ``model``; None where its parent would bypass the mask."""
    layer = model.get_submodule(name)
    if durable:
        return durable_type(layer)
    found = masked_type(layer)
    if not uses_weight_directly(model.get_submodule(name.rpartition(".")[0]), _last(name)):
        return found
    return DirectLinear if found is WFLinear else None


def _some(names: list[str], limit: int = 8) -> str:
    if not names:
        return "none"
    more = f", ... ({len(names)} in all)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
