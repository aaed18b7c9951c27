"""CIFAR-10, CIFAR-100 and SVHN: published files, which torchvision reads after their digests."""

import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wfnet.services.extras import require


@dataclass(frozen=True)
class PublishedSet:
    """A data set by name.

    files:  in the folder of the data; `source` says whose they are.
    reader: torchvision's class.
    count:  of the classes.
    mean, std: of the training images, per channel.
    """

    files: tuple[str, ...]
    source: str
    reader: str
    count: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def check(self, data_dir: str | Path) -> int:
        """Returns the number of classes.

        Raises FileNotFoundError for a file that is not in `data_dir`.
        """
        for file in self.files:
            if not Path(data_dir, file).exists():
                raise FileNotFoundError(
                    f"{Path(data_dir, file)} does not exist: put {self.source} there, nothing is "
                    "downloaded"
                )
        return self.count


_CIFAR10 = (
    ("cifar-10-batches-py",),
    "CIFAR-10's Python version (by Krizhevsky, University of Toronto), unpacked,",
    "CIFAR10",
)
_CIFAR100 = (
    ("cifar-100-python",),
    "CIFAR-100's Python version (by Krizhevsky, University of Toronto), unpacked,",
    "CIFAR100",
)
_SVHN = (
    ("train_32x32.mat", "test_32x32.mat"),
    "the two files of SVHN's cropped digits (by Netzer et al., Stanford University)",
    "SVHN",
)
_SCALE100 = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)

SETS = {
    "cifar10": PublishedSet(*_CIFAR10, 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": PublishedSet(*_CIFAR100, 100, *_SCALE100),
    "cifar100-coarse": PublishedSet(*_CIFAR100, 20, *_SCALE100),
    "svhn": PublishedSet(*_SVHN, 10, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
}


def read_published(
    name: str, data_dir: str | Path
) -> tuple[list[tuple[Tensor, Tensor]], list[str]]:
    """Returns images [N, 3, 32, 32] uint8 and labels [N] of the training and of the test part, and
    the class names.

    name: of `SETS`; ``cifar100-coarse`` are CIFAR-100's 20 superclasses.

    Raises FileNotFoundError for a missing file, ValueError for a damaged one.
    """
    SETS[name].check(data_dir)
    if name == "svhn":
        require("scipy.io", "eval")
    reader = getattr(require("torchvision.datasets", "train"), SETS[name].reader)
    splits = ("train", "test") if name == "svhn" else (True, False)
    try:
        parts = [reader(str(data_dir), split) for split in splits]
    except RuntimeError as error:
        files = " and ".join(str(Path(data_dir, file)) for file in SETS[name].files)
        raise ValueError(
            f"{files}: incomplete, damaged or not as published: fetch them again"
        ) from error
    if name == "svhn":  # [N, 3, 32, 32]; classes are digits
        found = [(torch.from_numpy(part.data).contiguous(), part.labels) for part in parts]
        return [(x, torch.from_numpy(y)) for x, y in found], [str(n) for n in range(10)]
    targets, classes = [part.targets for part in parts], parts[0].classes
    if name == "cifar100-coarse":  # torchvision has the fine labels alone
        folder = Path(data_dir, *SETS[name].files)
        train, test, meta = (
            pickle.loads((folder / file).read_bytes(), encoding="latin1")
            for file in ("train", "test", "meta")
        )
        targets = [table["coarse_labels"] for table in (train, test)]
        classes = meta["coarse_label_names"]
    images = (torch.from_numpy(np.ascontiguousarray(p.data.transpose(0, 3, 1, 2))) for p in parts)
    return [(x, torch.tensor(y)) for x, y in zip(images, targets, strict=True)], list(classes)
