"""Cached pixels: the values are those of the files, nothing is decoded twice, room is checked."""

import errno
import logging
import os
import resource

import pytest
import torch
from image_files import CLASS_NAMES, truncate, write_image

from wfnet.data import (
    CachedImages,
    CorruptImages,
    ImageFiles,
    batches,
    cache,
    evaluation_transform,
    open_data,
    pixel_store,
)

SIZE, MEAN, STD = 16, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
PLACES = ("host", "device", "disk")


def files(root, crop_pct=0.875):
    return ImageFiles(root / "train", evaluation_transform(SIZE, MEAN, STD, crop_pct=crop_pct))


def cached(root, place="host", folder=None, **kwargs):
    return CachedImages(files(root), place, SIZE, MEAN, STD, folder=folder, **kwargs)


@pytest.fixture
def decoded(monkeypatch):
    """Positions that were decoded in this process."""
    found = []
    original = ImageFiles.__getitem__

    def counting(self, index):
        found.append(index)
        return original(self, index)

    monkeypatch.setattr(ImageFiles, "__getitem__", counting)
    return found


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("workers", [0, 2])
def test_values_are_those_of_the_files(image_folder, tmp_path, place, workers):
    data = cached(image_folder, place, tmp_path)
    plain = files(image_folder)
    order = torch.tensor([3, 0, 17, 3, 9, 1, 2]).split(3)
    for _ in range(2):  # from the files, then from the cache
        for batch, indices in zip(batches(data, order, workers), order, strict=True):
            assert torch.equal(batch.indices, indices)
            assert torch.equal(batch.labels, plain.labels[indices])
            expected = torch.stack([plain[i][0] for i in indices.tolist()])
            assert torch.equal(batch.images, expected)
    assert torch.equal(data[5][0], plain[5][0])
    assert data.filled == 7


@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 1.0])
def test_any_crop(image_folder, crop_pct):
    plain = files(image_folder, crop_pct)
    data = CachedImages(plain, "host", SIZE, MEAN, STD, crop_pct=crop_pct)
    assert torch.equal(data[4][0], plain[4][0])


def test_no_image_is_decoded_twice(image_folder, decoded):
    data = cached(image_folder)
    for _ in range(3):
        list(batches(data, torch.arange(18).split(5)))
    assert decoded == list(range(18))


def test_an_image_twice_in_a_batch(image_folder, decoded):
    (batch,) = batches(cached(image_folder), [torch.tensor([4, 4, 2])])
    assert torch.equal(batch.images[0], batch.images[1])
    assert batch.indices.tolist() == [4, 4, 2]


def test_corrupt_images_are_left_out(image_folder, decoded):
    bad = truncate(image_folder / "train" / "bee" / "1.png")
    data = cached(image_folder)
    corrupt = CorruptImages(1)
    for _ in range(2):
        first, second = batches(data, torch.arange(6, 10).split(2), max_corrupt=corrupt)
        assert first.indices.tolist() == [6]
        assert second.indices.tolist() == [8, 9]
    assert list(corrupt.found) == [str(bad)]
    assert list(batches(data, [torch.tensor([7])], max_corrupt=corrupt)) == []


def test_a_disk_cache_is_found_again_until_an_image_changes(image_folder, tmp_path, decoded):
    order = torch.arange(18).split(6)
    list(batches(cached(image_folder, "disk", tmp_path / "c"), order))
    assert len(decoded) == 18
    again = cached(image_folder, "disk", tmp_path / "c")
    assert again.filled == 18
    list(batches(again, order))
    assert len(decoded) == 18
    write_image(image_folder / "train" / "ant" / "0.png", 99)
    assert cached(image_folder, "disk", tmp_path / "c").filled == 0
    other = CachedImages(files(image_folder), "disk", SIZE, MEAN, STD, "bilinear", folder=tmp_path)
    assert other.filled == 0


def test_an_interrupted_run_leaves_what_it_read(image_folder, tmp_path):
    stream = batches(cached(image_folder, "disk", tmp_path), torch.arange(18).split(6))
    next(stream)
    stream.close()
    assert cached(image_folder, "disk", tmp_path).filled == 6


