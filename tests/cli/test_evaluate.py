import json

from wfnet.cli import main


def test_evaluate_takes_what_the_command_line_says_over_what_was_recorded(finished, tmp_path):
    output = tmp_path / "elsewhere"
    call = ["evaluate", "--resume", str(finished), "--output", str(output), "--zrf-base", "2"]
    call += ["--classes", "cat", "0", "--retained-rows", "1", "--no-figures", "--no-fuse", "-j0"]
    assert main([*call, "--split", "train"]) == 0
    result = json.loads((output / "evaluation.json").read_text())
    assert result["zrf_base"] == 2
    assert [record["index"] for record in result["classes"]] == [2, 0]
    assert result["settings"]["images"] == 15
    assert {path.name for path in output.iterdir()} == {"evaluation.json", "evaluation.csv"}
    assert not (finished / "evaluation.json").exists()
