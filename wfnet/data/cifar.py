"""CIFAR-10, from the archive of its binary version or the unpacked Python version."""

import tarfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wfnet.services.extras import require

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
ARCHIVE = "cifar-10-binary.tar.gz"
FOLDER = "cifar-10-batches-py"
TRAIN = [f"data_batch_{number}.bin" for number in range(1, 6)]
TEST = "test_batch.bin"
RECORD = 1 + 3 * 32 * 32  # bytes in the binary version: the label, then red, green, blue planes


def read_cifar10(data_dir: str | Path) -> list[tuple[Tensor, Tensor]]:
    """Returns images [N, 3, 32, 32] uint8 and labels [N] of the training and of the test part.

    Looked for, in this order: `cifar-10-binary.tar.gz` (read in place), `cifar-10-batches-py/`
    (read by torchvision, which checks its digests before anything is unpickled).
    Raises FileNotFoundError if neither is there, ValueError for damaged files.
    """
    archive = find_cifar10(data_dir)
    if archive is not None:
        contents = _unpacked(archive)
        return [_decoded(archive, b"".join(contents[n] for n in part)) for part in (TRAIN, [TEST])]
    datasets = require("torchvision.datasets", "train")
    try:
        parts = [datasets.CIFAR10(data_dir, train=train) for train in (True, False)]
    except RuntimeError as error:
        raise ValueError(
            f"{Path(data_dir, FOLDER)} is incomplete or not the published one: fetch it again"
        ) from error
    return [
        (torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in parts
    ]


def find_cifar10(data_dir: str | Path) -> Path | None:
    """Returns the archive of the binary version, or None where the Python version is to be read.

    Raises FileNotFoundError if neither is in `data_dir`.
    """
    archive = Path(data_dir, ARCHIVE)
    if archive.is_file():
        return archive
    if Path(data_dir, FOLDER).is_dir():
        return None
    raise FileNotFoundError(
        f"{archive} does not exist, nor does {FOLDER}/: put one of them (by Krizhevsky, University "
        "of Toronto) there, nothing is downloaded"
    )


def _unpacked(archive: Path) -> dict[str, bytes]:
    """The batch files in the archive, by name."""
    found = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                name = Path(member.name).name
                if member.isfile() and name in (*TRAIN, TEST):
                    found[name] = tar.extractfile(member).read()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise ValueError(f"{archive} is truncated or damaged ({error}): fetch it again") from error
    missing = {*TRAIN, TEST} - found.keys()
    if missing:
        raise ValueError(f"{archive} has no member {min(missing)}: it is not the CIFAR-10 archive")
    return found


def _decoded(archive: Path, content: bytes) -> tuple[Tensor, Tensor]:
    """Images and labels of records: a label byte and 3,072 pixel bytes each."""
    records = np.frombuffer(content, np.uint8)
    if len(records) % RECORD or (records[::RECORD] >= len(CLASSES)).any():
        raise ValueError(f"{archive} does not hold records of CIFAR-10: fetch it again")
    records = torch.from_numpy(records.reshape(-1, RECORD).copy())
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].to(torch.int64)