def test_augmentation_depends_on_seed_and_position_alone(image_folder):
    def drawn(seed, start, workers=0):
        data = cached(image_folder, augment=True)
        order = torch.arange(12).split(4)
        return [b.images for b in batches(data, order, workers, seed=seed, start=start)]

    first = drawn(1, 0)
    assert all(torch.equal(a, b) for a, b in zip(first, drawn(1, 0, workers=2), strict=True))
    assert not torch.equal(first[0], drawn(2, 0)[0])
    resumed = cached(image_folder, augment=True)
    (later,) = batches(resumed, [torch.arange(8, 12)], seed=1, start=2)
    assert torch.equal(later.images, first[2])
    assert first[0].shape == (4, 3, SIZE, SIZE)


def test_whole_crops_without_flip_are_the_image(image_folder):
    data = CachedImages(files(image_folder), "host", SIZE, MEAN, STD, crop_pct=1.0, augment=True)
    data.prepare = cache.Preparation(SIZE, MEAN, STD, scale=(2.0, 2.0), flip=0.0)
    (batch,) = batches(data, [torch.arange(3)])
    plain = files(image_folder, 1.0)
    expected = torch.stack([plain[i][0] for i in range(3)])
    torch.testing.assert_close(batch.images, expected, atol=1e-5, rtol=0)
    data.prepare = cache.Preparation(SIZE, MEAN, STD, scale=(2.0, 2.0), flip=1.0)
    (batch,) = batches(data, [torch.arange(3)])
    torch.testing.assert_close(batch.images, expected.flip(3), atol=1e-5, rtol=0)


def test_a_selection_shares_the_store(image_folder, decoded):
    data = cached(image_folder)
    part = data.select(torch.tensor([5, 2, 11]))
    (batch,) = batches(part, [torch.tensor([2, 0])])
    assert torch.equal(batch.images[0], data[11][0])
    assert batch.labels.tolist() == [1, 0]
    assert (part.filled, data.filled) == (2, 2)
    assert decoded == [2, 0]  # positions in the selected files
    assert part.name_of(1) == data.name_of(2)


def test_the_size_is_logged_and_checked(image_folder, tmp_path, monkeypatch, caplog):
    with caplog.at_level(logging.INFO, "wfnet"):
        cached(image_folder)
    assert "18 images of 3 x 16 x 16 bytes" in caplog.text
    monkeypatch.setattr(pixel_store, "free_memory", lambda: 1000)
    with pytest.raises(ValueError, match=r"does not fit.*on host.*put it on device or disk"):
        cached(image_folder)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(pixel_store.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match="on disk"):
        cached(image_folder, "disk", tmp_path / "not" / "there")
    assert not (tmp_path / "not").exists()


def _errors(number):
    def fails(file, start, size):
        raise OSError(number, os.strerror(number))

    return fails


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the platform reserves nothing")
def test_space_on_disk_is_reserved_when_the_file_is_made(image_folder, tmp_path, monkeypatch):
    """A write through the map would kill the process once others have filled the disk."""
    monkeypatch.setattr(pixel_store, "_RESERVED_AT_ONCE", 5000)  # in several pieces
    data = cached(image_folder, "disk", tmp_path / "c")
    for path, size in zip(
        sorted((tmp_path / "c").iterdir(), reverse=True), (18 * 3 * SIZE**2, 18), strict=True
    ):
        assert path.stat().st_size == size
        assert path.stat().st_blocks * 512 >= size
    assert data.filled == 0


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the platform reserves nothing")
def test_a_sparse_cache_of_earlier_keeps_its_images_and_gets_its_space(
    image_folder, tmp_path, monkeypatch, decoded
):
    with monkeypatch.context() as sparse:
        sparse.setattr(pixel_store, "_allocate", lambda file, start, size: False)
        (first,) = batches(cached(image_folder, "disk", tmp_path), [torch.arange(3)])
    again = cached(image_folder, "disk", tmp_path)
    assert again.filled == 3
    (batch,) = batches(again, [torch.arange(3)])
    assert torch.equal(batch.images, first.images)
    assert decoded == [0, 1, 2]
    (pixels,) = tmp_path.glob("*.uint8")
    assert pixels.stat().st_blocks * 512 >= pixels.stat().st_size


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said_before_any_work_and_nothing_is_left(
    image_folder, tmp_path, monkeypatch, decoded, number
):
    reserved = []

    def full_after_a_while(file, start, size):
        reserved.append(start)
        if len(reserved) == 3:
            _errors(number)(file, start, size)

    monkeypatch.setattr(pixel_store, "_RESERVED_AT_ONCE", 5000)
    monkeypatch.setattr(os, "posix_fallocate", full_after_a_while, raising=False)
    with pytest.raises(ValueError, match=rf"made in .*/not/there: {os.strerror(number)}; make"):
        cached(image_folder, "disk", tmp_path / "not" / "there")
    assert reserved == [0, 5000, 10000]
    assert not (tmp_path / "not").exists()
    assert decoded == []


