import pytest

from wfnet.report.figures import trust_checks
from wfnet.trust import TrustResult


def test_measures_stand_between_their_levels(make_trust, drawn, tmp_path):
    values = {
        ("membership", "auc_confidence"): 0.5,
        ("relearning", "acc_f_retain_only"): 0.5,
        ("relearning", "acc_f_from_1"): 0.6,
        ("probing", "probe_last"): 0.99,
        ("closeness", "kl_forget"): 7.0,
        ("closeness", "tv_forget"): 0.4,
    }
    details = {
        "probing": {"layers": {"conv1": 0.9, "input of the head": 0.99}},
        "relearning": {"course": {"retain_only": [0.0, 0.5]}},
    }
    result = make_trust(values, dict.fromkeys(values, 0.1), classes=(0, 3), details=details)
    trust_checks(result, tmp_path / "trust.png")
    levels = drawn[0].subfigs[0].axes[0]
    names = [text.get_text() for text in levels.get_yticklabels()]
    assert [name.split()[0] for name in names] == ["area", "best", "best", "balanced", "total"]
    assert levels.collections[-1].get_offsets()[0, 0] == pytest.approx(0.5)  # under test
    bars = [t.get_text() for t in drawn[0].subfigs[1].axes[1].get_xticklabels()]
    assert bars == ["other classes\nonly", "1 image\nof the class"]


def test_what_was_not_measured(make_trust, drawn, tmp_path):
    trust_checks(make_trust({("closeness", "tv_forget"): 0.2}), tmp_path / "some.png")
    texts = [t.get_text() for axis in drawn[0].subfigs[1].axes for t in axis.texts]
    assert texts == ["not measured"] * 2
    with pytest.raises(ValueError, match="no records"):
        trust_checks(TrustResult([]), tmp_path / "none.png")
