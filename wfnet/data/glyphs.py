"""Rendered characters: image data with up to a hundred classes, of any size and difficulty.

Characters of the fonts that ship with matplotlib go through a random affine map, thickness,
contrast and noise. Nothing is downloaded; the same arguments give the same images.
"""

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from wfnet.data.dataset import Dataset
from wfnet.data.splits import Splits, split_dataset
from wfnet.data.tensor_images import TensorImages
from wfnet.services.extras import require

DIGITS = "0123456789"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# A hundred characters that stay apart when tilted and slanted: no O beside 0, no I beside 1, no
# small letters that are shrunken capitals, no Greek or Cyrillic twins of Latin letters.
HUNDRED = (
    DIGITS
    + "ABCDEFGHJKLMNPQRSTUVWXYZ"
    + "abdefghmnqrty"
    + "ΓΔΘΛΞΠΣΦΨΩαβγδεζηθλμξπσφψω"
    + "БДЖИЦЧШЮЯЭЫ"
    + "&@#%?!+=$£§¶∞√∇∫"
)
CHARACTERS = {10: DIGITS, 26: LETTERS, 100: HUNDRED}
FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSans-BoldOblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-Oblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralItalic",
    "STIXGeneralBolIta",
    "cmr10",
    "cmb10",
    "cmss10",
    "cmtt10",
)
# Computer Modern's encodings hold other characters at code points beyond these.
COMPUTER_MODERN = frozenset(DIGITS + LETTERS + LETTERS.lower())
# Strengths of noise. `create("resnet", 100)` reaches 99.4% of a hundred classes at EASY and
# 87.9% at HARD (test images; 200 images of each class in all, 6 epochs, distortion 0.7).
EASY, HARD = 0.05, 0.3
DISTORTION = 0.7
MEAN, STD = (0.5,), (0.25,)
CANVAS = 64  # characters are drawn at this size and shrunk by the affine map
TEST_FRACTION, VALIDATION_FRACTION = 0.2, 0.1


def glyphs(
    num_classes: int = 10,
    per_class: int = 200,
    seed: int = 0,
    image_size: int = 32,
    channels: int = 1,
    noise: float = EASY,
    distortion: float = DISTORTION,
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
) -> Splits:
    """Render a data set: 20% of each class are test images, 10% of the rest validation images.

    num_classes: 10 (digits), 26 (capitals) or up to 100 (letters of three alphabets and signs).
    per_class:   images of each class, all parts together.
    noise:       strength of pixel noise and clutter; `EASY` and `HARD` are two good values.
    distortion:  factor on rotation, shear, scale, shift and thickness.
    channels:    1, or 3 for coloured strokes and backgrounds.
    """
    train, test = read_glyphs(
        num_classes, image_size, channels, mean, std, seed, per_class, noise, distortion
    )
    train, validation = split_dataset(train, VALIDATION_FRACTION, seed)
    return Splits(train, validation, test, train.classes, f"glyphs{num_classes}", seed)


def read_glyphs(
    num_classes: int,
    image_size: int = 32,
    channels: int = 1,
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
    seed: int = 0,
    per_class: int = 200,
    noise: float = EASY,
    distortion: float = DISTORTION,
) -> tuple[Dataset, Dataset]:
    """(training part, test part) of rendered characters; the arguments are those of `glyphs`."""
    characters = characters_of(num_classes)
    labels = torch.arange(num_classes).repeat_interleave(per_class)
    images = render(characters, labels, seed, image_size, channels, noise, distortion)
    whole = TensorImages(images, labels, list(characters), mean, std)
    return split_dataset(whole, TEST_FRACTION, seed)


def characters_of(num_classes: int) -> str:
    """The characters of a data set of `num_classes`, one for each class."""
    if not 2 <= num_classes <= len(HUNDRED):
        raise ValueError(f"glyphs have 2 to {len(HUNDRED)} classes, not {num_classes}")
    return CHARACTERS.get(num_classes, HUNDRED[:num_classes])


def render(
    characters: str,
    labels: Tensor,
    seed: int = 0,
    image_size: int = 32,
    channels: int = 1,
    noise: float = EASY,
    distortion: float = DISTORTION,
) -> Tensor:
    """Images [N, channels, image_size, image_size] uint8 of `characters[labels[i]]`, labels [N].

    Needs Pillow and matplotlib's font files, `pip install wfnet[train,viz]`.
    """
    if channels not in (1, 3):
        raise ValueError(f"glyphs have 1 or 3 channels, not {channels}")
    if noise < 0 or distortion < 0:
        raise ValueError(f"noise and distortion must be 0 or more, got {noise}, {distortion}")
    masks, fonts = _draw(characters)
    generator = torch.Generator().manual_seed(seed)
    parts = [
        _render_part(masks, fonts, part, generator, image_size, channels, noise, distortion)
        for part in labels.split(2048)
    ]
    return torch.cat(parts) if parts else torch.empty(0, channels, image_size, image_size).byte()