def test_a_full_disk_leaves_an_earlier_cache_as_it_was(image_folder, tmp_path, monkeypatch):
    (before,) = batches(cached(image_folder, "disk", tmp_path), [torch.arange(3)])
    monkeypatch.setattr(os, "posix_fallocate", _errors(errno.ENOSPC), raising=False)
    with pytest.raises(ValueError, match="No space left"):
        cached(image_folder, "disk", tmp_path)
    monkeypatch.undo()
    again = cached(image_folder, "disk", tmp_path)
    assert again.filled == 3
    (batch,) = batches(again, [torch.arange(3)])
    assert torch.equal(batch.images, before.images)


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL])
def test_file_systems_that_reserve_nothing(image_folder, tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "posix_fallocate", _errors(number), raising=False)
    data = cached(image_folder, "disk", tmp_path)
    (batch,) = batches(data, [torch.tensor([2])])
    assert torch.equal(batch.images[0], files(image_folder)[2][0])


def test_a_file_past_the_limit_of_the_process(image_folder, tmp_path):
    """The real system's refusal, not a pretended one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(ValueError, match=r"cannot be made in .*File too large"):
            cached(image_folder, "disk", tmp_path / "c")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "c").exists()


def test_an_interruption_while_space_is_reserved_leaves_nothing(
    image_folder, tmp_path, monkeypatch
):
    def interrupted(file, start, size):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "posix_fallocate", interrupted, raising=False)
    with pytest.raises(KeyboardInterrupt):
        cached(image_folder, "disk", tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_bad_places(image_folder):
    with pytest.raises(ValueError, match="device, host, disk, not on 'ram'"):
        cached(image_folder, "ram")


def test_default_folder(image_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cached(image_folder, "disk")
    assert len(list((tmp_path / "wfnet").glob("images-*"))) == 2


def test_open_data(image_folder, tmp_path, caplog):
    plain = open_data(image_folder, image_size=SIZE)
    splits = open_data(image_folder, image_size=SIZE, cache="disk", cache_dir=tmp_path)
    for part in ("train", "validation", "test"):
        ours, theirs = getattr(splits, part), getattr(plain, part)
        assert ours.classes == list(CLASS_NAMES)
        assert torch.equal(ours[1][0], theirs[1][0])
        assert torch.equal(ours.labels, theirs.labels)
    with pytest.raises(ValueError, match="cache='host' and a transform"):
        open_data(image_folder, cache="host", transform=lambda image: image)
    with caplog.at_level(logging.INFO, "wfnet"):
        open_data("digits", cache="host")
    assert "digits is in memory as it is" in caplog.text


@pytest.mark.parametrize("workers", [0, 1])
def test_without_a_place_nothing_is_kept(image_folder, workers):
    data = cached(image_folder, None)
    plain = files(image_folder)
    for _ in range(2):
        (batch,) = batches(data, [torch.tensor([2, 2, 7])], workers)
        assert torch.equal(batch.images, torch.stack([plain[i][0] for i in (2, 2, 7)]))
    assert data.filled == 0
    assert torch.equal(data.select(torch.tensor([7]))[0][0], plain[7][0])
