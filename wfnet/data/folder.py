"""Image files in class folders: `train/<class>/*.jpg`, `val/<class>/*.jpg`, or Tiny-ImageNet's."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from wfnet.data.class_names import numbers_by_name
from wfnet.data.encoded import EXTENSIONS, EncodedFiles
from wfnet.data.transforms import Transform
from wfnet.services.extras import require
from wfnet.services.files import readable
from wfnet.services.log import logger

ANNOTATIONS = "val_annotations.txt"


class ImageFiles(EncodedFiles):
    """The images under `root/<class>/`, decoded when asked for.

    root:      a folder with one sub-folder for each class; images may lie deeper. Hidden files and
               class folders are left out; the order is that of torchvision's `ImageFolder`.
    transform: PIL image -> float32 tensor [C, H, W] (`evaluation_transform`, timm's
               `create_transform`, torchvision's `weights.transforms()`).
    channels:  1 decodes to grey, 3 to RGB.
    classes:   the class folders that must be there and no others; None takes those found, sorted.

    Raises FileNotFoundError for a missing root or a class folder without images, ValueError for a
    class list that differs. An item that cannot be decoded raises `CorruptImage`.
    """

    def __init__(
        self,
        root: str | Path,
        transform: Transform,
        channels: int = 3,
        classes: Sequence[str] | None = None,
    ):
        root = Path(root)
        folders = class_folders(root)
        names = [readable(name) for name in folders]
        if classes is not None:
            numbers_by_name(names, sorted(classes), str(root), "the other parts of the data")
        start = os.path.join(root, "")
        passed_over = []

        def is_image(path: str) -> bool:
            if os.path.basename(path).startswith("."):
                return False
            wanted = path.lower().endswith(EXTENSIONS)
            if not wanted:
                passed_over.append(readable(path.removeprefix(start)))
            return wanted

        reader = require("torchvision.datasets.folder", "train")
        numbers = {name: number for number, name in enumerate(folders)}
        try:
            samples = reader.make_dataset(str(root), numbers, is_valid_file=is_image)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{root}: {error}Add images ({', '.join(EXTENSIONS)}), or remove these classes "
                "from every part of the data"
            ) from error
        if passed_over:
            some = ", ".join(passed_over[:5])
            logger.warning("%s: %d files are no images: %s", root, len(passed_over), some)
        labels = torch.tensor([label for _, label in samples])
        super().__init__(labels, names, transform, channels)
        self.take_files(root, [path.removeprefix(start) for path, _ in samples])


class AnnotatedFiles(EncodedFiles):
    """Tiny-ImageNet's validation images: those in `root/images/`, of which a list says the classes.

    Each line of `root/val_annotations.txt` holds the file name, its class (a WordNet number) and
    more, with tabs between. The other arguments are those of `ImageFiles`.

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
        names = sorted({row[1] for row in table})
        if classes is not None:
            numbers_by_name(names, sorted(classes), str(root), "the other parts of the data")
        number = {name: index for index, name in enumerate(names)}
        labels = torch.tensor([number[row[1]] for row in table])
        super().__init__(labels, names, transform, channels)
        self.take_files(Path(root), [f"images/{row[0]}" for row in table], path)


def class_folders(root: Path) -> list[str]:
    """Returns the names of the class folders under `root`, sorted; hidden ones are none."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder: it should hold one folder for each class")
    names = sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith("."))
    if not names:
        raise ValueError(f"{root} has no class folders: images belong in {root / '<class>'}")
    return names
