"""The classifier's head: which layer gives the logits, and how a class is cut from it."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor, nn

from wfnet.layers import MaskedLayer
from wfnet.services.modes import evaluation_mode

# Logit of a class whose row was cut from the head: far below what classifiers give.
CUT_LOGIT = -30.0

# Sides of square images that networks without a recorded input size are tried with.
_SIDES = (224, 32, 28, 64, 8, 16, 48, 96, 128, 256, 299, 384)


def find_head(
    model: nn.Module, num_classes: int | None = None, head: str | None = None
) -> tuple[str, nn.Module] | None:
    """Name and module of the linear map or convolution that gives the logits, as far as it shows.

    Nothing is run. timm's models say which it is; elsewhere it is the last linear map (else
    convolution) with ``num_classes`` outputs in registration order, else the last of any size.
    :func:`head_that_gives_logits` finds it by running the network.

    Args:
        model: the classifier.
        num_classes: its classes, where they are known.
        head: the user's own word for it.

    Returns:
        None if the model has no such layer.
    """
    modules = _linear_layers(model)
    if head is not None:
        if head not in modules:
            raise ValueError(
                f"head={head!r} is no linear map or convolution of {type(model).__name__}; its "
                f"last ones are {', '.join(map(repr, list(modules)[-5:])) or 'none'}"
            )
        return head, modules[head]
    for candidate in _named_by_model(model):
        for name, m in reversed(modules.items()):
            if m is candidate:
                return name, m
    fitting = [
        (name, m)
        for kind in (nn.Linear, nn.Conv2d)
        for name, m in modules.items()
        if isinstance(m, kind) and _outputs(m) == num_classes
    ]
    linear = [item for item in fitting if isinstance(item[1], nn.Linear)]
    if fitting:
        return (linear or fitting)[-1]
    return next(reversed(modules.items()), None)


def head_modules(model: nn.Module, num_classes: int | None = None) -> set[nn.Module]:
    """Every module that is part of the classifier's head."""
    found = find_head(model, num_classes)
    return set(_named_by_model(model)) | (set() if found is None else {found[1]})


def check_head(model: nn.Module, num_classes: int, head: str | None = None) -> None:
    """Refuses a number of classes that the classifier does not have.

    Raises:
        ValueError: if ``num_classes`` is no integer of at least 2 or the head has other outputs.
    """
    if isinstance(num_classes, bool) or not isinstance(num_classes, Integral) or num_classes < 2:
        raise ValueError(
            f"num_classes must be an integer of at least 2 (one class to forget, one to retain); "
            f"got {num_classes!r}"
        )
    kind = type(model).__name__
    named = _named_by_model(model)
    if head is None and named and all(isinstance(m, nn.Identity) for m in named):
        raise ValueError(
            f"{kind} has no classifier, it only computes features (its get_classifier() is an "
            "Identity): make it with its classes and load the weights of its classifier, too, or "
            "name the layer that gives the logits in head="
        )
    found = find_head(model, num_classes, head)
    if found is None or _outputs(found[1]) == num_classes:
        return
    name, size = found[0], _outputs(found[1])
    if size == 1:
        raise ValueError(
            f"num_classes={num_classes} does not match {kind}: its last layer {name!r} has 1 "
            "output. A network with one logit for two classes needs two: replace that layer by one "
            "with 2 outputs, whose first row is 0 and whose second is the old one; then "
            "num_classes=2"
        )
    says = bool(named) or head is not None
    sure = f"its head {name!r}, which has {size} outputs; pass num_classes={size}"
    unsure = (
        f"{kind}: none of its layers has {num_classes} outputs. Its last is {name!r} with {size}: "
        f"pass num_classes={size} if those are its classes, head= to name another layer, or give "
        "the network a classifier first if it only computes features"
    )
    raise ValueError(f"num_classes={num_classes} does not match {sure if says else unsure}")


def head_that_gives_logits(
    model: nn.Module, num_classes: int, head: str | None = None, images: Tensor | None = None
) -> tuple[str, nn.Module]:
    """The layer whose outputs are the network's logits, found by running the network.

    A constant is added to the outputs of every layer with ``num_classes`` outputs in turn. The
    head is the one where exactly that constant is added to what the network returns. So auxiliary
    heads, heads whose outputs are averaged and heads in front of a temperature are told apart.

    Args:
        model: the classifier; its mode and its weights stay as they are.
        num_classes: its classes.
        head: look at this layer alone.
        images: ``[N, C, H, W]`` to run it with; None: random ones of a size that it takes.

    Raises:
        ValueError: if no layer is found, with the layers that were tried.
    """
    kind = type(model).__name__
    if head is not None:
        candidates = [find_head(model, num_classes, head)]
    else:
        candidates = [
            (n, m) for n, m in _linear_layers(model).items() if _outputs(m) == num_classes
        ]
    if not candidates:
        raise ValueError(f"{kind} has no linear layer with {num_classes} outputs")
    with evaluation_mode(model), torch.no_grad():
        if images is None:
            images = example_images(model)
        plain = first_output(model(images))
        check_logits(plain, num_classes, kind)
        added = torch.linspace(1.0, 2.0, num_classes, dtype=plain.dtype, device=plain.device)
        for name, module in reversed(candidates):
            size = (
                [-1 if i == 1 else 1 for i in range(4)] if isinstance(module, nn.Conv2d) else [-1]
            )
            shift = added.reshape(size)
            hook = module.register_forward_hook(lambda m, args, out, shift=shift: out + shift)
            try:
                moved = first_output(model(images))
            finally:
                hook.remove()
            if moved.shape == plain.shape and torch.allclose(
                moved - plain, added.expand_as(plain), rtol=1e-3, atol=1e-3
            ):
                return name, module
    tried = ", ".join(repr(name) for name, _ in candidates)
    raise ValueError(
        f"{kind} has no layer whose outputs are its logits (tried {tried}): what follows "
        "changes them, an average of several heads, for example, or a temperature"
    )


