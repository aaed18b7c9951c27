"""The README's tables and its chart are those of the committed results."""

import json

import pytest
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
