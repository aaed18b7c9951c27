"""WFNet: a frozen classifier whose convolutions or qkv projections are masked layers."""

from __future__ import annotations

import copy
import fnmatch
import inspect
import logging
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from numbers import Integral

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from wfnet import backends, fusion, pretrained
from wfnet.backends import winners
from wfnet.gates import gather_samples
from wfnet.labels import (
    DeferredLabelCheck,
    ForgetLabels,
    Selection,
    check_range,
    forgetting,
    labels_in_checkpoints,
    select,
)
from wfnet.layers import LayerNames, MaskedLayer, masked_type, refuse_layer

logger = logging.getLogger("wfnet")

# Logit of a class whose row was cut from the head: far below what classifiers give.
CUT_LOGIT = -30.0

Targets = str | type | Sequence[str | type] | None

# Last part of the name of a query, key or value projection in the transformers of timm,
# torchvision and transformers.
_QKV_NAME = re.compile(r"(to_)?(qkv|kv|q|k|v)(_proj)?|query|key|value")
# Never masked by default: patch embeddings, and what prepares features for the head (timm's VGG).
_NOT_BY_DEFAULT = {"patch_embed", "conv_proj", "pre_logits"}


class WFNet(nn.Module):
    """A frozen classifier with filter matrices: one network that can forget any class on demand.

    The model is copied, frozen and kept in evaluation mode; only filter matrices can be trained.
    Module tree and state-dict keys of the model stay as they are, below ``model.``.

    Args:
        model: any classifier. If it already contains WF layers, they are used as they are.
        num_classes: classes of the classifier, and rows of every filter matrix.
        targets: layers to mask: module names, shell-style patterns or layer types (or a list of
            them). By default the qkv projections if the model has any, else all convolutions;
            never the head, ``pre_logits`` or the patch embedding.
        alpha_init, normalize_gate, filter_dtype: see :class:`wfnet.WFConv2d`.
        backend: backend of all masked layers.
        fuse: True: fold each convolution with its BatchNorm, residual sum and ReLU and run the
            network as one autograd node (:mod:`wfnet.fusion`). A transformer keeps its own
            operations: what comes before the first mask (patch embedding, positions, first norm)
            runs once per source image, and on a CUDA device the rest is compiled. "compile": the
            same with ``torch.compile`` of what lies between the convolutions (backend eager;
            kernels of the others leave nothing between them), or of a transformer's rest on any
            device; every size of a batch is compiled once. The result is compared with the unfused
            network once; where fusing is not possible, the network runs unfused, with a line in
            the log. Can be set later: ``net.fuse = True``.

    Raises:
        ValueError: if nothing can be masked, a target does not exist, a layer cannot be masked
            correctly, or ``num_classes`` does not match the head. The message names the layer. Also
            for another ``fuse``.

    Example::

        net = wfnet.WFNet(timm.create_model("resnet18", pretrained=True), num_classes=1000)
        logits = net(images, forget=labels)
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        targets: Targets = None,
        alpha_init: float = 3.0,
        normalize_gate: bool = True,
        backend: str = "auto",
        filter_dtype: torch.dtype | None = None,
        fuse: bool | str = False,
    ):
        super().__init__()
        if isinstance(model, WFNet):
            raise ValueError("model is a WFNet already; pass the original classifier")
        _check_initialized(model)
        _check_head(model, num_classes)
        self.num_classes = num_classes = int(num_classes)
        self.alpha_init = float(alpha_init)
        self.normalize_gate = normalize_gate
        chosen = _choose_targets(model, targets)
        self.model = copy.deepcopy(model).requires_grad_(False)
        self._check_masked_before()
        for name in chosen:
            layer = self.model.get_submodule(name)
            try:
                masked = masked_type(layer).adopt(
                    layer,
                    num_classes,
                    alpha_init=alpha_init,
                    normalize_gate=normalize_gate,
                    backend=backend,
                    filter_dtype=filter_dtype,
                )
            except ValueError as error:
                raise ValueError(f"layer {name!r} cannot be masked: {error}") from error
            _replace(self.model, layer, masked)
        self.masked_layers: dict[str, MaskedLayer] = {}
        for name, layer in self.model.named_modules():
            if isinstance(layer, MaskedLayer):
                layer.layer_name = name
                self.masked_layers[name] = layer
                for parameter in layer.named_filters().values():
                    parameter.requires_grad_(True)
                if layer.num_classes != num_classes:
                    raise ValueError(
                        f"layer {name!r} has filters for {layer.num_classes} classes, but "
                        f"num_classes={num_classes}"
                    )
        self._all_called = False
        _check_fuse(fuse)
        self.fuse = fuse
        # (what it was made for, the fused network or None); a plan holds references, not weights
        self._fusion: tuple[object, fusion.FusedNetwork | None] | None = None
        self._label_check = DeferredLabelCheck()
        self.train()

    # -- running ----------------------------------------------------------------------------------

    def forward(
        self, images: Tensor, forget: ForgetLabels | Selection = None, source: Tensor | None = None
    ) -> Tensor:
        """Logits of the network as if it had never known the classes in ``forget``.

        Args:
            images: ``[N, C, H, W]``.
            forget: int (all samples), LongTensor ``[B]`` or ``[B, J]`` (several classes at once,
                padded with -1), or None for the original network. -1 selects no row.
            source: LongTensor ``[B]``: sample ``b`` is ``images[source[b]]`` under ``forget[b]``,
                for batches in which an image occurs under several labels.

        Returns:
            ``[B, num_classes]``.

        Raises:
            TypeError, ValueError: for labels that do not fit. Labels on a device are checked
                without a synchronisation: a wrong one gives NaN, and an error at a later call or
                at :meth:`check_labels`.
        """
        if getattr(self, "_is_replica", False):
            raise RuntimeError(
                "torch.nn.DataParallel splits neither forget labels nor filters correctly; "
                "use DistributedDataParallel"
            )
        selection = select(forget)
        if torch.compiler.is_compiling():
            if isinstance(forget, int):
                check_range(forget, forget, self.num_classes)
            with forgetting(selection):
                return self.model(_expand(images, source))
        self._check(selection, images.shape[0] if source is None else source.shape[0])
        if self.fuse and selection.rows is not None and not images.requires_grad:
            network = self.fused_network(images)
            if network is not None:
                batch = images.shape[0] if source is None else source.shape[0]
                rows = selection.expand(batch, images.device, self.num_classes)
                return network(images, rows, source if source is None else source.to(images.device))
        return self._unfused(images, selection, source)

    def _unfused(
        self, images: Tensor, selection: Selection, source: Tensor | None = None
    ) -> Tensor:
        checkpoints = labels_in_checkpoints() if torch.is_grad_enabled() else nullcontext()
        first = nullcontext() if self._all_called else self._watching_calls()
        with forgetting(selection), checkpoints, first:
            return self.model(_expand(images, source))

    def fused_network(self, images: Tensor) -> fusion.FusedNetwork | None:
        """The fused network, made and checked on first use with two of ``images``.

        None where it cannot be made, and without ``fuse``.
        """
        if not self.fuse:
            return None
        key = (
            self.fuse,
            images.device,
            images.dtype,
            *(layer.backend for layer in self.masked_layers.values()),
        )
        if self._fusion is None or self._fusion[0] != key:
            self._fusion = (key, self._make_fused(images))
        return self._fusion[1]

    def _make_fused(self, images: Tensor) -> fusion.FusedNetwork | None:
        _check_fuse(self.fuse)  # it can be set at any time
        name = type(self.model).__name__
        try:
            if any(isinstance(layer, nn.Conv2d) for layer in self.masked_layers.values()):
                network = self._make_plan(images)
            else:
                network = self._make_trunk(images)
        except fusion.NotFusable as reason:
            logger.warning("%s runs unfused: %s", name, reason)
            return None
        logger.info("%s: %s", name, network.describe())
        return network

    def _make_plan(self, images: Tensor) -> fusion.PlanNetwork:
        backend = fusion.backend_for(self.masked_layers.values())
        if backend is None:
            winners.know(images.device)  # a table that cannot be read is no reason to run unfused
        if self.fuse == "compile" and backend is None:
            backend = backends.get("eager")  # the one that has a graph to compile
        network = fusion.PlanNetwork(fusion.make_plan(self.model, images[:2]), backend)
        self._check_fused(network, images)
        if self.fuse != "compile" or backend is not backends.get("eager"):
            return network
        if network.plan.masked_calls:
            logger.warning(
                "%s runs uncompiled: some of its masked layers do not fold",
                type(self.model).__name__,
            )
            return network
        return fusion.CompiledNetwork(network)

    def _make_trunk(self, images: Tensor) -> fusion.TrunkNetwork:
        parts = fusion.split_at_first_mask(self.model, images[:2])
        network = fusion.TrunkNetwork(*parts, compiled=False)
        self._check_fused(network, images)
        if self.fuse == "compile" or images.device.type == "cuda":
            return fusion.TrunkNetwork(*parts, compiled=True)
        return network

    def _check_fused(self, network: fusion.FusedNetwork, images: Tensor) -> None:
        fusion.check_plan(
            network,
            lambda few, rows: self._unfused(few, select(rows)),
            images,
            self.num_classes,
        )

    def __deepcopy__(self, memo: dict) -> WFNet:
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        state = {key: value for key, value in self.__dict__.items() if key != "_fusion"}
        copied.__dict__ = {**copy.deepcopy(state, memo), "_fusion": None}
        return copied

    def check_labels(self) -> None:
        """Waits for the range checks of labels that were given on a device.

        Raises:
            ValueError: if one of them was out of range.
        """
        self._label_check.wait()

    def _check(self, selection: Selection, batch: int) -> None:
        if selection.rows is None:
            return
        check_range(selection.low, selection.high, self.num_classes)
        if not selection.uniform and selection.rows.shape[0] != batch:
            raise ValueError(
                f"{selection.rows.shape[0]} forget labels were given for a batch of "
                f"{batch} samples; give one label per sample, or one integer for all"
            )
        self._label_check.poll()
        self._label_check.submit(selection.rows, self.num_classes)

    @contextmanager
    def _watching_calls(self) -> Iterator[None]:
        """On the first forward pass, refuses whoever computes with a masked layer's weight itself.

        ``F.linear(x, self.qkv.weight)`` in a parent, for example, would bypass the mask in silence.
        """
        dynamo = sys.modules.get("torch._dynamo")  # compiled parts run eagerly while watched
        stance = nullcontext() if dynamo is None else torch.compiler.set_stance("force_eager")
        with stance, _WeightWatch(self.model, self.masked_layers):
            yield
        self._all_called = True

    def _check_masked_before(self) -> None:
        """WF layers that came with the model must have the settings that a checkpoint records."""
        for name, layer in self.model.named_modules():
            if isinstance(layer, MaskedLayer) and (
                layer.alpha_init != self.alpha_init or layer.normalize_gate != self.normalize_gate
            ):
                raise ValueError(
                    f"layer {name!r} was made with alpha_init={layer.alpha_init}, "
                    f"normalize_gate={layer.normalize_gate}, but the network with alpha_init="
                    f"{self.alpha_init}, normalize_gate={self.normalize_gate}; give WFNet the same"
                )

    def train(self, mode: bool = True) -> WFNet:
        """Sets training mode of the filters; the frozen base always stays in evaluation mode."""
        super().train(mode)
        self.model.eval()
        return self

    # -- filters ----------------------------------------------------------------------------------

    def named_filters(self) -> dict[str, nn.Parameter]:
        """Filter matrices ``[num_classes, out_channels]`` by name, in the order of the network."""
        return {
            f"{name}.{kind}": parameter
            for name, layer in self.masked_layers.items()
            for kind, parameter in layer.named_filters().items()
        }

    def filter_parameters(self) -> list[nn.Parameter]:
        """The trainable parameters, for any optimiser."""
        return list(self.named_filters().values())

    def gates(self) -> dict[str, Tensor]:
        """Gates ``[num_classes, out_channels]`` per filter matrix, in the order of the network."""
        return {
            f"{name}.{kind}": layer.gates(kind.removeprefix("alpha_"))
            for name, layer in self.masked_layers.items()
            for kind in layer.named_filters()
        }

    # -- export and storage -----------------------------------------------------------------------

    def bake(
        self,
        forget: int | Sequence[int] | None,
        prune_below: float = 0.0,
        cut_output: bool = False,
    ) -> nn.Module:
        """A plain model of the original class with the gates of ``forget`` multiplied in.

        Args:
            forget: one label, several (their gates are multiplied), or None for the original.
            prune_below: gates below this become exactly 0, so that what they scaled cannot be
                read out of the export by scaling it back; nothing is pruned by default.
            cut_output: also cut the classes of ``forget`` from the head, ``head.weight[c] = 0``
                and ``head.bias[c] = CUT_LOGIT``. Re-estimated BatchNorm statistics, rescaled rows
                and fine-tuning on the other classes then find nothing to bring back at the
                output. The logits of these classes are a constant, in which the export differs
                from a model retrained without them. It can be undone: what features hold stays,
                so whoever has images of a class can teach it again, a constant added to its logit
                makes it the answer where no other class fits, and the base has the row.

        Returns:
            A copy in evaluation mode, without filters; all its parameters can be trained again.
            Without pruning it equals the filtered network within rounding, but for cut logits.

        Raises:
            TypeError, ValueError: for labels that do not fit, a threshold that is negative or not
                finite, or ``cut_output`` without a class to cut, a linear head or its bias.
        """
        if not 0 <= prune_below < math.inf:
            raise ValueError(
                f"prune_below={prune_below} must be a finite number of at least 0: gates below it "
                "become 0 (0.05, for example; 0 prunes nothing)"
            )
        labels = _label_list(forget)
        if labels:
            check_range(min(labels), max(labels), self.num_classes)
        labels = [label for label in labels if label != -1]
        plain = _copy_without_filters(self.model)
        for name, layer in self.masked_layers.items():
            baked = layer.bake(labels, prune_below)
            if name:
                _replace(plain, layer, baked)
            else:
                plain = baked
        if cut_output:
            _cut_from_head(plain, labels, self.num_classes)
        return plain.requires_grad_(True).eval()

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes ``wf_config.json`` and ``wf_model.safetensors``: the filters, not the base.

        Files are written beside their place and moved in, so that an interrupted save loses
        nothing that was there.
        """
        pretrained.save_filters(self, folder)

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike, base_model: nn.Module, backend: str = "auto"
    ) -> WFNet:
        """Wraps ``base_model`` and loads the filters that :meth:`save_pretrained` wrote.

        Raises:
            FileNotFoundError: if ``folder`` holds no such files.
            ValueError: if the files are damaged or of another format, or ``base_model`` is not
                the one that the filters were trained on.
        """
        return pretrained.load_filters(cls, folder, base_model, backend)


