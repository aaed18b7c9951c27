"""Tiny-ImageNet's validation part, whose images lie in one folder beside a list of their classes.

Its training part is a folder of class folders like others; its test part has no labels.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from wfnet.data.class_names import numbers_by_name
from wfnet.data.encoded import EncodedFiles
from wfnet.data.transforms import Transform

ANNOTATIONS = "val_annotations.txt"


class AnnotatedFiles(EncodedFiles):
    """The images under `root/images/` that `root/val_annotations.txt` lists.

    Each line holds the file name and its class (a WordNet number), and more after them, with tabs
    between. The other arguments are those of `ImageFiles`.

    Raises FileNotFoundError for an image that is not there, ValueError for a damaged list or other
    classes than `classes`.
    """

    def __init__(
        self,
        root: str | Path,
        transform: Transform,
        channels: int = 3,
        classes: Sequence[str] | None = None,
    ):
        path = Path(root, ANNOTATIONS)
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        table = [line.split("\t") for line in lines if line.strip()]
        if not table or any(len(row) < 2 for row in table):
            raise ValueError(
                f"{path} must have an image and its class, a tab between, on each line"
            )
        missing = next(
            (row[0] for row in table if not Path(root, "images", row[0]).is_file()), None
        )
        if missing is not None:
            raise FileNotFoundError(
                f"{Path(root, 'images', missing)} does not exist, but {path} names it"
            )
        names = sorted({row[1] for row in table})
        if classes is not None:
            numbers_by_name(names, sorted(classes), str(root), "the other parts of the data")
        number = {name: index for index, name in enumerate(names)}
        labels = torch.tensor([number[row[1]] for row in table])
        super().__init__(labels, names, transform, channels)
        self.root = Path(root)
        self.files = np.array([os.fsencode(f"images/{row[0]}") for row in table])
