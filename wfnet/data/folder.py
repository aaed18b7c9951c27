"""Image files in class folders: `train/<class>/*.jpg`, `val/<class>/*.jpg`."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from wfnet.data.encoded import EXTENSIONS, EncodedFiles
from wfnet.data.transforms import Transform


class ImageFiles(EncodedFiles):
    """The images under `root/<class>/`, decoded when asked for.

    root:      a folder with one sub-folder for each class; images may lie deeper.
    transform: PIL image -> float32 tensor [C, H, W] (`evaluation_transform`, timm's
               `create_transform`, torchvision's `weights.transforms()`).
    channels:  1 decodes to grey, 3 to RGB.
    classes:   the class folders that must be there and no others; None takes those found, sorted.

    Raises FileNotFoundError for a missing root, ValueError for a class folder without images or a
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
        found = class_folders(root)
        if classes is not None and list(classes) != found:
            raise ValueError(_difference(root, list(classes), found))
        files, labels, empty = [], [], []
        for label, name in enumerate(found):
            images = _image_files(root, name)
            if not images:
                empty.append(name)
            files += images
            labels += [label] * len(images)
        if empty:
            raise ValueError(
                f"{_listed(empty)} in {root} {'has' if len(empty) == 1 else 'have'} no images "
                f"({', '.join(EXTENSIONS)}): add some or remove the folder"
            )
        labels = torch.tensor(labels, dtype=torch.int64)
        super().__init__(root, files, labels, found, transform, channels)


def class_folders(root: Path) -> list[str]:
    """Names of the class folders under `root`, sorted. Hidden folders are no classes."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder: it should hold one folder for each class")
    names = sorted(
        entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name[0] != "."
    )
    if not names:
        raise ValueError(f"{root} has no class folders: images belong in {root / '<class>'}")
    return names


def _image_files(root: Path, name: str) -> list[bytes]:
    """Paths of the images of one class, relative to `root`."""
    files = []
    for parent, folders, names in os.walk(root / name, followlinks=True):
        folders.sort()
        below = os.path.relpath(parent, root)  # once a folder: a million files take seconds
        files += [
            os.fsencode(f"{below}{os.sep}{name}")
            for name in sorted(names)
            if name.lower().endswith(EXTENSIONS) and not name.startswith(".")
        ]
    return files


def _difference(root: Path, expected: list[str], found: list[str]) -> str:
    missing = sorted(set(expected) - set(found))
    extra = sorted(set(found) - set(expected))
    parts = []
    if missing:
        parts.append(f"lacks {_listed(missing)}")
    if extra:
        parts.append(f"has {_listed(extra)} besides")
    if not parts:
        parts.append(f"is read in the order {found} and not {expected}")
    return (
        f"{root} {' and '.join(parts)}: its class folders must be those of the other parts, "
        f"{len(expected)} in number"
    )


def _listed(names: list[str], most: int = 5) -> str:
    listed = ", ".join(repr(name) for name in names[:most])
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"class folder{'s' if len(names) > 1 else ''} {listed}{more}"
