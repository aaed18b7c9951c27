"""Decoded images kept as uint8, so that no image is decoded twice.

Decoding JPEG files is what starves a GPU. A run draws its images again and again, so the first time
an image is drawn its resized pixels are stored - on the device, on the host or on disk - and from
then on batches are gathered from there. Normalisation and augmentation run on the device, on whole
batches; a byte per value crosses the bus instead of four, beside what the device computes.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from wfnet.data.dataset import Batch, LabelledImages
from wfnet.data.encoded import EncodedImages
from wfnet.data.row_store import RowStore
from wfnet.data.transforms import evaluation_transform, training_transform
from wfnet.services.device_copies import to_device_async, to_device_overlapped
from wfnet.services.extras import require
from wfnet.services.files import cache_folder, sha256

# Part of the area that a random crop covers, at an aspect ratio of 3/4 to 4/3.
_LEAST_CROP, _WIDEST = 0.25, 4 / 3


class CachedImages(LabelledImages):
    """An image data set whose decoded pixels are kept after the first time.

    dataset:  `ImageFiles` or `ImageShards`.
    place:    "device" (memory of `device`), "host" (main memory) or "disk" (a file that later runs
              find again); None keeps nothing: images are decoded anew every time, and what
              comes after the decoding is done on the device all the same.
    size:     of the images that the network gets.
    mean, std, interpolation, crop_pct: as for `evaluation_transform`, whose values the cache
              reproduces exactly.
    augment:  random crops and mirroring, drawn anew for every batch from (seed, position); of the
              stored pixels, or of the whole image (`training_transform`) where none are kept.
    device:   where batches are wanted; pixels are normalised there.
    folder:   of the disk cache; default: `cache_folder()`.

    The size is logged first. Raises ValueError for a place that is none of these, or too small for
    the cache.
    """

    per_image = ("labels", "multi_hot", "_positions")

    def __init__(
        self,
        dataset: EncodedImages,
        place: str | None,
        size: int,
        mean: Iterable[float],
        std: Iterable[float],
        interpolation: str = "bicubic",
        crop_pct: float = 0.875,
        augment: bool = False,
        device: torch.device | str = "cpu",
        folder: str | Path | None = None,
    ):
        self.device = torch.device(device)
        if augment and place is None:
            decode = training_transform(size, interpolation=interpolation)
            augment = False
        else:
            # With augmentation all of the resized square is kept, else what the crop leaves of it.
            kept, part = (math.floor(size / crop_pct), 1.0) if augment else (size, crop_pct)
            decode = evaluation_transform(kept, interpolation=interpolation, crop_pct=part)
        # Without the conversion to float: resized and cropped (or cropped and mirrored) bytes.
        self.dataset = dataset.with_transform(type(decode)(decode.transforms[:3]))
        self.labels, self.classes = dataset.labels, dataset.classes
        self.multi_hot = dataset.multi_hot
        self.size, self.augment = size, augment
        self._mean, self._std = (
            torch.tensor([*values], dtype=torch.float32).view(-1, 1, 1).to(self.device)
            for values in (mean, std)
        )
        self._positions = torch.arange(len(dataset))  # of each image among the pixels
        self._pixels: RowStore | None = None  # [N, C, S, S] uint8
        if place is None:
            return
        shape, path = (dataset.channels, kept, kept), None
        if place == "disk":
            marks = f"{dataset.versions()} {interpolation} {part} {(len(dataset), *shape)}"
            name = f"images-{sha256(marks)[:32]}.uint8"
            path = Path(folder or cache_folder(), name)
        self._pixels = RowStore("images", place, len(dataset), shape, torch.uint8, device, path)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One image, decoded; without augmentation if pixels are kept."""
        pixels = self.dataset[index][0].to(self.device)
        return self._normalised(self._centre(pixels)), int(self.labels[index])

    def select(self, indices: Tensor) -> "CachedImages":
        """The chosen images as a data set of their own, with the same pixels."""
        chosen = super().select(indices)
        chosen.dataset = self.dataset.select(indices)
        return chosen

    def name_of(self, index: int) -> str:
        return self.dataset.name_of(index)

    def versions(self) -> list[str]:
        """As :meth:`EncodedImages.versions`, with what is done to the images."""
        done = [
            self.size,
            self.augment,
            self._mean.flatten().tolist(),
            self._std.flatten().tolist(),
        ]
        return [*self.dataset.versions(), repr(done)]

    @property
    def filled(self) -> int:
        """How many images need no decoding any more."""
        return int(self._has(torch.arange(len(self))).sum())

    def _has(self, indices: Tensor) -> Tensor:
        if self._pixels is None:
            return torch.zeros(len(indices), dtype=torch.bool)
        return self._pixels.has(self._positions[indices])

    def stream(
        self,
        requests: Iterator[tuple[int, list[int]]],
        read: Callable[..., Iterator[Batch | None]],
        seed: int,
        pin_memory: bool,
    ) -> Iterator[Batch]:
        """Yields batches on `device`, in the order of `requests`; called by `wfnet.data.batches`.

        Args:
            requests: (position, indices) of each batch.
            read: yields for each (position, indices) a batch of a data set, or None; with
                `pin_memory=True` in page-locked memory.
        """
        waiting: deque[tuple[int, Tensor, Tensor]] = deque()

        def missing() -> Iterator[tuple[int, list[int]]]:
            for position, indices in requests:
                wanted = torch.tensor(indices, dtype=torch.int64)
                there = self._has(wanted)
                waiting.append((position, wanted, there))
                yield position, wanted[~there].tolist()

        if self.filled == len(self):  # no worker has to be started
            decoded = (None for _ in missing())
        else:
            # What is kept is not sent from where the workers leave it.
            decoded = read(self.dataset, missing(), pin_memory=pin_memory and self._pixels is None)
        for batch in decoded:
            position, indices, there = waiting.popleft()
            if self._pixels is None:
                if batch is not None:
                    yield self._batch(batch.images, batch.indices, seed, position)
                continue
            if batch is not None:
                self._pixels.put(self._positions[batch.indices], batch.images)
                if len(batch.indices) == int((~there).sum()):
                    indices[~there] = batch.indices  # replacements of corrupt images among them
            indices = indices[self._has(indices)]
            if len(indices):
                pixels = self._pixels.get(self._positions[indices], pin_memory)
                yield self._batch(pixels, indices, seed, position)

    def _batch(self, pixels: Tensor, indices: Tensor, seed: int, position: int) -> Batch:
        """Bytes [n, C, S, S] as the network's input, on the device."""
        pixels = to_device_overlapped(pixels, self.device)
        if self.augment:
            images = _random_crops(pixels, _uniform(seed, position, indices, 5), self.size)
        else:
            images = self._centre(pixels)
        return Batch(self._normalised(images), self.labels[indices], indices)

    def _centre(self, pixels: Tensor) -> Tensor:
        functional = require("torchvision.transforms.v2.functional", "train")
        pixels = functional.center_crop(pixels, [self.size, self.size])
        return functional.to_dtype(pixels, torch.float32, scale=True)

    def _normalised(self, images: Tensor) -> Tensor:
        return images.sub_(self._mean).div_(self._std)


