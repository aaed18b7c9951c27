import sys

import pytest

from wfnet.report.figures import gate_heatmap


def test_unknown_format_writes_nothing_and_matplotlibs_state_is_left_alone(tmp_path, make_net):
    import matplotlib

    before, pyplot = dict(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules
    for name in ("gates", "gates.xyz"):
        with pytest.raises(ValueError, match="no ending that names a picture format"):
            gate_heatmap(make_net(2), tmp_path / name, [0], "ab")
    assert list(tmp_path.iterdir()) == []
    gate_heatmap(make_net(3), tmp_path / "o.png", [0], "abc")
    assert dict(matplotlib.rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) == pyplot
