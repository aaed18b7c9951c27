"""Rendered characters: image data with up to a hundred classes, of any size and difficulty.

Characters of the fonts that ship with matplotlib go through a random affine map, thickness,
contrast and noise. Nothing is downloaded; the same arguments give the same images.
"""

from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

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
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *("cmr10", "cmb10", "cmss10", "cmtt10"),
)
# Computer Modern's encodings hold other characters at code points beyond these.
COMPUTER_MODERN = frozenset(DIGITS + LETTERS + LETTERS.lower())
# Strength of noise: `create("resnet", 100)` reaches 99.4% of a hundred classes with it, and 87.9%
# at 0.3 (test images; 200 images of each class in all, 6 epochs).
NOISE = 0.05
DISTORTION = 0.7  # factor on rotation, shear, scale, shift and thickness
MEAN, STD = (0.5,), (0.25,)
CANVAS = 64  # characters are drawn at this size and shrunk by the affine map
PER_CLASS = 200


def render(characters: str, labels: Tensor, seed: int, image_size: int, channels: int) -> Tensor:
    """Images [N, channels, image_size, image_size] uint8 of `characters[labels[i]]`, labels [N].

    Needs Pillow and matplotlib's font files, `pip install wfnet[train,viz]`.
    """
    masks, fonts = _draw(characters)
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for part in labels.split(2048):
        strokes = _distorted(masks, fonts, part, generator, image_size)
        parts.append(_painted(strokes, generator, channels))
    return torch.cat(parts)


def _uniform(generator: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=generator) * (high - low) + low


def _distorted(
    masks: Tensor, fonts: Tensor, labels: Tensor, generator: torch.Generator, size: int
) -> Tensor:
    """Strokes [n, 1, size, size] in 0..1 of the characters labels [n], each in a random font."""
    n = len(labels)
    uniform = partial(_uniform, generator)
    # Of the fonts that have the character: fonts [K, F] lists them first.
    count = (fonts[labels] >= 0).sum(1)
    pick = (uniform(0, 1, n) * count).long().clamp_(max=fonts.shape[1] - 1)
    mask = masks[labels, fonts[labels, pick]].float().div_(255).unsqueeze(1)  # [n, 1, 64, 64]

    # Strokes from thin (erosion) to thick (dilation).
    weight = uniform(-0.8, 1.0, n, 1, 1, 1) * DISTORTION
    thick = F.max_pool2d(mask, 3, 1, 1)
    thin = -F.max_pool2d(-mask, 3, 1, 1)
    mask = torch.where(
        weight > 0, torch.lerp(mask, thick, weight.clamp(0, 1)), torch.lerp(mask, thin, -weight)
    ).clamp_(0, 1)

    angle = uniform(-0.26, 0.26, n) * DISTORTION
    shear = uniform(-0.25, 0.25, n) * DISTORTION
    scale = 0.8 * torch.exp(uniform(-0.15, 0.25, n, 2) * DISTORTION)  # below 1 enlarges
    shift = uniform(-0.12, 0.12, n, 2) * DISTORTION
    cos, sin = angle.cos(), angle.sin()
    across = torch.stack((cos, sin), 1) * scale[:, :1]
    down = torch.stack((shear * cos - sin, shear * sin + cos), 1) * scale[:, 1:]
    theta = torch.stack((across, down, shift), 2)
    # Sampled at twice the size and averaged, so that strokes do not alias.
    grid = F.affine_grid(theta, [n, 1, 2 * size, 2 * size], align_corners=False)
    return F.avg_pool2d(F.grid_sample(mask, grid, align_corners=False), 2)


def _painted(strokes: Tensor, generator: torch.Generator, channels: int) -> Tensor:
    """strokes [n, 1, size, size] -> images [n, channels, size, size] uint8."""
    n, _, size, _ = strokes.shape
    shape = (n, channels, 1, 1)
    ground = _uniform(generator, 0.0, 1.0, *shape)
    light, dark = (_uniform(generator, *ends, *shape) for ends in ((0.75, 1.0), (0.0, 0.25)))
    # Noise covers part of the contrast; clutter is noise of a coarser grain, as big as strokes.
    images = torch.lerp(ground, torch.where(ground < 0.5, light, dark), strokes)
    coarse = max(size // 4, 1)
    clutter = torch.randn(n, channels, coarse, coarse, generator=generator)
    clutter = F.interpolate(clutter, size=(size, size), mode="bilinear", align_corners=False)
    grain = torch.randn(n, channels, size, size, generator=generator)
    images = images + NOISE * (0.5 * clutter + 0.5 * grain)
    return images.clamp_(0, 1).mul_(255).round_().byte()


@lru_cache(4)
def _draw(characters: str) -> tuple[Tensor, Tensor]:
    """Masks [K, F, CANVAS, CANVAS] uint8 of every character in every font, and the fonts that have
    it: [K, F] font numbers first, then -1."""
    image_module = require("PIL.Image", "train")
    font_module = require("PIL.ImageFont", "train")
    draw_module = require("PIL.ImageDraw", "train")
    folder = Path(require("matplotlib", "viz").get_data_path(), "fonts", "ttf")
    masks = torch.zeros(len(characters), len(FONTS), CANVAS, CANVAS, dtype=torch.uint8)
    fonts = torch.full((len(characters), len(FONTS)), -1)
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
            masks[label, number] = torch.from_numpy(np.array(image))
            fonts[label, (fonts[label] >= 0).sum()] = number
    return masks, fonts
