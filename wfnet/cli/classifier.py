"""Classifiers by name, with weights: timm, torchvision, and the small networks of this package."""

from __future__ import annotations

import difflib
import inspect
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wfnet import models
from wfnet.cli.weights import load_weights
from wfnet.data import model_data_config
from wfnet.head import find_head
from wfnet.services.extras import require

SMALL_IMAGE_SIZE = 32
# Arguments that options of their own bring, or that are none.
_OF_THE_OPTIONS = {"self", "args", "kwargs", "num_classes", "in_channels", "in_chans"}
_TORCHVISION = ("torchvision/", "tv.")


def create_classifier(
    name: str,
    num_classes: int | None = None,
    *,
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    in_channels: int | None = None,
    image_size: int | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A classifier in evaluation mode, ``[N, C, H, W] -> [N, num_classes]``.

    Args:
        name: ``resnet50`` (timm), ``torchvision/resnet50`` or ``tv.resnet50``, ``small/resnet``.
        num_classes: by default what the pretrained weights have, else the library's default.
        pretrained: weights of timm or torchvision.
        checkpoint: a file with weights, read by :func:`load_weights`.
        in_channels, image_size: passed to models that have such an argument, if given.
        seed: draws the weights that no file replaces; the caller's random state stays as it is.
        options: more arguments of the model's constructor.

    Raises:
        ValueError: for an unknown name, or arguments that the model does not take.
        RuntimeError: if pretrained weights cannot be had.
        ImportError: if the library is not installed.
    """
    if pretrained and checkpoint:
        raise ValueError("give --pretrained or --checkpoint, one of them: both bring all weights")
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise FileNotFoundError(f"the weights {checkpoint} do not exist")
    arguments = dict(options or {})
    if arguments:
        _check_arguments(name, arguments)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        if name.startswith("small/"):
            model = _small(name, num_classes, pretrained, in_channels, image_size, arguments)
        elif name.startswith(_TORCHVISION):
            model = _torchvision(name, num_classes, pretrained, in_channels, arguments)
        else:
            model = _timm(name, num_classes, pretrained, in_channels, arguments)
    if checkpoint is not None:
        load_weights(model, checkpoint)
    return model.eval()


def _check_arguments(name: str, arguments: Mapping[str, Any]) -> None:
    """Raises ValueError for what the model's constructor does not name, and for values that are not
    simple: arguments may come from a stranger's ``config.json``."""
    for key, value in arguments.items():
        parts = value if isinstance(value, list | tuple) else (value,)
        if len(parts) > 64 or not all(_is_simple(part) for part in parts):
            raise ValueError(
                f"{name} does not take {key}={value!r}: arguments of a network are numbers, text, "
                "true, false, or lists of these"
            )
    known = _constructor_arguments(name)
    unknown = [key for key in arguments if key not in known]
    if known and unknown:
        others = _near(unknown[0], known) or f", but {', '.join(known)}"
        raise ValueError(
            f"{name} does not take {dict(arguments)}: it has no argument {unknown[0]!r}{others}"
        )


def _is_simple(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, int):
        return abs(value) < 2**31
    return value is None or (isinstance(value, str) and len(value) < 256)


def _constructor_arguments(name: str) -> list[str]:
    """Returns the arguments that the class behind a model's name takes, by their names."""
    if is_small(name):
        kind = name.removeprefix("small/")
        if kind not in models.SMALL_MODELS:
            return []  # creating it names those that there are
        made: Any = models.SMALL_MODELS[kind]
    else:
        in_library = _torchvision if name.startswith(_TORCHVISION) else _timm
        with torch.device("meta"):  # a network without memory
            made = type(in_library(name, None, False, None, {})).__init__
    return [name for name in inspect.signature(made).parameters if name not in _OF_THE_OPTIONS]


def is_small(name: str) -> bool:
    return name.startswith("small/")


def data_settings(model: nn.Module, name: str) -> dict[str, Any]:
    """What a classifier expects of its images, as arguments of :func:`wfnet.data.open_data`."""
    if is_small(name):
        return {"image_size": SMALL_IMAGE_SIZE}
    if not name.startswith(_TORCHVISION):
        return model_data_config(model)
    torchvision = require("torchvision.models", "train")
    weights = torchvision.get_model_weights(_torchvision_name(name))
    preset = weights.DEFAULT.transforms()
    return {
        "image_size": preset.crop_size[0],
        "channels": 3,
        "mean": tuple(preset.mean),
        "std": tuple(preset.std),
        "interpolation": preset.interpolation.value,
        "crop_pct": preset.crop_size[0] / preset.resize_size[0],
    }


def check_head(model: nn.Module, name: str, num_classes: int, data: str) -> None:
    """Raises ValueError unless the classifier has as many classes as the data."""
    head = find_head(model)
    if head is None or head[1].weight.shape[0] == num_classes:
        return
    raise ValueError(
        f"{data} has {num_classes} classes, but {name} classifies {head[1].weight.shape[0]} (its "
        f"head is {head[0]!r}); use the data that it was trained on, give --checkpoint with "
        "weights for these classes, or, to untrain some of the network's classes, --classes"
    )


# -- libraries ------------------------------------------------------------------------------------


def _small(
    name: str,
    num_classes: int | None,
    pretrained: bool,
    in_channels: int | None,
    image_size: int | None,
    arguments: dict[str, Any],
) -> nn.Module:
    if pretrained:
        raise ValueError(
            f"{name} has no pretrained weights: `wfnet demo` trains one and saves its weights for "
            "--checkpoint"
        )
    kind = name.removeprefix("small/")
    if kind.startswith("vit") and image_size is not None:
        arguments.setdefault("image_size", image_size)
    if num_classes is None:
        raise ValueError(f"give --num-classes for {name}")
    return _construct(
        lambda: models.create(kind, num_classes, in_channels or 1, **arguments),
        name,
        arguments,
        pretrained,
    )


def _torchvision_name(name: str) -> str:
    for prefix in _TORCHVISION:
        name = name.removeprefix(prefix)
    return name


def _torchvision(
    name: str,
    num_classes: int | None,
    pretrained: bool,
    in_channels: int | None,
    arguments: dict[str, Any],
) -> nn.Module:
    torchvision = require("torchvision.models", "train")
    plain = _torchvision_name(name)
    known = torchvision.list_models(module=torchvision)
    if plain not in known:
        raise ValueError(f"torchvision has no classifier {plain!r}{_near(plain, known)}")
    if in_channels not in (None, 3):
        raise ValueError(f"{name} takes images of 3 channels, not {in_channels}: leave --in-chans")
    if pretrained:
        weights = torchvision.get_model_weights(plain).DEFAULT
        _check_pretrained_classes(name, num_classes, len(weights.meta["categories"]))
        arguments["weights"] = weights
    elif num_classes is not None:
        arguments["num_classes"] = num_classes
    return _construct(
        lambda: torchvision.get_model(plain, **arguments), name, arguments, pretrained
    )


def _timm(
    name: str,
    num_classes: int | None,
    pretrained: bool,
    in_channels: int | None,
    arguments: dict[str, Any],
) -> nn.Module:
    timm = require("timm", "train")
    elsewhere = ":" in name or name.startswith("hf_hub/")  # hf-hub:, local-dir:
    if not elsewhere and not timm.is_model(name.partition(".")[0]):
        raise ValueError(
            f"timm has no model {name!r}{_near(name, timm.list_models())}; torchvision's are "
            "called torchvision/NAME, the small networks of this package small/NAME"
        )
    if in_channels is not None:
        arguments["in_chans"] = in_channels
    if num_classes is not None:
        if pretrained and not elsewhere:
            config = timm.get_pretrained_cfg(name)
            if config is not None:
                _check_pretrained_classes(name, num_classes, config.num_classes)
        arguments["num_classes"] = num_classes
    return _construct(
        lambda: timm.create_model(name, pretrained=pretrained, **arguments),
        name,
        arguments,
        pretrained,
    )


def _construct(make, name: str, arguments: dict[str, Any], pretrained: bool) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # libraries warn of names that they renamed
        try:
            return make()
        except TypeError as error:
            raise ValueError(_bad_arguments(name, arguments, error)) from error
        except Exception as error:  # networks and hubs fail in many ways
            if not pretrained:
                raise ValueError(f"{name} cannot be made: {_first_line(error)}") from error
            raise RuntimeError(
                f"the pretrained weights of {name} cannot be had ({_first_line(error)}); load them "
                "where there is a connection, and pass the file as --checkpoint"
            ) from error


def _check_pretrained_classes(name: str, wanted: int | None, found: int) -> None:
    if wanted is not None and wanted != found:
        raise ValueError(
            f"the pretrained weights of {name} have {found} classes, not {wanted}: a new head "
            "would know none of them; leave out --num-classes, or train it and pass --checkpoint"
        )


def _bad_arguments(name: str, arguments: Mapping[str, Any], error: Exception) -> str:
    return f"{name} does not take {dict(arguments)}: {_first_line(error)}"


def _near(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, 3)
    return f"; near it are {', '.join(near)}" if near else ""


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