def cut_from_head(
    plain: nn.Module,
    labels: Sequence[int],
    num_classes: int,
    head: str | None = None,
    image_shape: Sequence[int] | None = None,
) -> None:
    """Makes the logits of ``labels`` the constant ``CUT_LOGIT``, whatever the features are.

    Raises:
        ValueError: if there is no class to cut, no linear layer with a bias whose outputs are the
            logits, or if the logits are something else once it is cut (both are checked by running
            the network).
    """
    if not labels:
        raise ValueError(
            "cut_output=True has no class to cut from the head: name one in forget=, or leave "
            "cut_output out"
        )
    kind = type(plain).__name__
    try:
        images = example_images(plain, image_shape or ())
        name, module = head_that_gives_logits(plain, num_classes, head, images)
    except ValueError as error:
        raise ValueError(
            f"cut_output=True needs one linear head with a bias, but {error}; name the head in "
            "head=, or leave cut_output out (prune_below= closes gates in any network)"
        ) from error
    if not isinstance(module, nn.Linear):
        reason = f"has the {type(module).__name__} {name!r}"
    elif module._parameters.get("bias") is None:
        reason = f"has {name!r}, which has no bias to hold the constant"
    elif "weight" not in module._parameters:
        reason = f"computes the weight of {name!r} from other parameters"
    else:
        with evaluation_mode(plain), torch.no_grad():
            module.weight[list(labels)] = 0.0
            module.bias[list(labels)] = CUT_LOGIT
            found = first_output(plain(images))[:, list(labels)]
        if found.eq(CUT_LOGIT).all():
            return
        reason = (
            f"computes with the outputs of {name!r}: once that is cut, the logits are "
            f"{found.min():.4g} to {found.max():.4g} instead of {CUT_LOGIT:g}"
        )
    raise ValueError(
        f"cut_output=True needs one linear head with a bias, but {kind} {reason}; "
        "leave it out (prune_below= closes gates in any network)"
    )


def example_images(model: nn.Module, image_shape: Sequence[int] = ()) -> Tensor:
    """Two random images ``[2, C, H, W]`` of a size that the network takes, always the same.

    Args:
        model: any network.
        image_shape: ``(C, H, W)`` where it is known.

    Raises:
        ValueError: if none of the usual sizes works.
    """
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    recorded = tuple(image_shape or config.get("input_size") or ())
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    channels = 3 if first is None else first.in_channels
    side = getattr(model, "image_size", None)
    sizes = [recorded] if len(recorded) == 3 else []
    sizes += [(channels, side, side)] if isinstance(side, int) else []
    sizes += [(channels, side, side) for side in _SIDES]
    weight = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    failure = None
    with evaluation_mode(model), torch.no_grad():
        for size in sizes:
            images = torch.randn(2, *size, generator=generator).to(weight.device, weight.dtype)
            try:
                model(images)
            except Exception as error:  # wrong sizes fail in as many ways as there are networks
                failure = failure or error
            else:
                return images
    raise ValueError(
        f"{type(model).__name__} takes no image of {channels} channels of any usual size "
        f"({' '.join(str(failure).split())[:150]})"
    )


def first_output(outputs: object) -> Tensor:
    """The logits among what a network returns: a tensor, ``.logits``, or the first of several.

    Raises:
        TypeError: if there is no tensor.
    """
    found = outputs
    if isinstance(found, dict):
        found = found.get("logits", next(iter(found.values()), None))
    elif not isinstance(found, Tensor) and hasattr(found, "logits"):
        found = found.logits
    elif isinstance(found, tuple | list) and found:
        found = found[0]
    if not isinstance(found, Tensor):
        raise TypeError(
            f"the network returns {type(outputs).__name__}, in which there is no tensor of logits; "
            "wrap it in a module that returns the logits alone"
        )
    return found


def check_logits(logits: Tensor, num_classes: int, kind: str) -> None:
    """Refuses outputs that are not one logit for each class, as features are.

    Raises:
        ValueError: if the second dimension of ``logits`` is not ``num_classes``.
    """
    if logits.dim() < 2 or logits.shape[1] != num_classes:
        raise ValueError(
            f"{kind} returns a tensor {list(logits.shape)} where {num_classes} logits an image "
            "were expected: if it returns several, the logits must be the first or be called "
            "'logits'; else wrap it in a module that returns the logits alone"
        )


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear | nn.Conv2d) and not isinstance(m, MaskedLayer)
    }


def _named_by_model(model: nn.Module) -> list[nn.Module]:
    """The modules that ``get_classifier`` of timm's models names, and all inside them."""
    get_classifier = getattr(model, "get_classifier", None)
    if not callable(get_classifier):
        return []
    found = get_classifier()
    heads = found if isinstance(found, tuple | list) else [found]
    return [m for head in heads if isinstance(head, nn.Module) for m in head.modules()]


def _outputs(module: nn.Module) -> int:
    return module.out_features if isinstance(module, nn.Linear) else module.out_channels
