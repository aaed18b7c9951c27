"""CIFAR-10, from its binary or its Python version, unpacked or in the original archive."""

import io
import math
import pickle
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from wfnet.data.dataset import Dataset
from wfnet.data.tensor_images import TensorImages

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
PARENTS = ("", "cifar10", "cifar-10", "CIFAR10")
TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST = "test_batch"
RECORD = 1 + 3 * 32 * 32  # bytes in the binary version: the label, then red, green, blue planes


def read_cifar10(
    data_dir: str | Path,
    image_size: int = 32,
    channels: int = 3,
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
) -> tuple[Dataset, Dataset]:
    """(training part, test part) from whichever version lies in `data_dir`.

    Looked for, in this order: `cifar-10-batches-bin/`, `cifar-10-batches-py/`,
    `cifar-10-binary.tar.gz`, `cifar-10-python.tar.gz` (read in place, not unpacked).
    Raises FileNotFoundError naming what is missing, ValueError for damaged files.
    """
    read, decode, suffix = _find(Path(data_dir))
    parts = []
    for names in (TRAIN, (TEST,)):
        decoded = []
        for name in names:
            where, content = read(name + suffix)
            decoded.append(decode(where, content))
        images = np.concatenate([images for images, _ in decoded])
        labels = np.concatenate([labels for _, labels in decoded])
        if len(labels) and labels.max() >= len(CLASSES):
            raise ValueError(f"CIFAR-10 in {data_dir} has label {labels.max()}: it is not CIFAR-10")
        parts.append(
            TensorImages(
                torch.from_numpy(images),
                torch.from_numpy(labels),
                CLASSES,
                mean,
                std,
                size=image_size,
                channels=channels,
            )
        )
    return parts[0], parts[1]


Decoder = Callable[[str, bytes], tuple[np.ndarray, np.ndarray]]


def check_files(data_dir: str | Path) -> None:
    """Raises FileNotFoundError unless the files of CIFAR-10 are in `data_dir`; reads none."""
    _find(Path(data_dir))


def found_files(data_dir: str | Path) -> list[Path]:
    """The files from which CIFAR-10 is read: one archive, or those of its six batches.

    Raises FileNotFoundError unless they are in `data_dir`.
    """
    read, _, suffix = _find(Path(data_dir))
    if isinstance(read, _ArchiveFiles):
        return [read.archive]
    return [read.folder / (name + suffix) for name in (*TRAIN, TEST)]


def _find(data_dir: Path) -> tuple[Callable[[str], tuple[str, bytes]], Decoder, str]:
    """How to read a batch file by name, how to decode it, and its suffix."""
    versions = (
        ("cifar-10-batches-bin", "cifar-10-binary.tar.gz", decode_binary, ".bin"),
        ("cifar-10-batches-py", "cifar-10-python.tar.gz", decode_pickle, ""),
    )
    roots = [data_dir / parent for parent in PARENTS]
    for folder, _, decode, suffix in versions:
        for root in roots:
            for place in (root / folder, root):
                if (place / (TEST + suffix)).is_file():
                    return _FolderFiles(place), decode, suffix
    for folder, archive, decode, suffix in versions:
        for root in roots:
            if (root / archive).is_file():
                return _ArchiveFiles(root / archive, folder), decode, suffix
    raise FileNotFoundError(
        f"{data_dir / 'cifar-10-batches-bin' / 'test_batch.bin'} does not exist, nor do the "
        "Python version or the original archives: put cifar-10-binary.tar.gz or "
        "cifar-10-python.tar.gz (by Krizhevsky, University of Toronto) there, nothing is downloaded"
    )


class _FolderFiles:
    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, name: str) -> tuple[str, bytes]:
        path = self.folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: this CIFAR-10 is incomplete")
        return str(path), path.read_bytes()


class _ArchiveFiles:
    """Reads members of a .tar.gz by name; the archive is unpacked once, in memory, at first use."""

    def __init__(self, archive: Path, folder: str):
        self.archive = archive
        wanted = {f"{folder}/{name}" for name in (*TRAIN, TEST)}
        wanted |= {name + ".bin" for name in wanted}
        self.members: dict[str, bytes] = {}
        try:
            with tarfile.open(archive, "r:gz") as tar:
                for member in tar:
                    if member.isfile() and member.name.removeprefix("./") in wanted:
                        self.members[member.name.rpartition("/")[2]] = tar.extractfile(
                            member
                        ).read()
        except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
            raise ValueError(
                f"{archive} is truncated or damaged ({error}): fetch it again"
            ) from error

    def __call__(self, name: str) -> tuple[str, bytes]:
        if name not in self.members:
            raise ValueError(f"{self.archive} has no member {name}: it is not the CIFAR-10 archive")
        return f"{self.archive}:{name}", self.members[name]


