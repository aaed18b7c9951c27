import csv
import json

import torch
from safetensors.torch import save_file

from wfnet.baselines import BaselineConfig, BaselineModels, Origin
from wfnet.data import open_data

QUICK = ("--samples", "40", "--relearn-steps", "1", "--relearn-images", "1", "--quiet", "-j0")


def test_json_and_csv_and_what_is_missing(digits_run, call, capsys):
    words = ["trust", digits_run, *QUICK, "--checks", "membership", "removal", "--classes", "3"]
    call("", *words, "7")
    capsys.readouterr()
    call("", *words)  # reused
    shown = capsys.readouterr().out
    assert "Can one tell that images of the forgotten class were trained on?" in shown
    assert f"wfnet baseline {digits_run} --methods retrained --classes 3" in shown
    content = json.loads((digits_run / "trust.json").read_text())
    pairs = [(r["index"], r["check"]) for r in content["records"]]
    assert len(pairs) == len(set(pairs)) == 4
    assert {index for index, _ in pairs} == {3, 7}
    assert content["settings"]["settings"]["samples"] == 40
    lines = list(csv.DictReader((digits_run / "trust.csv").open()))
    assert {line["check"] for line in lines} >= {"membership", "removal"}
    call("", *words, "--prune-below", "0.1")  # of other exports: nothing is reused
    content = json.loads((digits_run / "trust.json").read_text())
    assert content["settings"]["prune_below"] == 0.1
    assert {record["index"] for record in content["records"]} == {3}


def test_retrained_models_of_this_classifier_and_data_only(
    digits_run, small_network, tmp_path, call
):
    data = open_data("digits", seed=3)
    base = small_network()

    def retrain(folder, base, train, seed=0):
        config = BaselineConfig(seed=seed)
        origin = Origin(base, train, {"epochs": 1})
        BaselineModels("retrained", tmp_path / folder, origin, config)(3)

    retrain("a/retrained", base, data.train)
    retrain("b", base, data.train, seed=1)
    retrain("other_base", small_network(seed=2), data.train)
    retrain("other_images", base, data.test)
    (tmp_path / "copy").mkdir()
    copied = tmp_path / "a" / "retrained" / "class_3.safetensors"
    (tmp_path / "copy" / "class_3.safetensors").write_bytes(copied.read_bytes())
    output = tmp_path / "out"
    words = ["--classes", "3", "--checks", "closeness", "--retrained", tmp_path, *QUICK]
    call("trust --output", output, digits_run, *words)
    (record,) = json.loads((output / "trust.json").read_text())["records"]
    assert (record["retrained_models"], record["missing"]) == (2, None)
    assert "js_forget" in record["forgetful"]


def test_retrained_models_of_other_programs(digits_run, small_network, tmp_path, call, fails):
    torch.save({"state_dict": small_network(seed=5).state_dict()}, tmp_path / "mine.pth")
    save_file(small_network(seed=6).state_dict(), tmp_path / "b.safetensors")
    files = [f"3={tmp_path}/mine.pth", f"3={tmp_path}/b.safetensors"]
    words = ["--checks", "closeness", "--output", tmp_path / "out", *QUICK]
    call("trust", digits_run, *words, "--classes", "3", "--retrained", *files)
    (record,) = json.loads((tmp_path / "out" / "trust.json").read_text())["records"]
    assert record["retrained_models"] == 2
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "other.pth")
    fails(["trust", digits_run, *words, "--retrained", f"3={tmp_path}/other.pth"], "does not fit")
