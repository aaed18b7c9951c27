"""The README's tables and its chart are those of the committed results."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import render


def test_readme_and_chart_are_up_to_date(capsys):
    status = render.main(["--check"])
    assert status == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    ("document", "number", "other"), [("README", "| 99.", "| 98."), ("SCALE", "93 |", "94 |")]
)
def test_a_changed_number_is_out_of_date(tmp_path, monkeypatch, capsys, document, number, other):
    path = getattr(render, document)
    changed = tmp_path / path.name
    changed.write_text(path.read_text().replace(number, other, 1))
    assert changed.read_text() != path.read_text()
    monkeypatch.setattr(render, document, changed)
    assert render.main(["--check"]) == 1
    assert f"out of date: {path.name}" in capsys.readouterr().out


def test_markers_must_be_those_of_the_tables():
    with pytest.raises(ValueError, match=r"marks the tables \['data'\]"):
        render.rendered("<!-- results:data -->\n<!-- end -->\n")


def test_networks_of_one_device_and_commit_share_a_table(tmp_path, monkeypatch):
    """A network has a run of its own where minutes are short; columns of one run stay together."""
    path = next(render.RESULTS.glob("step_*.json"))
    content = json.loads(path.read_text())
    (name, network), *_ = content["networks"].items()
    content["networks"] = {name: network}
    for number in range(2):
        written = {**content, "networks": {f"{name}{number}": network}}
        (tmp_path / f"step_{number}.json").write_text(json.dumps(written))
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    assert [list(found["networks"]) for found in render.step_files()] == [[f"{name}0", f"{name}1"]]
    assert render.step().count("| --- | --- | --- |\n") == 1
    (tmp_path / "step_2.json").write_text(json.dumps({**content, "commit": "other"}))
    assert len(render.step_files()) == 2
    (tmp_path / "step_3.json").write_text(json.dumps({**content, "commit": "other"}))
    with pytest.raises(ValueError, match="a second time"):
        render.step_files()


def test_errors_of_kernels_on_a_device_stand_where_the_backends_are_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    before = render.backends()
    assert "compiles, not yet run" in before
    rows = [
        {"backend": "cuda", "comparisons": 1200, "failures": 3, "largest_ratio_to_eager": 1.5},
        {"backend": "cuda", "comparisons": 34, "failures": 0, "largest_ratio_to_eager": None},
        {"backend": "eager", "comparisons": 2, "failures": 0, "largest_ratio_to_eager": None},
    ]
    content = {"device": "NVIDIA X", "commit": "0123abc", "rows": rows,
               "unfinished": [{"name": "hopper-rest", "reason": "out of time"}]}  # fmt: skip
    (tmp_path / "numerics_x.json").write_text(json.dumps(content))
    _, _, *lines = render.backends().splitlines()[:6]
    assert "1 test or process on NVIDIA X ended without a comparison" in render.backends()
    cells = {line.split("`")[1]: line.split("|")[3].strip() for line in lines}
    assert cells == {
        "reference": "not run",
        "eager": "NVIDIA X: 2 of 2 comparisons with fp64 passed (commit 0123abc)",
        "triton": "compiles, not yet run",
        "cuda": "NVIDIA X: 1,231 of 1,234 comparisons with fp64 passed, errors up to 1.50 times "
        "eager's (commit 0123abc)",
    }
