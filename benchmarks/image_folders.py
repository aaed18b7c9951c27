"""JPEG files to read, for wall time alone: pictures of nothing.

They are noise with the spectrum of photographs, whose files decode as photographs do.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

_PICTURES = 32


def photograph(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Returns pixels [height, width, 3] uint8 with the spectrum of photographs.

    Noise whose amplitude falls with frequency. It goes on at the opposite edge where it ends.
    """
    down, across = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    amplitude = 1 / np.maximum(np.hypot(down, across), 1 / width)
    spectrum = amplitude * np.exp(2j * np.pi * rng.random((3, *amplitude.shape)))
    pixels = np.fft.irfft2(spectrum, (height, width))
    pixels = 128 + 50 * pixels / pixels.std() + rng.normal(0, 8, pixels.shape)
    return pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


def write_images(root: Path, names: Sequence[str], height: int, width: int) -> None:
    """Writes files ``names`` below ``root`` by all cores; the same names get the same images.

    Each is one of a few pictures, moved, mirrored, its colours exchanged.
    """
    for folder in {(root / name).parent for name in names}:
        folder.mkdir(parents=True, exist_ok=True)
    write = functools.partial(_write, root, height, width)
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        for _ in pool.imap_unordered(write, enumerate(names), chunksize=64):
            pass


def _write(root: Path, height: int, width: int, numbered: tuple[int, str]) -> None:
    number, name = numbered
    rng = np.random.default_rng(number)
    image = _drawn(height, width)[rng.integers(_PICTURES)][:, :, rng.permutation(3)]
    image = np.roll(image, rng.integers((height, width)), (0, 1))[:, :: rng.choice((-1, 1))]
    Image.fromarray(np.ascontiguousarray(image)).save(root / name, quality=90)


@functools.lru_cache(1)
def _drawn(height: int, width: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [photograph(rng, height, width) for _ in range(_PICTURES)]
