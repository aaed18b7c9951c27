"""Filter checkpoints: safetensors and JSON, atomic writes, a fingerprint of the base weights."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from wfnet.durable_layers import SOFT_INIT
from wfnet.hugging_face import base_name, load_base
from wfnet.layers import LayerNames
from wfnet.services.extras import require
from wfnet.services.files import (
    FilePath,
    digest,
    fingerprint,
    read_tensors,
    write_json,
    write_tensors,
)
from wfnet.version import __version__

if TYPE_CHECKING:
    from wfnet.network import WFNet

CONFIG_NAME = "wf_config.json"
FILTERS_NAME = "wf_model.safetensors"
FORMAT = 1


def filters_digest(net: "WFNet") -> str:
    """Returns SHA-256 over the filters of ``net`` and their statistics, as files record it."""
    return digest({**net.named_filters(), **net.named_statistics()})


def save_filters(net: "WFNet", folder: FilePath) -> None:
    """Writes the filters of ``net`` and what is needed to wrap the same base again."""
    folder = Path(folder)
    tensors = {**net.named_filters(), **net.named_statistics()}
    config = {
        "format": FORMAT,
        "wfnet_version": __version__,
        "model": type(net.model).__name__,
        "num_classes": net.num_classes,
        "targets": list(net.masked_layers),
        "alpha_init": net.alpha_init,
        "normalize_gate": net.normalize_gate,
        "filter_dtype": str(net.filter_parameters()[0].dtype).removeprefix("torch."),
        "base": base_name(net.model),
        "base_fingerprint": fingerprint(net.model),
        "gate": net.gate,
        "soft_init": net.soft_init,
        "filters_digest": filters_digest(net),
    }
    # The filters carry a copy, from which a lost configuration can be restored.
    metadata = {"format": "pt", "wf_config": json.dumps(config)}
    write_tensors(folder / FILTERS_NAME, tensors, metadata)
    write_json(folder / CONFIG_NAME, config)


def read_config(folder: FilePath) -> dict:
    """The checkpoint's configuration.

    Raises:
        FileNotFoundError, ValueError: if it is missing, damaged or of an unknown format.
    """
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; {Path(folder)} holds no wfnet checkpoint (save_pretrained "
            f"writes {CONFIG_NAME} and {FILTERS_NAME})"
        )
    try:
        config = json.loads(path.read_text())
        known = {"format", "num_classes", "targets", "alpha_init", "base_fingerprint"}
        missing = sorted(known - set(config if isinstance(config, dict) else ()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged or not a wfnet configuration ({error})") from error
    if missing:
        raise ValueError(f"{path} is not a wfnet configuration: it lacks {', '.join(missing)}")
    if config["format"] != FORMAT:
        raise ValueError(
            f"{path} has format {config['format']}, this version of wfnet reads {FORMAT}; "
            "install the version that wrote it"
        )
    targets, dtype = config["targets"], config.get("filter_dtype", "float32")
    if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        raise ValueError(f"{path} is damaged: targets must be a list of names; got {targets!r}")
    if dtype not in ("float16", "bfloat16", "float32", "float64"):
        raise ValueError(f"{path} is damaged: filter_dtype is {dtype!r}")
    return config


def _folder_of(source: FilePath) -> Path:
    """A local folder, or that in which the files of a repository of the Hub lie."""
    repository = isinstance(source, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", source)
    if Path(source).exists() or not repository:
        return Path(source)
    hub = require("huggingface_hub", "hf")
    try:
        return Path(hub.snapshot_download(source, allow_patterns=[CONFIG_NAME, FILTERS_NAME]))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"{source!r} is no folder, and cannot be had from the Hub ({reason[:200]})"
        ) from error


def load_filters(
    cls: "type[WFNet]", source: FilePath, base_model: nn.Module | None, backend: str
) -> "WFNet":
    """Wraps ``base_model``, or the one recorded, as the files say and loads the filters."""
    folder = _folder_of(source)
    config = read_config(folder)
    if base_model is None:
        if not config.get("base"):
            raise ValueError(
                f"{folder / CONFIG_NAME} does not say where the network is that its filters belong "
                f"to (a {config.get('model', 'model')}): give it as base_model"
            )
        base_model = load_base(config["base"])
    tensors = read_tensors(folder / FILTERS_NAME)
    found = fingerprint(base_model)
    if found != config["base_fingerprint"]:
        raise ValueError(
            f"the base model is not the one these filters were trained on: its fingerprint is "
            f"{found[:12]}..., {folder / CONFIG_NAME} expects {config['base_fingerprint'][:12]}... "
            f"(a {config.get('model', 'model')}); load the original weights in their original dtype"
        )
    gate = config.get("gate", "sigmoid")
    soft_init = config.get("soft_init", SOFT_INIT if gate == "durable" else None)
    if gate == "durable" and soft_init is None:  # of a version where linear maps started at -1
        layers = map(base_model.get_submodule, config["targets"])
        soft_init = -1.0 if all(isinstance(layer, nn.Linear) for layer in layers) else SOFT_INIT
    net = cls(
        base_model,
        config["num_classes"],
        targets=LayerNames(config["targets"]),
        alpha_init=config["alpha_init"],
        normalize_gate=config.get("normalize_gate", True),
        backend=backend,
        filter_dtype=getattr(torch, config.get("filter_dtype", "float32")),
        gate=gate,
        soft_init=soft_init,
    )
    for name, layer in net.masked_layers.items():
        if f"{name}.row_pair_mean" in tensors and hasattr(layer, "start_pairs"):
            layer.start_pairs(tensors.get(f"{name}.row_pair_place"))
    assign_filters(net, tensors, folder / FILTERS_NAME, statistics=True)
    # Files of earlier versions have no digest.
    if config.get("filters_digest", "") not in ("", digest(tensors)):
        raise ValueError(
            f"{folder / FILTERS_NAME} was not written together with {CONFIG_NAME}, or is damaged "
            "(was a save interrupted?); save again, or restore the configuration from the entry "
            "wf_config in the metadata of the filters"
        )
    return net


def assign_filters(
    net: "WFNet", tensors: dict[str, Tensor], origin: object, statistics: bool = False
) -> None:
    """Copies ``tensors`` into the filters of ``net``, and into the rows' statistics if wanted.

    Raises:
        ValueError: if names or shapes differ from those of ``net``, a filter is NaN (infinite
            ones are gates of 0 and 1), or a statistic is not finite or a negative variance.
    """
    measured = net.named_statistics() if statistics else {}
    filters = net.named_filters() | measured
    odd = sorted(set(filters) ^ set(tensors))
    if odd:
        raise ValueError(
            f"{origin} does not fit this network: filter matrix {odd[0]!r} is only in one of them "
            f"({len(odd)} differ); was it written for other targets?"
        )
    for name, parameter in filters.items():
        found = tensors[name]
        if found.shape != parameter.shape:
            raise ValueError(
                f"{origin} does not fit this network: {name!r} is {list(found.shape)}, expected "
                f"{list(parameter.shape)}"
            )
        problem = None
        if found.isnan().any():
            problem = "NaN"
        elif name in measured and not found.isfinite().all():
            problem = "infinite values"
        elif name in measured and name.endswith("row_var") and found.lt(0).any():
            problem = "negative variances"
        if problem:
            raise ValueError(
                f"{origin} has {problem} in {name!r}: the untraining that wrote it diverged, or "
                "the file is damaged; untrain again with a smaller learning rate, or restore a copy"
            )
    with torch.no_grad():
        for name, parameter in filters.items():
            parameter.copy_(tensors[name])
