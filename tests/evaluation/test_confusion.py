import pytest
import torch
from torch import nn

import wfnet
from wfnet.data.tensor_images import TensorImages
from wfnet.evaluation.confusion import ConfusionChange, confusion_change

CLASSES = 5


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(6, CLASSES))  # fmt: skip
    net = wfnet.WFNet(model, CLASSES)
    with torch.no_grad():
        for alpha in net.filter_parameters():
            alpha.copy_(5 * torch.randn(alpha.shape))
    return net


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(CLASSES).repeat(6)
    pictures = 3 * torch.randn(len(labels), 1, 8, 8, generator=generator)
    return TensorImages(pictures, labels, [f"class {k}" for k in range(CLASSES)])


@pytest.mark.parametrize("batch_size", [3, 256])
def test_counts_are_those_of_one_image_at_a_time(net, images, batch_size):
    found = confusion_change(net, images, batch_size=batch_size, progress=False)
    own = torch.zeros(CLASSES, CLASSES, dtype=torch.int64)
    original, correct = own.clone(), own.clone()
    with torch.no_grad():
        for image, label in zip(images.images, images.labels.tolist(), strict=True):
            original[label, net(image[None]).argmax()] += 1
            for row in range(CLASSES):
                guess = net(image[None], forget=row).argmax().item()
                correct[row, label] += guess == label
                if row == label:
                    own[row, guess] += 1
    assert torch.equal(found.destinations, own)
    assert torch.equal(found.original_destinations, original)
    assert torch.equal(found.correct, correct)
    assert found.seen.eq(6).all()
    before = original.diagonal().double() / 6
    change = found.collateral()
    assert change.diagonal().isnan().all()
    expected = correct[1, 3] / 6 - before[3]
    assert change[1, 3].item() == pytest.approx(expected.item())
    assert found.shares().sum(1).tolist() == pytest.approx([1.0] * CLASSES)


def test_some_rows_and_some_other_rows(net, images):
    found = confusion_change(net, images, classes=[4, 1, 2], other_rows=1, progress=False)
    assert found.destinations.shape == (3, CLASSES)
    assert found.destinations.sum(1).tolist() == [6, 6, 6]
    assert int(found.seen.sum()) == 3 * 6 + len(images)  # own rows, and one other for each image
    whole = confusion_change(net, images, progress=False)
    assert torch.equal(found.destinations, whole.destinations[[4, 1, 2]])
    assert torch.equal(found.original_shares(), whole.original_shares()[[4, 1, 2]])


def test_the_table_survives_a_file(net, images, tmp_path):
    found = confusion_change(net, images, classes=[3, 0], progress=False)
    found.to_json(tmp_path / "confusion.json")
    again = ConfusionChange.from_json(tmp_path / "confusion.json")
    assert again.names == found.names
    for name in ("classes", "destinations", "original_destinations", "seen", "correct"):
        assert torch.equal(getattr(again, name), getattr(found, name))
    (tmp_path / "confusion.json").write_text('{"format": 1}')
    with pytest.raises(ValueError, match="not a confusion table of"):
        ConfusionChange.from_json(tmp_path / "confusion.json")
    with pytest.raises(FileNotFoundError):
        ConfusionChange.from_json(tmp_path / "none.json")
