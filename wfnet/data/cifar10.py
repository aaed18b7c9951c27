"""CIFAR-10, from its binary or its Python version, unpacked or in the original archive."""

import io
import pickle
import tarfile
import zlib
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
PARENTS = ("", "cifar10", "cifar-10", "CIFAR10")
TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST = "test_batch"
RECORD = 1 + 3 * 32 * 32  # bytes in the binary version: the label, then red, green, blue planes
# Folder, archive and suffix of the batch files.
VERSIONS = (
    ("cifar-10-batches-bin", "cifar-10-binary.tar.gz", ".bin"),
    ("cifar-10-batches-py", "cifar-10-python.tar.gz", ""),
)


def read_cifar10(data_dir: str | Path) -> list[tuple[Tensor, Tensor]]:
    """Returns images [N, 3, 32, 32] uint8 and labels [N] of the training and of the test part.

    Looked for, in this order: `cifar-10-batches-bin/`, `cifar-10-batches-py/`,
    `cifar-10-binary.tar.gz`, `cifar-10-python.tar.gz` (read in place, not unpacked).
    Raises FileNotFoundError naming what is missing, ValueError for damaged files.
    """
    files = found_files(data_dir)
    contents = {path.stem: (path, path.read_bytes()) for path in files if path.suffix != ".gz"}
    contents = contents or _unpacked(files[0])
    parts = []
    for names in (TRAIN, (TEST,)):
        batches = [_decode(*contents[name]) for name in names]
        images, labels = (np.concatenate(values) for values in zip(*batches, strict=True))
        images = torch.from_numpy(images).view(-1, 3, 32, 32)
        parts.append((images, torch.from_numpy(labels.astype(np.int64))))
    return parts


def found_files(data_dir: str | Path) -> list[Path]:
    """The files from which CIFAR-10 is read: one archive, or those of its six batches.

    Raises FileNotFoundError unless they are in `data_dir`.
    """
    roots = [Path(data_dir, parent) for parent in PARENTS]
    for folder, _, suffix in VERSIONS:
        for place in (place for root in roots for place in (root / folder, root)):
            if (place / (TEST + suffix)).is_file():
                files = [place / (name + suffix) for name in (*TRAIN, TEST)]
                missing = next((path for path in files if not path.is_file()), None)
                if missing is not None:
                    raise FileNotFoundError(f"{missing} does not exist: CIFAR-10 is incomplete")
                return files
    for _, archive, _ in VERSIONS:
        for root in roots:
            if (root / archive).is_file():
                return [root / archive]
    raise FileNotFoundError(
        f"{Path(data_dir, 'cifar-10-batches-bin', 'test_batch.bin')} does not exist, nor do the "
        "Python version or the original archives: put cifar-10-binary.tar.gz or "
        "cifar-10-python.tar.gz (by Krizhevsky, University of Toronto) there, nothing is downloaded"
    )


def _unpacked(archive: Path) -> dict[str, tuple[Path, bytes]]:
    """The batch files in an archive, by name."""
    found = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                path = Path(member.name)
                if member.isfile() and path.stem in (*TRAIN, TEST):
                    found[path.stem] = archive / path.name, tar.extractfile(member).read()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise ValueError(f"{archive} is truncated or damaged ({error}): fetch it again") from error
    missing = {*TRAIN, TEST} - found.keys()
    if missing:
        raise ValueError(f"{archive} has no member {min(missing)}: it is not the CIFAR-10 archive")
    return found


def _decode(path: Path, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, 3072] uint8 and labels [N] of a batch file."""
    try:
        images, labels = (_binary if path.suffix == ".bin" else _pickled)(content)
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise ValueError(
            f"{path} is damaged or no batch of CIFAR-10 ({error}): fetch it again"
        ) from error
    if labels.ndim != 1 or images.shape != (len(labels), RECORD - 1):
        raise ValueError(f"{path} is no batch of CIFAR-10: its images are {list(images.shape)}")
    if labels.dtype.kind not in "iu" or not np.isin(labels, range(len(CLASSES))).all():
        raise ValueError(f"{path} is no batch of CIFAR-10: its labels are not 0 to 9")
    return images, labels


def _binary(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The binary version: records of a label byte and 3,072 pixel bytes."""
    records = np.frombuffer(content, np.uint8).reshape(-1, RECORD)
    return records[:, 1:], records[:, 0]


def _pickled(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The Python version: a pickled dict with `data` [N, 3072] and `labels`, str or bytes keys."""
    table = _ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
    table = {key.decode() if isinstance(key, bytes) else key: table[key] for key in table}
    _, shape, dtype, fortran, raw = table["data"].state
    if dtype.arguments[0] != "u1":
        raise ValueError(f"its images are of type {dtype.arguments[0]!r}")
    raw = raw.encode("latin1") if isinstance(raw, str) else raw
    images = np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran else "C")
    return images, np.asarray(table["labels"])


class _Described:
    """Stands for what a pickle makes of numpy's names: only remembers what it is given."""

    def __init__(self, *arguments: Any):
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _latin1(text: str, encoding: str) -> bytes:
    return text.encode("latin1")


# The unpickler in Python: the one in C reserves memory for numbers that a file makes up.
class _ArrayUnpickler(pickle._Unpickler):
    """Builds plain values and descriptions of arrays; no real class or function is reached.

    numpy's own would take what a file makes up, such as types that are pointers.
    """

    stands_for: ClassVar = {
        ("numpy.core.multiarray", "_reconstruct"): _Described,
        ("numpy._core.multiarray", "_reconstruct"): _Described,
        ("numpy", "ndarray"): _Described,
        ("numpy", "dtype"): _Described,
        ("_codecs", "encode"): _latin1,  # how Python 3 pickles bytes in protocol 2
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.stands_for:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is refused")
        return self.stands_for[module, name]
