"""Images that are decoded when asked for, whatever they are stored in."""

import warnings
from abc import abstractmethod
from typing import BinaryIO, TypeVar

import torch
from torch import Tensor

from wfnet.data.dataset import CorruptImage
from wfnet.data.loading import is_decoding_error
from wfnet.data.transforms import Transform
from wfnet.services.extras import require

# What file names end in; other files are no images.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")

Encoded = TypeVar("Encoded", bound="EncodedImages")


class EncodedImages(torch.utils.data.Dataset):
    """Labelled images in some storage; a subclass says where image number ``i`` lies.

    labels:    [N] int64.
    classes:   their names.
    transform: PIL image -> tensor [C, H, W].
    channels:  1 decodes to grey, 3 to RGB.

    An item that cannot be decoded raises `CorruptImage`.
    """

    # Attributes that hold one entry per image, for `select`.
    _per_image: tuple[str, ...] = ("labels",)

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
        """How the log calls the image."""

    @abstractmethod
    def versions(self) -> list[str]:
        """One line per file that is read: name, size and time of change, so that what was derived
        from the images can tell whether they have changed."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image_module = require("PIL.Image", "train")
        try:
            with warnings.catch_warnings():
                # Pillow warns of odd metadata in files that decode well.
                warnings.simplefilter("ignore")
                with self.open(index) as file, image_module.open(file) as opened:
                    image = opened.convert("L" if self.channels == 1 else "RGB")
        except Exception as error:
            if is_decoding_error(error) or isinstance(error, (ValueError, EOFError)):
                reason = str(error) or type(error).__name__
                raise CorruptImage(self.name_of(index), reason) from error
            raise
        return self.transform(image), int(self.labels[index])

    def select(self: Encoded, indices: Tensor) -> Encoded:
        """The chosen images as a data set of their own."""
        chosen = self._copy()
        for name in self._per_image:
            values = getattr(self, name)
            chosen.__dict__[name] = values[indices if torch.is_tensor(values) else indices.numpy()]
        return chosen

    def with_transform(self: Encoded, transform: Transform) -> Encoded:
        """The same images through another transform."""
        other = self._copy()
        other.transform = transform
        return other

    def _copy(self: Encoded) -> Encoded:
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other
