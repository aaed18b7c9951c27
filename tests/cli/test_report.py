import json

import pytest


@pytest.mark.usefixtures("small_pictures")
def test_the_page_of_a_run(digits_run, tmp_path, call, fails, capsys):
    words = ["--tables", "--no-relearn", "--attribution-steps", "1", "--group-sizes"]
    call("evaluate --no-figures --quiet -j0", digits_run, *words)
    settings = json.loads((digits_run / "evaluation.json").read_text())["settings"]
    filters = json.loads((digits_run / "wf_config.json").read_text())
    assert settings["filters_digest"] == filters["filters_digest"]  # the report compares them
    call("report --quiet -j0", digits_run)
    assert "open it in a browser" in capsys.readouterr().out
    text = (digits_run / "report.html").read_text()
    assert 'id="class-9"' in text
    for name in ("overview", "gates", "associations", "confusion", "attribution"):
        assert f'id="figure-{name}"' in text
    other = tmp_path / "other.html"
    call("report --as-is", digits_run, "--output", other)
    assert other.read_text() == text
    fails(["report", digits_run, "--as-is", "--output", tmp_path], f"{tmp_path} is a folder")
