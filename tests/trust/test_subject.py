import math

import pytest
import torch

from wfnet.trust.subject import ImageReader, TrustSettings


def test_samples_are_bounded_repeatable_and_of_the_classes_asked_for(data):
    reader = ImageReader(data.train, 5, seed=3)
    own, rest = reader.of(2), reader.without(2)
    assert own.labels.tolist() == [2] * 5
    assert len(rest) <= 5
    assert 2 not in rest.labels
    again = ImageReader(data.train, 5, seed=3).of(2)
    assert torch.equal(own.images, again.images)
    assert not torch.equal(own.images, ImageReader(data.train, 5, seed=4).of(2).images)
    assert set(ImageReader(data.train, 99).without(0, 3).labels.tolist()) == {1, 2}


@pytest.mark.parametrize(
    ("per_class", "label", "own", "others"),
    [((8, 8, 8, 8), 1, 8, 24), ((90, 10, 60, 40), 1, 5, 95), ((1, 299, 0, 0), 0, 1, 100)],
)
def test_attackers_images_have_the_natural_mix(make_images, per_class, label, own, others):
    found = ImageReader(make_images(per_class, 0), 100, seed=1).mixed(label)
    count = int((found.labels == label).sum())
    rest = len(found) - count
    assert rest == pytest.approx(others, abs=12)  # drawn at random
    assert count == max(1, round(rest * per_class[label] / (sum(per_class) - per_class[label])))
    assert count == pytest.approx(own, abs=12)


def test_what_makes_no_sense_is_refused(data, make_images):
    with pytest.raises(ValueError, match="samples must"):
        TrustSettings(samples=1)
    with pytest.raises(ValueError, match="relearn_images must"):
        TrustSettings(relearn_images=(0,))
    with pytest.raises(ValueError, match="no image of class 9"):
        ImageReader(data.train, 5).of(9)


def test_nan_is_an_error_and_no_number(make_network, make_subject):
    broken = make_network(0)
    with torch.no_grad():
        broken.fc.bias[0] = math.nan
    with pytest.raises(FloatingPointError, match="gives NaN"):
        make_subject(forgetful=broken).logits(broken, "test_forget")
