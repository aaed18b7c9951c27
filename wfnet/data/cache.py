"""Decoded images kept as uint8, so that no image is decoded twice.

Decoding JPEG files is what starves a GPU. A run draws its images again and again, so the first time
an image is drawn its resized pixels are stored - on the device, on the host or on disk - and from
then on batches are gathered from there. Normalisation and augmentation run on the device, on whole
batches; a byte per value crosses the bus instead of four, beside what the device computes.
"""

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from wfnet.data.dataset import Batch, name_of
from wfnet.data.encoded import EncodedImages
from wfnet.data.pixel_store import PLACES, PixelStore, cache_folder
from wfnet.data.transforms import evaluation_transform, training_transform
from wfnet.services.device_copies import to_device_async, to_device_overlapped
from wfnet.services.extras import require


@dataclass(frozen=True)
class Preparation:
    """From stored pixels to the network's input, on the device, a batch at a time.

    size:      of the result; a smaller one than the stored size is cropped from the centre.
    mean, std: per channel, on a scale of 0 to 1.
    scale:     for augmentation: range of the area that a random crop covers (aspect ratio 3/4 to
               4/3, resized to `size`); None for none.
    flip:      probability of mirroring; used with `scale`.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: tuple[float, float] | None = None
    flip: float = 0.5

    def __call__(self, pixels: Tensor, draw: Tensor | None = None) -> Tensor:
        """Images [n, C, size, size] float32 from pixels [n, C, S, S] uint8.

        draw: [n, 5] on the CPU, uniform random numbers of each image for its augmentation.
        """
        functional = require("torchvision.transforms.v2.functional", "train")
        if self.scale is None:
            pixels = functional.center_crop(pixels, [self.size, self.size])
            images = functional.to_dtype(pixels, torch.float32, scale=True)
        else:
            images = self._random_crops(pixels.float() / 255, draw)
        mean, std = _statistics(self.mean, self.std, images.device)
        return images.sub_(mean).div_(std)

    def _random_crops(self, images: Tensor, draw: Tensor) -> Tensor:
        n = len(images)
        area = self.scale[0] + (self.scale[1] - self.scale[0]) * draw[:, 0]
        ratio = torch.exp((2 * draw[:, 1] - 1) * math.log(4 / 3))
        # Extent of the crop as a part of the (square) image: never more than all of it.
        across = torch.sqrt(area * ratio).clamp_max(1.0)
        down = torch.sqrt(area / ratio).clamp_max(1.0)
        mirrored = torch.where(draw[:, 2] < self.flip, -1.0, 1.0)
        theta = torch.zeros(n, 2, 3)
        theta[:, 0, 0] = across * mirrored
        theta[:, 1, 1] = down
        theta[:, 0, 2] = (1 - across) * (2 * draw[:, 3] - 1)
        theta[:, 1, 2] = (1 - down) * (2 * draw[:, 4] - 1)
        grid = F.affine_grid(
            to_device_async(theta, images.device), [n, 1, self.size, self.size], False
        )
        return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


@lru_cache(16)
def _statistics(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Mean and deviation ``[C, 1, 1]`` on the device; made there once, since it waits for that."""
    made = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (mean, std))
    return tuple(values.to(device) for values in made)


