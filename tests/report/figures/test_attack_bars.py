import pytest

from wfnet.report.figures import attack_levels, attacks


def test_bars_stand_where_every_network_was_attacked(drawn, tmp_path):
    found = {("removal", "acc_f"): 0.0, ("removal", "acc_f_offset"): 0.25}
    one = attack_levels(lambda *names: found.get(names))
    assert one == {"nothing": 0.0, "its logit\nshifted": 25.0}
    other = one | {"its logit\nshifted": 75.0, "fine-tuned\nwith ten": 50.0}
    attacks(99.0, {"a": one, "b": other}, tmp_path / "attacks.png")
    axis = drawn[0].axes[0]
    assert [text.get_text() for text in axis.get_xticklabels()] == list(one)
    assert [bar.get_height() for bar in axis.patches] == pytest.approx([0, 25, 0, 75])
    assert axis.lines[0].get_ydata()[0] == 99
