"""Images that fit in memory."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from wfnet.data.dataset import Batch, LabelledImages, check_labels
from wfnet.data.transforms import per_channel
from wfnet.services.files import digest

# Above this many bytes, resized images are not kept: they are resized again on each access.
RESIZED_BYTES = 2 << 30
# Weights of red, green and blue in brightness (ITU-R BT.601, as in Pillow's "L").
LUMA = (0.299, 0.587, 0.114)


class TensorImages(LabelledImages):
    """A data set held as one tensor; `batch(indices)` equals `(images / 255 - mean) / std`.

    images:   [N, C, H, W], uint8 (0..255) or floating point (0..1); kept as it is.
    labels:   [N] int64 in 0..len(classes)-1.
    mean, std: a number, or one for each of `channels`; None is 0 and 1.
    size:     images are resized to [size, size] (bilinear, antialiased when shrinking), once if the
              result is below `RESIZED_BYTES`, else on access; both give the same values.
    channels: 1 or 3; grey images are repeated on access, colour images turned grey once.

    Raises ValueError for shapes, types or labels that do not fit.
    """

    per_image = ("labels", "multi_hot", "images")

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        classes: Sequence[str],
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        size: int | None = None,
        channels: int | None = None,
    ):
        if images.dim() != 4 or not (images.dtype == torch.uint8 or images.is_floating_point()):
            raise ValueError(
                "images must be uint8 or floating point [N, C, H, W], got "
                f"{images.dtype} {list(images.shape)}"
            )
        if len(images) != len(labels):
            raise ValueError(f"{len(images)} images but {len(labels)} labels")
        check_labels(labels, classes)
        channels = images.shape[1] if channels is None else channels
        if channels != images.shape[1]:
            if channels == 1 and images.shape[1] == 3:
                images = _grey(images)
            elif images.shape[1] != 1:
                raise ValueError(f"images of {images.shape[1]} channels cannot become {channels}")
        self.labels = labels.to(torch.int64)
        self.classes = list(classes)
        self.size = None  # set where resizing is left to access
        if size is not None and tuple(images.shape[2:]) != (size, size):
            values = len(images) * images.shape[1] * size * size
            if values * images.element_size() <= RESIZED_BYTES:
                images = _resize(images, size)
            else:
                self.size = size
        self.images = images
        self.channels = channels
        mean, std = (
            torch.tensor(per_channel(values, channels), dtype=torch.float64).view(1, -1, 1, 1)
            for values in (0.0 if mean is None else mean, 1.0 if std is None else std)
        )
        if not bool((std > 0).all()):
            raise ValueError(f"std must be above 0, got {std.flatten().tolist()}")
        self._scale = (1.0 / (255.0 if images.dtype == torch.uint8 else 1.0) / std).float()
        self._offset = (-mean / std).float()

    def batch(self, indices: Tensor) -> Batch:
        """Images [n, channels, H, W] float32, labels [n] and the indices [n] themselves."""
        images = self.images[indices]
        if self.size is not None:
            images = _resize(images, self.size)
        images = torch.addcmul(self._offset, images.float(), self._scale)
        return Batch(images, self.labels[indices], indices)

    def versions(self) -> list[str]:
        """One line that changes with the values of the images."""
        values = {"images": self.images, "scale": self._scale, "offset": self._offset}
        return [f"{digest(values)} {self.size}"]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        batch = self.batch(torch.tensor([index]))
        return batch.images[0], int(batch.labels[0])


def _grey(images: Tensor) -> Tensor:
    luma = (images.float() * torch.tensor(LUMA).reshape(1, 3, 1, 1)).sum(1, keepdim=True)
    return luma.round().to(torch.uint8) if images.dtype == torch.uint8 else luma


def _resize(images: Tensor, size: int) -> Tensor:
    """[N, C, H, W] -> [N, C, size, size] of the same dtype, in parts that keep memory small."""
    resized = images.new_empty(len(images), images.shape[1], size, size)
    for start in range(0, len(images), 4096):
        part = F.interpolate(
            images[start : start + 4096].float(),
            size=(size, size),
            mode="bilinear",
            antialias=True,
            align_corners=False,
        )
        if images.dtype == torch.uint8:
            part = part.round_().clamp_(0, 255)
        resized[start : start + 4096] = part.to(images.dtype)
    return resized