def _check_fuse(fuse: object) -> None:
    if fuse not in (True, False, "compile"):
        raise ValueError(f"fuse={fuse!r} is none of True, False and 'compile'")


def _expand(images: Tensor, source: Tensor | None) -> Tensor:
    return images if source is None else gather_samples(images, source.to(images.device))


def _label_list(forget: int | Sequence[int] | Tensor | None) -> list[int]:
    if forget is None:
        return []
    if isinstance(forget, Tensor):
        forget = forget.tolist()
    labels = list(forget) if isinstance(forget, Sequence) else [forget]
    for label in labels:
        if isinstance(label, bool) or not isinstance(label, Integral):
            raise TypeError(f"forget must be one integer label or several; got {label!r}")
    return [int(label) for label in labels]


def _cut_from_head(plain: nn.Module, labels: list[int], num_classes: int) -> None:
    """Makes the logits of ``labels`` the constant ``CUT_LOGIT``, whatever the features are."""
    if not labels:
        raise ValueError(
            "cut_output=True has no class to cut from the head: name one in forget=, or leave "
            "cut_output out"
        )
    found = find_head(plain)
    name, head = found or ("", None)
    several = getattr(plain, "get_classifier", lambda: None)()
    if head is None:
        reason = "has none"
    elif isinstance(several, tuple | list) and len(several) > 1:
        reason = f"has {len(several)} heads"
    elif not isinstance(head, nn.Linear):
        reason = f"has the {type(head).__name__} {name!r}"
    elif head.out_features != num_classes:
        reason = f"ends in {name!r}, with {head.out_features} outputs for {num_classes} classes"
    elif head._parameters.get("bias") is None:
        reason = f"has {name!r}, which has no bias to hold the constant"
    elif "weight" not in head._parameters:
        reason = f"computes the weight of {name!r} from other parameters"
    else:
        with torch.no_grad():
            head.weight[labels] = 0.0
            head.bias[labels] = CUT_LOGIT
        return
    raise ValueError(
        f"cut_output=True needs one linear head with a bias, but {type(plain).__name__} {reason}; "
        "leave it out (prune_below= closes gates in any network)"
    )


