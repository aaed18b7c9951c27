"""WebDataset shards: tar files in which `<key>.jpg` and `<key>.cls` lie side by side.

A shard is indexed once (its headers are read, nothing is unpacked) and then read at random, so that
shards are drawn from in any order, as image folders are. Only image members and the class index
(`.cls`, a decimal number) are ever decoded; nothing is unpickled.

Format: https://github.com/webdataset/webdataset. The files of a sample follow each other and have
one key, the path up to the first dot of the file's name; what follows says what is in a file.
"""

import io
import os
import tarfile
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from wfnet.data.class_names import read_names
from wfnet.data.encoded import EXTENSIONS, EncodedImages, file_version
from wfnet.data.transforms import Transform
from wfnet.services.files import cache_folder, read_tensors, sha256, write_tensors
from wfnet.services.log import logger

_LARGEST_CLASS_INDEX = 16  # bytes of a .cls member that is a number
_INDEX_FORMAT = "4"
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
        count = int(labels.max()) + 1
        if classes is None:
            classes = _class_names(self.shards[0]) or [str(number) for number in range(count)]
        if count > len(classes):
            raise ValueError(
                f"{self.shards[0]} and those beside it have class {count - 1}, but only "
                f"{len(classes)} classes are named: correct the list of class names"
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
        places = sha256(self._place.numpy().tobytes())
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
    for shard in shards:
        if not shard.is_file():
            raise FileNotFoundError(f"the shard {shard} does not exist")
        if not shard.name.endswith(".tar"):
            raise ValueError(
                f"{shard} is compressed, and images in it cannot be read at random: unpack it to "
                "a plain .tar (gunzip, zstd -d); JPEG files gain nothing from compression"
            )
    versions = "\n".join([_INDEX_FORMAT, *(file_version(shard) for shard in shards)])
    kept = cache_folder() / f"shards-{sha256(versions)}.safetensors"
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
    if not keys:
        raise ValueError(
            f"{shards[0]} and those beside it hold no images ({', '.join(EXTENSIONS)})"
        )
    table = torch.tensor(numbers)
    index = {
        "label": table[:, 0].clone(),
        "place": table[:, 1:].clone(),
        "key": torch.from_numpy(np.array(keys).view(np.uint8).reshape(len(keys), -1)),
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
    found = []
    with tarfile.open(shard, "r:") as tar, open(shard, "rb") as file:
        files = [member for member in tar if member.isfile()]
        if shard.stat().st_size < tar.offset + tarfile.BLOCKSIZE:
            raise tarfile.ReadError("the mark of its end is missing: it is cut off")
        for key, members in groupby(files, _key_of):
            images, labels = [], []
            for member in members:
                extension = member.name.removeprefix(key).lower()
                if extension in EXTENSIONS:
                    images.append(member)
                elif extension == ".cls":
                    labels.append(_class_index(file, member, shard))
            if images and (len(images), len(labels)) != (1, 1):
                raise ValueError(
                    f"{shard}: {', '.join(image.name for image in images)}: {len(images)} images "
                    f"with {len(labels)} class indices; a sample is one image with its number in "
                    f"{key}.cls beside it"
                )
            found += [(key, labels[0], image.offset_data, image.size) for image in images]
    return found


def _key_of(member: tarfile.TarInfo) -> str:
    """The path up to the first dot of the file's name; all of it for hidden files."""
    folder, slash, name = member.name.rpartition("/")
    return folder + slash + (name.partition(".")[0] or name)


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
