"""Image files in class folders: `train/<class>/*.jpg`, `val/<class>/*.jpg`."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from wfnet.data.encoded import EXTENSIONS, EncodedFiles, log_passed_over
from wfnet.data.transforms import Transform
from wfnet.services.files import readable


class ImageFiles(EncodedFiles):
    """The images under `root/<class>/`, decoded when asked for.

    root:      a folder with one sub-folder for each class; images may lie deeper. A folder that
               several links lead to is read once.
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
        folders = class_folders(root)
        names = [readable(name) for name in folders]
        if classes is not None and set(classes) != set(names):
            lacks, besides = sorted({*classes} - {*names}), sorted({*names} - {*classes})
            raise ValueError(
                f"{root} lacks the class folders {_listed(lacks)} and has {_listed(besides)} "
                f"besides: they must be those of the other parts, {len(classes)} in number"
            )
        start = os.path.join(root, "")
        # A link to a folder above would bring in other parts of the data.
        seen = {os.path.realpath(root / name) for name in folders}
        one_another = len(seen) < len(folders)
        seen |= {str(folder) for folder in (root.resolve(), *root.resolve().parents)}
        passed_over = [e.path for e in os.scandir(root) if not _hidden(e) and not e.is_dir()]
        images = [_images(start + name, seen, passed_over) for name in folders]
        log_passed_over(root, [readable(path.removeprefix(start)) for path in sorted(passed_over)])
        empty = [name for name, files in zip(names, images, strict=True) if not files]
        if empty or one_another:
            raise ValueError(
                f"the class folders of {root} must have images ({', '.join(EXTENSIONS)}) of their "
                f"own; none are in {_listed(empty)}, or two are one and the same folder: add some, "
                "or remove the class from every part of the data"
            )
        counts = torch.tensor([len(files) for files in images])
        labels = torch.arange(len(names)).repeat_interleave(counts)
        super().__init__(labels, names, transform, channels)
        self.root = root
        self.files = np.array([os.fsencode(f.removeprefix(start)) for own in images for f in own])


def _images(folder: str, seen: set[str], passed_over: list[str]) -> list[str]:
    """Returns the images below a folder, first its own.

    Args:
        folder: not hidden.
        seen: folders that are read already, or are above; they are not entered.
        passed_over: gets what is no image, and links that lead nowhere or to a folder in `seen`.
    """
    files, folders = [], []
    # Entries know their kind without a look at each file: a million files take seconds.
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if _hidden(entry):
            continue
        if entry.is_dir() and os.path.realpath(entry.path) not in seen:
            seen.add(os.path.realpath(entry.path))
            folders.append(entry.path)
        elif entry.name.lower().endswith(EXTENSIONS) and entry.is_file():
            files.append(entry.path)
        else:
            passed_over.append(entry.path)
    return files + [file for below in folders for file in _images(below, seen, passed_over)]


def _hidden(entry: os.DirEntry) -> bool:
    return entry.name.startswith(".")


def class_folders(root: Path) -> list[str]:
    """Returns the names of the class folders under `root`, sorted; hidden ones are none."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder: it should hold one folder for each class")
    names = sorted(e.name for e in os.scandir(root) if not _hidden(e) and e.is_dir())
    if not names:
        raise ValueError(f"{root} has no class folders: images belong in {root / '<class>'}")
    return names


def has_class_images(root: Path) -> bool:
    """Returns whether there are folders below `root` with an image in them."""
    if not root.is_dir():
        return False
    tops = [e.path for e in os.scandir(root) if not _hidden(e) and e.is_dir()]
    files = (file for top in tops for _, _, files in os.walk(top) for file in files)
    return any(file.lower().endswith(EXTENSIONS) for file in files)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(repr(name) for name in names[:5]) + more or "none"
