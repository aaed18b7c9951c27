def test_table_of_a_run(digits_run, call, capsys, fails, tmp_path):
    call("evaluate --no-figures --quiet", digits_run)
    capsys.readouterr()
    call("table", digits_run, "--output", tmp_path)
    shown = capsys.readouterr().out
    assert "digits, small/resnet, balanced (1 seed)" in shown
    assert f"missing: trust.json in {digits_run}: wfnet trust {digits_run}" in shown
    assert {path.name for path in tmp_path.iterdir()} == {"seeds.md", "seeds.csv", "seeds.tex"}
    fails(["table", tmp_path], "is no run of wfnet")
