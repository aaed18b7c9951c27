"""What is known of an evaluation that may be interrupted: kept in a file, bound to what it is of.

:class:`PartialResults` keeps finished records by key, :class:`PartialCounts` the counts over the
images that were seen.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import safetensors
import torch
from torch import Tensor

from wfnet.data import CorruptImages, Dataset, classes_of, labels_of
from wfnet.data.multi_hot import multi_hot_of
from wfnet.network import WFNet
from wfnet.services.files import fingerprint, read_tensors, write_json, write_tensors
from wfnet.services.ranks import Ranks

FORMAT = 1
_SAVE_EVERY = 30.0  # seconds between two files of counts


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


class Counts(Protocol):
    """What is counted: a measure whose state are tensors."""

    def state(self) -> dict[str, Tensor]:
        """Everything that was counted, by name."""

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Takes what :meth:`state` gave."""


class PartialCounts:
    """The counts over the images seen so far, in one file that is replaced atomically.

    Args:
        path: the file; with several ranks each has its own beside it.
        identity: what the counts depend on; a file of another identity is refused.
        counts: filled by :meth:`load`, and saved.
        corrupt: images that were left out, saved with the counts.
        ranks: processes that share the images.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        identity: Mapping[str, Any],
        counts: Counts,
        corrupt: CorruptImages,
        ranks: Ranks,
    ):
        self.path, self.counts, self.corrupt = Path(path), counts, corrupt
        if not ranks.alone:
            name = f"{self.path.stem}-{ranks.rank}-of-{ranks.size}{self.path.suffix}"
            self.path = self.path.with_name(name)
        self.identity = json.loads(json.dumps(dict(identity)))
        self.saved = time.perf_counter()

    def load(self) -> int:
        """Fills the counts; returns the position of the first image that they have not seen.

        Raises:
            ValueError: if the file is damaged or of something else.
        """
        if not self.path.is_file():
            return 0
        tensors = read_tensors(self.path)
        with safetensors.safe_open(self.path, "pt") as file:
            metadata = file.metadata() or {}
        try:
            state = json.loads(metadata["state"])
            position, found = int(state["position"]), dict(state["corrupt"])
            check_identity(self.path, dict(state["identity"]), self.identity)
            self.counts.load_state(tensors)
        except (KeyError, TypeError, RuntimeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{self.path} is damaged ({error}); delete it to evaluate anew"
            ) from error
        self.corrupt.found.update(found)
        return position

    def save_now_and_then(self, position: int) -> None:
        """Saves the counts of the images before ``position``, at most twice a minute."""
        if time.perf_counter() - self.saved >= _SAVE_EVERY:
            self.save(position)

    def save(self, position: int) -> None:
        """Writes the counts of the images before ``position``."""
        state = {
            "identity": self.identity,
            "position": position,
            "corrupt": self.corrupt.found,
        }
        write_tensors(self.path, self.counts.state(), {"state": json.dumps(state)})
        self.saved = time.perf_counter()


def check_identity(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises ValueError unless the records in ``path`` are of what is evaluated now."""
    for name in {**found, **wanted}:
        before, now = found.get(name), wanted.get(name)
        if before != now:
            if isinstance(before, dict) and isinstance(now, dict):  # only what differs is shown
                differing = {key for key in before | now if before.get(key) != now.get(key)}
                before = {key: before.get(key) for key in sorted(differing)}
                now = {key: now.get(key) for key in sorted(differing)}
            raise ValueError(
                f"{path} holds records of other {name} ({_shown(before)}, now {_shown(now)}); "
                "give the same again to go on, delete it to evaluate anew, or choose another output"
            )


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(item)}" for name, item in value.items())
    text = "none" if value is None else str(value)
    return text if len(text) <= 20 else f"{text[:12]}..."


def network_identity(net: WFNet) -> dict[str, str]:
    """Digests of the base weights and of the filters."""
    digest = hashlib.sha256(json.dumps([net.alpha_init, net.normalize_gate]).encode())
    for name, parameter in (net.named_filters() | net.named_statistics()).items():
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
