"""Small networks for 32-pixel images: minutes of training on a CPU, the layers of the big ones."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wfnet.extras import require


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


class SmallResNet(nn.Module):
    """A CIFAR-style ResNet: a 3x3 stem and three stages of `width`, 2 `width`, 4 `width` channels.

    depth = 6 n + 2 for n blocks in each stage: 8, 14, 20 ... The stem's stride of 2 makes it four
    times cheaper than the usual `stem_stride=1`. Input [N, in_channels, H, W] with H and W from
    about 16 up, output logits [N, num_classes].
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 1,
        width: int = 24,
        depth: int = 8,
        stem_stride: int = 2,
    ):
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth must be 8, 14, 20, ... (6 n + 2), got {depth}")
        self.conv1 = nn.Conv2d(in_channels, width, 3, stem_stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        channels = width
        for stage in range(3):
            out = width << stage
            layers = [BasicBlock(channels, out, 1 if stage == 0 else 2)]
            layers += [BasicBlock(out, out, 1) for _ in range(blocks - 1)]
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))
            channels = out
        self.fc = nn.Linear(channels, num_classes)
        _initialise_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


class SmallVGG(nn.Module):
    """Five 3x3 convolutions with bias in three stages (1, 2, 2), each closed by a 2x2 maximum.

    Stages have `width`, 2 `width` and 4 `width` channels; `batch_norm=False` leaves out BatchNorm.
    Input [N, in_channels, H, W] with H and W from 8 up, output logits [N, num_classes].
    """

    def __init__(
        self, num_classes: int, in_channels: int = 1, width: int = 24, batch_norm: bool = True
    ):
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for stage in range(3):
            out = width << stage
            for _ in range(1 if stage == 0 else 2):
                layers.append(nn.Conv2d(channels, out, 3, padding=1))
                if batch_norm:
                    layers.append(nn.BatchNorm2d(out))
                layers.append(nn.ReLU(inplace=True))
                channels = out
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_classes)
        _initialise_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


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
) -> nn.Module:
    """timm's VisionTransformer, small and with averaged tokens: its qkv projections are modules.

    `width` is the embedding, a multiple of 32 (one head for each 32). Averaging learns from far
    fewer images than a class token does, and patches of 8 pixels train in a quarter of the time of
    patches of 4. Needs timm, `pip install wfnet[train]`.
    """
    if width % 32:
        raise ValueError(f"the width of a ViT must be a multiple of 32, got {width}")
    return require("timm.models.vision_transformer", "train").VisionTransformer(
        img_size=image_size,
        patch_size=patch_size,
        in_chans=in_channels,
        num_classes=num_classes,
        embed_dim=width,
        depth=depth,
        num_heads=width // 32,
        mlp_ratio=2.0,
        global_pool="avg",
        class_token=False,
    )


SMALL_MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet": SmallResNet,
    "vgg": SmallVGG,
    "vit": small_vit,
}


def create(
    name: str, num_classes: int, in_channels: int = 1, seed: int | None = None, **options: int
) -> nn.Module:
    """A small network by name: `resnet`, `vgg` or `vit`.

    options: `width` for all; `depth` for resnet and vit; `stem_stride` for resnet; `batch_norm` for
             vgg; `patch_size` and `image_size` for vit.
    seed:    draws the weights from this seed and leaves the caller's random state as it is.
    Raises ValueError for an unknown name.
    """
    if name not in SMALL_MODELS:
        raise ValueError(f"no small model {name!r}: choose one of {', '.join(SMALL_MODELS)}")
    if num_classes < 1:
        raise ValueError(f"num_classes must be 1 or more, got {num_classes}")
    if seed is None:
        return SMALL_MODELS[name](num_classes, in_channels, **options)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        return SMALL_MODELS[name](num_classes, in_channels, **options)
