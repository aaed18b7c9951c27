"""Image files in class folders: `train/<class>/*.jpg`, `val/<class>/*.jpg`."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from wfnet.data.encoded import EXTENSIONS, EncodedFiles
from wfnet.data.transforms import Transform
from wfnet.services.files import readable

logger = logging.getLogger("wfnet")


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
        found, passed_over = class_folders(root), PassedOver()
        names = [readable(name) for name in found]
        if classes is not None and list(classes) != names:
            raise ValueError(_difference(root, list(classes), names))
        scan = _FolderScan(root, found, passed_over)
        images = [scan.images(name) for name in found]
        empty = [name for name, files in zip(found, images, strict=True) if not files]
        passed_over.log(root)
        if empty:
            raise ValueError(_no_images(root, empty, classes is not None))
        labels = torch.arange(len(found)).repeat_interleave(
            torch.tensor([len(files) for files in images])
        )
        files = [file for files in images for file in files]
        super().__init__(root, files, labels, names, transform, channels)


class PassedOver:
    """What lies in a data set and is not read: counted by reason, named in the log once."""

    def __init__(self) -> None:
        self.found: dict[str, list[str]] = {}

    def add(self, reason: str, name: str) -> None:
        self.found.setdefault(reason, []).append(name)

    def log(self, root: Path) -> None:
        """Warns of all that was passed over, in one line."""
        if self.found:
            reasons = "; ".join(
                f"{len(names)} {reason} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
                for reason, names in self.found.items()
            )
            logger.warning("%s: passed over %s", root, reasons)


class _FolderScan:
    """Lists the images of class folders; every folder is entered once, whatever links to it.

    root:        the folder of the class folders `classes`.
    passed_over: gets what is no image, and links that lead nowhere or back.
    """

    def __init__(self, root: Path, classes: list[str], passed_over: PassedOver):
        self.root, self.passed_over = root, passed_over
        # A link to a folder above would bring in other classes, and other parts of the data.
        above = [root, *root.resolve().parents]
        self.seen = {_identity(folder) for folder in above}
        self.tops = {name: _identity(root / name) for name in classes}
        self.seen |= set(self.tops.values())
        for entry in os.scandir(root):
            if entry.name.startswith(".") or entry.name in self.tops:
                continue
            if _leads_nowhere(entry):
                kind = "links that lead nowhere"
            elif entry.is_dir():
                kind = "links back to a folder above"
            else:
                kind = "files outside a class"
            passed_over.add(kind, entry.name)

    def images(self, name: str) -> list[bytes]:
        """Returns the paths of a class's images, relative to `root`."""
        twins = [other for other, top in self.tops.items() if top == self.tops[name]]
        if len(twins) > 1:
            raise ValueError(
                f"{_listed(twins)} in {self.root} are one and the same folder: its images cannot "
                "belong to several classes"
            )
        return self._below(name)

    def _below(self, below: str) -> list[bytes]:
        files, folders = [], []
        # Entries know their kind without a look at each file: a million files take seconds.
        for entry in sorted(os.scandir(self.root / below), key=lambda entry: entry.name):
            path = f"{below}{os.sep}{entry.name}"
            if entry.name.startswith("."):
                continue
            if _leads_nowhere(entry):
                self.passed_over.add("links that lead nowhere", path)
            elif entry.is_dir():
                identity = _identity(entry.path)
                if identity in self.seen:
                    self.passed_over.add("links to folders that are read already", path)
                else:
                    self.seen.add(identity)
                    folders.append(path)
            elif not entry.is_file():
                self.passed_over.add("pipes or devices", path)
            elif entry.name.lower().endswith(EXTENSIONS):
                files.append(os.fsencode(path))
            else:
                self.passed_over.add("files that are no images", path)
        return files + [file for folder in folders for file in self._below(folder)]


def _leads_nowhere(entry: os.DirEntry) -> bool:
    """Whether it is a link whose target is missing, or that leads round in a circle to itself."""
    return entry.is_symlink() and not os.path.exists(entry.path)


def _identity(folder: str | Path) -> tuple[int, int]:
    state = os.stat(folder)
    return state.st_dev, state.st_ino


def class_folders(root: Path) -> list[str]:
    """Returns the names of the class folders under `root`, sorted.

    Hidden folders are no classes, nor are links to a folder that `root` lies in.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder: it should hold one folder for each class")
    above = {_identity(folder) for folder in (root, *root.resolve().parents)}
    names = sorted(
        entry.name
        for entry in os.scandir(root)
        if entry.name[0] != "."
        and not _leads_nowhere(entry)
        and entry.is_dir()
        and _identity(entry.path) not in above
    )
    if not names:
        raise ValueError(f"{root} has no class folders: images belong in {root / '<class>'}")
    return names


def has_class_images(root: Path) -> bool:
    """Returns whether there are folders below `root` with an image in them."""
    if not root.is_dir():
        return False
    tops = (
        entry.path
        for entry in os.scandir(root)
        if entry.name[0] != "." and not _leads_nowhere(entry) and entry.is_dir()
    )
    return any(has_images(folder) for top in tops for folder, _, _ in os.walk(top))


def has_images(folder: str | Path) -> bool:
    """Returns whether an image lies in a folder itself."""
    return any(entry.name.lower().endswith(EXTENSIONS) for entry in os.scandir(folder))


def _no_images(root: Path, empty: list[str], named_elsewhere: bool) -> str:
    remedy = "add some or remove the folder"
    if named_elsewhere:
        remedy = "add some, or remove the class from every part of the data"
    has = "has" if len(empty) == 1 else "have"
    return f"{_listed(empty)} in {root} {has} no images ({', '.join(EXTENSIONS)}): {remedy}"


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
