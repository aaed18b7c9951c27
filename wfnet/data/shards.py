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
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from wfnet.data.cache import cache_folder
from wfnet.data.class_names import read_names
from wfnet.data.encoded import EXTENSIONS, EncodedImages, file_version, log_passed_over
from wfnet.data.transforms import Transform
from wfnet.services.files import read_tensors, write_tensors

logger = logging.getLogger("wfnet")

_LARGEST_CLASS_INDEX = 32  # bytes of a .cls member that is a number
_INDEX_FORMAT = "3"
# Text files in which data sets keep the names of their classes, a line each.
_CLASS_FILES = ("classes.txt", "classnames.txt")


class ImageShards(EncodedImages):
    """The images in WebDataset tar shards, in the order in which they lie there.

    shards:    paths of tar files, uncompressed.
    transform, channels: as for `ImageFiles`.
    classes:   class names; None: `classes.txt` or `classnames.txt` beside the first shard or in
               the folder above (a name per line), else the numbers themselves.

    The index (positions and labels) is kept in `$XDG_CACHE_HOME/wfnet` (`~/.cache/wfnet`) and made
    again when a shard's size or time of change differs.

    Raises FileNotFoundError for a missing shard; ValueError for shards that are compressed, cut off
    or without images, for samples without a class index, and for class numbers that the class names
    do not have. An item that cannot be decoded raises `CorruptImage`.
    """

    per_image = ("labels", "_place", "_key")

    def __init__(
        self,
        shards: Sequence[str | Path],
        transform: Transform,
        channels: int = 3,
        classes: Sequence[str] | None = None,
    ):
        self.shards = [Path(shard) for shard in shards]
        index = _read_index(self.shards)
        labels = index["label"]
        where = f"{self.shards[0]} and those beside it"
        if not len(labels):
            raise ValueError(f"{where} hold no images ({', '.join(EXTENSIONS)})")
        count = int(labels.max()) + 1
        if classes is None:
            classes = _class_names(self.shards[0]) or [str(number) for number in range(count)]
        if count > len(classes):
            raise ValueError(
                f"{where} have class {count - 1}, but only {len(classes)} classes are named: "
                "correct the list of class names"
            )
        super().__init__(labels, list(classes), transform, channels)
        self._place = index["place"]  # [N, 3]: number of the shard, offset, size
        self._key = index["key"]  # [N, longest key] bytes, padded with zeros

    def name_of(self, index: int) -> str:
        key = os.fsdecode(bytes(self._key[index].numpy()).rstrip(b"\0"))
        return f"{self.shards[int(self._place[index, 0])]}:{key}"

    def open(self, index: int) -> BinaryIO:
        shard, offset, size = self._place[index].tolist()
        with open(self.shards[shard], "rb") as file:
            file.seek(offset)
            content = file.read(size)
        if len(content) < size:
            raise EOFError(f"the shard ends {size - len(content)} bytes before the image does")
        return io.BytesIO(content)

    def versions(self) -> list[str]:
        places = hashlib.sha256(self._place.numpy().tobytes()).hexdigest()
        return [*(file_version(shard) for shard in self.shards), places]


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


def _read_index(shards: list[Path]) -> dict[str, torch.Tensor]:
    """Label [N], place [N, 3] and key [N, bytes] of every image."""
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
    versions = "\n".join([_INDEX_FORMAT, *(file_version(shard) for shard in shards)])
    kept = cache_folder() / f"shards-{hashlib.sha256(versions.encode()).hexdigest()}.safetensors"
    try:
        return read_tensors(kept)
    except (FileNotFoundError, ValueError):
        pass
    keys: list[bytes] = []
    numbers: list[tuple[int, int, int, int]] = []  # label, shard, offset, size
    for number, shard in enumerate(shards):
        try:
            found = _scan(shard)
        except (tarfile.TarError, EOFError) as error:
            raise ValueError(
                f"the shard {shard} cannot be read ({error}): fetch it again, or remove it"
            ) from error
        for key, label, offset, size in found:
            keys.append(os.fsencode(key))
            numbers.append((label, number, offset, size))
    longest = max((len(key) for key in keys), default=1)
    packed = np.array(keys, dtype=f"S{longest}").view(np.uint8).reshape(len(keys), longest)
    table = torch.tensor(numbers, dtype=torch.int64).reshape(-1, 4)
    index = {
        "label": table[:, 0].clone(),
        "place": table[:, 1:].clone(),
        "key": torch.from_numpy(packed.copy()),
    }
    try:
        write_tensors(kept, index)
    except OSError as error:  # a convenience: without it the next run reads the headers again
        logger.warning("the index of the shards was not kept: %s", error)
    return index


def _scan(shard: Path) -> list[tuple[str, int, int, int]]:
    """Reads the headers of one shard: key, label, offset and size of its images, in order.

    Raises tarfile.TarError if it is no tar file or is cut off, ValueError for what is wrong in it.
    """
    images: dict[str, list[tarfile.TarInfo]] = {}
    labels: dict[str, list[int]] = {}
    passed_over: list[str] = []
    end = shard.stat().st_size
    with tarfile.open(shard, "r:") as tar, open(shard, "rb") as file:
        for member in tar:
            if not member.isfile():
                continue
            blocks = -(-member.size // tarfile.BLOCKSIZE)
            if member.offset_data + (blocks + 1) * tarfile.BLOCKSIZE > end:  # the mark of its end
                raise tarfile.ReadError(f"it is cut off within or behind {member.name}")
            key, extension = os.path.splitext(member.name)
            if os.path.basename(member.name).startswith("."):
                passed_over.append(member.name)
            elif extension.lower() in EXTENSIONS:
                images.setdefault(key, []).append(member)
            elif extension.lower() == ".cls":
                labels.setdefault(key, []).append(_class_index(file, member, shard))
    found = []
    for key, members in images.items():
        own = labels.pop(key, [])
        if not own and _sample_of(key) in images:  # such as `7.seg.png` beside `7.jpg`
            passed_over += [member.name for member in members]
        elif len(own) != len(members):
            raise ValueError(
                f"{shard}: {', '.join(member.name for member in members)}: {len(members)} images "
                f"with {len(own)} class indices; a sample is one image with its number in {key}.cls"
            )
        else:
            found += [
                (key, label, member.offset_data, member.size)
                for member, label in zip(members, own, strict=True)
            ]
    passed_over += [f"{key}.cls" for key in labels]
    log_passed_over(shard, passed_over)
    return found


def _sample_of(key: str) -> str | None:
    """The key up to the first dot of the last name in it; None if that is all of it."""
    folder, slash, name = key.rpartition("/")
    sample = f"{folder}{slash}{name.partition('.')[0]}"
    return None if sample == key else sample


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
