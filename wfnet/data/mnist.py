"""MNIST, from its own IDX files (plain or gzip)."""

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wfnet.data.dataset import Dataset
from wfnet.data.tensor_images import TensorImages

MEAN, STD = (0.1307,), (0.3081,)
FOLDERS = ("", "mnist", "MNIST", "MNIST/raw", "mnist/MNIST/raw", "raw")
NAMES = {
    "train images": "train-images-idx3-ubyte",
    "train labels": "train-labels-idx1-ubyte",
    "test images": "t10k-images-idx3-ubyte",
    "test labels": "t10k-labels-idx1-ubyte",
}


def read_mnist(
    data_dir: str | Path,
    image_size: int = 32,
    channels: int = 1,
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
) -> tuple[Dataset, Dataset]:
    """(training part, test part) from the four IDX files in `data_dir` or its usual sub-folders.

    Raises FileNotFoundError naming the missing file, ValueError for one that is damaged.
    """
    parts = []
    for part in ("train", "test"):
        images = read_idx(find_idx(data_dir, NAMES[f"{part} images"]))
        labels = read_idx(find_idx(data_dir, NAMES[f"{part} labels"]))
        if images.dim() != 3 or labels.dim() != 1 or len(images) != len(labels):
            raise ValueError(
                f"the {part} files of MNIST in {data_dir} do not belong together: "
                f"images {list(images.shape)}, labels {list(labels.shape)}"
            )
        classes = [str(digit) for digit in range(10)]
        parts.append(
            TensorImages(
                images.unsqueeze(1),
                labels.to(torch.int64),
                classes,
                mean,
                std,
                size=image_size,
                channels=channels,
            )
        )
    return parts[0], parts[1]


def find_idx(data_dir: str | Path, name: str) -> Path:
    """The file `name`, plain or .gz, also under the spelling `train-images.idx3-ubyte`."""
    for folder in FOLDERS:
        for spelling in (name, name.replace("-idx", ".idx")):
            for suffix in ("", ".gz"):
                path = Path(data_dir, folder, spelling + suffix)
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
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is truncated or damaged ({error}): fetch it again") from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an IDX file of unsigned bytes: fetch it again")
    dims = content[3]
    shape = np.frombuffer(content, ">i4", count=min(dims, (len(content) - 4) // 4), offset=4)
    values = np.frombuffer(content, np.uint8, offset=min(4 + 4 * dims, len(content)))
    if len(shape) != dims or int(np.prod(shape, dtype=np.int64)) != len(values):
        raise ValueError(
            f"{path} is truncated or damaged: its header says {shape.tolist()}, "
            f"it holds {len(values)} values; fetch it again"
        )
    return torch.from_numpy(values.reshape(shape).copy())
