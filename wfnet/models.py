"""Networks for images of 28 or 32 pixels: small ones, and those of the paper cut to that size."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wfnet.services.extras import require
from wfnet.services.settings import int_from


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a skip, projected by a 1x1 where shapes change."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + skip)


class ResNet(nn.Module):
    """A 3x3 stem, stages of blocks at width, 2 width, 4 width ... channels, and one linear map."""

    def __init__(
        self, num_classes: int, in_channels: int, width: int, stages: int, blocks: int, stride: int
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.stages = stages
        channels = width
        for stage in range(stages):
            out = width << stage
            layers = [BasicBlock(channels, out, 1 if stage == 0 else 2)]
            layers += [BasicBlock(out, out, 1) for _ in range(blocks - 1)]
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))
            channels = out
        self.fc = nn.Linear(channels, num_classes)
        _initialise_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in range(self.stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        return self.fc(x.mean((2, 3)))


def small_resnet(
    num_classes: int, in_channels: int = 1, width: int = 24, depth: int = 8, stem_stride: int = 2
) -> ResNet:
    """A CIFAR-style ResNet: a 3x3 stem and three stages of `width`, 2 `width`, 4 `width` channels.

    depth = 6 n + 2 for n blocks in each stage: 8, 14, 20 ... The stem's stride of 2 makes it four
    times cheaper than the usual `stem_stride=1`. Input [N, in_channels, H, W] with H and W from
    about 16 up, output logits [N, num_classes].
    """
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1:
        raise ValueError(f"depth must be 8, 14, 20, ... (6 n + 2), got {depth}")
    return ResNet(num_classes, in_channels, width, 3, blocks, stem_stride)


def resnet18(num_classes: int, in_channels: int = 3, width: int = 64) -> ResNet:
    """ResNet-18 for small images: a 3x3 stem of stride 1, no pooling, stages of 2 blocks each.

    He et al., "Deep Residual Learning" (CVPR 2016), as usual on CIFAR: the stem of the ImageNet
    network would leave one pixel of 32. Stages have `width`, 2, 4 and 8 `width` channels (64: the
    original's). Input [N, in_channels, H, W] with H and W from 8 up.
    """
    return ResNet(num_classes, in_channels, width, stages=4, blocks=2, stride=1)


class VGG(nn.Module):
    """3x3 convolutions with bias in stages, each closed by a 2x2 maximum, and one linear map.

    stages: (number of convolutions, channels) of each.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        stages: tuple[tuple[int, int], ...],
        batch_norm: bool,
        ceil_mode: bool,
    ):
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for convolutions, out in stages:
            for _ in range(convolutions):
                layers.append(nn.Conv2d(channels, out, 3, padding=1))
                if batch_norm:
                    layers.append(nn.BatchNorm2d(out))
                layers.append(nn.ReLU(inplace=True))
                channels = out
            layers.append(nn.MaxPool2d(2, ceil_mode=ceil_mode))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_classes)
        _initialise_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def small_vgg(
    num_classes: int, in_channels: int = 1, width: int = 24, batch_norm: bool = True
) -> VGG:
    """Five 3x3 convolutions with bias in three stages (1, 2, 2), each closed by a 2x2 maximum.

    Stages have `width`, 2 `width` and 4 `width` channels; `batch_norm=False` leaves out BatchNorm.
    Input [N, in_channels, H, W] with H and W from 8 up, output logits [N, num_classes].
    """
    stages = (1, width), (2, 2 * width), (2, 4 * width)
    return VGG(num_classes, in_channels, stages, batch_norm, ceil_mode=False)


def vgg16(num_classes: int, in_channels: int = 3, width: int = 64, batch_norm: bool = True) -> VGG:
    """VGG-16 for small images: its 13 convolutions, here with BatchNorm, and one linear map.

    Simonyan and Zisserman, "Very Deep Convolutional Networks" (ICLR 2015), configuration D; the
    three large linear maps are for 7x7 features, which images of 32 pixels do not leave. Stages
    have `width`, 2, 4, 8 and 8 `width` channels (64: the original's). Pooling rounds up, so that 28
    pixels will do. Input [N, in_channels, H, W] with H and W from 8 up.
    """
    stages = tuple((n, factor * width) for n, factor in ((2, 1), (2, 2), (3, 4), (3, 8), (3, 8)))
    return VGG(num_classes, in_channels, stages, batch_norm, ceil_mode=True)


