"""Commands one after the other, what is wrong with command lines, and how errors are told."""

import json
import subprocess
import sys

import pytest
import torch
from image_files import truncate
from safetensors.torch import load_file

import wfnet
from wfnet import models
from wfnet.cli import COMMANDS, build_parser, main
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


def test_every_command_has_an_example_and_every_option_help():
    parsers = next(a for a in build_parser()._actions if a.dest == "command").choices
    assert len(parsers) == len(COMMANDS)
    for name, parser in parsers.items():
        assert f"example:\n  wfnet {name}" in parser.format_help()
        assert "None" not in parser.format_help()
        assert all(action.help for action in parser._actions)


def test_untrain_evaluate_bake(arguments, tmp_path, base, capsys):
    folder = tmp_path / "runs" / "first"
    call = ["untrain", *arguments, "--steps", "3", "--output", str(tmp_path / "runs")]
    assert main([*call, "--experiment", "first"]) == 0
    assert f"wfnet evaluate {folder}" in capsys.readouterr().out
    run = json.loads((folder / "config.json").read_text())
    assert run["command"] == "untrain"
    assert run["classes"] == ["ant", "bee", "cat"]
    assert run["untraining"]["objective"] == "balanced"  # what the recipe sets is recorded, too
    assert run["options"]["checkpoint"] == str(base)
    assert run["result"]["steps"] == 3
    assert (folder / "history.csv").is_file()
    assert (folder / "training_curves.png").is_file()

    assert main(["evaluate", str(folder), "-j", "0"]) == 0  # nothing is repeated
    assert "original network" in capsys.readouterr().out
    result = json.loads((folder / "evaluation.json").read_text())
    assert [record["name"] for record in result["classes"]] == ["ant", "bee", "cat"]
    assert result["settings"]["images"] == 6
    assert result["settings"]["split"] == "test"
    assert len((folder / "evaluation.csv").read_text().splitlines()) == 6
    assert (folder / "overview.png").is_file()

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


def test_a_run_can_be_moved(finished, finished_once, tmp_path):
    """What lies inside a run's folder is recorded relative to it."""
    inside = finished / "base.safetensors"
    inside.write_bytes((finished_once / "base.safetensors").read_bytes())
    run = json.loads((finished / "config.json").read_text())
    run["options"]["checkpoint"] = "base.safetensors"
    (finished / "config.json").write_text(json.dumps(run))
    moved = finished.rename(tmp_path / "moved")
    assert main(["bake", str(moved), "--forget", "0", "--verify"]) == 0


