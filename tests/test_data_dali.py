"""Decoding by DALI, on the CPU where there is no GPU; skipped where DALI is not installed."""

import io

import numpy as np
import pytest
import torch
from image_files import truncate
from PIL import Image

from wfnet.data import CachedImages, CorruptImages, ImageFiles, batches, evaluation_transform

SIZE, MEAN, STD = 48, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@pytest.fixture
def jpegs(tmp_path):
    """Smooth JPEG files of odd sizes: where a pixel is taken from shows in its value."""
    sizes = [(81, 64), (64, 97), (70, 70), (113, 61), (59, 120), (100, 75)]
    for number, size in enumerate(sizes):
        pixels = np.random.default_rng(number).integers(0, 256, (5, 6, 3), dtype=np.uint8)
        path = tmp_path / "jpegs" / f"class{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path, quality=95)
    return tmp_path / "jpegs"


def files(root, crop_pct=0.875):
    return ImageFiles(root, evaluation_transform(SIZE, MEAN, STD, crop_pct=crop_pct))


def decoded(root, place=None, crop_pct=0.875, **kwargs):
    return CachedImages(
        files(root, crop_pct), place, SIZE, MEAN, STD, crop_pct=crop_pct, decoder="dali", **kwargs
    )


def test_a_missing_package_is_named(jpegs, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "nvidia.dali", None)
    with pytest.raises(ImportError, match=r"pip install wfnet\[dali\]"):
        decoded(jpegs)


def test_unknown_decoders_are_refused(jpegs):
    with pytest.raises(ValueError, match="pil, dali, not 'turbo'"):
        CachedImages(files(jpegs), None, SIZE, MEAN, STD, decoder="turbo")


class TestWithDali:
    @pytest.fixture(autouse=True)
    def _installed(self):
        pytest.importorskip("nvidia.dali")

    @pytest.mark.parametrize("crop_pct", [0.875, 0.95, 1.0])
    def test_the_geometry_is_that_of_pillow(self, jpegs, crop_pct):
        plain = files(jpegs, crop_pct)
        (batch,) = batches(decoded(jpegs, crop_pct=crop_pct), [torch.tensor([5, 0, 1, 2, 3, 4])])
        expected = torch.stack([plain[i][0] for i in batch.indices.tolist()])
        levels = (batch.images - expected).abs() * torch.tensor(STD).reshape(3, 1, 1) * 255
        assert levels.max() < 4
        assert levels.mean() < 0.6

    def test_order_and_sizes_of_batches(self, jpegs):
        order = [torch.tensor(part) for part in ([0], [3, 1], [], [2, 4, 5], [1], [0, 0])]
        found = list(batches(decoded(jpegs), order, workers=2))
        assert [b.indices.tolist() for b in found] == [o.tolist() for o in order if len(o)]
        assert torch.equal(found[0].images[0], found[-1].images[1])
        assert torch.equal(found[0].labels, files(jpegs).labels[:1])

    def test_corrupt_files_are_left_out(self, jpegs):
        cut = truncate(jpegs / "class0" / "2.jpg")
        (jpegs / "class1" / "3.jpg").write_bytes(b"no image")
        data = decoded(jpegs)
        corrupt = CorruptImages(2)
        first, second = batches(data, torch.arange(6).split(3), max_corrupt=corrupt)
        assert first.indices.tolist() + second.indices.tolist() == [
            i for i in range(6) if data.name_of(i) not in corrupt.found
        ]
        assert set(corrupt.found) == {str(cut), str(jpegs / "class1" / "3.jpg")}

    @pytest.mark.parametrize("place", ["host", "disk"])
    def test_a_cache_keeps_what_dali_decoded(self, jpegs, tmp_path, place):
        data = decoded(jpegs, place, folder=tmp_path)
        first = [b.images for b in batches(data, torch.arange(6).split(4))]
        assert data.filled == 6
        again = [b.images for b in batches(data, torch.arange(6).split(4))]
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert torch.equal(data[4][0], first[1][0])

    def test_grey_and_png(self, tmp_path):
        pixels = np.random.default_rng(0).integers(0, 256, (6, 6), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).resize((60, 50)).save(file, "PNG")
        for number in range(2):
            path = tmp_path / "a" / f"{number}.png"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(file.getvalue())
        transform = evaluation_transform(SIZE, [0.5], [0.25])
        grey = ImageFiles(tmp_path, transform, channels=1)
        data = CachedImages(grey, None, SIZE, [0.5], [0.25], decoder="dali")
        (batch,) = batches(data, [torch.arange(2)])
        assert batch.images.shape == (2, 1, SIZE, SIZE)
        assert (batch.images[0] - grey[0][0]).abs().max() * 0.25 * 255 < 4
