import json
import os

import pytest
import torch
from image_files import pack_folder
from safetensors.torch import load_file

from wfnet import models
from wfnet.cli import inputs, main
from wfnet.services.files import write_tensors

NETWORK = ("--model", "small/resnet", "--model-kwargs", "width=8", "--img-size", "32")


no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton runs here")


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
def test_bad_options(change, parts, arguments, tmp_path, fails):
    folder = tmp_path / "run"
    call = ["untrain", *arguments, "--steps", "2", "--output", folder, "--debug"]
    fails([*call[:-1], *change], *parts)
    assert not (folder / "config.json").exists()  # before work starts


@pytest.mark.parametrize("model", ["test_resnet.r160_in1k", "torchvision/squeezenet1_1"])
def test_networks_of_libraries(model, image_folder, tmp_path, capsys):
    pytest.importorskip("timm")
    pytest.importorskip("torchvision")
    call = ["untrain", "--data-dir", str(image_folder), "--model", model, "--dry-run"]
    assert main([*call, "--output", str(tmp_path / "run")]) == 0
    assert f"network     {model}" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.fixture
def untrain(base, tmp_path, small_pictures, monkeypatch):
    """Untrains three steps and returns the filters."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(data, name, *options):
        call = "--model small/resnet --model-kwargs width=8 --img-size 32 -b 4 -M 2 --steps 3"
        arguments = [*call.split(), "--quiet", "--output", str(tmp_path / name)]
        arguments += ["--data-dir", str(data), "--checkpoint", str(base), *options]
        assert main(["untrain", *arguments]) == 0
        return load_file(tmp_path / name / "wf_model.safetensors")

    return run


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "options",
    [
        ("--cache", "host", "--workers", "0"),
        ("--cache", "device", "--workers", "1"),
        ("--cache", "disk", "--workers", "0"),
    ],
)
def test_caches_change_nothing(untrain, image_folder, options):
    plain = untrain(image_folder, "plain", "--workers", "0")
    assert same(plain, untrain(image_folder, "cached", *options))


def test_shards_change_nothing(untrain, image_folder, tmp_path, capsys):
    plain = untrain(image_folder, "plain", "--workers", "0")
    packed = pack_folder(image_folder, tmp_path / "packed")
    assert same(plain, untrain(packed, "shards", "--workers", "0", "--cache", "disk"))
    assert main(["evaluate", str(tmp_path / "shards"), "--no-figures", "--workers", "0"]) == 0
    assert "bee" in capsys.readouterr().out


@pytest.mark.parametrize(("data", "missing"), [("mnist", "train-images"), ("cifar10", "cifar-10")])
def test_missing_files_are_noticed_before_the_model_is_made(
    data, missing, tmp_path, capsys, monkeypatch, fails
):
    def never(*args, **kwargs):
        raise AssertionError("the model was made")

    monkeypatch.setattr("wfnet.cli.inputs.create_classifier", never)
    config = ["--config", f"{data}/resnet18", "--data-dir", str(tmp_path)]
    fails(["untrain", *config], missing)
    fails(["train", *config, "--output", str(tmp_path / "base")], missing)


RENAMED = {"ant": "asp", "bee": "boa", "cat": "cow"}


@pytest.mark.parametrize(
    "command",
    [
        ["evaluate"],
        ["evaluate", "--tables", "--no-relearn"],
        ["baseline", "--train-epochs", "1"],
        ["bake", "--forget", "1", "--verify"],
        ["trust", "--checks", "removal"],
        ["report"],
    ],
    ids=lambda command: "".join(command[:2]),
)
def test_data_of_other_classes_are_refused_by_name(command, finished, image_folder, fails):
    name, *rest = command
    if name == "report":  # it needs something to report
        assert main(["evaluate", str(finished), "--no-figures", "-j0", "--quiet"]) == 0
    for part in image_folder.iterdir():
        for folder in list(part.iterdir()):
            folder.rename(part / RENAMED[folder.name])
    fails([name, finished, *rest], "other classes than the run", "'asp', 'boa', 'cow'")


def test_untraining_compares_with_the_classes_of_the_weights(image_folder, base, tmp_path, fails):
    config = {"command": "train", "options": {}, "classes": ["ant", "bee", "dog"]}
    (base.parent / "config.json").write_text(json.dumps(config))
    call = ["untrain", "--data-dir", image_folder, "--checkpoint", base, *NETWORK, "--steps", "2"]
    fails([*call, "--output", tmp_path / "run"], "other classes than the classifier", "'cat'")
    config["classes"] = ["cat", "ant", "bee"]
    (base.parent / "config.json").write_text(json.dumps(config))
    quick = ["-b", "2", "-M", "1", "-j0", "--quiet"]
    assert main([*map(str, call), *quick, "--output", str(tmp_path / "run")]) == 0
    run = json.loads((tmp_path / "run" / "config.json").read_text())
    assert run["classes"] == ["cat", "ant", "bee"]  # the order of the network's outputs


def test_evaluation_finds_classes_by_name(finished, image_folder, tmp_path):
    """Shards whose list of classes has another order give the same figures by name."""
    call = ["evaluate", str(finished), "--no-figures", "-j0", "--quiet", "--output"]
    assert main([*call, str(tmp_path / "plain")]) == 0
    packed = pack_folder(image_folder, tmp_path / "packed", order=["cat", "ant", "bee"])
    assert main([*call, str(tmp_path / "shards"), "--data-dir", str(packed)]) == 0
    results = [
        json.loads((tmp_path / name / "evaluation.json").read_text())
        for name in ("plain", "shards")
    ]
    plain, shards = (
        [(r["index"], r["name"], r["acc_f"], r["acc_r"]) for r in result["classes"]]
        for result in results
    )
    assert plain == shards


def test_class_names_that_are_no_utf8_or_look_like_formulas(
    image_folder, arguments, tmp_path, capsys
):
    names = {"ant": b"caf\xe9", "bee": b"=1+1", "cat": b"$x^$"}
    for part in image_folder.iterdir():
        for folder in list(part.iterdir()):
            folder.rename(part / os.fsdecode(names[folder.name]))
    run = tmp_path / "run"
    assert main(["untrain", *arguments, "--steps", "2", "--output", str(run), "--quiet"]) == 0
    assert main(["evaluate", str(run), "--workers", "0", "--quiet"]) == 0
    assert r"caf\xe9" in capsys.readouterr().out
    lines = (run / "evaluation.csv").read_text(encoding="utf-8").splitlines()
    assert [line.split(",")[2] for line in lines[1:4]] == ["$x^$", "'=1+1", r"caf\xe9"]
    for name in (r"caf\xe9", os.fsdecode(b"caf\xe9"), "=1+1"):
        assert main(["bake", str(run), "--forget", name, "--quiet"]) == 0


def test_classes_of_numbered_data_may_be_named_later(mnist_folder, base, tmp_path, fails):
    config = {"command": "train", "options": {}, "classes": [str(k) for k in range(10)]}
    (base.parent / "config.json").write_text(json.dumps(config))
    write_tensors(base, models.create("resnet", 10, 1, seed=1, width=8).state_dict())
    names = list("abcdefghij")
    data = ["--data", "mnist", "--data-dir", str(mnist_folder), "--checkpoint", str(base)]
    call = ["untrain", *data, *NETWORK, "--steps", "2", "-b", "2", "-M", "1", "-j0", "--quiet"]
    run = tmp_path / "run"
    assert main([*call, "--class-names", *names, "--output", str(run)]) == 0
    evaluate = ["evaluate", str(run), "--no-figures", "-j0", "--quiet"]
    assert main([*evaluate, "--classes", "a", "i"]) == 0
    fails([*evaluate, "--class-names", *names[::-1][1:], "socks"], "'socks' is not known there")


def test_a_class_named_twice_counts_once():
    assert inputs.class_indices(["bee", "1", "0"], ["ant", "bee"], 2) == [1, 0]
