"""The README's tables and its chart are those of the committed results."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import render


def test_readme_and_chart_are_up_to_date(capsys):
    status = render.main(["--check"])
    assert status == 0, capsys.readouterr().out


def test_a_changed_number_is_out_of_date(tmp_path, monkeypatch, capsys):
    changed = tmp_path / "README.md"
    changed.write_text(render.README.read_text().replace("| 99.", "| 98.", 1))
    assert changed.read_text() != render.README.read_text()
    monkeypatch.setattr(render, "README", changed)
    assert render.main(["--check"]) == 1
    assert "out of date: README.md" in capsys.readouterr().out


def test_markers_must_be_those_of_the_tables():
    with pytest.raises(ValueError, match=r"marks the tables \['data'\]"):
        render.rendered("<!-- results:data -->\n<!-- end -->\n")
