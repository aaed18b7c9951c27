"""MNIST, and sets in its format, from IDX files (plain or gzip)."""

import gzip
import logging
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wfnet.data.dataset import Dataset
from wfnet.data.tensor_images import TensorImages

logger = logging.getLogger("wfnet")

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
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    class_names: Sequence[str] | None = None,
) -> tuple[Dataset, Dataset]:
    """Returns the training and the test part from the four IDX files in `data_dir`.

    Other sets come in these files, too (Fashion-MNIST, EMNIST, Kuzushiji-MNIST): they may have
    more than ten classes, and names for them. Without `mean` and `std` all are normalised by those
    of MNIST, and the log says so where the images have others.

    Raises FileNotFoundError naming the missing file, ValueError for one that is damaged.
    """
    pairs = []
    for part in ("train", "test"):
        images = read_idx(find_idx(data_dir, NAMES[f"{part} images"]))
        labels = read_idx(find_idx(data_dir, NAMES[f"{part} labels"]))
        if images.dim() != 3 or labels.dim() != 1 or len(images) != len(labels):
            raise ValueError(
                f"the {part} files of MNIST in {data_dir} do not belong together: "
                f"images {list(images.shape)}, labels {list(labels.shape)}"
            )
        pairs.append((images.unsqueeze(1), labels.to(torch.int64)))
    classes = [str(number) for number in range(_classes(*(labels for _, labels in pairs)))]
    if class_names is not None and len(class_names) == len(classes):
        classes = list(class_names)
    if mean is None and std is None:
        _say_whose_statistics(pairs[0][0], data_dir)
    mean, std = MEAN if mean is None else mean, STD if std is None else std
    train, test = (
        TensorImages(images, labels, classes, mean, std, size=image_size, channels=channels)
        for images, labels in pairs
    )
    return train, test


def count_classes(data_dir: str | Path) -> int:
    """Returns the number of classes, from the files of labels alone."""
    for file in NAMES.values():
        find_idx(data_dir, file)
    labels = (read_idx(find_idx(data_dir, NAMES[f"{part} labels"])) for part in ("train", "test"))
    return _classes(*labels)


def _classes(*labels: Tensor) -> int:
    """Returns how many classes labels stand for: ten digits, or more."""
    return max(10, *(int(part.max()) + 1 for part in labels if len(part)))


def _say_whose_statistics(images: Tensor, data_dir: str | Path) -> None:
    """Warns if MNIST's mean and deviation are not those of the images [N, 1, H, W] uint8."""
    counts = torch.zeros(256, dtype=torch.float64)
    for part in images.split(4096):
        counts += part.flatten().int().bincount(minlength=256)
    levels = torch.arange(256) / 255
    mean = float((counts * levels).sum() / counts.sum())
    std = float((counts * (levels - mean) ** 2).sum() / counts.sum()) ** 0.5
    if abs(mean - MEAN[0]) > 0.01 or abs(std - STD[0]) > 0.01:
        logger.warning(
            "%s is no MNIST: its images are normalised by MNIST's mean %.4f and std %.4f, while "
            "their own are %.4f and %.4f (--mean, --std)",
            data_dir,
            MEAN[0],
            STD[0],
            mean,
            std,
        )


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
