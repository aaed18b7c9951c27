import torch

from wfnet.data import open_data
from wfnet.data.glyphs import CHARACTERS, FONTS, HUNDRED, font_folder, render


def test_glyphs_are_seeded():
    a, b, c = (open_data("glyphs10", image_size=8, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(a.train.images, b.train.images)
    assert not torch.equal(a.train.images, c.train.images)
    assert a.classes == list(CHARACTERS[10])
    assert (len(a.train), len(a.validation), len(a.test)) == (1440, 160, 400)


def test_a_hundred_distinct_characters_have_fonts():
    assert len(set(HUNDRED)) == 100
    assert all((font_folder() / f"{name}.ttf").is_file() for name in FONTS)
    images = render(HUNDRED, torch.arange(100), noise=0.0)
    assert images.shape == (100, 1, 32, 32)
    contrast = images.flatten(1).max(1).values.int() - images.flatten(1).min(1).values.int()
    assert contrast.min() > 40


def test_noise_and_colour():
    clean, noisy = (render("AB", torch.zeros(20).long(), noise=n, channels=3) for n in (0.0, 0.5))
    assert clean.shape == (20, 3, 32, 32)
    assert noisy.float().diff(dim=-1).abs().mean() > 2 * clean.float().diff(dim=-1).abs().mean()
