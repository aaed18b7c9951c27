"""WebDataset shards: tar files in which `<key>.jpg` and `<key>.cls` lie side by side.

A shard is indexed once (its headers are read, nothing is unpacked) and then read at random, so that
shards are drawn from in any order, as image folders are. Only image members and the class index
(`.cls`, a decimal number) are ever decoded; nothing is unpickled.

Format: https://github.com/webdataset/webdataset. A sample is an image and a class index of one key,
the path up to the extension; keys may have dots. The same key may come again: each image then has
the class index that stands in the same place among those of the key.
"""

import hashlib
import io
import logging
import os
import tarfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from wfnet.data.encoded import EXTENSIONS, EncodedImages, file_version
from wfnet.data.folder import PassedOver
from wfnet.data.pixel_store import cache_folder
from wfnet.data.transforms import Transform
from wfnet.services.files import read_tensors, write_tensors

logger = logging.getLogger("wfnet")

# Shards held open by a process; systems allow 1,024 open files or more.
_OPEN_SHARDS = 64
_LARGEST_CLASS_INDEX = 32  # bytes of a .cls member that is a number
_INDEX_FORMAT = "2"
# Text files in which data sets keep the names of their classes, a line each.
_CLASS_FILES = ("classes.txt", "classnames.txt")


class ImageShards(EncodedImages):
    """The images in WebDataset tar shards, in the order in which they lie there.

    shards:    paths of tar files, uncompressed.
    transform, channels: as for `ImageFiles`.
    classes:   class names; None: `classes.txt` or `classnames.txt` beside the first shard or in
               the folder above (a name per line), else the numbers themselves.
    max_unreadable: shards that may be unreadable (left out, named in the log); None: one in a
               hundred, and none of fewer than a hundred.

    The index (positions and labels) is kept in `$XDG_CACHE_HOME/wfnet` (`~/.cache/wfnet`) and made
    again when a shard's size or time of change differs.

    Raises FileNotFoundError for a missing shard; ValueError for compressed shards, for samples
    without a class index, for class numbers that the class names do not have, for too many
    unreadable shards or none with images. An item that cannot be decoded raises `CorruptImage`.
    """

    _per_image = ("labels", "_shard", "_offset", "_size", "_key")

    def __init__(
        self,
        shards: Sequence[str | Path],
        transform: Transform,
        channels: int = 3,
        classes: Sequence[str] | None = None,
        max_unreadable: int | None = None,
    ):
        self.shards = [Path(shard) for shard in shards]
        limit = len(self.shards) // 100 if max_unreadable is None else max_unreadable
        index = _read_index(self.shards, limit)
        labels = index["label"]
        if not len(labels):
            raise ValueError(f"{_named(self.shards)} hold no images ({', '.join(EXTENSIONS)})")
        if classes is None:
            classes = _class_names(self.shards[0]) or _numbered(int(labels.max()) + 1)
        if int(labels.max()) >= len(classes):
            raise ValueError(
                f"{_named(self.shards)} have class {int(labels.max())}, but only {len(classes)} "
                "classes are named: correct the list of class names"
            )
        super().__init__(labels, list(classes), transform, channels)
        self._shard = index["shard"]
        self._offset = index["offset"]
        self._size = index["size"]
        self._key = index["key"].numpy()  # [N, longest key] bytes, padded with zeros
        self._files = _OpenFiles(self.shards)

    def name_of(self, index: int) -> str:
        key = os.fsdecode(bytes(self._key[index]).rstrip(b"\0"))
        return f"{self.shards[int(self._shard[index])]}:{key}"

    def open(self, index: int) -> BinaryIO:
        size = int(self._size[index])
        content = self._files.read(int(self._shard[index]), int(self._offset[index]), size)
        if len(content) < size:
            raise EOFError(f"the shard ends {size - len(content)} bytes before the image does")
        return io.BytesIO(content)

    def versions(self) -> list[str]:
        positions = hashlib.sha256(self._shard.numpy().tobytes() + self._offset.numpy().tobytes())
        return [*(file_version(shard) for shard in self.shards), positions.hexdigest()]


