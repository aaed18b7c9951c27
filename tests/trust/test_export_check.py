import pytest

from wfnet.trust import removal
from wfnet.trust.export_check import check_export
from wfnet.trust.subject import TrustSettings


@pytest.fixture
def checks(data, make_network, closed):
    base = make_network(0)
    settings = TrustSettings(samples=100)
    return check_export(closed(base, 0.05), base, data, ("conv1", "conv2"), [1, 2], settings)


def test_every_forgotten_class_is_attacked_with_the_natural_mix(checks, data):
    assert [(check.label, check.name) for check in checks] == [(1, "quarter 1"), (2, "quarter 2")]
    for check in checks:
        assert set(check.values) == set(removal.CHECK.measures)
        assert check.images == {"forget": 5, "retain": 10}  # the other forgotten class is no test
        # ... but an attacker has its images as well
        assert check.details["attackers_images"] == {"unlabelled": 32, "of_the_class": 8}


def test_what_is_printed(checks):
    text = str(checks[0])
    assert "accuracy on it" in text
    assert "(8 of 32 of the class)" in text
    value = f"{checks[0].values['acc_f_affine_reset']:.1%}  BatchNorm's scale and shift reset"
    assert value in text
    assert "norms of the public base (holds the base as well)" in text
