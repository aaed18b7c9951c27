import json

import pytest

from wfnet.cli import main


@pytest.mark.usefixtures("small_pictures")
def test_the_page_of_a_run(digits_run, tmp_path, capsys):
    assert main(["evaluate", str(digits_run), "--no-figures", "--quiet", "-j0"]) == 0
    settings = json.loads((digits_run / "evaluation.json").read_text())["settings"]
    filters = json.loads((digits_run / "wf_config.json").read_text())
    assert settings["filters_digest"] == filters["filters_digest"]  # the report compares them
    assert main(["report", str(digits_run), "--quiet", "-j0"]) == 0
    assert "open it in a browser" in capsys.readouterr().out
    page = digits_run / "report.html"
    text = page.read_text()
    assert 'id="class-9"' in text
    for name in ("overview", "gates", "associations", "confusion"):
        assert f'id="figure-{name}"' in text
    other = tmp_path / "other.html"
    assert main(["report", str(digits_run), "--as-is", "--output", str(other)]) == 0
    assert other.read_text() == text


def test_nothing_to_report(tmp_path, fails):
    fails(["report", tmp_path], "holds nothing to report yet")
    fails(["report", tmp_path / "none"], "is not a folder")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ("-b 0", "'0' is not a whole number of at least 1"),
        ("-b 1000000000", "is not a whole number of at most"),
        (f"--seed {2**70}", "is not a whole number of at most"),
        ("--threads 0.5", "is not a whole number"),
    ],
)
def test_values_out_of_range(arguments, part, capsys):
    with pytest.raises(SystemExit) as end:
        main(["report", "run", *arguments.split()])
    assert end.value.code == 2
    assert part in capsys.readouterr().err


def test_an_output_that_cannot_be_written(digits_run, tmp_path, fails):
    (tmp_path / "file").write_text("")
    call = ["report", digits_run, "--as-is", "--output"]
    fails(
        [*call, tmp_path / "file" / "report.html"], "cannot be written to", str(tmp_path / "file")
    )
    fails([*call, tmp_path], f"{tmp_path} is a folder")


@pytest.mark.parametrize("command", ["trust", "report"])
def test_help_has_an_example_and_no_none(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert f"example:\n  wfnet {command}" in shown
    assert "None" not in shown
