"""Which layers are masked: by default, by name, pattern and type; what is refused by name."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from wfnet import WFNet, models
from wfnet.targets import choose_targets
from wfnet.wrapping import wrap

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")

from timm.models.mlp_mixer import MlpMixer  # noqa: E402

CLASSES = 10


def tm(name, **options):
    return timm.create_model(name, num_classes=CLASSES, **options)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: tm("resnetv2_50x1_bit"), r"stem\.conv.*StdConv2d"),
        (lambda: MlpMixer(CLASSES, 32, patch_size=8, num_blocks=1, embed_dim=16), "no convolution"),
        (lambda: nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(CLASSES)), "lazy"),
        (
            lambda: nn.Sequential(weight_norm(nn.Conv2d(3, 4, 3)), nn.Linear(4, CLASSES)),
            "'0'.*param",
        ),
    ],
)
def test_refused_by_name(make, says):
    with pytest.raises(ValueError, match=says):
        WFNet(make(), CLASSES)


def names(model, targets):
    return list(WFNet(model, CLASSES, targets=targets).masked_layers)


def test_targets_by_name_suffix_pattern_and_type():
    model = tm("resnet10t")
    assert names(model, "layer1.0.conv1") == ["layer1.0.conv1"]
    assert names(model, ["layer2.0.conv1", "layer1.0.conv2"]) == [
        "layer1.0.conv2",
        "layer2.0.conv1",
    ]
    assert names(model, "conv2") == [f"layer{i}.0.conv2" for i in (1, 2, 3, 4)]
    assert names(model, "layer1.*") == ["layer1.0.conv1", "layer1.0.conv2"]
    assert len(names(model, nn.Conv2d)) == 14
    assert names(model, nn.Linear) == ["fc"]
    assert len(names(model, [nn.Conv2d, "fc"])) == 15


@pytest.mark.parametrize("wrong", ["layer9.*", nn.Conv3d, ["conv1", "blocks.0"]])
def test_unknown_targets_are_named(wrong):
    with pytest.raises(ValueError, match=r"matches no layer of ResNet; its maskable layers are"):
        WFNet(tm("resnet10t"), CLASSES, targets=wrong)


def test_odd_targets():
    with pytest.raises(ValueError, match="targets is empty"):
        WFNet(tm("resnet10t"), CLASSES, targets=[])
    for wrong in ([3], 3):
        with pytest.raises(TypeError, match="got 3"):
            WFNet(tm("resnet10t"), CLASSES, targets=wrong)
    with pytest.raises(ValueError, match=r"'bn1'.*no convolution or linear"):
        WFNet(tm("resnet10t"), CLASSES, targets="bn1")
    with pytest.raises(ValueError, match="StdConv2d"):  # a pattern does not skip it
        WFNet(tm("resnetv2_50x1_bit"), CLASSES, targets="stages.*")


def test_default_targets_leave_head_and_stem_of_transformers_alone():
    with torch.device("meta"):
        vgg = tm("vgg11")
    assert not any("pre_logits" in n or "head" in n for n in choose_targets(vgg))
    squeeze = choose_targets(torchvision.models.squeezenet1_1(num_classes=CLASSES))
    assert "classifier.1" not in squeeze
    vit = choose_targets(tm("vit_tiny_patch16_224", img_size=32, depth=1))
    assert vit == [f"blocks.0.{n}" for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    vit = tm("vit_tiny_patch16_224", img_size=32, depth=2)
    assert choose_targets(vit, "qkv") == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]


def test_linear_maps_outside_of_blocks_and_of_position_biases_are_left_alone():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.dense, self.gate = (nn.Linear(4, 4) for _ in range(3))
            self.rel_pos = nn.ModuleDict({"fc1": nn.Linear(2, 4)})

    model = nn.Module()
    model.fc1 = nn.Linear(4, 4)
    model.layer = nn.ModuleList([Block(), nn.ModuleDict({"fc1": nn.Linear(4, 4)})])
    model.pool = nn.ModuleDict({"q": nn.Linear(4, 4), "proj": nn.Linear(4, 4)})
    model.head = nn.Linear(4, CLASSES)
    assert choose_targets(model) == ["layer.0.query", "layer.0.dense", "pool.q", "pool.proj"]


def test_targets_of_durable_gates():
    vit = models.create("vit", CLASSES, depth=1)
    assert choose_targets(vit, durable=True) == choose_targets(vit)
    chosen = choose_targets(vit, ["attn.proj", "fc2"], durable=True)
    assert chosen == [f"blocks.0.{n}" for n in ("attn.proj", "mlp.fc2")]
    resnet = models.create("resnet", CLASSES, width=8)
    chosen = choose_targets(resnet, "layer3.*", durable=True)
    assert chosen == [f"layer3.0.{n}" for n in ("bn1", "bn2", "downsample.1")]
    assert choose_targets(resnet, durable=True)[-3:] == chosen
    many = wrap(models.create("resnet", 31, width=8), 31, "durable")
    assert (list(many.masked_layers), many.alpha_init) == (chosen, 1)
    with pytest.raises(ValueError, match=r"'layer9' matches no layer.*durable gates are"):
        choose_targets(resnet, "layer9", durable=True)
    vgg = models.create("vgg", CLASSES, width=8, batch_norm=False)
    layers = WFNet(vgg, CLASSES, gate="durable").masked_layers.values()
    assert {type(layer).__name__ for layer in layers} == {"DurableConv2d"}


@pytest.mark.parametrize("gate", ["sigmoid", "durable"])
def test_layers_that_mix_the_samples_of_a_batch_are_refused_by_name(gate):
    layer = nn.SyncBatchNorm(4, track_running_stats=False)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), layer, nn.Flatten(), nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"layer '1' \(\w+\) keeps no running statistics"):
        WFNet(model, 3, gate=gate)
    model[1] = nn.InstanceNorm2d(4)
    WFNet(model, 3)


@pytest.mark.parametrize(
    ("name", "mask_from", "first", "count"),
    [
        ("resnet10t", "layer3", "layer3.0.conv1", 6),
        ("resnet10t", "1", "layer4.0.conv1", 3),
        ("resnet10t", 0.25, "layer4.0.conv1", 3),
        ("resnet10t", "all", "conv1.0", 14),
        ("deit_tiny_patch16_224", "blocks.10.mlp", "blocks.10.mlp.fc1", 6),
        ("tf_efficientnet_lite0", 2, "blocks.6.0.conv_pw", 4),
    ],
)
def test_late_stages_alone(name, mask_from, first, count):
    chosen = choose_targets(tm(name), None, CLASSES, mask_from=mask_from)
    assert (chosen[0], len(chosen)) == (first, count)


@pytest.mark.parametrize("mask_from", ["layer9", "7", 0, 2.5])
def test_no_such_stage(mask_from):
    with pytest.raises(
        ValueError, match=r"mask_from.*its stages are conv1, layer1, layer2, layer3"
    ):
        WFNet(models.create("resnet", CLASSES, width=4), CLASSES, mask_from=mask_from)