def _initialise_convolutions(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def small_vit(
    num_classes: int,
    in_channels: int = 1,
    width: int = 64,
    depth: int = 4,
    patch_size: int = 8,
    image_size: int = 32,
    *,
    head_width: int = 32,
    mlp_ratio: float = 2.0,
    global_pool: str = "avg",
    class_token: bool = False,
) -> nn.Module:
    """timm's VisionTransformer, small and with averaged tokens: its qkv projections are modules.

    `width` is the embedding, with one head for each `head_width`. Averaging learns from far fewer
    images than a class token does, and patches of 8 pixels train in a quarter of the time of
    patches of 4. Needs timm, `pip install wfnet[train]`. Raises ValueError for sizes that are not
    divided.
    """
    if width % head_width:
        raise ValueError(f"the width of this ViT must be a multiple of {head_width}, got {width}")
    if image_size % patch_size:
        raise ValueError(
            f"images of {image_size} pixels are not divided by patches of {patch_size}"
        )
    return require("timm.models.vision_transformer", "train").VisionTransformer(
        img_size=image_size,
        patch_size=patch_size,
        in_chans=in_channels,
        num_classes=num_classes,
        embed_dim=width,
        depth=depth,
        num_heads=width // head_width,
        mlp_ratio=mlp_ratio,
        global_pool=global_pool,
        class_token=class_token,
    )


def vit_tiny(
    num_classes: int,
    in_channels: int = 3,
    patch_size: int = 4,
    image_size: int = 32,
    width: int = 192,
    depth: int = 12,
) -> nn.Module:
    """ViT-T (DeiT-Ti) for small images: 12 blocks of width 192 with 3 heads, patches of 4 pixels.

    Touvron et al., "Training data-efficient image transformers" (ICML 2021). `width` is a multiple
    of 64, one head for each. Needs timm, `pip install wfnet[train]`.
    """
    sizes = (num_classes, in_channels, width, depth, patch_size, image_size)
    original = {"head_width": 64, "mlp_ratio": 4.0, "global_pool": "token", "class_token": True}
    return small_vit(*sizes, **original)


SMALL_MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet": small_resnet,
    "vgg": small_vgg,
    "vit": small_vit,
    "resnet18": resnet18,
    "vgg16": vgg16,
    "vit_tiny": vit_tiny,
    "vit_small": partial(vit_tiny, width=384),  # 6 heads
}


_OPTION_RANGE = int_from(1, 2**16)


def create(
    name: str, num_classes: int, in_channels: int = 1, seed: int | None = None, **options: int
) -> nn.Module:
    """A network by name: `resnet`, `vgg`, `vit`, or `resnet18`, `vgg16`, `vit_tiny`, `vit_small`.

    options: `width` for all; `depth` for resnet and the ViTs; `stem_stride` for resnet;
             `batch_norm` for vgg and vgg16; `patch_size` and `image_size` for the ViTs.
    seed:    draws the weights from this seed and leaves the caller's random state as it is.
    Raises ValueError for an unknown name and for options out of range.
    """
    if name not in SMALL_MODELS:
        raise ValueError(f"no small model {name!r}: choose one of {', '.join(SMALL_MODELS)}")
    if num_classes < 1:
        raise ValueError(f"num_classes must be 1 or more, got {num_classes}")
    for option, value in options.items():
        if option != "batch_norm" and (wrong := _OPTION_RANGE.violation(value)):
            raise ValueError(f"{option} must be {wrong}, got {value!r}")
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.random.default_generator.manual_seed(seed)
        return SMALL_MODELS[name](num_classes, in_channels, **options)
