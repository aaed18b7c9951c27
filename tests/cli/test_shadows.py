import csv
import json

FEW = ("--train-per-class", "12")


def test_shadows_of_a_run(digits_run, call, capsys, fails):
    words = ["shadows", digits_run, "--train-epochs", "1", "--quiet", *FEW]
    fails([*words, "-n", "5"], "come in pairs", "got 5")
    call("", *words, "-n", "6", "--classes", "3")
    shown = capsys.readouterr().out
    assert "told from retrained without the class" in shown
    content = json.loads((digits_run / "shadows.json").read_text())
    rows = {(r["against"], r["what"], r["method"], r["index"]): r for r in content["rows"]}
    assert {key[0] for key in rows} == {"image", "class"}
    for method in ("forgetful", "original", "logit_masked", "bias_shifted", "retrained"):
        area = rows["class", "auc", method, "all"]
        assert 0 <= area["low"] <= area["value"] <= area["high"] <= 1
    assert content["settings"]["rounds"] == 6
    lines = list(csv.DictReader((digits_run / "shadows.csv").open()))
    assert len(lines) == len(content["rows"])
    kept = {path.name for path in (digits_run / "shadows").glob("round_*.safetensors")}
    assert len(kept) == 6
    call("", *words, "-n", "6", "--classes", "7", "--no-retrain", "--methods", "logit_masked")
    shown = capsys.readouterr().out
    assert "leave out --no-retrain, 6 trainings for each class" in shown
    content = json.loads((digits_run / "shadows.json").read_text())
    assert {row["against"] for row in content["rows"]} == {"image"}