def _copy_without_filters(model: nn.Module) -> nn.Module:
    """A deep copy in which masked layers are left shared: they are about to be replaced."""
    memo = {id(m): m for m in model.modules() if isinstance(m, MaskedLayer)}
    return copy.deepcopy(model, memo)


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts ``new`` under every name that ``old`` has in ``model``: a layer may be used twice."""
    for parent in list(model.modules()):
        for child, module in parent._modules.items():
            if module is old:
                parent._modules[child] = new


class _WeightWatch(TorchFunctionMode):
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
            for parameter in (layer.weight, layer.bias):
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
                    raise ValueError(_bypass_message(name, parent))
        return result


def _called_by_forward_of(layers: list[MaskedLayer]) -> bool:
    frame = sys._getframe(2)
    while frame is not None:
        caller = frame.f_locals.get("self") if frame.f_code.co_name == "forward" else None
        if any(caller is layer for layer in layers):
            return True
        frame = frame.f_back
    return False


# -- choice of layers -----------------------------------------------------------------------------


def find_head(model: nn.Module) -> tuple[str, nn.Module] | None:
    """Name and module of the classifier's last linear map or convolution; None if there is none.

    timm models say which it is; elsewhere it is the last such module in registration order.
    """
    modules = {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear | nn.Conv2d) and not isinstance(m, MaskedLayer)
    }
    get_classifier = getattr(model, "get_classifier", None)
    if callable(get_classifier):
        classifier = get_classifier()
        heads = classifier if isinstance(classifier, tuple | list) else [classifier]
        for head in heads:
            inside = set(head.modules()) if isinstance(head, nn.Module) else set()
            for name, m in reversed(modules.items()):
                if m in inside:
                    return name, m
    return next(reversed(modules.items()), None)


def _head_modules(model: nn.Module) -> set[nn.Module]:
    """Every module that is part of the classifier's head."""
    found = find_head(model)
    heads = set() if found is None else {found[1]}
    get_classifier = getattr(model, "get_classifier", None)
    if callable(get_classifier):
        classifier = get_classifier()
        for head in classifier if isinstance(classifier, tuple | list) else [classifier]:
            heads |= set(head.modules()) if isinstance(head, nn.Module) else set()
    return heads