def _random_crops(pixels: Tensor, draw: Tensor, size: int) -> Tensor:
    """Crops of pixels [n, C, S, S], half of them mirrored, as [n, C, size, size] in 0..1.

    draw: [n, 5] on the CPU, uniform random numbers of each image.
    """
    area = _LEAST_CROP + (1.0 - _LEAST_CROP) * draw[:, 0]
    ratio = torch.exp((2 * draw[:, 1] - 1) * math.log(_WIDEST))
    # Extent of the crop as a part of the (square) image: never more than all of it.
    across = torch.sqrt(area * ratio).clamp_max(1.0)
    down = torch.sqrt(area / ratio).clamp_max(1.0)
    theta = torch.zeros(len(pixels), 2, 3)
    theta[:, 0, 0] = across * torch.where(draw[:, 2] < 0.5, -1.0, 1.0)
    theta[:, 1, 1] = down
    theta[:, 0, 2] = (1 - across) * (2 * draw[:, 3] - 1)
    theta[:, 1, 2] = (1 - down) * (2 * draw[:, 4] - 1)
    theta = to_device_async(theta, pixels.device)
    grid = F.affine_grid(theta, [len(pixels), 1, size, size], False)
    return F.grid_sample(pixels.float() / 255, grid, padding_mode="border", align_corners=False)


def _uniform(seed: int, position: int, indices: Tensor, count: int) -> Tensor:
    """[n, count] numbers in 0..1, a function of (seed, position, index) of each row alone.

    SplitMix64, for all rows at once: a generator for every image takes a step's worth of time.
    """
    with np.errstate(over="ignore"):
        state = _mixed(np.array([seed % (1 << 64)], np.uint64))
        state = _mixed(state ^ np.uint64(position))
        state = _mixed(state ^ indices.numpy().astype(np.uint64)[:, None])  # [n, 1]
        steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        bits = _mixed(state + steps) >> np.uint64(40)  # 24 bits: all that fp32 holds below 1
    return torch.from_numpy(bits.astype(np.float32) * np.float32(2**-24))


def _mixed(state: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64 (Steele, Lea & Flood)."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
