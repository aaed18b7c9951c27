import math

import pytest
import torch

from wfnet.data import TensorImages
from wfnet.models import create
from wfnet.training import accuracy, fit_classifier, shift_images


def tiny(count=40):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 2
    images = torch.rand(count, 1, 16, 16, generator=generator) * 0.2
    images[labels == 1, :, 4:12] += 0.8
    return TensorImages(images, labels, ["plain", "bar"], 0.5, 0.5)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optimizer": "sgd", "schedule": "cosine", "lr": 0.05, "channels_last": False},
        {"shift": 1, "label_smoothing": 0.1},
        {"amp": "bfloat16"},
    ],
)
def test_learns_and_repeats_bitwise(settings):
    data = tiny()
    results = []
    for _ in range(2):
        model = create("resnet", 2, width=8, seed=1)
        state = torch.get_rng_state()
        history = fit_classifier(model, data, 4, seed=3, batch_size=8, **settings)
        assert torch.equal(state, torch.get_rng_state())
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not model.training
    assert len(history.loss) == len(history.accuracy) == 4
    assert history.loss[-1] < history.loss[0]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert accuracy(model, data, amp=settings.get("amp")) == 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "lamb"}, "optimizer='lamb' is not one of 'adam', 'sgd'"),
        ({"epochs": 0}, "epochs must be a whole number of at least 1, got 0"),
        ({"batch_size": 1}, "batch_size must be a whole number of at least 2"),
        ({"lr": math.nan}, "lr must be a number above 0, got nan"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        fit_classifier(create("resnet", 2, width=8), tiny(), **settings)
    with pytest.raises(ValueError, match="at least 2 images"):
        fit_classifier(create("resnet", 2, width=8), tiny(1))


@pytest.mark.parametrize("steps", [1, 4, 5])
def test_runs_of_a_few_steps(steps):
    model = create("resnet", 2, width=8, seed=0)
    before = model.fc.weight.detach().clone()
    fit_classifier(model, tiny(4 * steps + 1), 1, batch_size=4)  # BatchNorm needs two images
    assert bool(model.fc.weight.isfinite().all())
    assert not torch.equal(model.fc.weight, before)


def test_a_lost_run_says_so():
    data = tiny()
    data.images[3, 0, 0, 0] = math.nan
    with pytest.raises(FloatingPointError, match=r"the loss became nan .*lower lr"):
        fit_classifier(create("vgg", 2, width=8), data, 2, batch_size=8)


def test_accuracy_counts_and_keeps_the_mode():
    model = create("resnet", 2, width=8, seed=0).train()
    data = tiny(10)
    with torch.no_grad():
        model.fc.weight.zero_()
        model.fc.bias.copy_(torch.tensor([1.0, 0.0]))
    assert accuracy(model, data, batch_size=3) == 0.5
    assert model.training
    with pytest.raises(ValueError, match="empty"):
        accuracy(model, data.select(torch.arange(0)))


def test_shifts_repeat_the_edge():
    images = torch.arange(2 * 3 * 5 * 4, dtype=torch.float32).view(2, 3, 5, 4)
    moved = shift_images(images, 1, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape
    padded = torch.nn.functional.pad(images, [1] * 4, mode="replicate")
    for image, source in zip(moved, padded, strict=True):
        windows = [source[:, y : y + 5, x : x + 4] for y in range(3) for x in range(3)]
        assert any(torch.equal(image, window) for window in windows)