def _check_initialized(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.UninitializedParameter):
            raise ValueError(
                f"parameter {name!r} is lazy and has no shape yet; run the model once before "
                "wrapping it"
            )


def _check_head(model: nn.Module, num_classes: int) -> None:
    if isinstance(num_classes, bool) or not isinstance(num_classes, Integral) or num_classes < 2:
        raise ValueError(
            f"num_classes must be an integer of at least 2 (one class to forget, one to retain); "
            f"got {num_classes!r}"
        )
    found = find_head(model)
    if found is None:
        return
    name, head = found
    size = head.weight.shape[0]
    if size != num_classes:
        raise ValueError(
            f"num_classes={num_classes} does not match the model's head {name!r}, which has "
            f"{size} outputs; pass num_classes={size}"
        )


def _choose_targets(model: nn.Module, targets: Targets) -> list[str]:
    """Names of the layers to mask, in the order of the network."""
    if targets is None:
        return _default_targets(model)
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


def _find(model: nn.Module, name: str) -> nn.Module | None:
    return dict(model.named_modules()).get(name)


def _is_layer(m: nn.Module) -> bool:
    if isinstance(m, MaskedLayer):
        return False
    return isinstance(m, nn.Conv2d | nn.Linear) or masked_type(m) is not None


def _matches(name: str, target: str) -> bool:
    """A full name, a suffix of whole parts (as PEFT's target_modules), or a shell-style pattern."""
    return name == target or name.endswith(f".{target}") or fnmatch.fnmatchcase(name, target)


