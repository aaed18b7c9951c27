"""SVHN, cropped digits: `train_32x32.mat` and `test_32x32.mat`, read by torchvision."""

from pathlib import Path

import torch
from torch import Tensor

from wfnet.services.extras import require

MEAN, STD = (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)
FILES = {"train": "train_32x32.mat", "test": "test_32x32.mat"}


def check_files(data_dir: str | Path) -> None:
    """Raises FileNotFoundError unless both files are in `data_dir`."""
    for file in FILES.values():
        if not Path(data_dir, file).is_file():
            raise FileNotFoundError(
                f"{Path(data_dir, file)} does not exist: put the two files of SVHN's cropped "
                "digits (by Netzer et al., Stanford University) there, nothing is downloaded"
            )


def read_svhn(data_dir: str | Path) -> list[tuple[Tensor, Tensor]]:
    """Returns images [N, 3, 32, 32] uint8 and labels [N], digits 0 to 9, of the training and of the
    test part.

    torchvision checks the digests. Raises FileNotFoundError for a missing file, ValueError for a
    damaged one.
    """
    check_files(data_dir)
    require("scipy.io", "eval")
    parts = []
    for split, file in FILES.items():
        try:
            part = require("torchvision.datasets", "train").SVHN(str(data_dir), split)
        except RuntimeError as error:
            raise ValueError(
                f"{Path(data_dir, file)} is damaged or not the published one: fetch it again"
            ) from error
        parts.append((torch.from_numpy(part.data).contiguous(), torch.from_numpy(part.labels)))
    return parts
