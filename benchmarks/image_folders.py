"""Folders of JPEG files to untrain on, for wall time alone: pictures of nothing.

They are noise with the spectrum of photographs, whose files decode as photographs do.

Files are written by all cores. A folder says when it is complete; one that is not is made anew.
"""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from bench_data import photograph
from PIL import Image

from wfnet.services.files import write_json

PARTS = ("train", "val", "test")
_COMPLETE = "complete.json"
_QUALITY = 90
_AT_ONCE = 64  # files that are rendered together
_PICTURES = 32  # of each process; a file is one of them, moved, mirrored, its colours exchanged
_BYTES_PER_PIXEL = 0.8  # of a file, no less than they take


@dataclass(frozen=True)
class ImageFolder:
    """What a folder is to hold.

    Attributes:
        train, val, test: images of each class in each part.
        pixels: of the files, a side.

    Raises:
        ValueError: for numbers that make no sense.
    """

    classes: int
    train: int
    val: int
    test: int
    pixels: int = 224

    def __post_init__(self) -> None:
        if self.classes < 2 or min(self.train, self.val, self.test) < 1 or self.pixels < 8:
            raise ValueError(
                "a folder needs 2 classes, an image of each in every part and 8 pixels, not "
                f"{self.classes} classes with {self.train}, {self.val} and {self.test} images of "
                f"{self.pixels} pixels"
            )

    @property
    def files(self) -> int:
        return self.classes * (self.train + self.val + self.test)

    def place(self, index: int) -> tuple[int, str]:
        """Returns label and path below the folder of file number ``index``."""
        number, label = divmod(index, self.classes)
        part = "train" if number < self.train else "val"
        part = "test" if number >= self.train + self.val else part
        return label, f"{part}/{label:04d}/{number:05d}.jpg"


def make(wanted: ImageFolder, below: Path, processes: int) -> Path:
    """Returns the folder, made below ``below`` by so many processes unless it is there.

    Raises:
        ValueError: if there is no room for it.
    """
    described = json.dumps(asdict(wanted), sort_keys=True)
    name = f"images-{wanted.classes}-{hashlib.sha256(described.encode()).hexdigest()[:8]}"
    root = below / name
    if (root / _COMPLETE).is_file():
        return root
    if root.exists():
        shutil.rmtree(root)
    below.mkdir(parents=True, exist_ok=True)
    most, free = wanted.files * wanted.pixels**2 * _BYTES_PER_PIXEL, shutil.disk_usage(below).free
    if free < most:
        raise ValueError(
            f"{wanted.files:,} images may take {most / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB "
            f"are free in {below}: choose another --scratch, or fewer images"
        )
    for part in PARTS:
        for label in range(wanted.classes):
            (root / part / f"{label:04d}").mkdir(parents=True)
    write = functools.partial(_write, root, wanted)
    with multiprocessing.get_context("fork").Pool(processes, torch.set_num_threads, (1,)) as pool:
        for _ in pool.imap_unordered(write, range(0, wanted.files, _AT_ONCE)):
            pass
    write_json(root / _COMPLETE, asdict(wanted))
    return root


def _write(root: Path, wanted: ImageFolder, first: int) -> None:
    """Writes files ``first .. first + _AT_ONCE - 1``."""
    indices = range(first, min(first + _AT_ONCE, wanted.files))
    for index, image in zip(indices, _pictures(wanted, indices), strict=True):
        Image.fromarray(image).save(root / wanted.place(index)[1], quality=_QUALITY)


def _pictures(wanted: ImageFolder, indices: range) -> list[np.ndarray]:
    rng = np.random.default_rng([0, indices.start])
    drawn = _drawn(wanted.pixels)
    made = []
    for _ in indices:
        image = drawn[rng.integers(len(drawn))][:, :, rng.permutation(3)]
        moved = rng.integers(wanted.pixels), rng.integers(wanted.pixels)
        image = np.roll(image, moved, (0, 1))
        made.append(np.ascontiguousarray(image[:, :: rng.choice((-1, 1))]))
    return made


@functools.lru_cache(1)
def _drawn(pixels: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [photograph(rng, pixels, pixels) for _ in range(_PICTURES)]
