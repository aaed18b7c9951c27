import csv
import json
import subprocess
import sys

import pytest
import torch
from image_files import truncate
from safetensors.torch import load_file

import wfnet
from wfnet import models
from wfnet.cli import bake, build_parser, main
from wfnet.cli.classifier import create_classifier
from wfnet.services.files import write_tensors


def test_help_is_quick_to_import_and_runs_as_a_module():
    code = (
        "import runpy, sys; sys.argv = ['wfnet', '--help']\n"
        "try: runpy.run_module('wfnet', run_name='__main__')\n"
        "except SystemExit as end: print('status', end.code)\n"
        "heavy = {'timm', 'torchvision', 'matplotlib', 'sklearn'}\n"
        "print('heavy', sorted(heavy & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "status 0\nheavy []" in shown.stdout
    for command in ("demo", "untrain", "evaluate", "bake"):
        assert command in shown.stdout


@pytest.mark.parametrize("command", ["demo", "untrain", "evaluate", "bake"])
def test_every_command_has_help_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert f"example:\n  wfnet {command}" in shown
    assert "None" not in shown


def test_every_option_has_help():
    parser = build_parser()
    commands = next(a for a in parser._actions if a.dest == "command")
    for name, command in commands.choices.items():
        silent = [a.option_strings for a in command._actions if not a.help]
        assert not silent or silent == [["--std"]], name


def test_a_wrong_option_ends_with_status_2(capsys):
    with pytest.raises(SystemExit) as end:
        main(["untrain", "--steps", "many"])
    assert end.value.code == 2
    assert "'many' is not a whole number of at least 1" in capsys.readouterr().err


def test_untrain_evaluate_bake(arguments, tmp_path, base, capsys):
    folder = tmp_path / "runs" / "first"
    call = ["untrain", *arguments, "--steps", "3", "--output", str(tmp_path / "runs")]
    assert main([*call, "--experiment", "first"]) == 0
    shown = capsys.readouterr().out
    assert "3 classes" in shown
    assert f"wfnet evaluate {folder}" in shown
    run = json.loads((folder / "config.json").read_text())
    assert run["command"] == "untrain"
    assert run["classes"] == ["ant", "bee", "cat"]
    assert run["options"]["label_expansion"] == 2
    assert run["untraining"]["objective"] == "balanced"  # what the recipe sets is recorded, too
    assert run["options"]["checkpoint"] == str(base)
    assert run["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert run["result"]["steps"] == 3
    for name in ("wf_config.json", "wf_model.safetensors", "history.csv", "training_curves.png"):
        assert (folder / name).is_file()

    assert main(["evaluate", str(folder), "-j", "0"]) == 0  # nothing is repeated
    assert "original network" in capsys.readouterr().out
    result = json.loads((folder / "evaluation.json").read_text())
    assert [record["name"] for record in result["classes"]] == ["ant", "bee", "cat"]
    assert result["settings"]["images"] == 6
    assert result["settings"]["split"] == "test"
    assert len(list(csv.DictReader((folder / "evaluation.csv").open()))) == 5
    for name in ("overview.png", "accuracy_per_class.png", "gates.png"):
        assert (folder / name).is_file()

    assert main(["bake", str(folder), "--forget", "bee", "--verify"]) == 0
    shown = capsys.readouterr().out
    assert "class 1 (bee)" in shown
    assert "verified on 6 test images: equal" in shown
    plain = models.create("resnet", 3, 3, width=8).eval()
    plain.load_state_dict(load_file(folder / "forget_1.safetensors"))
    original = create_classifier(
        "small/resnet", 3, checkpoint=base, in_channels=3, options={"width": 8}
    )
    net = wfnet.WFNet.from_pretrained(folder, original)
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(plain(images), net(images, forget=1))
    assert not torch.equal(plain(images), original(images))


def test_a_run_can_be_moved(finished, base, tmp_path):
    """What lies inside a run's folder is recorded relative to it."""
    inside = finished / "base.safetensors"
    inside.write_bytes(base.read_bytes())
    run = json.loads((finished / "config.json").read_text())
    run["options"]["checkpoint"] = "base.safetensors"
    (finished / "config.json").write_text(json.dumps(run))
    moved = finished.rename(tmp_path / "moved")
    assert main(["bake", str(moved), "--forget", "0", "--verify"]) == 0


def test_missing_options(image_folder, tmp_path, monkeypatch, fails):
    monkeypatch.chdir(tmp_path)
    fails(["untrain"], "there are no images: give --data-dir DIR")
    fails(["untrain", "--data", "mnist"], "--data mnist needs --data-dir")
    fails(["untrain", "--data-dir", image_folder], "there is no network: give --model")
    fails(["evaluate"], "name the folder of a run")
    fails(["evaluate", tmp_path / "nowhere"], "is not a folder")
    fails(["bake", tmp_path, "--forget", "0"], "holds no wfnet checkpoint")


def test_bad_images(arguments, image_folder, tmp_path, capsys, fails):
    call = ["untrain", *arguments, "--steps", "2", "--output", tmp_path / "run"]
    for number in (0, 1, 2):
        truncate(next((image_folder / "train" / "bee").glob(f"{number}.*")))
    assert main([str(argument) for argument in call]) == 0
    shown = capsys.readouterr()
    assert "corrupt image left out" in shown.err
    assert "corrupt images, named above" in shown.out
    fails([*call, "--force", "--max-corrupt", "0"], "more than max_corrupt=0")
    (image_folder / "train" / "dog").mkdir()
    fails([*call, "--force"], "has weights for 3 classes, not for 4")
    (image_folder / "train" / "dog").rmdir()
    (image_folder / "val" / "dog").mkdir()
    fails([*call, "--force"], "dog")


def test_an_output_that_cannot_be_written(arguments, tmp_path, fails):
    (tmp_path / "file").write_text("in the way")
    call = ["untrain", *arguments, "--steps", "2", "--output", tmp_path / "file" / "run"]
    fails(call, "the output folder cannot be written to", "choose another --output")


def test_foreign_and_damaged_files(finished, arguments, tmp_path, image_folder, fails):
    other = tmp_path / "other.safetensors"
    write_tensors(other, models.create("resnet", 3, 3, seed=2, width=8).state_dict())
    fails(["evaluate", finished, "--checkpoint", other], "not the one these filters")
    fails(["bake", finished, "--forget", "dog"], "no class 'dog'", "ant, bee, cat")
    fails(["bake", finished, "--forget", "3"], "0 to 2")
    fails(["bake", finished, "--forget", "0", "--output", "x.pt"], ".safetensors")
    fails(["evaluate", finished, "--data", "digits"], "digits has 10 classes")
    truncate(finished / "wf_model.safetensors")
    fails(["evaluate", finished], "is truncated or not a safetensors file")
    truncate(finished / "config.json")
    fails(["evaluate", finished], "is damaged or no record of a run")


def test_debug_shows_the_traceback(capsys):
    assert main(["untrain", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_error_nobody_foresaw_keeps_its_traceback(finished, monkeypatch, capsys):
    monkeypatch.setattr("wfnet.cli.evaluate.evaluate", lambda *args, **kwargs: {}["missing"])
    assert main(["evaluate", str(finished), "-j", "0"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_full_disk(finished, monkeypatch, fails):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("wfnet.evaluation.EvaluationResult.to_json", full)
    fails(["evaluate", finished, "-j", "0"], "the disk is full", "no file was left half written")


NETWORK = ("--model", "small/resnet", "--model-kwargs", "width=8", "--img-size", "32")


def test_filters_saved_from_python_need_the_options_once(
    base, tmp_path, image_folder, capsys, fails
):
    original = create_classifier(
        "small/resnet", 3, checkpoint=base, in_channels=3, options={"width": 8}
    )
    wfnet.WFNet(original, 3).save_pretrained(tmp_path / "filters")
    fails(["bake", tmp_path / "filters", "--forget", "0"], "does not say which network")
    call = ["bake", str(tmp_path / "filters"), "--forget", "0", "2", "--verify", "--images", "3"]
    call += [*NETWORK, "--checkpoint", str(base), "--in-chans", "3"]
    assert main(call) == 0
    assert "verified on 3 random images" in capsys.readouterr().out
    assert (tmp_path / "filters" / "forget_0_2.safetensors").is_file()


def test_onnx(finished, tmp_path, monkeypatch, fails):
    path = tmp_path / "model.onnx"
    call = ["bake", str(finished), "--forget", "1", "--onnx", str(path)]
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        fails(call, "--onnx needs onnx and onnxscript: install")
    assert not (finished / "forget_1.safetensors").exists()  # before work starts
    pytest.importorskip("onnxscript")
    evaluator = pytest.importorskip("onnx.reference").ReferenceEvaluator
    assert main(call) == 0
    plain = models.create("resnet", 3, 3, width=8).eval()
    plain.load_state_dict(load_file(finished / "forget_1.safetensors"))
    images = torch.randn(5, 3, 32, 32)
    (logits,) = evaluator(str(path)).run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), plain(images), rtol=1e-4, atol=1e-4)


def test_verify_fails_loudly(finished, base):
    original = create_classifier(
        "small/resnet", 3, checkpoint=base, in_channels=3, options={"width": 8}
    )
    net = wfnet.WFNet.from_pretrained(finished, original)
    path = finished / "forget_0.safetensors"
    bake.save_baked(net, [0], path)
    images = torch.randn(8, 3, 32, 32)
    assert bake.verify(net, original, [0], path, images).within_rounding
    weights = load_file(path)
    weights["layer1.0.conv1.weight"][0] *= 1.001
    write_tensors(path, weights)
    with pytest.raises(RuntimeError, match="does not compute what the filtered network does"):
        bake.verify(net, original, [0], path, images)
    weights["fc.bias"][0] = torch.nan
    write_tensors(path, weights)
    with pytest.raises(RuntimeError, match="do not use it"):
        bake.verify(net, original, [0], path, images)
