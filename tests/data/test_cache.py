"""Cached pixels: the values are those of the files, nothing is decoded twice."""

import pytest
import torch
from image_files import write_image

from wfnet.data import CachedImages, ImageFiles, batches, cache, evaluation_transform, open_data

SIZE, MEAN, STD = 16, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


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


@pytest.mark.parametrize(
    ("place", "workers"), [("host", 0), ("disk", 2), ("device", 0), (None, 0), (None, 1)]
)
def test_values_are_those_of_the_files(image_folder, tmp_path, place, workers):
    data = cached(image_folder, place, tmp_path)
    plain = files(image_folder)
    order = torch.tensor([3, 0, 17, 3, 9, 1, 2, 2]).split(3)
    for _ in range(2):  # from the files, then from the cache
        for batch, indices in zip(batches(data, order, workers), order, strict=True):
            assert torch.equal(batch.indices, indices)
            assert torch.equal(batch.labels, plain.labels[indices])
            expected = torch.stack([plain[i][0] for i in indices.tolist()])
            assert torch.equal(batch.images, expected)
    assert torch.equal(data[5][0], plain[5][0])
    assert data.filled == (0 if place is None else 6)
    other_crop = CachedImages(plain, "host", SIZE, MEAN, STD, crop_pct=0.9)
    assert torch.equal(other_crop[4][0], files(image_folder, 0.9)[4][0])


def test_no_image_is_decoded_twice_in_any_selection(image_folder, decoded):
    data = cached(image_folder)
    part = data.select(torch.tensor([5, 2, 11]))
    (batch,) = batches(part, [torch.tensor([2, 0])])
    assert torch.equal(batch.images[0], files(image_folder)[11][0])
    assert batch.labels.tolist() == [1, 0]
    assert (part.filled, data.filled) == (2, 2)
    assert part.name_of(1) == data.name_of(2)
    decoded.clear()
    for _ in range(2):
        list(batches(data, torch.arange(18).split(5)))
    assert sorted(decoded) == sorted(set(range(18)) - {5, 11})


def test_a_disk_cache_is_found_again_until_an_image_changes(image_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    stream = batches(cached(image_folder, "disk"), torch.arange(18).split(6))
    next(stream)
    stream.close()  # an interrupted run leaves what it has read
    again = cached(image_folder, "disk")
    assert again.filled == 6
    plain = files(image_folder)
    (batch,) = batches(again, [torch.arange(5, 7)])
    assert torch.equal(batch.images, torch.stack([plain[5][0], plain[6][0]]))
    assert len(list((tmp_path / "wfnet").glob("images-*"))) == 2
    write_image(image_folder / "train" / "ant" / "0.png", 99)
    assert cached(image_folder, "disk").filled == 0


def test_augmentation_depends_on_seed_and_position_alone(image_folder):
    def drawn(seed, order, workers=0, start=0):
        data = cached(image_folder, augment=True)
        return [b.images for b in batches(data, order, workers, seed=seed, start=start)]

    order = torch.arange(12).split(4)
    first = drawn(1, order)
    assert first[0].shape == (4, 3, SIZE, SIZE)
    assert all(torch.equal(a, b) for a, b in zip(first, drawn(1, order, workers=2), strict=True))
    assert torch.equal(drawn(1, order[2:], start=2)[0], first[2])
    assert not torch.equal(first[0], drawn(2, order)[0])


def test_the_largest_crop_is_the_image(monkeypatch):
    monkeypatch.setattr(cache, "_LEAST_CROP", 2.0)
    draw = torch.tensor([[0.0, 0.5, mirror, 0.5, 0.5] for mirror in (0.9, 0.0)])
    pixels = torch.randint(0, 256, (1, 3, SIZE, SIZE)).byte()
    expected = torch.cat((pixels, pixels.flip(3))).float() / 255
    found = cache._random_crops(pixels.expand(2, -1, -1, -1), draw, SIZE)
    torch.testing.assert_close(found, expected)


def test_draws_of_an_image_depend_on_seed_position_and_index_alone():
    uniform, indices = cache._uniform, torch.arange(4000)
    found = uniform(3, 5, indices, 5)
    assert found.dtype == torch.float32
    assert 0 <= found.min() <= found.max() < 1
    assert torch.equal(uniform(3, 5, indices[17:18], 5), found[17:18])
    # Even, and columns, neighbours, seeds and positions independent of each other.
    assert (found.mean(0) - 0.5).abs().max() < 0.02
    others = (uniform(4, 5, indices, 5), uniform(3, 6, indices, 5), found.roll(1, 0))
    rows = torch.cat([found, *(other[:, :1] for other in others)], 1).T.double()
    assert (torch.corrcoef(rows) - torch.eye(8)).abs().max() < 0.06


@pytest.mark.parametrize("augment", [False, True], ids=["plain", "augmented"])
def test_a_gpu_normalises_what_the_host_would(pretended_device, image_folder, augment):
    """Bytes cross the bus; the images are those that the host's transforms make."""
    settings = {"image_size": SIZE, "augment": augment, "validation_fraction": 0.34}
    on_host = open_data(image_folder, device="cpu", **settings)
    on_device = open_data(image_folder, device="cuda", **settings)
    assert isinstance(on_device.train, CachedImages)
    for part in ("train", "test"):
        order = [torch.tensor([3, 0, 5]), torch.tensor([0, 4])]
        found = list(batches(getattr(on_device, part), order, pin_memory=True, seed=7, start=2))
        expected = batches(getattr(on_host, part), order, seed=7, start=2)
        for mine, theirs in zip(found, expected, strict=True):
            assert mine.images.is_cuda
            assert torch.equal(mine.images.cpu(), theirs.images)
            assert torch.equal(mine.labels, theirs.labels)