# Command lines that are refused in one sentence, before work starts, with a part of it.
BAD_INPUT = [
    ("untrain", "there are no images: give --data-dir DIR"),
    ("untrain --data mnist", "mnist needs data_dir (--data-dir)"),
    ("untrain --data-dir {images}", "there is no network: give --model"),
    ("untrain --config mnist/alexnet", "cifar10/vgg16"),
    ("untrain --config {tmp}/no.yaml", "no.yaml does not exist"),
    ("untrain --resume {tmp}", "is no run of wfnet"),
    ("{untrain} --model resnet81", "near it are"),
    ("{untrain} --model small/lenet", "no small model 'lenet'"),
    ("{untrain} --model-kwargs size=8", "small/resnet cannot be made with {{'size': 8"),
    ("{untrain} --model resnet18 --model-kwargs checkpoint_path=x", "does not take"),
    ("untrain --data-dir {images} --model small/vit --pretrained", "no pretrained weights"),
    ("untrain --data-dir {images} --model resnet18 --pretrained --num-classes 3", "1000 classes"),
    ("{untrain} --num-classes 10", "has weights for 3 classes, not for 10"),
    ("{untrain} --in-chans 1", "does not fit this ResNet"),
    ("{untrain} --pretrained", "one of them"),
    ("{untrain} --targets conv9", "target 'conv9' matches no layer"),
    ("{untrain} -b 5", "batch_size must be even"),
    ("{untrain} --device abacus", "--device abacus cannot be used"),
    ("{untrain} --torchcompile --no-fuse", "--no-fuse"),
    ("{untrain} --data-dir /nowhere", "image folder /nowhere does not exist"),
    ("{untrain} --data mnist --data-dir /nowhere", "MNIST"),
    ("{untrain} --data cifar10 --data-dir /nowhere", "cifar-10"),
    ("{untrain} --checkpoint /no.pth", "the weights /no.pth do not exist"),
    ("{untrain} --std 0.5 0.5", "2 mean or std values"),
    ("{untrain} --output {file}/run", "the output folder cannot be written to"),
    ("train --config digits/resnet", "--output DIR"),
    ("train --config digits/resnet --output {run}", "--force"),
    ("evaluate", "name the folder of a run"),
    ("evaluate {tmp}/nowhere", "is not a folder"),
    ("evaluate {run} --checkpoint {other}", "not the one these filters"),
    ("evaluate {run} --data digits", "digits has 10 classes"),
    ("evaluate {run} --tables --group-sizes 4", "--group-sizes 4 leaves none of the 3 classes"),
    ("evaluate {run} --retained-rows 3", "retained_rows must be a whole number of at most 2"),
    ("evaluate {run} --published x/y", "nothing was published for 'x/y'"),
    ("evaluate {run} --tables --baselines {tmp}/no", "is no folder; give that of"),
    ("baseline {run} --set retrained=3", "METHOD.NAME=VALUE"),
    ("baseline {run} --set random_labels.lr=high", "above 0, got 'high'"),
    ("baseline {run} --set retrained.lr=0.1", "would change nothing"),
    ("trust {run} --classes eleven", "there is no class 'eleven'"),
    ("trust {run} --retrained {tmp}/no", "does not exist"),
    ("bake {tmp} --forget 0", "holds no wfnet checkpoint"),
    ("bake {run} --forget dog", "ant, bee, cat"),
    ("bake {run} --forget 0 --output x.pt", ".safetensors"),
    ("report {tmp}", "holds nothing to report yet"),
    ("bench", "there is no network: give --model NAME"),
]


@pytest.fixture(scope="module")
def places(finished_once, tmp_path_factory, network_options, quick_options):
    """What stands for the names in braces."""
    tmp = tmp_path_factory.mktemp("places")
    other = tmp_path_factory.mktemp("other") / "other.safetensors"
    write_tensors(other, models.create("resnet", 3, 3, seed=2, width=8).state_dict())
    images, base = finished_once / "images", finished_once / "base.safetensors"
    words = ["untrain", *network_options, *quick_options, "--steps", "2"]
    words += [f"--data-dir {images} --checkpoint {base} --output {tmp}/new"]
    run = finished_once / "run"
    found = {"tmp": tmp, "file": other, "other": other, "images": images, "run": run}
    return {**found, "untrain": " ".join(words)}


@pytest.mark.parametrize(("line", "part"), BAD_INPUT)
def test_bad_input(line, part, places, fails):
    if "resnet81" in line or "resnet18" in line:
        pytest.importorskip("timm")
        pytest.importorskip("torchvision")
    fails(line.format(**places).split(), part.format())
    assert not (places["tmp"] / "new" / "config.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton runs here")
def test_a_backend_that_cannot_run_is_refused(places, fails):
    fails([*places["untrain"].split(), "--backend", "triton"], "'triton'")


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


def test_damaged_files_of_a_run(finished, fails):
    truncate(finished / "wf_model.safetensors")
    fails(["evaluate", finished], "is truncated or not a safetensors file")
    truncate(finished / "config.json")
    fails(["evaluate", finished], "is damaged or no record of a run")


def test_errors_that_are_not_the_users(finished, monkeypatch, capsys, fails):
    def full(*args):
        raise OSError(28, "No space left on device")

    assert main(["untrain", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr("wfnet.evaluation.EvaluationResult.to_json", full)
        fails(["evaluate", finished, "-j", "0"], "the disk is full", "no file was left half")
    monkeypatch.setattr("wfnet.cli.evaluate.evaluate", lambda *args, **kwargs: {}["missing"])
    assert main(["evaluate", str(finished), "-j", "0"]) == 1
    assert "Traceback" in capsys.readouterr().err
