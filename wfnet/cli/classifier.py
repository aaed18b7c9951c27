"""Classifiers by name, with weights: timm, torchvision, transformers, and small networks."""

import difflib
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wfnet import hugging_face, models
from wfnet.cli.weights import load_weights
from wfnet.data import model_data_config
from wfnet.head import find_head
from wfnet.services.extras import require

SMALL_IMAGE_SIZE = 32
_TORCHVISION = ("torchvision/", "tv.")
# Arguments of the libraries that choose or read weights: a stranger's config.json may name some.
_OF_WEIGHTS = {"checkpoint_path", "cache_dir", "weights"}


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
        name: ``resnet50`` (timm), ``torchvision/resnet50`` or ``tv.resnet50``, ``small/resnet``,
            ``hf:FOLDER`` or ``hf:user/repo`` (transformers; local files alone).
        num_classes: by default what the pretrained weights have, else the library's default.
        pretrained: weights of timm, torchvision or transformers.
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
    for key in arguments:
        if key in _OF_WEIGHTS or key.startswith("pretrained"):
            raise ValueError(
                f"{name} does not take {key}: --model-kwargs describe the network, not its weights"
            )
    if in_channels is not None:
        arguments["in_channels" if is_small(name) else "in_chans"] = in_channels
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    if is_small(name):
        make = _small(name, pretrained, image_size, arguments)
    elif name.startswith(_TORCHVISION):
        make = _torchvision(name, pretrained, arguments)
    elif name.startswith(hugging_face.PREFIX):
        make = _transformers(name, pretrained, arguments)
    else:
        make = _timm(name, pretrained, arguments)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.random.default_generator.manual_seed(seed)
        warnings.simplefilter("ignore")  # libraries warn of names that they renamed
        try:
            model = make()
        except (ImportError, FileNotFoundError):
            raise
        except Exception as error:  # networks and hubs fail in many ways
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            if not pretrained:
                raise ValueError(f"{name} cannot be made with {arguments}: {reason}") from error
            raise RuntimeError(
                f"the pretrained weights of {name} cannot be had ({reason}); load them where there "
                "is a connection, and pass the file as --checkpoint"
            ) from error
    if checkpoint is not None:
        load_weights(model, checkpoint)
    return model.eval()


def is_small(name: str) -> bool:
    return name.startswith("small/")


def data_settings(model: nn.Module, name: str) -> dict[str, Any]:
    """What a classifier expects of its images, as arguments of :func:`wfnet.data.open_data`."""
    if is_small(name):
        channels = next(p for p in model.parameters() if p.dim() == 4).shape[1]
        return {"image_size": SMALL_IMAGE_SIZE, "channels": channels}
    if name.startswith(hugging_face.PREFIX):
        return hugging_face.data_settings(model)
    if not name.startswith(_TORCHVISION):
        return model_data_config(model)
    torchvision = require("torchvision.models", "train")
    preset = torchvision.get_model_weights(_plain(name)).DEFAULT.transforms()
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


# -- libraries: each returns what makes the network -----------------------------------------------


def _small(
    name: str, pretrained: bool, image_size: int | None, arguments: dict[str, Any]
) -> Callable[[], nn.Module]:
    if pretrained:
        raise ValueError(
            f"{name} has no pretrained weights: `wfnet demo` trains one and saves its weights for "
            "--checkpoint"
        )
    if "num_classes" not in arguments:
        raise ValueError(f"give --num-classes for {name}")
    kind = name.removeprefix("small/")
    if kind.startswith("vit") and image_size is not None:
        arguments.setdefault("image_size", image_size)
    return lambda: models.create(kind, **arguments)


def _torchvision(name: str, pretrained: bool, arguments: dict[str, Any]) -> Callable[[], nn.Module]:
    torchvision = require("torchvision.models", "train")
    plain = _plain(name)
    known = torchvision.list_models(module=torchvision)
    if plain not in known:
        raise ValueError(f"torchvision has no classifier {plain!r}{_near(plain, known)}")
    if arguments.pop("in_chans", 3) != 3:
        raise ValueError(f"{name} takes images of 3 channels: leave --in-chans")
    if pretrained:
        weights = torchvision.get_model_weights(plain).DEFAULT
        count = len(weights.meta["categories"])
        _check_pretrained_classes(name, arguments.pop("num_classes", None), count)
        arguments["weights"] = weights
    return lambda: torchvision.get_model(plain, **arguments)


def _transformers(
    name: str, pretrained: bool, arguments: dict[str, Any]
) -> Callable[[], nn.Module]:
    if "in_chans" in arguments:
        arguments["num_channels"] = arguments.pop("in_chans")
    source = name.removeprefix(hugging_face.PREFIX)
    return lambda: hugging_face.load_classifier(source, pretrained, **arguments)


def _timm(name: str, pretrained: bool, arguments: dict[str, Any]) -> Callable[[], nn.Module]:
    timm = require("timm", "train")
    elsewhere = ":" in name or name.startswith("hf_hub/")  # hf-hub:, local-dir:
    if not elsewhere and not timm.is_model(name.partition(".")[0]):
        raise ValueError(
            f"timm has no model {name!r}{_near(name, timm.list_models())}; torchvision's are "
            "called torchvision/NAME, a folder or repository of transformers hf:NAME, the small "
            "networks of this package small/NAME"
        )
    config = timm.get_pretrained_cfg(name) if pretrained and not elsewhere else None
    if config is not None:
        _check_pretrained_classes(name, arguments.get("num_classes"), config.num_classes)
    return lambda: timm.create_model(name, pretrained=pretrained, **arguments)


def _plain(name: str) -> str:
    """The name that torchvision has for a network."""
    return name.removeprefix("torchvision/").removeprefix("tv.")


def _check_pretrained_classes(name: str, wanted: int | None, found: int) -> None:
    if wanted is not None and wanted != found:
        raise ValueError(
            f"the pretrained weights of {name} have {found} classes, not {wanted}: a new head "
            "would know none of them; leave out --num-classes, or train it and pass --checkpoint"
        )


def _near(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, 3)
    return f"; near it are {', '.join(near)}" if near else ""
