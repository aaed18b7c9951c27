"""CIFAR-10 and CIFAR-100, from the archive of the binary or the unpacked Python version."""

import pickle
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from wfnet.services.extras import require

PIXELS = 3 * 32 * 32  # bytes of an image: red, green, blue planes


@dataclass(frozen=True)
class Version:
    """One data set of the family.

    archive, folder: the binary and the Python version, as they are published.
    train, test: files in the archive. Each record is one byte for each of `names`, and the pixels.
    names:   the file with the class names that belongs to each label byte.
    reader:  torchvision's class for the Python version.
    mean, std: of the training images, per channel.
    """

    archive: str
    folder: str
    train: tuple[str, ...]
    test: str
    names: tuple[str, ...]
    reader: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


CIFAR10 = Version(
    archive="cifar-10-binary.tar.gz",
    folder="cifar-10-batches-py",
    train=tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
    test="test_batch.bin",
    names=("batches.meta.txt",),
    reader="CIFAR10",
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
)
CIFAR100 = Version(
    archive="cifar-100-binary.tar.gz",
    folder="cifar-100-python",
    train=("train.bin",),
    test="test.bin",
    names=("coarse_label_names.txt", "fine_label_names.txt"),
    reader="CIFAR100",
    mean=(0.5071, 0.4865, 0.4409),
    std=(0.2673, 0.2564, 0.2762),
)


class Labels(NamedTuple):
    """A data set by name: the version, which of its label bytes, and the number of classes."""

    version: Version
    column: int
    count: int


SETS = {
    "cifar10": Labels(CIFAR10, 0, 10),
    "cifar100": Labels(CIFAR100, 1, 100),
    "cifar100-coarse": Labels(CIFAR100, 0, 20),
}


def read_cifar(name: str, data_dir: str | Path) -> tuple[list[tuple[Tensor, Tensor]], list[str]]:
    """Returns images [N, 3, 32, 32] uint8 and labels [N] of the training and of the test part, and
    the class names.

    name: ``cifar10``, ``cifar100``, or ``cifar100-coarse``, its 20 superclasses.

    The archive is read in place; the folder by torchvision, which checks its digests before
    anything is unpickled. Raises FileNotFoundError if neither is there, ValueError for damaged
    files.
    """
    version, column, count = SETS[name]
    archive = find_cifar(name, data_dir)
    if archive is None:
        return _from_python(SETS[name], Path(data_dir))
    contents = _unpacked(archive, version)
    classes = contents[version.names[column]].decode("ascii", "replace").split()
    parts = []
    for files in (version.train, (version.test,)):
        content = b"".join(contents[file] for file in files)
        records = np.frombuffer(content, np.uint8)
        size = len(version.names) + PIXELS
        if len(classes) != count or len(records) % size or (records[column::size] >= count).any():
            raise ValueError(f"{archive} does not hold the records of {name}: fetch it again")
        records = torch.from_numpy(records.reshape(-1, size).copy())
        images = records[:, len(version.names) :].reshape(-1, 3, 32, 32)
        parts.append((images, records[:, column].to(torch.int64)))
    return parts, classes


def find_cifar(name: str, data_dir: str | Path) -> Path | None:
    """Returns the archive of the binary version, or None where the Python version is to be read.

    Raises FileNotFoundError if neither is in `data_dir`.
    """
    version = SETS[name].version
    archive = Path(data_dir, version.archive)
    if archive.is_file():
        return archive
    if Path(data_dir, version.folder).is_dir():
        return None
    raise FileNotFoundError(
        f"{archive} does not exist, nor does {version.folder}/: put one of them (by Krizhevsky, "
        "University of Toronto) there, nothing is downloaded"
    )


def _from_python(labels: Labels, data_dir: Path) -> tuple[list[tuple[Tensor, Tensor]], list[str]]:
    folder = data_dir / labels.version.folder
    reader = getattr(require("torchvision.datasets", "train"), labels.version.reader)
    try:
        parts = [reader(data_dir, train=train) for train in (True, False)]
    except RuntimeError as error:
        raise ValueError(
            f"{folder} is incomplete or not the published one: fetch it again"
        ) from error
    targets, classes = [part.targets for part in parts], parts[0].classes
    if labels.count != len(classes):  # torchvision has the fine labels alone
        train, test, meta = (
            pickle.loads((folder / file).read_bytes(), encoding="latin1")
            for file in ("train", "test", "meta")
        )
        targets = [table["coarse_labels"] for table in (train, test)]
        classes = meta["coarse_label_names"]
    images = (torch.from_numpy(p.data).permute(0, 3, 1, 2).contiguous() for p in parts)
    return [(x, torch.tensor(y)) for x, y in zip(images, targets, strict=True)], list(classes)


def _unpacked(archive: Path, version: Version) -> dict[str, bytes]:
    """The files of data and of names in the archive."""
    wanted, found = {*version.train, version.test, *version.names}, {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                name = Path(member.name).name
                if member.isfile() and name in wanted:
                    found[name] = tar.extractfile(member).read()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise ValueError(f"{archive} is truncated or damaged ({error}): fetch it again") from error
    missing = wanted - found.keys()
    if missing:
        raise ValueError(f"{archive} has no member {min(missing)}: it is not the published archive")
    return found
