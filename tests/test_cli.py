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
from wfnet.cli.classifier import create_classifier, load_weights
from wfnet.services.files import write_tensors
from wfnet.untraining.optimizers import RowAdam

NETWORK = ("--model", "small/resnet", "--model-kwargs", "width=8", "--img-size", "32")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton runs here")
QUICK = ("-b", "4", "-M", "2", "--workers", "0", "--seed", "3", "--device", "cpu")


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch):
    monkeypatch.setattr("wfnet.report.figures.style.DPI", 30)


@pytest.fixture
def base(tmp_path):
    """Weights of a small network for three classes."""
    path = tmp_path / "base.safetensors"
    write_tensors(path, models.create("resnet", 3, 3, seed=1, width=8).state_dict())
    return path


@pytest.fixture
def arguments(image_folder, base):
    """Options of an untraining run without its length and output."""
    return ["--data-dir", str(image_folder), "--checkpoint", str(base), *NETWORK, *QUICK]


@pytest.fixture
def finished(arguments, tmp_path):
    """The folder of a finished run."""
    folder = tmp_path / "run"
    assert main(["untrain", *arguments, "--steps", "3", "--output", str(folder), "--quiet"]) == 0
    return folder


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def fails(capsys, arguments, *parts):
    """The command ends with status 2 and one sentence that has ``parts``."""
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.splitlines()[-1].startswith("wfnet")
    assert len([line for line in error.splitlines() if "error:" in line]) == 1
    error = error.splitlines()[-1]
    for part in parts:
        assert part in error


# -- help -----------------------------------------------------------------------------------------


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


def test_a_wrong_option_ends_with_status_2(capsys):
    with pytest.raises(SystemExit) as end:
        main(["untrain", "--steps", "many"])
    assert end.value.code == 2
    assert "'many' is not a whole number of at least 1" in capsys.readouterr().err


# -- from images to a baked model -----------------------------------------------------------------


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


def test_a_run_can_be_moved(finished, base, tmp_path):
    """What lies inside a run's folder is recorded relative to it."""
    inside = finished / "base.safetensors"
    inside.write_bytes(base.read_bytes())
    run = json.loads((finished / "config.json").read_text())
    run["options"]["checkpoint"] = "base.safetensors"
    (finished / "config.json").write_text(json.dumps(run))
    moved = finished.rename(tmp_path / "moved")
    assert main(["bake", str(moved), "--forget", "0", "--verify"]) == 0


def test_filters_saved_from_python_need_the_options_once(base, tmp_path, image_folder, capsys):
    original = create_classifier(
        "small/resnet", 3, checkpoint=base, in_channels=3, options={"width": 8}
    )
    wfnet.WFNet(original, 3).save_pretrained(tmp_path / "filters")
    fails(capsys, ["bake", tmp_path / "filters", "--forget", "0"], "does not say which network")
    call = ["bake", str(tmp_path / "filters"), "--forget", "0", "2", "--verify", "--images", "3"]
    call += [*NETWORK, "--checkpoint", str(base), "--in-chans", "3"]
    assert main(call) == 0
    assert "verified on 3 random images" in capsys.readouterr().out
    assert (tmp_path / "filters" / "forget_0_2.safetensors").is_file()


def test_onnx(finished, tmp_path, capsys, monkeypatch):
    path = tmp_path / "model.onnx"
    call = ["bake", str(finished), "--forget", "1", "--onnx", str(path)]
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        fails(capsys, call, "--onnx needs onnx and onnxscript: install")
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


@pytest.mark.parametrize("recipe", ["balanced", "paper"])
def test_transformers_and_recipes(recipe, image_folder, tmp_path, capsys):
    pytest.importorskip("timm")
    folder = tmp_path / "vit"
    call = ["untrain", "--data-dir", str(image_folder), "--model", "small/vit", "--steps", "2"]
    call += ["--model-kwargs", "width=32", "depth=1", "--recipe", recipe, "--output", str(folder)]
    assert main([*call, *QUICK]) == 0
    assert "small/vit has random weights" in capsys.readouterr().err
    config = json.loads((folder / "wf_config.json").read_text())
    assert config["normalize_gate"] is (recipe == "balanced")
    assert config["alpha_init"] == (-1.0 if recipe == "balanced" else 3.0)
    assert (
        main(["evaluate", str(folder), "--no-figures", "-j", "0"]) == 0
    )  # random weights come from the seed


@pytest.mark.parametrize("model", ["test_resnet.r160_in1k", "torchvision/squeezenet1_1"])
def test_networks_of_libraries(model, image_folder, tmp_path, capsys):
    pytest.importorskip("timm")
    pytest.importorskip("torchvision")
    call = ["untrain", "--data-dir", str(image_folder), "--model", model, "--dry-run"]
    assert main([*call, "--output", str(tmp_path / "run")]) == 0
    assert f"network     {model}" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


