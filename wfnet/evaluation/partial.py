"""What is known of an evaluation that may be interrupted: kept in a file, bound to what it is of.

:class:`PartialResults` keeps finished records by key, :class:`PartialCounts` the counts over the
images that were seen.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from wfnet.data import CorruptImages, Dataset, classes_of, labels_of
from wfnet.data.multi_hot import multi_hot_of
from wfnet.network import WFNet
from wfnet.services.files import (
    FilePath,
    fingerprint,
    read_metadata,
    read_tensors,
    write_json,
    write_tensors,
)
from wfnet.services.ranks import Ranks
from wfnet.services.records import check_format, read_json

FORMAT = 1
_SAVE_EVERY = 30.0  # seconds between two files of counts
Record = TypeVar("Record")


class PartialResults:
    """Records by key in a JSON file that is replaced atomically whenever one is added.

    Args:
        path: the file; None keeps records in memory only.
        identity: gives what the records depend on, by name: digests of network and data, settings.

    Raises:
        ValueError: if the file is damaged, or holds records of something else.
    """

    def __init__(self, path: FilePath | None, identity: Callable[[], Mapping[str, Any]]):
        self.path = None if path is None else Path(path)
        self.identity = {} if path is None else json.loads(json.dumps(identity()))
        self.records: dict[str, Any] = {}
        if self.path is not None and self.path.is_file():
            what = "what is known of an unfinished evaluation"
            found, self.records = read_json(self.path, _content, what, "delete it to evaluate anew")
            check_identity(self.path, found, self.identity)

    def left(self, keys: Iterable[Any]) -> list[Any]:
        """The keys without a record."""
        return [key for key in keys if str(key) not in self.records]

    def add(self, key: Any, record: Any) -> None:
        """Keeps ``record``, anything that JSON can hold, and writes the file."""
        self.records[str(key)] = record
        if self.path is not None:
            content = {"format": FORMAT, "identity": self.identity, "records": self.records}
            write_json(self.path, content)

    def complete(
        self,
        keys: Sequence[Any],
        kind: type[Record],
        make: Callable[[list[Any]], Iterable[Record]],
        together: int = 1,
    ) -> list[Record]:
        """Returns a record for each key: those of the file, and new ones of the others.

        Args:
            kind: dataclass of a record.
            make: gives the records of up to ``together`` keys; each is kept at once.
        """
        left = self.left(keys)
        for start in range(0, len(left), together):
            part = left[start : start + together]
            for key, record in zip(part, make(part), strict=True):
                self.add(key, asdict(record))
        return [kind(**self.records[str(key)]) for key in keys]


def _content(content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    check_format(content, FORMAT)
    return dict(content["identity"]), dict(content["records"])


class PartialCounts:
    """Tables over the images seen so far, and what was corrupt, in one file replaced atomically.

    With several ranks each has its own file beside ``path``.
    """

    def __init__(
        self,
        path: FilePath | None,
        identity: Callable[[], Mapping[str, Any]],
        tables: dict[str, Tensor],
        corrupt: CorruptImages,
        ranks: Ranks,
    ):
        self.path = None if path is None else Path(path)
        self.tables, self.corrupt = tables, corrupt
        if path is not None and not ranks.alone:
            self.path = self.path.with_stem(f"{self.path.stem}-{ranks.rank}-of-{ranks.size}")
        self.identity = {} if path is None else json.loads(json.dumps(identity()))
        self.saved = time.perf_counter()

    def load(self) -> int:
        """Fills the tables; returns the position of the first image that they have not seen.

        Raises:
            ValueError: if the file is damaged or of something else.
        """
        if self.path is None or not self.path.is_file():
            return 0
        tensors = read_tensors(self.path)
        try:
            state = json.loads(read_metadata(self.path)["state"])
            check_identity(self.path, state["identity"], self.identity)
            for name, table in self.tables.items():
                table.copy_(tensors[name])
            self.corrupt.found.update(state["corrupt"])
            return int(state["position"])
        except (KeyError, TypeError, RuntimeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{self.path} is damaged ({error}); delete it to evaluate anew"
            ) from error

    def save(self, position: int, now: bool = False) -> None:
        """Writes the tables of the images before ``position``: now, or at most twice a minute."""
        late = time.perf_counter() - self.saved >= _SAVE_EVERY
        if self.path is not None and (now or late):
            state = {"identity": self.identity, "position": position, "corrupt": self.corrupt.found}
            write_tensors(self.path, self.tables, {"state": json.dumps(state)})
            self.saved = time.perf_counter()


def check_identity(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises ValueError unless the records in ``path`` are of what is evaluated now."""
    for name in {**found, **wanted}:
        if name == "code" and name not in found:  # kept before it was recorded
            continue
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"{path} holds records of other {name}; give the same again to go on, delete it "
                "to evaluate anew, or choose another output"
            )


def network_identity(net: WFNet) -> dict[str, str]:
    """Digests of the base weights and of the filters."""
    digest = hashlib.sha256(json.dumps([net.alpha_init, net.normalize_gate]).encode())
    for name, parameter in (net.named_filters() | net.named_statistics()).items():
        digest.update(f"{name} {list(parameter.shape)}".encode())
        digest.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
    return {"base network": fingerprint(net.model), "filters": digest.hexdigest()}


def evaluation_identity(net: WFNet, dataset: Dataset, **more: Any) -> dict[str, Any]:
    """What the measures of a filtered network depend on; ``more``: settings of a measure."""
    return {**network_identity(net), **data_identity(dataset), **more}


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
