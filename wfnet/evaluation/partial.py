"""Records of an evaluation that may be interrupted: kept in one file, bound to what they are of."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from wfnet.data import Dataset, classes_of, labels_of
from wfnet.data.multi_hot import multi_hot_of
from wfnet.network import WFNet
from wfnet.services.files import fingerprint, write_json

FORMAT = 1


class PartialResults:
    """Records by key in a JSON file that is replaced atomically whenever one is added.

    Args:
        path: the file; None keeps records in memory only.
        identity: what the records depend on, by name: digests of network and data, settings. A
            file that was written for another identity is refused.

    Attributes:
        records: what is known so far, by key, in the order in which it was added.

    Raises:
        ValueError: if the file is damaged, or holds records of something else.
    """

    def __init__(self, path: str | os.PathLike | None, identity: Mapping[str, Any]):
        self.path = None if path is None else Path(path)
        self.identity = json.loads(json.dumps(dict(identity)))
        self.records: dict[str, Any] = {}
        if self.path is not None and self.path.is_file():
            self.records = self._read()

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self.path.read_text())
            if content["format"] != FORMAT:
                raise ValueError(f"its format is {content['format']}, this version reads {FORMAT}")
            identity, records = dict(content["identity"]), dict(content["records"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path} is damaged ({error}); delete it to evaluate anew"
            ) from error
        check_identity(self.path, identity, self.identity)
        return records

    def __contains__(self, key: object) -> bool:
        return str(key) in self.records

    def __getitem__(self, key: object) -> Any:
        return self.records[str(key)]

    def add(self, key: object, record: Any) -> None:
        """Keeps ``record``, anything that JSON can hold, and writes the file."""
        self.records[str(key)] = record
        if self.path is not None:
            content = {"format": FORMAT, "identity": self.identity, "records": self.records}
            write_json(self.path, content)


def check_identity(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises ValueError unless the records in ``path`` are of what is evaluated now."""
    for name in {**found, **wanted}:
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"{path} holds records of another {name} ({_shown(found.get(name))}, now "
                f"{_shown(wanted.get(name))}); delete it to evaluate anew, or choose another output"
            )


def _shown(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 20 else f"{text[:12]}..."


def network_identity(net: WFNet) -> dict[str, str]:
    """Digests of the base weights and of the filters."""
    digest = hashlib.sha256(json.dumps([net.alpha_init, net.normalize_gate]).encode())
    for name, parameter in net.named_filters().items():
        digest.update(f"{name} {list(parameter.shape)}".encode())
        digest.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
    return {"base network": fingerprint(net.model), "filters": digest.hexdigest()}


def data_identity(dataset: Dataset, what: str = "data") -> dict[str, str]:
    """A digest of labels and class names, and of some images where they are in memory.

    Images in files may be transformed at random, so their content is no mark of the data set.
    """
    labels = labels_of(dataset)
    digest = hashlib.sha256(json.dumps(classes_of(dataset)).encode())
    digest.update(labels.numpy().tobytes())
    multi_hot = multi_hot_of(dataset)
    if multi_hot is not None:
        digest.update(multi_hot.numpy().tobytes())
    if hasattr(dataset, "batch") and len(labels):
        images = dataset.batch(torch.tensor([0, len(labels) // 2, len(labels) - 1])).images
        digest.update(images.float().contiguous().numpy().tobytes())
    return {what: digest.hexdigest()}
