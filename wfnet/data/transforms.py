"""From a decoded image to the tensor that a network expects."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from wfnet.services.extras import require

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Of `torchvision.transforms.InterpolationMode`; named here to be known without it.
INTERPOLATIONS = ("nearest", "nearest-exact", "bilinear", "bicubic", "box", "hamming", "lanczos")

Transform = Callable[[Any], Tensor]  # PIL.Image -> float32 [C, H, W]


def per_channel(values: float | Sequence[float], channels: int) -> list[float]:
    """One value for each channel; grey images take the average of colour statistics."""
    found = torch.as_tensor(values, dtype=torch.float64).flatten().tolist()
    if channels == 1 and len(found) == 3:
        return [sum(found) / 3]
    if len(found) not in (1, channels):
        raise ValueError(f"{len(found)} mean or std values for images of {channels} channels")
    return found * channels if len(found) == 1 else found


def evaluation_transform(
    size: int,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    interpolation: str = "bicubic",
    crop_pct: float = 0.875,
) -> Transform:
    """Resize the shorter side to `size / crop_pct`, crop the centre, normalise.

    The same values as timm's `create_transform(size, ...)` for crop mode "center". Needs
    torchvision, `pip install wfnet[train]`.
    """
    v2 = require("torchvision.transforms.v2", "train")
    if not 0.0 < crop_pct <= 1.0:
        raise ValueError(f"crop_pct must lie in (0, 1], got {crop_pct}")
    return v2.Compose(
        [
            v2.Resize(math.floor(size / crop_pct), v2.InterpolationMode(interpolation)),
            v2.CenterCrop(size),
            *_to_tensor(v2, mean, std),
        ]
    )


def training_transform(
    size: int,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    interpolation: str = "bicubic",
    scale: tuple[float, float] = (0.25, 1.0),
    flip: float = 0.5,
) -> Transform:
    """A random crop of `scale` of the area, resized to `size`, mirrored with probability `flip`."""
    v2 = require("torchvision.transforms.v2", "train")
    mode = v2.InterpolationMode(interpolation)
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=scale, interpolation=mode),
            v2.RandomHorizontalFlip(flip),
            *_to_tensor(v2, mean, std),
        ]
    )


def _to_tensor(v2: Any, mean: Sequence[float], std: Sequence[float]) -> list[Any]:
    return [
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(list(mean), list(std)),
    ]


def chosen_preprocessing(options: Mapping[str, Any]) -> dict[str, Any]:
    """What options of a command say of preprocessing, as keyword arguments of `open_data`."""
    keys = {"img_size": "image_size", "in_chans": "channels"}
    keys |= {name: name for name in ("mean", "std", "interpolation", "crop_pct")}
    return {name: options[key] for key, name in keys.items() if options.get(key) is not None}


def model_data_config(model: torch.nn.Module) -> dict[str, Any]:
    """What a timm model expects of its images, as keyword arguments of `open_data`.

    `image_size, channels, mean, std, interpolation, crop_pct`, and `transform` where timm's crop is
    not a plain centre crop. An empty dict for models that carry no such description.
    """
    if not getattr(model, "pretrained_cfg", None):
        return {}
    timm_data = require("timm.data", "train")
    config = timm_data.resolve_model_data_config(model)
    channels, height, width = config["input_size"]
    arguments = {
        "image_size": height,
        "channels": channels,
        "mean": tuple(config["mean"]),
        "std": tuple(config["std"]),
        "interpolation": config["interpolation"],
        "crop_pct": config["crop_pct"],
    }
    if height != width or config.get("crop_mode", "center") != "center":
        arguments["transform"] = timm_data.create_transform(**config, is_training=False)
    return arguments
