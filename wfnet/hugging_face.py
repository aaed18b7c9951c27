"""Image classifiers of transformers, from local files; folders that transformers and timm load."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wfnet.services.extras import require
from wfnet.services.files import FilePath
from wfnet.services.log import logger

PREFIX = "hf:"  # of names on the command line
PROCESSOR_NAME = "preprocessor_config.json"


def local_folder(model: str | None) -> Path | None:
    """The folder that a name such as ``hf:FOLDER`` names; None for all others."""
    path = Path((model or "").removeprefix(PREFIX))
    return path if (model or "").startswith(PREFIX) and path.is_dir() else None


def load_classifier(
    name: str,
    weights: bool = True,
    num_classes: int | None = None,
    local: bool = True,
    **settings: Any,
) -> nn.Module:
    """A classifier of transformers from a folder, or from the local cache of the Hub.

    Weights are loaded as fp32.

    Args:
        name: a folder that ``save_pretrained`` wrote, or ``user/repo`` where it was fetched before.
        weights: False: new ones, drawn by PyTorch's generator.
        num_classes: of new weights; None: what the configuration says.
        local: nothing is downloaded.
        settings: changes of the configuration.

    Raises:
        FileNotFoundError: if there are no such files here.
        ValueError: for another number of classes than the weights have, an unknown setting, or
            weights without a classifier's head.
        ImportError: if transformers is not installed.
    """
    transformers = require("transformers", "hf")
    config, unknown = _configuration(name, local, **settings)
    if unknown:
        raise ValueError(f"the configuration of {name} has no {next(iter(unknown))!r}")
    if not weights:
        if num_classes not in (None, config.num_labels):
            config.num_labels = num_classes
        return transformers.AutoModelForImageClassification.from_config(config).eval()
    if num_classes not in (None, config.num_labels):
        raise ValueError(
            f"the weights of {name} have {config.num_labels} classes, not {num_classes}: a new "
            "head would know none of them; leave out the number, or train it first"
        )
    try:
        model, report = transformers.AutoModelForImageClassification.from_pretrained(
            name,
            config=config,
            local_files_only=local,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except OSError as error:
        raise _missing(name, "model.safetensors") from error
    if report["missing_keys"]:
        raise ValueError(
            f"the weights of {name} lack {min(report['missing_keys'])!r}, which would be random: "
            "this is no trained classifier; fine-tune it on your classes first"
        )
    return model.eval()


def _configuration(name: str, local: bool = True, **settings: Any) -> tuple[Any, dict[str, Any]]:
    """The configuration in a local folder, with changes, and the changes that it does not know."""
    auto = require("transformers", "hf").AutoConfig
    options = {"local_files_only": local, "return_unused_kwargs": True, **settings}
    try:
        return auto.from_pretrained(name, **options)
    except (OSError, ValueError) as error:  # a ValueError: the file is that of another library
        raise _missing(name, "config.json") from error


def _missing(name: str, file: str) -> FileNotFoundError:
    if Path(name).is_dir():
        return FileNotFoundError(
            f"the folder {name} has no {file} that transformers can read: write it with the "
            "model's save_pretrained"
        )
    return FileNotFoundError(
        f"{name!r} is no folder, and the local cache of the Hub has no {file} of it: fetch it "
        f"once, where there is a connection, with `hf download {name}`"
    )


def base_name(model: nn.Module) -> str | None:
    """Where a model of transformers was loaded from, as ``hf:user/repo``.

    None for a folder of this machine, and for models of other libraries, which do not say whether
    their weights are those of their name.
    """
    name = model.config._name_or_path if is_transformers(model) else ""
    return f"{PREFIX}{name}" if name and not Path(name).exists() else None


def load_base(name: str) -> nn.Module:
    """The pretrained network of :func:`base_name`, or of timm's name; may download."""
    if name.startswith(PREFIX):
        return load_classifier(name.removeprefix(PREFIX), local=False)
    return require("timm", "train").create_model(name, pretrained=True).eval()


def hub_id(name: str) -> str | None:
    """The repository of the Hub with the weights that :func:`load_base` loads; None if unknown."""
    if name.startswith((PREFIX, "hf-hub:", "hf_hub:")):
        return name.partition(":")[2]
    return f"timm/{name}" if "." in name else None  # with the tag of its weights


def is_transformers(model: nn.Module) -> bool:
    """Whether ``model`` is one of transformers, told without importing the package."""
    return any(
        kind.__name__ == "PreTrainedModel" and kind.__module__.startswith("transformers.")
        for kind in type(model).__mro__
    )


