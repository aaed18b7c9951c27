import logging

import pytest
import torch
from image_files import CLASS_NAMES, write_image

from wfnet.data import CachedImages, ImageFiles, batches, cache, evaluation_transform, open_data

"""Cached pixels: the values are those of the files, nothing is decoded twice, room is checked."""


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


# -- on a device (pretended: it finds every wait) -------------------------------------------------


@pytest.mark.parametrize("augment", [False, True], ids=["plain", "augmented"])
def test_a_gpu_normalises_what_the_host_would(pretended_device, image_folder, augment):
    """Bytes cross the bus; the images are those that the host's transforms make."""
    settings = {"image_size": SIZE, "augment": augment, "validation_fraction": 0.34}
    on_host = open_data(image_folder, device="cpu", **settings)
    on_device = open_data(image_folder, device="cuda", **settings)
    assert not isinstance(on_host.train, CachedImages)
    assert isinstance(on_device.train, CachedImages)
    order = [torch.tensor([3, 0, 5]), torch.tensor([0, 8])]
    for part in ("train", "validation", "test"):
        chosen = order if part == "train" else [torch.tensor([0, 1])]
        found = list(batches(getattr(on_device, part), chosen, pin_memory=True, seed=7, start=2))
        expected = batches(getattr(on_host, part), chosen, seed=7, start=2)
        for mine, theirs in zip(found, expected, strict=True):
            assert mine.images.is_cuda
            assert torch.equal(mine.images.cpu(), theirs.images)
            assert torch.equal(mine.labels, theirs.labels)
            assert torch.equal(mine.indices, theirs.indices)


def test_draws_of_an_image_depend_on_seed_position_and_index_alone():
    uniform, indices = cache._uniform, torch.arange(4000)
    found = uniform(3, 5, indices, 5)
    assert found.dtype == torch.float32
    assert (found >= 0).all()
    assert (found < 1).all()
    assert torch.equal(uniform(3, 5, indices[17:18], 5), found[17:18])
    for others in (uniform(4, 5, indices, 5), uniform(3, 6, indices, 5), found.roll(1, 0)):
        assert (others != found).float().mean() > 0.99
    # Even, and columns and neighbours independent of each other.
    assert (found.mean(0) - 0.5).abs().max() < 0.02
    correlation = torch.corrcoef(found.T.double())
    assert (correlation - torch.eye(5)).abs().max() < 0.06
    neighbours = torch.stack((found[:-1, 0], found[1:, 0])).double()
    assert torch.corrcoef(neighbours)[0, 1].abs() < 0.06
    assert uniform(-1, 0, indices[:2], 5).shape == (2, 5)  # as for every other seed
