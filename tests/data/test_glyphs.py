import pytest
import torch

from wfnet.data.glyphs import CHARACTERS, FONTS, HUNDRED, characters_of, font_folder, glyphs, render


def test_glyphs_are_seeded():
    a = glyphs(26, per_class=10, seed=3)
    b = glyphs(26, per_class=10, seed=3)
    c = glyphs(26, per_class=10, seed=4)
    assert torch.equal(a.train.images, b.train.images)
    assert not torch.equal(a.train.images, c.train.images)
    assert a.classes == list(CHARACTERS[26])
    assert (len(a.train), len(a.validation), len(a.test)) == (26 * 7, 26, 26 * 2)


def test_a_hundred_distinct_characters_have_fonts():
    assert len(set(HUNDRED)) == 100
    assert all((font_folder() / f"{name}.ttf").is_file() for name in FONTS)
    images = render(HUNDRED, torch.arange(100), noise=0.0, distortion=0.0)
    assert images.shape == (100, 1, 32, 32)
    contrast = images.flatten(1).max(1).values.int() - images.flatten(1).min(1).values.int()
    assert contrast.min() > 40


def test_noise_and_colour():
    clean = render("AB", torch.zeros(20).long(), noise=0.0, channels=3)
    noisy = render("AB", torch.zeros(20).long(), noise=0.5, channels=3)
    assert clean.shape == (20, 3, 32, 32)
    assert noisy.float().diff(dim=-1).abs().mean() > 2 * clean.float().diff(dim=-1).abs().mean()


@pytest.mark.parametrize("arguments", [{"num_classes": 101}, {"channels": 2}, {"noise": -1.0}])
def test_bad_glyphs_are_refused(arguments):
    with pytest.raises(ValueError, match=r"glyphs|noise"):
        glyphs(**arguments)
    assert characters_of(12) == HUNDRED[:12]
