"""Small networks and their ordinary training."""

import math

import pytest
import torch
from torch import nn

from wfnet.data import TensorImages, open_data
from wfnet.data.glyphs import glyphs
from wfnet.models import SMALL_MODELS, create
from wfnet.training import SMALL_MODEL_SETTINGS, accuracy, fit_classifier, shift_images


def tiny(count=40):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 2
    images = torch.rand(count, 1, 16, 16, generator=generator) * 0.2
    images[labels == 1, :, 4:12] += 0.8
    return TensorImages(images, labels, ["plain", "bar"], 0.5, 0.5)


@pytest.mark.parametrize("name", SMALL_MODELS)
@pytest.mark.parametrize("channels", [1, 3])
def test_logits(name, channels):
    size = {"width": 64, "depth": 1} if name.startswith("vit_") else {}
    size = {"width": 4} if name in ("resnet18", "vgg16") else size
    model = create(name, 7, channels, seed=0, **size)
    assert model(torch.randn(2, channels, 32, 32)).shape == (2, 7)
    again = create(name, 7, channels, seed=0, **size)
    other = create(name, 7, channels, seed=1, **size)
    weights = [next(p for p in m.parameters() if p.dim() > 1) for m in (model, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_seed_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    create("resnet", 3, seed=0)
    assert torch.equal(before, torch.get_rng_state())


def test_options():
    convs = [m for m in create("resnet", 10).modules() if isinstance(m, nn.Conv2d)]
    assert sum(conv.out_channels for conv in convs) == 504
    depth20 = create("resnet", 10, depth=20, width=16, stem_stride=1)
    assert (
        sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in depth20.modules()) == 19
    )
    plain = create("vgg", 10, batch_norm=False)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in plain.modules())
    assert all(m.bias is not None for m in plain.modules() if isinstance(m, nn.Conv2d))
    vit = create("vit", 10, width=96, depth=2, patch_size=4, image_size=24)
    qkv = [m for name, m in vit.named_modules() if name.endswith("qkv")]
    assert [type(m) for m in qkv] == [nn.Linear] * 2
    assert vit(torch.randn(1, 1, 24, 24)).shape == (1, 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "alexnet", "num_classes": 3}, "no small model 'alexnet': choose one of resnet"),
        ({"name": "resnet", "num_classes": 3, "depth": 10}, "depth must be 8, 14, 20"),
        ({"name": "vit", "num_classes": 3, "width": 50}, "multiple of 32, got 50"),
        ({"name": "vgg", "num_classes": 0}, "num_classes must be 1 or more, got 0"),
    ],
)
def test_bad_models(arguments, message):
    with pytest.raises(ValueError, match=message):
        create(**arguments)


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


def test_seed_changes_training():
    models = [create("vgg", 2, width=8, seed=1) for _ in range(2)]
    for seed, model in enumerate(models):
        fit_classifier(model, tiny(), 1, seed=seed, batch_size=8)
    first, second = (next(m.parameters()) for m in models)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "lamb"}, "'lamb' is unknown"),
        ({"schedule": "step"}, "'step' is unknown"),
        ({"amp": "float16"}, "'float16' is unknown"),
        ({"epochs": 0}, "epochs must be 1 or more"),
        ({"batch_size": 1}, "batch_size 2 or more"),
        ({"shift": -1}, "shift 0 or more"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        fit_classifier(create("resnet", 2, width=8), tiny(), **settings)
    with pytest.raises(ValueError, match="at least 2 images"):
        fit_classifier(create("resnet", 2, width=8), tiny(1))


def test_autocast_is_used_in_training_and_asked_for_in_accuracy():
    model, kinds = create("vgg", 2, width=8, seed=0), []
    model.register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))
    fit_classifier(model, tiny(), 1, batch_size=8, amp="bfloat16")
    accuracy(model, tiny())
    accuracy(model, tiny(), amp="bfloat16")
    assert kinds[0] == kinds[-1] == torch.bfloat16
    assert kinds[-2] == torch.float32


def test_a_lost_run_says_so():
    data = tiny()
    data.images[3, 0, 0, 0] = math.nan
    with pytest.raises(FloatingPointError, match=r"the loss became nan .*lower lr"):
        fit_classifier(create("vgg", 2, width=8), data, 2, batch_size=8)


def test_a_last_batch_of_one_is_left_out():
    history = fit_classifier(create("resnet", 2, width=8, seed=0), tiny(9), 2, batch_size=8)
    assert len(history.loss) == 2


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


def test_settings_cover_all_models():
    assert set(SMALL_MODEL_SETTINGS) == {"resnet", "vgg", "vit"}


def test_digits_are_learnt():
    splits = open_data("digits")
    model = create("resnet", 10, width=16, seed=0)
    fit_classifier(model, splits.train, epochs=2, batch_size=32)
    assert accuracy(model, splits.test) > 0.93


def test_glyphs_are_learnt():
    splits = glyphs(10, per_class=50, noise=0.02, distortion=0.3)
    model = create("resnet", 10, width=8, seed=0)
    fit_classifier(model, splits.train, epochs=3, batch_size=16)
    assert accuracy(model, splits.test) > 0.4


@pytest.mark.parametrize(
    ("name", "layers", "channels"),
    [("resnet18", 20, 4800), ("vgg16", 13, 4224), ("vit_tiny", 12, 6912), ("vit_small", 12, 13824)],
)
def test_the_networks_of_the_paper_have_the_layers_of_the_originals(name, layers, channels):
    """Masked layers and channels (3 x dim of every block for ViT), as of timm's networks."""
    with torch.device("meta"):
        model = create(name, 10, 3)
    kind = nn.Linear if name.startswith("vit") else nn.Conv2d
    masked = [
        module
        for path, module in model.named_modules()
        if isinstance(module, kind) and (kind is nn.Conv2d or path.endswith("qkv"))
    ]
    assert len(masked) == layers
    assert sum(module.weight.shape[0] for module in masked) == channels


@pytest.mark.parametrize("name", ["resnet18", "vgg16"])
def test_images_of_28_pixels_will_do(name):
    assert create(name, 5, 1, width=4)(torch.randn(2, 1, 28, 28)).shape == (2, 5)
    vit = create("vit_tiny", 5, 1, width=64, depth=1, image_size=28)
    assert vit(torch.randn(1, 1, 28, 28)).shape == (1, 5)
