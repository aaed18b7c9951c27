import pytest
import torch

from wfnet.data import Dataset, TensorImages, batches, tensor_images


def tensor_set(count=12, channels=3, dtype=torch.uint8, size=8, **kwargs):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, channels, size, size), generator=generator)
    images = images.to(torch.uint8) if dtype == torch.uint8 else images.to(dtype) / 255
    return TensorImages(images, torch.arange(count) % 3, ["a", "b", "c"], **kwargs)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_normalises_on_access(dtype):
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    data = tensor_set(dtype=dtype, mean=mean, std=std)
    raw = tensor_set(dtype=dtype).batch(torch.arange(12)).images
    expected = (raw - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    order = [torch.tensor([5, 2, 2]), [7]]
    batch, other = batches(data, order)
    torch.testing.assert_close(batch.images, expected[[5, 2, 2]], atol=1e-6, rtol=1e-6)
    assert batch.labels.tolist() == [2, 2, 2]
    assert (batch.indices.tolist(), other.indices.tolist()) == ([5, 2, 2], [7])
    image, label = data[5]
    assert torch.equal(image, batch.images[0])
    assert isinstance(label, int)
    assert isinstance(data, Dataset)


@pytest.mark.parametrize(("dtype", "size"), [(torch.uint8, 5), (torch.float32, 16)])
def test_resizing_on_access_equals_resizing_once(monkeypatch, dtype, size):
    once = tensor_set(dtype=dtype, size=8).images
    early = TensorImages(once, torch.zeros(12).long(), ["a"], size=size)
    assert early.images.shape[-1] == size
    monkeypatch.setattr(tensor_images, "RESIZED_BYTES", 10)
    late = TensorImages(once, torch.zeros(12).long(), ["a"], size=size)
    assert late.images.shape[-1] == 8
    rows = torch.tensor([3, 1, 7])
    torch.testing.assert_close(late.batch(rows).images, early.batch(rows).images)
    assert torch.equal(late.select(rows)[1][0], late.batch(rows).images[1])


def test_grey_becomes_colour_and_colour_grey():
    grey = tensor_set(channels=1)
    colour = TensorImages(grey.images, grey.labels, grey.classes, (0, 0, 0), (1, 2, 4), channels=3)
    batch = colour.batch(torch.arange(12)).images
    assert batch.shape == (12, 3, 8, 8)
    torch.testing.assert_close(batch[:, 0], 4 * batch[:, 2])
    repeated = grey.images.expand(-1, 3, -1, -1)
    assert torch.equal(
        TensorImages(repeated, grey.labels, grey.classes, channels=1).images, grey.images
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(3, 8, 8)}, "N, C, H, W"),
        ({"labels": torch.zeros(2).long()}, "3 images but 2 labels"),
        ({"labels": torch.tensor([0, 1, 2])}, "label 2 is outside 0..1"),
        ({"labels": torch.zeros(3)}, "integers"),
        ({"mean": (0.1, 0.2)}, "2 mean or std values"),
        ({"std": 0.0}, "std must be above 0"),
        ({"images": torch.zeros(3, 2, 8, 8), "channels": 3}, "2 channels cannot become 3"),
    ],
)
def test_bad_tensors_are_refused(change, message):
    good = {"images": torch.zeros(3, 1, 8, 8), "labels": torch.tensor([0, 1, 0])}
    with pytest.raises(ValueError, match=message):
        TensorImages(**{**good, "classes": ["a", "b"], **change})