class _OpenFiles:
    """Reads at given positions; keeps the shards that were read last open.

    `os.pread` has no position of its own, so that forked workers may share the descriptors.
    """

    def __init__(self, paths: list[Path]):
        self.paths = paths
        self.open: OrderedDict[int, int] = OrderedDict()

    def read(self, shard: int, offset: int, size: int) -> bytes:
        if shard not in self.open:
            if len(self.open) >= _OPEN_SHARDS:
                os.close(self.open.popitem(last=False)[1])
            self.open[shard] = os.open(self.paths[shard], os.O_RDONLY)
        self.open.move_to_end(shard)
        return os.pread(self.open[shard], size, offset)

    def __getstate__(self) -> dict:
        return {"paths": self.paths, "open": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in self.open.values():
            os.close(descriptor)


def find_shards(root: Path, part: str) -> list[Path]:
    """Tar shards of a part of a data set, sorted: `root/<part>/*.tar`, or `root/*<part>*.tar`.

    Part `val` is also found as `validation`. An empty list if there are none.
    """
    names = (part, "validation") if part == "val" else (part,)
    for name in names:
        for found in (root / name).glob("*.tar*"), root.glob(f"*{name}*.tar*"):
            shards = sorted(path for path in found if path.is_file())
            if shards:
                return shards
    return []


# -- the index ------------------------------------------------------------------------------------


def _read_index(shards: list[Path], limit: int) -> dict[str, torch.Tensor]:
    """Shard, offset and size [N] of every image, its label [N] and key [N, bytes]."""
    if not shards:
        raise ValueError("no shards were given")
    for shard in shards:
        if not shard.is_file():
            raise FileNotFoundError(f"the shard {shard} does not exist")
        if not shard.name.endswith(".tar"):
            raise ValueError(
                f"{shard} is compressed, and images in it cannot be read at random: unpack it to "
                "a plain .tar (gunzip, zstd -d); JPEG files gain nothing from compression"
            )
    versions = "\n".join(file_version(shard) for shard in shards)
    digest = hashlib.sha256(f"{_INDEX_FORMAT}\n{limit}\n{versions}".encode()).hexdigest()
    kept = cache_folder() / f"shards-{digest[:32]}.safetensors"
    try:
        return read_tensors(kept)
    except (FileNotFoundError, ValueError):
        pass
    parts: list[dict[str, list]] = []
    unreadable: list[str] = []
    for number, shard in enumerate(shards):
        try:
            parts.append(_scan(shard, number))
        except (tarfile.TarError, EOFError) as error:
            unreadable.append(shard.name)
            logger.warning("unreadable shard left out: %s: %s", shard, error)
            if len(unreadable) > limit:
                raise ValueError(
                    f"{len(unreadable)} of {len(shards)} shards cannot be read, more than the "
                    f"{limit} that may be; the last is {shard} ({error}): fetch it again, or "
                    "remove it"
                ) from error
    index = {
        name: torch.tensor([value for part in parts for value in part[name]], dtype=torch.int64)
        for name in ("shard", "offset", "size", "label")
    }
    keys = [os.fsencode(key) for part in parts for key in part["key"]]
    longest = max((len(key) for key in keys), default=1)
    packed = np.array(keys, dtype=f"S{longest}").view(np.uint8).reshape(len(keys), longest)
    index["key"] = torch.from_numpy(packed.copy())
    if not unreadable:  # a damaged shard may be mended, and is to be named again if it is not
        _keep(kept, index)
    return index


def _keep(path: Path, index: dict[str, torch.Tensor]) -> None:
    try:
        write_tensors(path, index)
    except OSError as error:  # a convenience: without it the next run reads the headers again
        logger.warning("the index of the shards was not kept: %s", error)


def _scan(shard: Path, number: int) -> dict[str, list]:
    """Reads the headers of one shard.

    Raises tarfile.TarError if it is no tar file or is cut off, ValueError for what is wrong in it.
    """
    images: dict[str, list[tarfile.TarInfo]] = {}
    labels: dict[str, list[int]] = {}
    others: dict[str, list[str]] = {}  # members that are neither, by sample
    passed_over = PassedOver()
    end = shard.stat().st_size
    after = 0  # where the last member ends, rounded up to whole blocks
    with tarfile.open(shard, "r:") as tar, open(shard, "rb") as file:
        for member in tar:
            blocks = -(-member.size // tarfile.BLOCKSIZE) if member.isfile() else 0
            after = member.offset_data + blocks * tarfile.BLOCKSIZE
            if not member.isfile():
                continue
            if member.offset_data + member.size > end:
                raise tarfile.ReadError(f"it is cut off within {member.name}")
            key, extension = os.path.splitext(member.name)
            if os.path.basename(member.name).startswith("."):
                passed_over.add("hidden members", member.name)
            elif extension.lower() in EXTENSIONS:
                images.setdefault(key, []).append(member)
            elif extension.lower() == ".cls":
                labels.setdefault(key, []).append(_class_index(file, member, shard))
            else:
                others.setdefault(_sample_of(member.name), []).append(member.name)
        file.seek(after)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("it has no end-of-archive mark, so it is cut off")
    found: dict[str, list] = {name: [] for name in ("shard", "offset", "size", "label", "key")}
    beside = [key for key in images if key not in labels and _is_beside(key, images, labels)]
    for key in beside:
        for member in images[key]:
            passed_over.add("images that belong to a sample's image", member.name)
    for key in labels:
        if key not in images:
            there = ", ".join([f"{key}.cls", *others.pop(_sample_of(key), [])])
            passed_over.add("samples without an image that is read", there)
    samples = {_sample_of(key) for key in images}
    for sample, names in others.items():
        if sample not in samples:  # texts and tables beside an image are usual
            for name in names:
                passed_over.add("members that belong to no image", name)
    passed_over.log(shard)
    for key, members in images.items():
        if key in beside:
            continue
        if key not in labels:
            raise ValueError(
                f"{shard}: the image {key!r} has no class index: a member {key}.cls with its "
                "number is missing"
            )
        if len(members) != len(labels[key]):
            raise ValueError(
                f"{shard}: the key {key!r} has {len(members)} images "
                f"({', '.join(member.name for member in members)}) and {len(labels[key])} class "
                "indices; a sample is one image with one .cls: rename or remove the others"
            )
        for member, label in zip(members, labels[key], strict=True):
            values = (number, member.offset_data, member.size, label, key)
            for name, value in zip(found, values, strict=True):
                found[name].append(value)
    return found


def _is_beside(key: str, images: dict[str, Any], labels: dict[str, Any]) -> bool:
    """Whether an image such as `7.seg.png` accompanies the sample `7`, as webdataset has it."""
    sample = _sample_of(key)
    return sample != key and sample in images and sample in labels


def _sample_of(name: str) -> str:
    """The path up to the first dot of the last name in it."""
    folder, slash, name = name.rpartition("/")
    return f"{folder}{slash}{name.partition('.')[0]}"


def _class_index(file: BinaryIO, member: tarfile.TarInfo, shard: Path) -> int:
    file.seek(member.offset_data)
    content = file.read(min(member.size, _LARGEST_CLASS_INDEX)).strip()
    if member.size > _LARGEST_CLASS_INDEX or not content.isdigit():
        raise ValueError(
            f"{shard}: {member.name} holds {content!r}, not the number of a class (0, 1, ...)"
        )
    return int(content)


def _class_names(shard: Path) -> list[str] | None:
    for folder in (shard.parent, shard.parent.parent):
        for name in _CLASS_FILES:
            if (folder / name).is_file():
                return read_names(folder / name)
    return None


def read_names(path: Path) -> list[str]:
    """Returns the class names of a text file, one a line; blank lines at its end are none.

    Raises ValueError for a text that is not UTF-8, for a blank line between names, and for a name
    that comes twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason}): save it as UTF-8") from error
    names = [line.strip() for line in text.rstrip().split("\n")]
    if "" in names:
        raise ValueError(
            f"{path}: line {names.index('') + 1} is blank; each line names a class, in the order "
            "of their numbers"
        )
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{path} names the class {twice!r} twice")
    return names


def _numbered(count: int) -> list[str]:
    return [str(number) for number in range(count)]


def _named(shards: list[Path]) -> str:
    more = f" and {len(shards) - 1} more" if len(shards) > 1 else ""
    return f"{shards[0]}{more}"
