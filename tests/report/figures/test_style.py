import importlib
import sys

import pytest
import torch

from wfnet.report.figures import gate_heatmap, style


def test_unknown_format_writes_nothing(tmp_path, make_net):
    for name in ("gates", "gates.xyz"):
        with pytest.raises(ValueError, match="no ending that names a picture format"):
            gate_heatmap(make_net(2), tmp_path / name, [0], "ab")
    assert list(tmp_path.iterdir()) == []


def test_missing_matplotlib_names_the_extra(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    importlib.reload(style)  # importing needs none
    with (
        pytest.raises(ImportError, match=r"pip install wfnet\[viz\]"),
        style.picture(tmp_path / "a.png", 1, 1),
    ):
        pass


def test_matplotlibs_and_torchs_state_are_left_alone(tmp_path, make_net):
    import matplotlib

    net, state = make_net(3), torch.get_rng_state()
    before, pyplot = dict(matplotlib.rcParams), "matplotlib.pyplot" in sys.modules
    gate_heatmap(net, tmp_path / "o.png", [0], "abc")
    assert dict(matplotlib.rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) == pyplot
    assert torch.equal(torch.get_rng_state(), state)
