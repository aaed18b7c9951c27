"""Folders of image files in their real formats, small, for tests of data and command line."""

from pathlib import Path

import numpy as np
import pytest
from image_files import CLASS_NAMES, write_idx, write_image


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """`train/` with 6 and `val/` with 2 images for each of three classes, in five formats."""
    root = tmp_path / "images"
    suffixes = ("jpg", "png", "jpeg", "webp", "bmp", "JPEG")
    for label, name in enumerate(CLASS_NAMES):
        for number in range(6):
            write_image(root / "train" / name / f"{number}.{suffixes[number]}", 10 * label + number)
        for number in range(2):
            write_image(root / "val" / name / f"{number}.jpg", 100 + 10 * label + number)
    return root


@pytest.fixture
def mnist_folder(tmp_path: Path) -> Path:
    """40 training and 20 test images in IDX files, the training files compressed."""
    rng = np.random.default_rng(0)
    root = tmp_path / "idx"
    for part, count, suffix in (("train", 40, ".gz"), ("t10k", 20, "")):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        write_idx(root / f"{part}-images-idx3-ubyte{suffix}", images)
        write_idx(root / f"{part}-labels-idx1-ubyte{suffix}", np.arange(count) % 10)
    return root
