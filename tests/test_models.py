import pytest
import torch
from torch import nn

from wfnet.models import SMALL_MODELS, create


@pytest.mark.parametrize("name", SMALL_MODELS)
@pytest.mark.parametrize("channels", [1, 3])
def test_logits(name, channels):
    side = 28 if name in ("resnet18", "vgg16", "vit_tiny") else 32
    size = {"width": 64, "depth": 1, "image_size": side} if name.startswith("vit_") else {}
    size = {"width": 4} if name in ("resnet18", "vgg16") else size
    before = torch.get_rng_state()
    model = create(name, 7, channels, seed=0, **size)
    assert torch.equal(before, torch.get_rng_state())
    assert model(torch.randn(2, channels, side, side)).shape == (2, 7)
    again = create(name, 7, channels, seed=0, **size)
    other = create(name, 7, channels, seed=1, **size)
    weights = [next(p for p in m.parameters() if p.dim() > 1) for m in (model, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


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
