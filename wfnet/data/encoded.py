"""Images that are decoded when asked for, whatever they are stored in."""

import copy
import os
import warnings
from abc import abstractmethod
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from torch import Tensor

from wfnet.data.dataset import CorruptImage, LabelledImages, is_decoding_error
from wfnet.data.transforms import Transform
from wfnet.services.extras import require

# What file names end in, of images that Pillow always decodes; other files are no images.
EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)

Encoded = TypeVar("Encoded", bound="EncodedImages")


class EncodedImages(LabelledImages):
    """Labelled images in some storage; a subclass says where image number ``i`` lies.

    labels:    [N] int64.
    classes:   their names.
    transform: PIL image -> tensor [C, H, W].
    channels:  1 decodes to grey, 3 to RGB.

    An item that cannot be decoded raises `CorruptImage`.
    """

    def __init__(self, labels: Tensor, classes: list[str], transform: Transform, channels: int):
        require("PIL.Image", "train")
        if channels not in (1, 3):
            raise ValueError(f"image files are read as 1 or 3 channels, got {channels}")
        self.labels = labels
        self.classes = classes
        self.transform = transform
        self.channels = channels

    @abstractmethod
    def open(self, index: int) -> BinaryIO:
        """The encoded image, to be read and closed."""

    @abstractmethod
    def name_of(self, index: int) -> str:
        """How the log calls an image."""

    @abstractmethod
    def versions(self) -> list[str]:
        """One line per file that is read: name, size and time of change, so that what was derived
        from the images can tell whether they have changed."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image_module = require("PIL.Image", "train")
        try:
            with warnings.catch_warnings():
                # Pillow warns of odd metadata in files that decode well.
                warnings.simplefilter("ignore")
                with self.open(index) as file, image_module.open(file) as opened:
                    image = _in_8_bits(opened).convert("L" if self.channels == 1 else "RGB")
        except Exception as error:
            if is_decoding_error(error) or isinstance(error, (ValueError, EOFError)):
                reason = str(error) or type(error).__name__
                raise CorruptImage(self.name_of(index), reason) from error
            raise
        return self.transform(image), int(self.labels[index])

    def with_transform(self: Encoded, transform: Transform) -> Encoded:
        """The same images through another transform."""
        other = copy.copy(self)
        other.transform = transform
        return other


def _in_8_bits(image: Any) -> Any:
    """Returns a PIL image with 8 bits a value: of 16 bits the upper 8, as Pillow does for colour.

    Raises ValueError for pixels of 32 bits, whose range no format says.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return require("PIL.Image", "train").fromarray(grey)
    if image.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits and no known range: convert it to 8 bits")
    return image


class EncodedFiles(EncodedImages):
    """Images in files of their own: `files` [N] are paths, as bytes, below the folder `root`."""

    root: Path
    # One array of bytes: millions of Python strings would be copied by every worker, because
    # touching their reference counts writes to shared pages.
    files: np.ndarray
    per_image = ("labels", "multi_hot", "files")

    def take_files(self, root: Path, names: list[str], listed: Path | None = None) -> None:
        """Sets where the images lie.

        Raises FileNotFoundError for one of them that is `listed` in a file, and not there.
        """
        for name in names if listed else ():
            if not (root / name).is_file():
                raise FileNotFoundError(f"{root / name} does not exist, but {listed} names it")
        self.root, self.files = root, np.array([os.fsencode(name) for name in names])

    def path(self, index: int) -> Path:
        return self.root / os.fsdecode(bytes(self.files[index]))

    def name_of(self, index: int) -> str:
        return str(self.path(index))

    def open(self, index: int) -> BinaryIO:
        return open(self.path(index), "rb")

    def versions(self) -> list[str]:
        return [file_version(self.path(index)) for index in range(len(self))]


def file_version(path: Path) -> str:
    """Returns a line that changes when a file is moved or written to."""
    state = path.stat()
    return f"{path.absolute()} {state.st_size} {state.st_mtime_ns}"