def class_names(source: nn.Module | str) -> list[str] | None:
    """Names of the classes of a model, or of a local folder, from ``id2label``.

    None for a model of another library, and where classes are only numbered.
    """
    if isinstance(source, nn.Module):
        labels = source.config.id2label if is_transformers(source) else {}
    else:
        labels = _configuration(source)[0].id2label
    names = [labels[number] for number in sorted(labels)]
    generic = all(name == f"LABEL_{number}" for number, name in enumerate(names))
    return None if generic else names


class ProcessorTransform:
    """An image processor of transformers as a transform: PIL image to float32 ``[C, H, W]``."""

    def __init__(self, processor: Any):
        self.processor = processor

    def __call__(self, image: Any) -> Tensor:
        return self.processor(images=image, return_tensors="pt")["pixel_values"][0]


def image_processor(model: nn.Module) -> Any | None:
    """The image processor beside the weights of ``model``; None where there is none."""
    transformers = require("transformers", "hf")
    try:
        return transformers.AutoImageProcessor.from_pretrained(
            model.config._name_or_path, local_files_only=True
        )
    except (OSError, ValueError):  # of configurations without one
        return None


def data_settings(model: nn.Module) -> dict[str, Any]:
    """What a classifier of transformers expects of its images, for :func:`wfnet.data.open_data`.

    Its image processor is the ``transform``; the other settings describe it for data in memory.
    """
    processor = image_processor(model)
    channels = getattr(model.config, "num_channels", 3)
    if processor is None:
        logger.warning(
            "%s has no %s: images are normalised as ImageNet's; give --mean, --std and --img-size "
            "if it was trained with others",
            model.config._name_or_path or type(model).__name__,
            PROCESSOR_NAME,
        )
        size = getattr(model.config, "image_size", None)
        return {"channels": channels} | ({"image_size": size} if isinstance(size, int) else {})
    image = require("PIL.Image", "train")
    transform = ProcessorTransform(processor)
    size = transform(image.new("RGB", (320, 240))).shape[1]
    plain = {"mean": processor.image_mean, "std": processor.image_std}
    if not processor.do_normalize:
        plain = {"mean": (0.0,) * channels, "std": (1.0,) * channels}
    settings = {
        "image_size": size,
        "channels": channels,
        **{key: tuple(values) for key, values in plain.items()},
        "interpolation": image.Resampling(processor.resample).name.lower(),
    }
    # A processor of colour images does not take grey ones.
    return settings | ({"transform": transform} if channels == 3 else {})


# -- folders that the libraries load --------------------------------------------------------------


def save_classifier(
    model: nn.Module,
    folder: FilePath,
    names: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
) -> None:
    """Writes a plain classifier as the folder that its own library loads, preprocessing included.

    Of transformers for ``AutoModelForImageClassification.from_pretrained(folder)``, of timm for
    ``timm.create_model("local-dir:FOLDER", pretrained=True)``; a folder for the Hub, in both cases.

    Args:
        model: without filters, as :meth:`wfnet.WFNet.bake` returns it.
        folder: is made if needed.
        names: of the classes.
        preprocessing: ``mean``, ``std`` (of timm's also ``image_size``, ``interpolation``,
            ``crop_pct``) where they are not those that the model came with.

    Raises:
        ValueError: for a model of neither library, or another change of a processor.
    """
    changes = dict(preprocessing or {})
    # Weights in channels-last layout are not saved by all versions.
    model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    if is_transformers(model):
        if not changes.keys() <= {"mean", "std"}:
            raise ValueError(
                "of an image processor of transformers only mean and std can be changed here; "
                f"leave out {', '.join(changes)} and edit its {PROCESSOR_NAME}"
            )
        if names is not None:
            model.config.id2label = dict(enumerate(names))
            model.config.label2id = {name: number for number, name in enumerate(names)}
        model.save_pretrained(folder)
        processor = image_processor(model)
        if processor is not None:
            for key, value in changes.items():
                setattr(processor, f"image_{key}", list(value))
            processor.save_pretrained(folder)
        return
    if not getattr(model, "pretrained_cfg", None):
        raise ValueError(
            f"{type(model).__name__} belongs to neither timm nor transformers, so no library loads "
            "it from a folder: write its weights to a .safetensors file"
        )
    if "image_size" in changes:
        side = changes.pop("image_size")
        changes["input_size"] = model.pretrained_cfg["input_size"][0], side, side
    about = {"pretrained_cfg": changes} | ({} if names is None else {"label_names": list(names)})
    save_for_hf = require("timm.models", "train").save_for_hf
    save_for_hf(model, str(folder), model_config=about, safe_serialization=True)


def load_saved(folder: FilePath, like: nn.Module) -> nn.Module:
    """What the library of ``like`` loads from a folder of :func:`save_classifier`."""
    if is_transformers(like):
        return load_classifier(str(folder))
    timm = require("timm", "train")
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
