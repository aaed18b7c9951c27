"""MNIST, and sets in its format, from IDX files (plain or gzip)."""

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

MEAN, STD = (0.1307,), (0.3081,)
FOLDERS = ("", "MNIST/raw")  # the second is torchvision's
# Images and labels of the two parts.
TRAIN = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
TEST = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def read_mnist(data_dir: str | Path) -> list[tuple[Tensor, Tensor]]:
    """Returns images [N, 1, H, W] uint8 and labels [N] of the training and of the test part.

    They are in four IDX files. Other sets come in these, too (Fashion-MNIST, EMNIST,
    Kuzushiji-MNIST): they may have more than ten classes.

    Raises FileNotFoundError naming the missing file, ValueError for one that is damaged.
    """
    parts = []
    for names in (TRAIN, TEST):
        images, labels = (read_idx(find_idx(data_dir, name)) for name in names)
        if images.dim() != 3 or labels.dim() != 1 or len(images) != len(labels):
            raise ValueError(
                f"{' and '.join(names)} in {data_dir} do not belong together: "
                f"images {list(images.shape)}, labels {list(labels.shape)}"
            )
        parts.append((images.unsqueeze(1), labels.to(torch.int64)))
    return parts


def count_classes(data_dir: str | Path) -> int:
    """Returns the number of classes, ten or more, from the files of labels alone.

    Raises FileNotFoundError unless those of images are there, too.
    """
    paths = [find_idx(data_dir, name) for name in (*TRAIN, *TEST)]
    labels = [read_idx(path) for path in paths[1::2]]
    return max(10, *(int(part.max()) + 1 for part in labels if len(part)))


def find_idx(data_dir: str | Path, name: str) -> Path:
    """The file `name`, plain or .gz."""
    for folder in FOLDERS:
        for path in Path(data_dir, folder, name), Path(data_dir, folder, f"{name}.gz"):
            if path.is_file():
                return path
    raise FileNotFoundError(
        f"{Path(data_dir, name)} (or {name}.gz) does not exist: put the four IDX files of MNIST "
        "(by LeCun, Cortes and Burges; torchvision's MNIST/raw folder has them) there, nothing is "
        "downloaded"
    )


def read_idx(path: Path) -> Tensor:
    """One IDX file of unsigned bytes -> uint8 tensor of the file's own shape.

    The format: two zero bytes, a type byte (8: uint8), the number of dimensions, the dimensions as
    big-endian int32, then the values.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if content[:3] != b"\x00\x00\x08":
            raise ValueError("not an IDX file of unsigned bytes")
        shape = np.frombuffer(content, ">i4", content[3], offset=4).tolist()
        values = np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape))
        return torch.from_numpy(values.reshape(shape).copy())
    except (ValueError, IndexError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is truncated or damaged ({error}): fetch it again") from error
