"""The classifier's head: which layer gives the logits, and how a class is cut from it."""

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
    fitting = [item for item in modules.items() if _outputs(item[1]) == num_classes]
    linear = [item for item in fitting if isinstance(item[1], nn.Linear)]
    found = linear or fitting or list(modules.items())
    return found[-1] if found else None


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
        what = (
            "1 output. A network with one logit for two classes needs two: a first row of 0, and "
            "the old one; then num_classes=2"
        )
    else:
        what = (
            f"{size} outputs: pass num_classes={size} if those are its classes, or head= to name "
            "another layer; a network that only computes features needs a classifier first"
        )
    raise ValueError(
        f"num_classes={num_classes} does not match {kind}: its last {name!r} has {what}"
    )


def cut_from_head(
    plain: nn.Module,
    labels: Sequence[int],
    num_classes: int,
    head: str | None = None,
    image_shape: Sequence[int] | None = None,
) -> None:
    """Makes the logits of ``labels`` the constant ``CUT_LOGIT``, whatever the features are.

    The head is found by running the network: the linear layer whose cut makes exactly these logits
    the constant. So auxiliary heads, averages of heads and temperatures are told apart.

    Raises:
        ValueError: if there is no class to cut, or no linear layer with a bias whose outputs are
            the logits.
    """
    if not labels:
        raise ValueError(
            "cut_output=True has no class to cut from the head: name one in forget=, or leave "
            "cut_output out"
        )
    named = _linear_layers(plain) if head is None else dict([find_head(plain, num_classes, head)])
    candidates = {
        name: (module._parameters.get("weight"), module._parameters.get("bias"))
        for name, module in reversed(named.items())
        if isinstance(module, nn.Linear) and module.out_features == num_classes
    }
    candidates = {n: pair for n, pair in candidates.items() if None not in pair}
    images = example_images(plain, image_shape or ())
    rows = list(labels)
    with evaluation_mode(plain), torch.no_grad():
        check_logits(first_output(plain(images)), num_classes, type(plain).__name__)
        for weight, bias in candidates.values():
            before = weight[rows], bias[rows]
            weight[rows], bias[rows] = 0.0, CUT_LOGIT
            if first_output(plain(images))[:, rows].eq(CUT_LOGIT).all():
                return
            weight[rows], bias[rows] = before
    tried = ", ".join(map(repr, candidates)) or "none"
    raise ValueError(
        f"cut_output=True needs one linear head with a bias whose outputs are the logits of this "
        f"{type(plain).__name__} (tried {tried}); name the head in head=, or leave cut_output out "
        "(prune_below= closes gates in any network)"
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
    own = getattr(model, "image_size", None)
    sides = [own, *_SIDES] if isinstance(own, int) else _SIDES
    sizes = [recorded] if len(recorded) == 3 else []
    sizes += [(channels, side, side) for side in sides]
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


def first_output(outputs: object, kinds: type | tuple[type, ...] = Tensor) -> Tensor:
    """The logits among what a network returns: a tensor, ``.logits``, or the first of several.

    Args:
        outputs: what the network returned.
        kinds: types that count as a tensor; a trace has proxies.

    Raises:
        TypeError: if there is no tensor.
    """
    found = outputs
    if isinstance(found, dict):
        found = found.get("logits", next(iter(found.values()), None))
    elif not isinstance(found, kinds) and hasattr(found, "logits"):
        found = found.logits
    elif isinstance(found, tuple | list) and found:
        found = found[0]
    if not isinstance(found, kinds):
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


def check_same_logits(
    found: Tensor, expected: Tensor, limit: float, what: str, least: float = 1.0
) -> tuple[float, float]:
    """Compares what should differ by rounding alone.

    Args:
        found, expected: logits of equal shape.
        limit: bound on their difference, as a part of the largest logit.
        what: computes ``found``, for the error.
        least: the bound is never smaller than for logits of this size.

    Returns:
        The largest difference, and the largest logit.

    Raises:
        RuntimeError: if they differ by more, or one is NaN.
    """
    difference = (found - expected).abs().max().item()
    span = expected.abs().max().item()
    if not difference <= limit * max(span, least):
        raise RuntimeError(
            f"{what} does not compute what the network does: logits differ by {difference:.2e} at "
            f"logits up to {span:.2e}, more than rounding; do not use it, and please report this"
        )
    return difference, span


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
