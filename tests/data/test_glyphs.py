import torch

from wfnet.data import open_data
from wfnet.data.glyphs import CHARACTERS, HUNDRED, render


def test_glyphs_are_seeded():
    a, b, c = (open_data("glyphs10", image_size=8, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(a.train.images, b.train.images)
    assert not torch.equal(a.train.images, c.train.images)
    assert a.classes == list(CHARACTERS[10])
    assert (len(a.train), len(a.validation), len(a.test)) == (1440, 160, 400)


def test_a_hundred_distinct_characters_have_fonts():
    assert len(set(HUNDRED)) == 100
    images = render(HUNDRED, torch.arange(100), seed=0, image_size=32, channels=3)
    assert images.shape == (100, 3, 32, 32)
    contrast = images.flatten(1).max(1).values.int() - images.flatten(1).min(1).values.int()
    assert contrast.min() > 40