class CachedImages(torch.utils.data.Dataset):
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

    The size is logged first, and space on disk is reserved. Raises ValueError for a place that is
    none of these, or too small for the cache.
    """

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
        if place not in (None, *PLACES):
            raise ValueError(f"a cache is on {', '.join(PLACES)}, not on {place!r}")
        self.device = torch.device(device)
        # With augmentation all of the resized square is kept, otherwise what the crop leaves of it.
        if augment and place is None:
            decode, augment = _PixelTransform(size, interpolation), False
        elif augment:
            decode = _PixelTransform(math.floor(size / crop_pct), interpolation, 1.0)
        else:
            decode = _PixelTransform(size, interpolation, crop_pct)
        self.dataset = dataset.with_transform(decode)
        self.labels = dataset.labels
        self.classes = dataset.classes
        self.place = place
        self.prepare = Preparation(
            size, tuple(mean), tuple(std), scale=(0.25, 1.0) if augment else None
        )
        shape = (len(dataset), dataset.channels, decode.size, decode.size)
        self.store: PixelStore | None = None
        if place == "disk":
            folder = cache_folder() if folder is None else Path(folder)
            marks = "\n".join([*dataset.versions(), repr(decode), repr(shape), "pil"])
            digest = hashlib.sha256(marks.encode()).hexdigest()[:32]
            self.store = PixelStore.on_disk(folder, digest, shape)
        elif place is not None:
            where = self.device if place == "device" else torch.device("cpu")
            self.store = PixelStore.in_memory(place, shape, where)

    @property
    def multi_hot(self) -> Tensor | None:
        """True labels [N, K] bool of images with several labels; None for others."""
        return getattr(self.dataset, "multi_hot", None)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One image; without augmentation if pixels are kept."""
        position = torch.tensor([index])
        if self.store is not None and self.store.has(position):
            pixels = self.store.get(position)
        else:
            pixels = self.dataset[index][0].unsqueeze(0)
            if self.store is not None:
                self.store.put(position, pixels)
        plain = Preparation(self.prepare.size, self.prepare.mean, self.prepare.std)
        images = plain(pixels.to(self.device))
        return images[0], int(self.labels[index])

    def name_of(self, index: int) -> str:
        return name_of(self.dataset, index)

    @property
    def filled(self) -> int:
        """How many images need no decoding any more."""
        return 0 if self.store is None else int(self.store.has(torch.arange(len(self))).sum())

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
                there = torch.zeros(len(wanted), dtype=torch.bool)
                if self.store is not None:
                    there = self.store.has(wanted)
                waiting.append((position, wanted, there))
                yield position, wanted[~there].tolist()

        if self.filled == len(self):  # no worker has to be started
            decoded = (None for _ in missing())
        else:
            # What goes into a store is not sent from where the workers leave it.
            decoded = read(self.dataset, missing(), pin_memory=pin_memory and self.store is None)
        for batch in decoded:
            position, indices, there = waiting.popleft()
            if self.store is None:
                if batch is not None:
                    yield self._batch(batch.images, batch.indices, seed, position)
                continue
            if batch is not None:
                self.store.put(batch.indices, batch.images)
                if len(batch.indices) == int((~there).sum()):
                    indices[~there] = batch.indices  # replacements of corrupt images among them
            indices = indices[self.store.has(indices)]
            if len(indices):
                yield self._batch(self.store.get(indices, pin_memory), indices, seed, position)

    def _batch(self, pixels: Tensor, indices: Tensor, seed: int, position: int) -> Batch:
        draw = None
        if self.prepare.scale is not None:
            draw = _uniform(seed, position, indices, 5)
        pixels = to_device_overlapped(pixels, self.device)
        return Batch(self.prepare(pixels, draw), self.labels[indices], indices)

    def select(self, indices: Tensor) -> "CachedImages":
        """The chosen images as a data set of their own, with the same store."""
        chosen = object.__new__(CachedImages)
        chosen.__dict__.update(self.__dict__)
        chosen.dataset = self.dataset.select(indices)
        chosen.labels = self.labels[indices]
        chosen.store = None if self.store is None else self.store.select(indices)
        return chosen


class _PixelTransform:
    """PIL image -> uint8 [C, S, S]: a transform before its conversion to float.

    crop_pct: of `evaluation_transform`; without it, `training_transform`.
    """

    def __init__(self, size: int, interpolation: str, crop_pct: float | None = None):
        self.size = size
        self.settings = (size, interpolation, crop_pct)
        if crop_pct is None:
            compose = training_transform(size, interpolation=interpolation)
        else:
            compose = evaluation_transform(size, interpolation=interpolation, crop_pct=crop_pct)
        self.steps = compose.transforms[:3]  # resize and crop (or crop and mirror), to tensor

    def __call__(self, image: Any) -> Tensor:
        for step in self.steps:
            image = step(image)
        return image

    def __repr__(self) -> str:
        return f"pixels{self.settings}"


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