def decode_binary(where: str, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The binary version: records of a label byte and 3,072 pixel bytes.

    Returns images [N, 3, 32, 32] uint8 and labels [N] int64.
    """
    if not content or len(content) % RECORD:
        raise ValueError(
            f"{where} has {len(content)} bytes, not a multiple of {RECORD}: fetch it again"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, RECORD)
    return records[:, 1:].reshape(-1, 3, 32, 32).copy(), records[:, 0].astype(np.int64)


def decode_pickle(where: str, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The Python version: a pickled dict with `data` [N, 3072] and `labels`, str or bytes keys.

    Only plain values and descriptions of arrays are built; anything else in the file is refused.
    """
    try:
        table = _ArrayUnpickler(io.BytesIO(content), encoding="latin1").load()
    except _RefusedPickle as error:
        raise ValueError(f"{where} is not a CIFAR-10 batch: {error}") from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise ValueError(f"{where} is truncated or damaged ({error}): fetch it again") from error
    table = table if isinstance(table, dict) else {}
    table = {key.decode("latin1") if isinstance(key, bytes) else key: table[key] for key in table}
    images, labels = (
        value.values if isinstance(value, _Array) else value
        for value in (table.get("data"), table.get("labels"))
    )
    if (
        not isinstance(images, np.ndarray)
        or images.dtype != np.uint8
        or images.ndim != 2
        or images.shape[1] != RECORD - 1
        or not isinstance(labels, (list, np.ndarray))
        or len(labels) != len(images)
    ):
        raise ValueError(f"{where} is not a CIFAR-10 batch: it lacks `data` [N, 3072] and `labels`")
    if isinstance(labels, list) and not all(type(label) is int for label in labels):
        raise ValueError(f"{where} is not a CIFAR-10 batch: its labels are not integers")
    if any(not 0 <= label < len(CLASSES) for label in labels):
        raise ValueError(f"{where} is not a CIFAR-10 batch: its labels are not 0 to 9")
    return images.reshape(-1, 3, 32, 32).copy(), np.array(labels, dtype=np.int64)


class _RefusedPickle(Exception):
    """A pickle that asks for something other than arrays and plain values."""


class _Stand:
    """Stands for a name in a pickle: may be called, and nothing else may be done with it."""

    __slots__ = ("make",)

    def __init__(self, make: Callable[..., Any]):
        self.make = make

    def __call__(self, *arguments: Any) -> Any:
        return self.make(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise _RefusedPickle("it changes a function, which is refused")


class _ArrayType:
    """What a pickled `numpy.dtype` describes: bytes or integers, else refused."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any, *_: Any):
        if code not in ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8"):
            raise _RefusedPickle(f"it has an array of type {code!r}, which is refused")
        self.code, self.order = code, "|"

    def __setstate__(self, state: Any) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        if order not in ("<", ">", "|", "="):
            raise _RefusedPickle("it has an array of an unknown byte order")
        self.order = order


class _Array:
    """What a pickled array describes; `values` is made from its bytes alone."""

    __slots__ = ("values",)

    def __init__(self, *_: Any):
        self.values = None

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise _RefusedPickle("it has an array without a shape")
        _, shape, kind, fortran, raw = state
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        if not (
            isinstance(kind, _ArrayType)
            and isinstance(raw, bytes)
            and isinstance(shape, tuple)
            and all(type(side) is int and side >= 0 for side in shape)
        ):
            raise _RefusedPickle("it has an array that is not made of bytes")
        values = np.frombuffer(raw, np.dtype(kind.code).newbyteorder(kind.order))
        if math.prod(shape) != len(values):
            raise _RefusedPickle(f"it has an array of {len(values)} values and shape {shape}")
        self.values = values.reshape(shape, order="F" if fortran else "C")


def _encode_latin1(text: Any, encoding: Any) -> bytes:
    """How Python 3 pickles bytes in protocol 2; no other codec is let through."""
    if encoding != "latin1" or not isinstance(text, str):
        raise _RefusedPickle(f"it asks for the codec {encoding!r}, which is refused")
    return text.encode("latin1")


# The unpickler in Python: the one in C reserves memory for numbers that a file makes up.
class _ArrayUnpickler(pickle._Unpickler):
    """Builds numbers, text, lists, dicts and descriptions of arrays: no real class is reached."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
        ):
            return _Stand(_Array)
        if (module, name) == ("numpy", "ndarray"):
            return _Stand(_Array)
        if (module, name) == ("numpy", "dtype"):
            return _Stand(_ArrayType)
        if (module, name) == ("_codecs", "encode"):
            return _Stand(_encode_latin1)
        raise _RefusedPickle(f"it refers to {module}.{name}, which is refused")

    def load_build(self) -> None:
        """Only the stand-ins have a state; the original would write into any object."""
        if not hasattr(self.stack[-2], "__setstate__"):
            raise _RefusedPickle("it gives a state to a plain value, which is refused")
        super().load_build()

    dispatch: ClassVar = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}