def _default_targets(model: nn.Module) -> list[str]:
    if any(isinstance(m, MaskedLayer) for m in model.modules()):
        return []
    heads = _head_modules(model)
    candidates = {
        name: m
        for name, m in model.named_modules()
        if name and m not in heads and not _NOT_BY_DEFAULT & set(name.split("."))
    }
    for name, m in model.named_modules():  # a patch embedding by another name (MLP-Mixer's stem)
        if "PatchEmbed" in type(m).__name__:
            candidates = {n: c for n, c in candidates.items() if not n.startswith(f"{name}.")}
    qkv = [
        name
        for name, m in candidates.items()
        if isinstance(m, nn.Linear) and _QKV_NAME.fullmatch(name.rpartition(".")[2])
    ]
    attention = [n for n, m in candidates.items() if isinstance(m, nn.MultiheadAttention)]
    if not qkv and attention:
        raise ValueError(
            f"the qkv projection of {attention[0]!r} (nn.MultiheadAttention) is not a module of "
            "its own, so it cannot be masked; use an implementation with a qkv linear layer "
            "(timm's, for example), or name other layers in targets="
        )
    chosen = qkv or [name for name, m in candidates.items() if isinstance(m, nn.Conv2d)]
    if not chosen:
        raise ValueError(
            f"{type(model).__name__} has no convolution and no qkv projection that could be "
            f"masked; name layers in targets=, for example one of: {_some(_maskable_names(model))}"
        )
    for name in chosen:
        _check_target(model, name)
    return chosen


