"""Where images of forgotten classes go, and the order of layers."""

import pytest
import torch
from torch import nn

import wfnet
from wfnet import models
from wfnet.data.tensor_images import TensorImages
from wfnet.evaluation.confusion import ConfusionChange, confusion_change
from wfnet.fusion.trace import execution_order

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


def test_the_network_is_not_changed(net, images):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    modes = [m.training for m in net.modules()]
    state = torch.get_rng_state()
    confusion_change(net, images, progress=False)
    assert all(torch.equal(before[n], v) for n, v in net.state_dict().items())
    assert [m.training for m in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_layers_in_the_order_of_the_forward_pass():
    net = wfnet.WFNet(models.create("resnet", 3, width=8), 3)
    names = list(net.masked_layers)
    assert names[-1] == "layer3.0.downsample.0"
    order = execution_order(net.model, names)
    assert order[-3:] == ["layer3.0.downsample.0", "layer3.0.conv1", "layer3.0.conv2"]
    assert sorted(order) == sorted(names)
    assert execution_order(net.bake(0), names) == order  # plain models, too


def test_a_network_that_cannot_be_traced_keeps_its_order():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.second, self.first = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)

        def forward(self, x):
            return self.second(self.first(x)) if x.sum() > 0 else x

    assert execution_order(Branching(), ["second", "first"]) == ["second", "first"]
