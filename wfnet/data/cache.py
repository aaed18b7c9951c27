"""Decoded images kept as uint8, so that no image is decoded twice.

Decoding JPEG files is what starves a GPU. A run draws its images again and again, so the first time
an image is drawn its resized pixels are stored - on the device, on the host or on disk - and from
then on batches are gathered from there. Normalisation and augmentation run on the device, on whole
batches; a byte per value crosses the bus instead of four, beside what the device computes.
"""

import contextlib
import errno
import hashlib
import logging
import math
import os
import shutil
from abc import ABC, abstractmethod
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
from wfnet.data.transforms import evaluation_transform, training_transform
from wfnet.services.device_copies import to_device_async, to_device_overlapped
from wfnet.services.extras import require

logger = logging.getLogger("wfnet")

PLACES = ("device", "host", "disk")
# Part of the free space that a cache may take: the network, batches and everybody else need some.
_SHARE = 0.8


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/wfnet`, or `~/.cache/wfnet`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "wfnet")


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
        self.store: _Store | None = None
        if place == "disk":
            folder = cache_folder() if folder is None else Path(folder)
            marks = "\n".join([*dataset.versions(), repr(decode), repr(shape), "pil"])
            digest = hashlib.sha256(marks.encode()).hexdigest()[:32]
            _check_room(place, shape, _free_on_disk(folder, digest))
            self.store = _DiskStore(folder, digest, shape)
        elif place is not None:
            on_gpu = place == "device" and self.device.type == "cuda"
            free = torch.cuda.mem_get_info(self.device)[0] if on_gpu else free_memory()
            _check_room(place, shape, free)
            self.store = _MemoryStore(shape, self.device if place == "device" else "cpu")

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
        chosen.store = None if self.store is None else _PartOfStore(self.store, indices)
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


# -- where pixels lie -----------------------------------------------------------------------------


class _Store(ABC):
    """Pixels [N, C, S, S] uint8 of the images that were put there."""

    @abstractmethod
    def has(self, indices: Tensor) -> Tensor:
        """[n] bool: which of the images are there."""

    @abstractmethod
    def put(self, indices: Tensor, pixels: Tensor) -> None:
        """Keeps pixels [n, C, S, S]."""

    @abstractmethod
    def get(self, indices: Tensor, pin_memory: bool = False) -> Tensor:
        """Pixels [n, C, S, S], a copy; on the host page-locked if that is asked for."""


class _MemoryStore(_Store):
    def __init__(self, shape: tuple[int, ...], device: torch.device | str):
        # Pages that are never written to take no memory on the host.
        self.pixels = torch.empty(shape, dtype=torch.uint8, device=device)
        self.filled = torch.zeros(shape[0], dtype=torch.bool)

    def has(self, indices: Tensor) -> Tensor:
        return self.filled[indices]

    def put(self, indices: Tensor, pixels: Tensor) -> None:
        self.pixels[to_device_async(indices, self.pixels.device)] = to_device_async(
            pixels, self.pixels.device
        )
        self.filled[indices] = True

    def get(self, indices: Tensor, pin_memory: bool = False) -> Tensor:
        if self.pixels.device.type == "cpu":
            return _gathered(self.pixels, indices, pin_memory)
        return self.pixels[to_device_async(indices, self.pixels.device)]


class _DiskStore(_Store):
    """A file of pixels and a file of marks, named by a digest of what they hold.

    Pixels are written before their mark, so that an interrupted run leaves no half image that
    counts. Several processes may fill one cache: they write the same bytes.
    """

    def __init__(self, folder: Path, digest: str, shape: tuple[int, ...]):
        pixels, filled = _pixel_file(folder, digest), folder / f"images-{digest}.filled"
        _reserve({pixels: math.prod(shape), filled: shape[0]})
        self.pixels = np.memmap(pixels, np.uint8, "r+", shape=shape)
        self.filled = np.memmap(filled, np.uint8, "r+", shape=shape[:1])
        there = int(self.filled.sum())
        if there:
            logger.info("cache: %d of %d images are there from an earlier run", there, shape[0])

    def has(self, indices: Tensor) -> Tensor:
        return torch.from_numpy(self.filled[indices.numpy()] != 0)

    def put(self, indices: Tensor, pixels: Tensor) -> None:
        self.pixels[indices.numpy()] = pixels.cpu().numpy()
        self.filled[indices.numpy()] = 1

    def get(self, indices: Tensor, pin_memory: bool = False) -> Tensor:
        if not pin_memory:
            return torch.from_numpy(self.pixels[indices.numpy()])
        return _gathered(torch.from_numpy(self.pixels), indices, pin_memory)


def _gathered(pixels: Tensor, indices: Tensor, pin_memory: bool) -> Tensor:
    """``pixels[indices]`` [n, C, S, S] on the host, written where it is to lie at once."""
    shape = (len(indices), *pixels.shape[1:])
    out = torch.empty(shape, dtype=pixels.dtype, pin_memory=pin_memory)
    return torch.index_select(pixels, 0, indices, out=out)


class _PartOfStore(_Store):
    """Some images of a store."""

    def __init__(self, store: _Store, chosen: Tensor):
        self.store = store
        self.chosen = chosen

    def has(self, indices: Tensor) -> Tensor:
        return self.store.has(self.chosen[indices])

    def put(self, indices: Tensor, pixels: Tensor) -> None:
        self.store.put(self.chosen[indices], pixels)

    def get(self, indices: Tensor, pin_memory: bool = False) -> Tensor:
        return self.store.get(self.chosen[indices], pin_memory)


def _pixel_file(folder: Path, digest: str) -> Path:
    return folder / f"images-{digest}.uint8"


# -- room -----------------------------------------------------------------------------------------

_RESERVED_AT_ONCE = 256 * 2**20  # bytes; between two pieces a signal is heard
# What a file system answers that reserves nothing.
_NO_RESERVATION = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


def _reserve(files: dict[Path, int]) -> None:
    """Gives every file its size and its space on disk; bytes that are there stay.

    A write through a memory map to a file without its space kills the process when the disk is
    full. Where the file system cannot reserve, the space is taken as it is written to.

    Raises ValueError if there is no room, and leaves nothing behind that was not there before.
    """
    fresh: list[Path] = []
    try:
        for path, size in files.items():
            fresh += [folder for folder in path.parents if not folder.exists()][::-1]
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                fresh.append(path)
            with open(path, "ab") as file:
                if file.tell() != size:
                    file.truncate(size)
                for start in range(0, size, _RESERVED_AT_ONCE):
                    if not _allocate(file.fileno(), start, min(_RESERVED_AT_ONCE, size - start)):
                        break
    except BaseException as error:
        for made in reversed(fresh):
            with contextlib.suppress(OSError):
                made.rmdir() if made.is_dir() else made.unlink()
        if isinstance(error, OSError):
            needed = sum(files.values()) / 2**30
            raise ValueError(
                f"the cache of {needed:.2f} GiB cannot be made in {path.parent}: "
                f"{error.strerror or error}; make room there, choose another folder, or put it on "
                "host or device"
            ) from error
        raise


def _allocate(file: int, start: int, size: int) -> bool:
    """Space for a piece of a file; False where that cannot be had in advance."""
    if not hasattr(os, "posix_fallocate"):
        return False
    try:
        os.posix_fallocate(file, start, size)
    except OSError as error:
        if error.errno in _NO_RESERVATION:
            return False
        raise
    return True


def _check_room(place: str, shape: tuple[int, ...], free: int) -> None:
    """Logs how large the cache becomes.

    Raises ValueError if it does not fit into `free` bytes.
    """
    needed = math.prod(shape)
    images = f"{shape[0]:,} images of {shape[1]} x {shape[2]} x {shape[3]} bytes"
    text = f"{images} = {needed / 2**30:.2f} GiB on {place}, {free / 2**30:.2f} GiB are free there"
    if needed > _SHARE * free:
        others = [other for other in PLACES if other != place]
        raise ValueError(
            f"the cache does not fit: {text} and {_SHARE:.0%} of that may be used; put it on "
            f"{' or '.join(others)}, or do without"
        )
    logger.info("cache: %s", text)


def _free_on_disk(folder: Path, digest: str) -> int:
    """Free bytes, with those that this cache takes already."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    pixels = _pixel_file(folder, digest)
    return free + (pixels.stat().st_blocks * 512 if pixels.exists() else 0)


def free_memory() -> int:
    """Bytes of main memory that can be had, under the limit of the container if there is one."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = (
            next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024
        )
    except (OSError, StopIteration):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
    except OSError:
        return free
    return free if limit == "max" else min(free, int(limit) - used)
