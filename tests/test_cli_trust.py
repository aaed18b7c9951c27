"""The commands around trust: `wfnet trust`, `wfnet report`, `wfnet bake --prune-below --verify`."""

import csv
import json

import pytest
import torch
from safetensors.torch import load_file

import wfnet
from wfnet import models
from wfnet.baselines import BaselineConfig, BaselineModels
from wfnet.cli import main, trust
from wfnet.cli.drawing import read_attribution
from wfnet.data import open_data
from wfnet.evaluation.attribution import AttributionRecord, AttributionResult
from wfnet.report import figures
from wfnet.services.files import write_json, write_tensors

pytest.importorskip("sklearn")

NETWORK = ("--model", "small/resnet", "--model-kwargs", "width=8")
QUICK = ("--samples", "40", "--relearn-steps", "1", "--relearn-images", "1", "--quiet")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run on digits whose filters are random: what is measured does not matter here."""
    folder = tmp_path_factory.mktemp("trust") / "run"
    base = folder / "base.safetensors"
    folder.mkdir()
    model = models.create("resnet", 10, seed=1, width=8)
    write_tensors(base, model.state_dict())
    call = ["untrain", "--data", "digits", "--checkpoint", str(base), *NETWORK, "--steps", "1",
            "--output", str(folder), "--quiet"]  # fmt: skip
    assert main([*call, "--workers", "0", "--seed", "3"]) == 0
    net = wfnet.WFNet.from_pretrained(folder, models.create("resnet", 10, seed=1, width=8))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for alpha in net.filter_parameters():
            alpha.copy_(3 * torch.randn(alpha.shape, generator=generator))
    net.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch):
    monkeypatch.setattr(figures, "_DPI", 30)


def fails(capsys, arguments, *parts):
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    for part in parts:
        assert part in error


@pytest.fixture(scope="module")
def checked(made):
    assert main(["trust", str(made), "--classes", "3", "7", *QUICK]) == 0
    return made


def test_trust_writes_json_and_csv_and_says_what_is_missing(checked, capsys):
    assert main(["trust", str(checked), "--classes", "3", *QUICK]) == 0  # reused
    shown = capsys.readouterr().out
    assert "Can one tell that images of the forgotten class were trained on?" in shown
    assert f"wfnet baseline {checked} --methods retrained --classes 3" in shown
    content = json.loads((checked / "trust.json").read_text())
    pairs = [(r["index"], r["check"]) for r in content["records"]]
    assert len(pairs) == len(set(pairs)) == 12
    assert {index for index, _ in pairs} == {3, 7}
    assert content["settings"]["settings"]["samples"] == 40
    assert content["settings"]["data"] == "digits"
    lines = list(csv.DictReader((checked / "trust.csv").open()))
    assert {line["check"] for line in lines} >= {"membership", "removal", "relearning"}


def test_trust_finds_retrained_models_of_this_classifier_and_data_only(made, tmp_path):
    data = open_data("digits", seed=3)
    net_base = models.create("resnet", 10, seed=1, width=8)

    def retrain(folder, base, train, seed=0):
        one = BaselineModels(
            "retrained", tmp_path / folder, base, train, BaselineConfig(seed=seed), {"epochs": 1}
        )
        return one(3)

    first = retrain("a/retrained", net_base, data.train)
    retrain("b", net_base, data.train, seed=1)
    retrain("other_base", models.create("resnet", 10, seed=2, width=8), data.train)
    retrain("other_images", net_base, data.test)
    (tmp_path / "copy").mkdir()
    copied = tmp_path / "a" / "retrained" / "class_3.safetensors"
    (tmp_path / "copy" / "class_3.safetensors").write_bytes(copied.read_bytes())
    found = trust.RetrainedModels([tmp_path], net_base, data.train)
    assert len(found(3)) == 2
    assert found(4) == []
    same = [all(torch.equal(a, b) for a, b in zip(first.state_dict().values(),
                                                  m.state_dict().values(), strict=True))
            for m in found(3)]  # fmt: skip
    assert same == [True, False]
    output = tmp_path / "out"
    call = ["trust", str(made), "--classes", "3", "--checks", "closeness", "membership"]
    assert main([*call, "--retrained", str(tmp_path), "--output", str(output), *QUICK]) == 0
    records = json.loads((output / "trust.json").read_text())["records"]
    assert all(record["retrained_models"] == 2 for record in records)
    assert records[0]["missing"] is None
    assert "js_forget" in records[1]["forgetful"]


def test_bad_input_of_trust(made, tmp_path, capsys):
    fails(capsys, ["trust", made, "--classes", "eleven"], "there is no class 'eleven'")
    fails(capsys, ["trust", tmp_path / "none"], "is not a folder")
    fails(capsys, ["trust", made, "--retrained", tmp_path / "none", *QUICK], "does not exist")
    fails(capsys, ["trust", made, "--data", "glyphs26", *QUICK], "26 classes", "10")
    with pytest.raises(SystemExit):
        main(["trust", str(made), "--checks", "magic"])
    assert "invalid choice: 'magic'" in capsys.readouterr().err


def test_report_of_a_run(checked, capsys):
    assert main(["evaluate", str(checked), "--no-figures", "--quiet", "-j0"]) == 0
    assert main(["report", str(checked), "--quiet", "-j0"]) == 0
    assert "open it in a browser" in capsys.readouterr().out
    text = (checked / "report.html").read_text()
    assert 'id="class-9"' in text
    assert 'id="trust-class-7"' in text
    for name in ("overview", "gates", "associations", "confusion"):
        assert f'id="figure-{name}"' in text
    assert "Removability of the export" in text
    before = (checked / "report.html").read_bytes()
    other = checked / "other.html"
    assert main(["report", str(checked), "--as-is", "--output", str(other)]) == 0
    assert len(other.read_bytes()) == len(before)
    assert (checked / "report.html").read_bytes() == before


def test_curves_are_read_as_evaluate_writes_them(tmp_path):
    names = ("insertion", "deletion", "insertion_random", "deletion_random")
    record = AttributionRecord(0, "a", 3, 0.9, 0.1, 0.5, 0.4, {n: [0.0, 1.0] for n in names})
    result = AttributionResult([0.0, 1.0], [record], {"steps": 1}, 2.0)
    path = tmp_path / "attribution.json"
    assert read_attribution(path) is None
    write_json(path, result.as_dict())
    assert read_attribution(path) == result
    path.write_text("[]")
    with pytest.raises(ValueError, match="is damaged"):
        read_attribution(path)


def test_report_of_nothing(tmp_path, capsys):
    fails(capsys, ["report", tmp_path], "holds nothing to report yet")


def test_bake_prunes_and_attacks_the_file_itself(made, tmp_path, capsys):
    path = tmp_path / "pruned.safetensors"
    call = ["bake", str(made), "--forget", "3", "--prune-below", "0.2", "--output", str(path)]
    assert main([*call, "--verify", "--samples", "30", "--quiet"]) == 0
    shown = capsys.readouterr().out
    assert "gates below 0.2 at 0, within rounding" in shown
    assert "brought back by who holds the file and no label" in shown
    report = json.loads((tmp_path / "pruned.trust.json").read_text())
    assert report["forget"] == [3]
    assert report["prune_below"] == 0.2
    (found,) = report["classes"]
    net = wfnet.WFNet.from_pretrained(made, models.create("resnet", 10, seed=1, width=8))
    gates = torch.cat([layer.gates()[3] for layer in net.masked_layers.values()])
    assert found["details"]["rows"]["zero_rows"] == int((gates < 0.2).sum())
    plain = models.create("resnet", 10, width=8)
    plain.load_state_dict(load_file(path))
    images = open_data("digits", seed=3).test
    own = images.labels == 3
    batch = images.batch(own.nonzero().squeeze(1)[:30]).images
    accuracy = (plain.eval()(batch).argmax(1) == 3).double().mean().item()
    assert found["images"]["forget"] == 30
    assert found["values"]["acc_f"] == pytest.approx(accuracy, abs=0.2)  # other 30 of the images
    assert "acc_f_batchnorm_all" in found["values"]


def test_verify_without_data_says_so(made, tmp_path, capsys):
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("wf_config.json", "wf_model.safetensors"):
        (alone / name).write_bytes((made / name).read_bytes())
    call = ["bake", str(alone), "--forget", "1", "--checkpoint", str(made / "base.safetensors")]
    assert main([*call, *NETWORK, "--in-chans", "1", "--img-size", "32", "--verify"]) == 0
    shown = capsys.readouterr().out
    assert "attacks need images" in shown
    assert json.loads((alone / "forget_1.trust.json").read_text())["classes"] == []


def test_bake_with_a_threshold_that_makes_no_sense(made, capsys):
    with pytest.raises(SystemExit):
        main(["bake", str(made), "--forget", "1", "--prune-below", "-1"])
    assert "is not a number of at least 0" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["trust", "report"])
def test_help_has_an_example_and_no_none(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert f"example:\n  wfnet {command}" in shown
    assert "None" not in shown