def _check_target(model: nn.Module, name: str) -> None:
    layer = model.get_submodule(name)
    if isinstance(layer, MaskedLayer):
        raise ValueError(f"layer {name!r} is masked already; leave it out of targets")
    if masked_type(layer) is None:
        raise ValueError(refuse_layer(layer, name))
    parent = model.get_submodule(name.rpartition(".")[0])
    if _uses_weight_directly(parent, name.rpartition(".")[2]):
        raise ValueError(_bypass_message(name, parent))


def _uses_weight_directly(parent: nn.Module, child: str) -> bool:
    """Whether the parent's forward, or a method it calls, computes with ``self.<child>.weight``."""
    harmless = r"(?!\.(dtype|device|shape|size|ndim|dim|requires_grad)\b)"
    use = re.compile(rf"(?<!_like\()(?<!type_as\()\bself\.{re.escape(child)}\.weight\b{harmless}")
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


def _bypass_message(name: str, parent: nn.Module) -> str:
    return (
        f"layer {name!r} cannot be masked: the model (its parent is a {type(parent).__name__}) "
        "computes with the layer's weight without calling the layer (a fused F.linear, for "
        "example), which would bypass the mask; use an implementation that calls the layer, or "
        "leave it out of targets="
    )


def _maskable_names(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if name and masked_type(m) is not None]


def _some(names: list[str], limit: int = 8) -> str:
    if not names:
        return "none"
    more = f", ... ({len(names)} in all)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