# -- interrupted and resumed ----------------------------------------------------------------------


def test_a_resumed_run_ends_as_an_uninterrupted_one(arguments, tmp_path, monkeypatch, capsys):
    call = ["untrain", *arguments, "--steps", "7", "--checkpoint-every", "2"]
    assert main([*call, "--output", str(tmp_path / "whole")]) == 0
    step, taken = RowAdam.step, []

    def interrupted_step(self, *args, **kwargs):
        taken.append(None)
        if len(taken) == 6:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    parts = str(tmp_path / "parts")
    with monkeypatch.context() as patch:
        patch.setattr(RowAdam, "step", interrupted_step)
        assert main([*call, "--output", parts]) == 130
    assert f"wfnet untrain --resume {parts}" in capsys.readouterr().err
    fails(capsys, [*call, "--output", parts], "--resume goes on with it")
    fails(capsys, [*call, "--output", parts, "--resume", "--lr", "0.17"], "was written with lr")
    assert main(["untrain", "--resume", parts]) == 0  # every option is remembered
    whole, resumed = (load_file(tmp_path / f / "wf_model.safetensors") for f in ("whole", "parts"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert json.loads((tmp_path / "parts" / "config.json").read_text())["result"]["steps"] == 7


def test_a_compiled_run_is_remembered_as_one(arguments, tmp_path, monkeypatch, capsys):
    make, made = torch.compile, []

    def traced(graph, **options):  # generated code is torch's own, and takes long to make
        made.append(graph)
        return make(graph, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", traced)
    folder = str(tmp_path / "run")
    call = ["untrain", *arguments, "--output", folder]
    fails(capsys, [*call, "--steps", "2", "--torchcompile", "--no-fuse"], "--no-fuse")
    assert main([*call, "--steps", "2", "--torchcompile"]) == 0
    remembered = json.loads((tmp_path / "run" / "config.json").read_text())
    assert remembered["untraining"]["fuse"] == "compile"
    assert main(["untrain", "--resume", folder]) == 0  # of a finished run: nothing is made
    assert main(["evaluate", folder, *arguments[:4], "--torchcompile"]) == 0
    assert len(made) == 2


def test_resume_auto_starts_anew_where_there_is_nothing(arguments, tmp_path, capsys):
    folder = tmp_path / "run"
    call = ["untrain", *arguments, "--steps", "2", "--output", str(folder), "--resume", "auto"]
    assert main(call) == 0
    before = (folder / "wf_model.safetensors").read_bytes()
    assert main(call) == 0  # finished: only loaded
    assert (folder / "wf_model.safetensors").read_bytes() == before


def test_force_replaces_a_run(arguments, finished):
    (finished / "evaluation.json").write_text("of the old filters")
    call = ["untrain", *arguments, "--steps", "1", "--output", str(finished), "--force"]
    assert main(call) == 0
    assert not (finished / "evaluation.json").exists()
    assert json.loads((finished / "config.json").read_text())["result"]["steps"] == 1


def test_progress_where_there_is_no_terminal(arguments, tmp_path, capsys):
    call = ["untrain", *arguments, "--steps", "6", "--output", str(tmp_path / "run")]
    assert main([*call, "--checkpoint-every", "1", "--log-interval", "0.001"]) == 0
    shown = capsys.readouterr().err.splitlines()
    lines = [line for line in shown if line.startswith("untraining: ")]
    assert lines
    assert "Acc_r" in lines[-1]
    assert "samples/s" in lines[-1]


def test_interrupted_before_anything_was_saved(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(RowAdam, "step", interrupt)
    assert main(["untrain", *arguments, "--steps", "2", "--output", str(tmp_path / "run")]) == 130
    assert "interrupted; no checkpoint was written yet" in capsys.readouterr().err


# -- options from files ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["yaml", "json"])
def test_options_from_a_file(kind, arguments, tmp_path, capsys):
    content = {"lr": 0.25, "epochs": 1, "label-expansion": 3, "amp": False, "targets": ["conv1"]}
    content["model_kwargs"] = {"width": 8}
    path = tmp_path / f"run.{kind}"
    if kind == "json":
        path.write_text(json.dumps(content))
    else:
        path.write_text(pytest.importorskip("yaml").safe_dump(content))
    folder = tmp_path / "run"
    call = ["untrain", *arguments, "--config", str(path), "--steps", "2", "--output", str(folder)]
    assert main(call) == 0
    options = json.loads((folder / "config.json").read_text())["options"]
    assert options["lr"] == 0.25
    assert options["label_expansion"] == 2  # the command line wins
    assert (options["steps"], options["epochs"]) == (2, None)  # one of the two, the given one
    assert options["targets"] == ["conv1"]
    again = ["untrain", "--config", str(folder / "config.json"), "--output", str(tmp_path / "b")]
    assert main(again) == 0
    first, second = (load_file(f / "wf_model.safetensors") for f in (folder, tmp_path / "b"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ({"learning_rate": 1}, ["no option 'learning_rate'"]),
        ({"label_expansoin": 1}, ["did you mean 'label_expansion'?"]),
        ({"lr": "fast"}, ["lr: 'fast' is not a number"]),
        ({"amp": "yes"}, ["amp must be true or false"]),
        ({"recipe": "secret"}, ["'secret' is not one of balanced, paper"]),
        ({"lr": [1, 2]}, ["lr must be a single value"]),
        ([1, 2], ["must hold options by name"]),
    ],
)
def test_bad_options_in_a_file(content, parts, tmp_path, capsys):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(content))
    fails(capsys, ["untrain", "--config", path], str(path), *parts)


def test_unreadable_option_files(tmp_path, capsys):
    fails(capsys, ["untrain", "--config", tmp_path / "no.yaml"], "no.yaml does not exist")
    (tmp_path / "bad.json").write_text("{")
    fails(capsys, ["untrain", "--config", tmp_path / "bad.json"], "not a readable options file")
    (tmp_path / "config.json").write_text("{}")
    fails(capsys, ["evaluate", tmp_path], "config.json is damaged or no record of a run")
    fails(capsys, ["untrain", "--resume", tmp_path / "nowhere"], "is no run of wfnet")


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (["--model", "resnet81"], ["timm has no model 'resnet81'", "near it are"]),
        (["--model", "tv.resnet81"], ["torchvision has no classifier 'resnet81'"]),
        (["--model", "small/lenet"], ["no small model 'lenet'"]),
        (["--model-kwargs", "size=8"], ["small/resnet does not take {'size': 8}"]),
        (["--num-classes", "10"], ["--num-classes 10 does not match", "3 classes"]),
        (["--in-chans", "1"], ["does not fit this SmallResNet", "--in-chans"]),
        (["--pretrained"], ["one of them"]),
        (["--targets", "conv9"], ["target 'conv9' matches no layer"]),
        (["-b", "5"], ["batch_size must be even"]),
        (["--epochs", "1"], ["steps or as epochs"]),
        (["--device", "abacus"], ["--device abacus cannot be used"]),
        pytest.param(["--backend", "triton"], ["'triton'"], marks=no_gpu),
        (["--data-dir", "/nowhere"], ["image folder /nowhere does not exist"]),
        (["--data", "mnist", "--data-dir", "/nowhere"], ["MNIST"]),
        (["--checkpoint", "/no.pth"], ["the weights /no.pth do not exist"]),
        (["--std", "0.5", "0.5"], ["2 mean or std values"]),
    ],
)
def test_bad_options(change, parts, arguments, tmp_path, capsys):
    folder = tmp_path / "run"
    call = ["untrain", *arguments, "--steps", "2", "--output", folder, "--debug"]
    fails(capsys, [*call[:-1], *change], *parts)
    assert not (folder / "config.json").exists()  # before work starts


def test_missing_options(image_folder, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fails(capsys, ["untrain"], "there are no images: give --data-dir DIR")
    fails(capsys, ["untrain", "--data", "mnist"], "--data mnist needs --data-dir")
    fails(capsys, ["untrain", "--data-dir", image_folder], "there is no network: give --model")
    fails(capsys, ["evaluate"], "name the folder of a run")
    fails(capsys, ["evaluate", tmp_path / "nowhere"], "is not a folder")
    fails(capsys, ["bake", tmp_path, "--forget", "0"], "holds no wfnet checkpoint")


def test_bad_images(arguments, image_folder, tmp_path, capsys):
    call = ["untrain", *arguments, "--steps", "2", "--output", tmp_path / "run"]
    for number in (0, 1, 2):
        truncate(next((image_folder / "train" / "bee").glob(f"{number}.*")))
    assert main([str(argument) for argument in call]) == 0
    shown = capsys.readouterr()
    assert "corrupt image left out" in shown.err
    assert "corrupt images, named above" in shown.out
    fails(capsys, [*call, "--force", "--max-corrupt", "0"], "more than max_corrupt=0")
    (image_folder / "train" / "dog").mkdir()
    fails(capsys, [*call, "--force"], "has weights for 3 classes, not for 4")
    (image_folder / "train" / "dog").rmdir()
    (image_folder / "val" / "dog").mkdir()
    fails(capsys, [*call, "--force"], "dog")


def test_an_output_that_cannot_be_written(arguments, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    call = ["untrain", *arguments, "--steps", "2", "--output", tmp_path / "file" / "run"]
    fails(capsys, call, "the output folder cannot be written to", "choose another --output")


def test_foreign_and_damaged_files(finished, arguments, tmp_path, capsys, image_folder):
    other = tmp_path / "other.safetensors"
    write_tensors(other, models.create("resnet", 3, 3, seed=2, width=8).state_dict())
    fails(capsys, ["evaluate", finished, "--checkpoint", other], "not the one these filters")
    fails(capsys, ["bake", finished, "--forget", "dog"], "no class 'dog'", "ant, bee, cat")
    fails(capsys, ["bake", finished, "--forget", "3"], "0 to 2")
    fails(capsys, ["bake", finished, "--forget", "0", "--output", "x.pt"], ".safetensors")
    fails(capsys, ["evaluate", finished, "--data", "digits"], "digits has 10 classes")
    truncate(finished / "wf_model.safetensors")
    fails(capsys, ["evaluate", finished], "is truncated or not a safetensors file")
    truncate(finished / "config.json")
    fails(capsys, ["evaluate", finished], "is damaged or no record of a run")


def test_debug_shows_the_traceback(capsys):
    assert main(["untrain", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_error_nobody_foresaw_keeps_its_traceback(finished, monkeypatch, capsys):
    monkeypatch.setattr("wfnet.cli.evaluate.evaluate", lambda *args, **kwargs: {}["missing"])
    assert main(["evaluate", str(finished), "-j", "0"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_full_disk(finished, monkeypatch, capsys):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("wfnet.evaluation.EvaluationResult.to_json", full)
    fails(capsys, ["evaluate", finished, "-j", "0"], "the disk is full", "is intact")


# -- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", ["plain", "ema", "prefix", "nested"])
def test_weights_of_training_scripts(wrap, tmp_path):
    state = models.create("vgg", 3, seed=1, width=8).state_dict()
    content = {
        "plain": state,
        "ema": {"state_dict": {k: v + 1 for k, v in state.items()}, "state_dict_ema": state},
        "prefix": {f"module._orig_mod.{k}": v for k, v in state.items()},
        "nested": {"model": state, "epoch": 3, "args": {"lr": 0.1}},
    }[wrap]
    torch.save(content, tmp_path / "weights.pth")
    model = models.create("vgg", 3, seed=2, width=8)
    load_weights(model, tmp_path / "weights.pth")
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


class Opens:
    """Would open a file when unpickled."""

    def __reduce__(self):
        return open, ("created_by_unpickling", "w")


def test_weights_are_never_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Opens()}, "evil.pth")
    with pytest.raises(ValueError, match="it is not unpickled"):
        load_weights(models.create("vgg", 3), "evil.pth")
    assert not (tmp_path / "created_by_unpickling").exists()


def test_weights_that_do_not_fit(tmp_path):
    state = models.create("vgg", 3, width=8).state_dict()
    path = tmp_path / "weights.pth"

    def load(content, num_classes=3):
        torch.save(content, path)
        load_weights(models.create("vgg", num_classes, width=8), path)

    with pytest.raises(ValueError, match="has weights for 3 classes, not for 4"):
        load(state, num_classes=4)
    with pytest.raises(ValueError, match=r"is \[8, 3, 3, 3\] in the file and \[8, 1, 3, 3\]"):
        load(models.create("vgg", 3, 3, width=8).state_dict())
    with pytest.raises(ValueError, match="it lacks"):
        load({k: v for k, v in state.items() if "classifier" not in k})
    with pytest.raises(ValueError, match="unknown to the model, 'more'"):
        load({**state, "more": torch.ones(1)})
    with pytest.raises(ValueError, match="holds no weights by name"):
        load(torch.ones(3))
    torch.save(state, path)
    truncate(path)
    with pytest.raises(ValueError, match="truncated or damaged"):
        load_weights(models.create("vgg", 3, width=8), path)


def test_pretrained_heads_are_not_replaced():
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match="have 1000 classes, not 3"):
        create_classifier("resnet18", 3, pretrained=True)
    with pytest.raises(ValueError, match="have 1000 classes, not 3"):
        create_classifier("torchvision/resnet18", 3, pretrained=True)
    with pytest.raises(ValueError, match="has no pretrained weights"):
        create_classifier("small/resnet", 3, pretrained=True)


def test_every_option_has_help():
    parser = build_parser()
    commands = next(a for a in parser._actions if a.dest == "command")
    for name, command in commands.choices.items():
        silent = [a.option_strings for a in command._actions if not a.help]
        assert not silent or silent == [["--std"]], name