def _render_part(
    masks: Tensor,
    fonts: Tensor,
    labels: Tensor,
    generator: torch.Generator,
    size: int,
    channels: int,
    noise: float,
    distortion: float,
) -> Tensor:
    """labels [n] -> images [n, channels, size, size] uint8."""
    n = len(labels)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=generator) * (high - low) + low

    # A random font of those that have the character: fonts [K, F] lists them first.
    count = (fonts[labels] >= 0).sum(1)
    pick = (uniform(0, 1) * count).long().clamp_(max=fonts.shape[1] - 1)
    mask = masks[labels, fonts[labels, pick]].float().div_(255).unsqueeze(1)  # [n, 1, 64, 64]

    # Strokes from thin (erosion) to thick (dilation).
    weight = uniform(-0.8, 1.0, 1, 1, 1) * distortion
    thick = F.max_pool2d(mask, 3, 1, 1)
    thin = -F.max_pool2d(-mask, 3, 1, 1)
    mask = torch.where(
        weight > 0, torch.lerp(mask, thick, weight.clamp(0, 1)), torch.lerp(mask, thin, -weight)
    ).clamp_(0, 1)

    angle = uniform(-0.26, 0.26) * distortion
    shear = uniform(-0.25, 0.25) * distortion
    scale = 0.8 * torch.exp(uniform(-0.15, 0.25, 2) * distortion)  # below 1 enlarges
    shift = uniform(-0.12, 0.12, 2) * distortion
    cos, sin = angle.cos(), angle.sin()
    theta = torch.stack(
        [
            torch.stack([cos * scale[:, 0], (shear * cos - sin) * scale[:, 1], shift[:, 0]], 1),
            torch.stack([sin * scale[:, 0], (shear * sin + cos) * scale[:, 1], shift[:, 1]], 1),
        ],
        1,
    )
    # Sampled at twice the size and averaged, so that strokes do not alias.
    grid = F.affine_grid(theta, [n, 1, 2 * size, 2 * size], align_corners=False)
    mask = F.avg_pool2d(F.grid_sample(mask, grid, align_corners=False), 2)

    ground = uniform(0.0, 1.0, channels, 1, 1)
    stroke = torch.where(
        ground < 0.5, uniform(0.75, 1.0, channels, 1, 1), uniform(0.0, 0.25, channels, 1, 1)
    )
    # Noise covers part of the contrast; clutter is noise of a coarser grain, as big as strokes.
    images = torch.lerp(ground, stroke, mask)
    coarse = max(size // 4, 1)
    clutter = torch.randn(n, channels, coarse, coarse, generator=generator)
    clutter = F.interpolate(clutter, size=(size, size), mode="bilinear", align_corners=False)
    grain = torch.randn(n, channels, size, size, generator=generator)
    images = images + noise * (0.5 * clutter + 0.5 * grain)
    return images.clamp_(0, 1).mul_(255).round_().byte()


@lru_cache(4)
def _draw(characters: str) -> tuple[Tensor, Tensor]:
    """Masks [K, F, CANVAS, CANVAS] uint8 of every character in every font, and the fonts that have
    it: [K, F] font numbers first, then -1."""
    image_module = require("PIL.Image", "train")
    font_module = require("PIL.ImageFont", "train")
    draw_module = require("PIL.ImageDraw", "train")
    folder = font_folder()
    masks = torch.zeros(len(characters), len(FONTS), CANVAS, CANVAS, dtype=torch.uint8)
    fonts = torch.full((len(characters), len(FONTS)), -1)
    counts = [0] * len(characters)
    for number, name in enumerate(FONTS):
        font = font_module.truetype(str(folder / f"{name}.ttf"), 44)
        unknown = bytes(font.getmask("\U0010fff0"))  # the box for characters that a font lacks
        for label, character in enumerate(characters):
            if name.startswith("cm") and character not in COMPUTER_MODERN:
                continue
            if bytes(font.getmask(character)) == unknown:
                continue
            image = image_module.new("L", (CANVAS, CANVAS))
            left, top, right, bottom = font.getbbox(character)
            corner = ((CANVAS - left - right) / 2, (CANVAS - top - bottom) / 2)
            draw_module.Draw(image).text(corner, character, fill=255, font=font)
            masks[label, number] = torch.frombuffer(
                bytearray(image.tobytes()), dtype=torch.uint8
            ).view(CANVAS, CANVAS)
            fonts[label, counts[label]] = number
            counts[label] += 1
    for label, count in enumerate(counts):
        if count == 0:
            raise ValueError(f"none of the fonts has the character {characters[label]!r}")
    return masks, fonts


def font_folder() -> Path:
    """The folder of matplotlib's font files, found without importing matplotlib."""
    spec = find_spec("matplotlib")
    if spec is None:
        require("matplotlib", "viz")
    return Path(spec.submodule_search_locations[0], "mpl-data", "fonts", "ttf")
